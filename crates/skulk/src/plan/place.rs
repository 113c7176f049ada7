//! Which machine holds what: attention and its cache on one, feed-forward weights filled into the others.
//!
//! Invariant: whatever has no room is said in `problems` and still has a place in the prediction, so that a plan always
//! tells how fast it would be.

use std::ops::Range;

use engine::PAGE;

use super::formula::{Load, Share, Speed, Step, Wire, step};
use super::nodes::{Link, Node, Nodes, Split};
use super::shape::Shape;

/// A plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One a machine, the attention node first.
    pub places: Vec<Place>,
    /// Seconds of a step.
    pub step: Step,
    /// All streams together.
    pub tokens_per_second: f64,
    /// For a million generated tokens, in the currency of the prices.
    pub cost_per_million: f64,
    /// What does not fit, and what would.
    pub problems: Vec<String>,
}

/// What a machine holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The machine.
    pub node: String,
    /// In words.
    pub holds: Holds,
    /// Weights.
    pub weight_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Of the store that is used: the GPU's memory or the machine's.
    pub memory_bytes: u64,
    /// That store is the GPU's.
    pub on_gpu: bool,
    /// What it reads, GB/s.
    pub bandwidth_gb_s: f64,
    /// What it costs.
    pub price_per_hour: f64,
}

/// What of a model a machine holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Everything.
    Everything,
    /// Embeddings, head, attention, cache.
    Attention,
    /// Feed-forward weights of these layers.
    Layers(Range<usize>),
    /// These experts of every layer.
    Experts(Range<u64>),
    /// There was nothing left for it.
    Nothing,
}

/// Plans `shape` under `load` on `nodes`.
///
/// # Errors
/// When experts are to be divided and there are none.
pub fn place(shape: &Shape, load: Load, nodes: &Nodes) -> Result<Plan, String> {
    let Some(attention) = nodes.attention() else {
        return Err("no node has the role attention".to_owned());
    };
    let servers: Vec<&Node> = nodes.servers().collect();
    if nodes.split == Split::Experts && shape.experts.0 == 1 {
        return Err("split: experts needs a model that has some; leave it out".to_owned());
    }
    let kv_bytes = load.n_streams * shape.kv_bytes(load.context, load.kv);
    let own_ffn_bytes = if servers.is_empty() {
        shape.ffn_bytes()
    } else {
        0
    };
    let weight_bytes = shape.attention_bytes() + own_ffn_bytes;
    let mut places = vec![stored(
        attention,
        if servers.is_empty() {
            Holds::Everything
        } else {
            Holds::Attention
        },
        weight_bytes,
        kv_bytes,
    )];
    let mut problems = Vec::new();
    problems.extend(too_small(shape, load, &places[0]));
    let (mut held, missing_bytes) = match nodes.split {
        Split::Layers => by_layers(shape, &servers),
        Split::Experts => by_experts(shape, &servers),
    };
    if missing_bytes > 0 && !servers.is_empty() {
        problems.push(format!(
            "{} of the feed-forward weights have no place: add a weight server with that much memory, give the ones \
             there are more, or take a smaller recipe",
            terminal::size(missing_bytes)
        ));
    }
    places.append(&mut held);

    let speed = |place: &Place| Speed {
        bandwidth: place.bandwidth_gb_s * 1e9,
    };
    let shares = |layer: usize| {
        if servers.is_empty() {
            return vec![Share {
                speed: speed(&places[0]),
                wire: None,
                part: 1.0,
                has_first: true,
            }];
        }
        let share = |(place, node): (&Place, &&Node)| {
            let (part, has_first) = match &place.holds {
                Holds::Layers(layers) if layers.contains(&layer) => (1.0, true),
                Holds::Experts(experts) if !experts.is_empty() => (
                    (experts.end - experts.start) as f64 / shape.experts.0 as f64,
                    experts.start == 0,
                ),
                _ => return None,
            };
            Some(Share {
                speed: speed(place),
                wire: node.link.map(wire),
                part,
                has_first,
            })
        };
        let shares: Vec<Share> = places[1..].iter().zip(&servers).filter_map(share).collect();
        if !shares.is_empty() {
            return shares;
        }
        // What has no place is predicted as if the first server had it.
        let first = places[1..].iter().zip(&servers).take(1);
        first
            .map(|(place, node)| Share {
                speed: speed(place),
                wire: node.link.map(wire),
                part: 1.0,
                has_first: true,
            })
            .collect()
    };
    let step = step(shape, load, speed(&places[0]), shares);
    let tokens_per_second = load.n_streams as f64 / step.total();
    let price: f64 = nodes.nodes.iter().map(|node| node.price_per_hour).sum();
    Ok(Plan {
        places,
        step,
        tokens_per_second,
        cost_per_million: price / 3600.0 / tokens_per_second * 1e6,
        problems,
    })
}

fn wire(link: Link) -> Wire {
    Wire {
        round_trip: link.round_trip_us * 1e-6,
        bandwidth: link.bandwidth_gbit_s * 1e9 / 8.0,
    }
}

/// The machine with its GPU where all of it fits there, else with its memory.
fn stored(node: &Node, holds: Holds, weight_bytes: u64, kv_bytes: u64) -> Place {
    let gpu = node
        .gpu
        .filter(|gpu| weight_bytes + kv_bytes <= gpu.memory_bytes.0);
    let (memory_bytes, bandwidth_gb_s) = match gpu {
        Some(gpu) => (gpu.memory_bytes.0, gpu.bandwidth_gb_s),
        None => (node.memory_bytes.0, node.bandwidth_gb_s),
    };
    Place {
        node: node.name.clone(),
        holds,
        weight_bytes,
        kv_bytes,
        memory_bytes,
        on_gpu: gpu.is_some(),
        bandwidth_gb_s,
        price_per_hour: node.price_per_hour,
    }
}

/// Says when the attention node is too small, and what would fit.
fn too_small(shape: &Shape, load: Load, place: &Place) -> Option<String> {
    let need = place.weight_bytes + place.kv_bytes;
    if need <= place.memory_bytes {
        return None;
    }
    let name = &place.node;
    let more = terminal::size(need - place.memory_bytes);
    if place.weight_bytes > place.memory_bytes {
        let what = match place.holds {
            Holds::Everything => "move the feed-forward weights to a weight server",
            _ => "take a machine with more memory or a smaller recipe",
        };
        return Some(format!(
            "{name} needs {more} more for the weights alone: {what}"
        ));
    }
    let room = place.memory_bytes - place.weight_bytes;
    let fits = |n_tokens: u64| load.n_streams * shape.kv_bytes(n_tokens, load.kv) <= room;
    // The largest context whose cache fits, by halving, in whole pages.
    let (mut low, mut high) = (0, load.context);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle
        } else {
            high = middle
        }
    }
    let low = low / PAGE as u64 * PAGE as u64;
    Some(format!(
        "{name} needs {more} more for the cache: a context of {low} tokens fits, or fewer streams"
    ))
}

/// How much a machine can hold: in its GPU, or in the larger of both.
fn capacity(node: &Node, gpu_only: bool) -> u64 {
    match node.gpu {
        Some(gpu) if gpu_only => gpu.memory_bytes.0,
        Some(gpu) => gpu.memory_bytes.0.max(node.memory_bytes.0),
        None => node.memory_bytes.0,
    }
}

fn fastest(node: &Node) -> f64 {
    node.gpu.map_or(node.bandwidth_gb_s, |gpu| {
        gpu.bandwidth_gb_s.max(node.bandwidth_gb_s)
    })
}

/// GPUs alone where everything fits into them, else whatever there is.
fn gpu_only(shape: &Shape, servers: &[&Node]) -> bool {
    let fast: u64 = servers.iter().map(|node| capacity(node, true)).sum();
    fast >= shape.ffn_bytes()
}

/// Whole layers in order, the fastest machine filled first; and the bytes that found no place.
fn by_layers(shape: &Shape, servers: &[&Node]) -> (Vec<Place>, u64) {
    let gpu_only = gpu_only(shape, servers);
    let mut order: Vec<usize> = (0..servers.len()).collect();
    order.sort_by(|&a, &b| fastest(servers[b]).total_cmp(&fastest(servers[a])));
    let mut layer = 0;
    let mut taken = vec![(0..0, 0); servers.len()];
    for i in order {
        let (begin, mut bytes) = (layer, 0);
        while let Some(next) = shape.layers.get(layer)
            && bytes + next.ffn_bytes <= capacity(servers[i], gpu_only)
        {
            bytes += next.ffn_bytes;
            layer += 1;
        }
        taken[i] = (begin..layer, bytes);
    }
    let missing = shape.layers[layer..]
        .iter()
        .map(|layer| layer.ffn_bytes)
        .sum();
    let place = |(node, (layers, bytes)): (&&Node, (Range<usize>, u64))| {
        let holds = if layers.is_empty() {
            Holds::Nothing
        } else {
            Holds::Layers(layers)
        };
        stored(node, holds, bytes, 0)
    };
    (servers.iter().zip(taken).map(place).collect(), missing)
}

/// Experts in order, as many for each machine as its speed is part of all speed and its memory takes. The first has what
/// every token visits, too.
fn by_experts(shape: &Shape, servers: &[&Node]) -> (Vec<Place>, u64) {
    let n = shape.experts.0;
    let every_bytes = shape.every_bytes();
    let expert_bytes = ((shape.ffn_bytes() - every_bytes) / n).max(1);
    let gpu_only = gpu_only(shape, servers);
    let mut room: Vec<u64> = servers
        .iter()
        .map(|node| capacity(node, gpu_only) / expert_bytes)
        .collect();
    // Whoever holds expert 0: the first that has room for it.
    let of_first = every_bytes.div_ceil(expert_bytes);
    let first = room.iter().position(|&room| room > of_first);
    for (i, room) in room.iter_mut().enumerate() {
        match first {
            Some(first) if i > first => {}
            Some(first) if i == first => *room -= of_first,
            _ => *room = 0,
        }
    }
    let speed: f64 = servers.iter().map(|node| fastest(node)).sum();
    let fair = |i: usize| (n as f64 * fastest(servers[i]) / speed) as u64;
    let mut counts: Vec<u64> = (0..servers.len()).map(|i| fair(i).min(room[i])).collect();
    let mut left = n - counts.iter().sum::<u64>().min(n);
    // The rest goes one by one to whoever would have the least to read for its speed.
    while left > 0 {
        let load = |i: usize| (counts[i] + 1) as f64 / fastest(servers[i]);
        let open = (0..servers.len()).filter(|&i| counts[i] < room[i]);
        let Some(i) = open.min_by(|&a, &b| load(a).total_cmp(&load(b))) else {
            break;
        };
        counts[i] += 1;
        left -= 1;
    }
    let mut begin = 0;
    let place = |(node, count): (&&Node, u64)| {
        let experts = begin..begin + count;
        begin += count;
        let own = match experts.start {
            0 if count > 0 => every_bytes,
            _ => 0,
        };
        let holds = if count == 0 {
            Holds::Nothing
        } else {
            Holds::Experts(experts)
        };
        stored(node, holds, count * expert_bytes + own, 0)
    };
    let missing_bytes = left * expert_bytes + first.map_or(every_bytes, |_| 0);
    let places = servers.iter().zip(counts).map(place).collect();
    (places, missing_bytes)
}

#[cfg(test)]
mod tests {
    use engine::KvType;

    use super::super::shape::{CacheShape, LayerShape};
    use super::*;

    fn shape(experts: (u64, u64)) -> Shape {
        let is_dense = experts.0 == 1;
        let layer = LayerShape {
            attention_bytes: 1_000_000,
            ffn_bytes: 8_000_000,
            every_bytes: if is_dense { 8_000_000 } else { 0 },
            n_rows: 1,
            n_every: u64::from(is_dense),
            n_chosen: if is_dense { 0 } else { experts.1 },
            kv_values: 1000,
            state_bytes: 0,
            window: None,
        };
        Shape {
            name: "m".to_owned(),
            hidden: 1000,
            head_bytes: 2_000_000,
            embeddings_bytes: 2_000_000,
            embedding_row_bytes: 2000,
            experts,
            context: 4096,
            layers: vec![layer; 4],
            cache: [CacheShape {
                page_bytes: 64 * 8000,
                fixed_bytes: 0,
            }; 2],
        }
    }

    const LOAD: Load = Load {
        n_streams: 1,
        context: 1000,
        kv: KvType::F16,
        wire_value_bytes: 4,
    };

    fn plan(experts: (u64, u64), yaml: &str) -> Plan {
        let nodes = Nodes::parse(yaml).expect("valid nodes");
        place(&shape(experts), LOAD, &nodes).expect("a plan")
    }

    const DESK: &str =
        "nodes:\n- {name: desk, role: attention, memory: 20MB, bandwidth: 10, price_per_hour: 1}\n";

    fn server(name: &str, memory: &str, bandwidth: u32) -> String {
        format!(
            "- {{name: {name}, role: ffn, memory: {memory}, bandwidth: {bandwidth}, link: {{round_trip_us: 50, bandwidth: 10}}}}\n"
        )
    }

    #[test]
    fn the_fastest_server_is_filled_first() {
        let plan = plan(
            (1, 1),
            &format!(
                "{DESK}{}{}",
                server("slow", "1GB", 10),
                server("fast", "17MB", 20)
            ),
        );
        assert_eq!(plan.problems, Vec::<String>::new());
        assert_eq!(plan.places[1].holds, Holds::Layers(2..4));
        assert_eq!(plan.places[2].holds, Holds::Layers(0..2));
        // 6 MB attention and head, 8 MB cache at 10 GB/s, then layers at 10 and 20 GB/s, then the wire.
        let read = 6_002_000.0 / 10e9 + 8e6 / 10e9 + 16e6 / 10e9 + 16e6 / 20e9;
        let wire = 4.0 * (50e-6 + 8000.0 / 1.25e9);
        assert!(
            (plan.step.total() - read - wire).abs() < 1e-12,
            "{}",
            plan.step.total()
        );
        let cost = 1.0 / 3600.0 * plan.step.total() * 1e6;
        assert!((plan.cost_per_million - cost).abs() < 1e-9);
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let alone = plan((1, 1), DESK);
        assert!(
            alone.problems[0].contains("move the feed-forward"),
            "{:?}",
            alone.problems
        );
        let small = plan(
            (1, 1),
            &format!(
                "{}{}",
                DESK.replace("20MB", "10MB"),
                server("a", "24MB", 10)
            ),
        );
        assert!(
            small.problems[0].contains("a context of 448 tokens fits"),
            "{:?}",
            small.problems
        );
        assert!(
            small.problems[1].starts_with("8.00 MB of the feed-forward"),
            "{:?}",
            small.problems
        );
        assert!(small.tokens_per_second > 0.0);
    }

    #[test]
    fn experts_are_divided_by_speed_and_memory() {
        let yaml = format!(
            "split: experts\n{DESK}{}{}",
            server("a", "1GB", 10),
            server("b", "1GB", 30)
        );
        let fair = plan((8, 2), &yaml);
        assert_eq!(fair.places[1].holds, Holds::Experts(0..2));
        assert_eq!(fair.places[2].holds, Holds::Experts(2..8));
        let tight = plan(
            (8, 2),
            &yaml.replace(
                "name: b, role: ffn, memory: 1GB",
                "name: b, role: ffn, memory: 16MB",
            ),
        );
        assert_eq!(tight.places[2].holds, Holds::Experts(4..8));
        assert_eq!(tight.problems, Vec::<String>::new());
        let nodes = Nodes::parse(&yaml).expect("valid");
        assert!(place(&shape((1, 1)), LOAD, &nodes).is_err());
    }

    #[test]
    fn a_gpu_is_used_where_all_of_it_fits() {
        let gpu = DESK.replace(
            "bandwidth: 10,",
            "bandwidth: 10, gpu: {memory: 16MB, bandwidth: 900},",
        );
        let with = plan((1, 1), &format!("{gpu}{}", server("a", "1GB", 10)));
        assert!(with.places[0].on_gpu);
        assert_eq!(with.places[0].bandwidth_gb_s, 900.0);
        let small = plan(
            (1, 1),
            &format!("{}{}", gpu.replace("16MB", "2MB"), server("a", "1GB", 10)),
        );
        assert!(!small.places[0].on_gpu);
    }
}
