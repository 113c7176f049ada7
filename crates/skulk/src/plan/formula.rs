//! How long a decoding step takes: reading weights and cache, and asking over the network. Derived in `docs/plan.md`.
//!
//! ```text
//! step = (head + embedding rows) / B_a
//!      + sum over layers ( (attention + streams * kv) / B_a  +  max over servers ( round trip + wire / link + ffn / B_f ) )
//! ffn  = every + (all - every) * visited
//! ```
//!
//! Invariant: pure; nothing is read, nothing is rounded. It leaves out compute: a step of few rows is bound by what it
//! reads, and a bandwidth that was measured with the kernels themselves has their compute in it.

use engine::KvType;

use super::shape::{LayerShape, Shape};

/// What is asked of a cluster at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Sequences that are decoded together.
    pub n_streams: u64,
    /// Tokens in each one's cache.
    pub context: u64,
    /// How keys and values are remembered.
    pub kv: KvType,
    /// Bytes of a value on the wire.
    pub wire_value_bytes: u64,
}

/// A machine in the formula, in bytes and seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Reads from memory, bytes/s.
    pub bandwidth: f64,
}

/// The way to a weight server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    /// Seconds.
    pub round_trip: f64,
    /// Bytes/s.
    pub bandwidth: f64,
}

/// What a weight server does for one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Who.
    pub speed: Speed,
    /// `None` in the attention node's own process.
    pub wire: Option<Wire>,
    /// Which part of the layer's experts it holds, 0 to 1.
    pub part: f64,
    /// Whether expert 0 is one of them, and with it what every token visits.
    pub has_first: bool,
}

/// Seconds of a step, by what they go into.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Weights of attention, head and embeddings.
    pub attention: f64,
    /// Keys, values and states.
    pub kv: f64,
    /// Feed-forward weights.
    pub ffn: f64,
    /// Waiting for an empty answer.
    pub round_trips: f64,
    /// Rows on the wire.
    pub wire: f64,
}

impl Step {
    /// The whole.
    pub fn total(&self) -> f64 {
        self.attention + self.kv + self.ffn + self.round_trips + self.wire
    }

    /// Which part of it goes into the network.
    pub fn on_the_wire(&self) -> f64 {
        (self.round_trips + self.wire) / self.total()
    }
}

/// How many of `n` experts at least one of `n_rows` rows visits, when each visits `n_used` and all are as likely:
/// `n * (1 - (1 - n_used / n)^n_rows)`.
pub fn distinct_experts(n: u64, n_used: u64, n_rows: u64) -> f64 {
    let n = n as f64;
    n * (1.0 - (1.0 - n_used as f64 / n).powf(n_rows as f64))
}

/// Bytes that one token puts on the wire for all layers: of each its rows there, and one row back for each expert that it
/// visits.
pub fn wire_bytes(shape: &Shape, value_bytes: u64) -> u64 {
    let rows = |layer: &LayerShape| layer.n_rows + layer.n_every + layer.n_chosen;
    shape.hidden * value_bytes * shape.layers.iter().map(rows).sum::<u64>()
}

/// The seconds of one step of `load` on `attention`, with layer `l` answered by `shares(l)`, of which all work at once.
pub fn step(
    shape: &Shape,
    load: Load,
    attention: Speed,
    shares: impl Fn(usize) -> Vec<Share>,
) -> Step {
    let streams = load.n_streams as f64;
    let (n, n_used) = shape.experts;
    let visited = distinct_experts(n, n_used, load.n_streams) / n as f64;
    let row_bytes = (shape.hidden * load.wire_value_bytes) as f64;
    let once = shape.head_bytes as f64 + streams * shape.embedding_row_bytes as f64;
    let mut step = Step {
        attention: once / attention.bandwidth,
        ..Step::default()
    };
    for (l, layer) in shape.layers.iter().enumerate() {
        let kv = layer.kv_values * layer.seen(load.context) * load.kv.value_bytes() as u64;
        // A state is read and written.
        let kv = kv + 2 * layer.state_bytes;
        step.attention += layer.attention_bytes as f64 / attention.bandwidth;
        step.kv += streams * kv as f64 / attention.bandwidth;
        // Whoever holds nothing that a token visits here is not asked.
        let asked = |share: &Share| share.has_first || layer.n_chosen > 0;
        let times = shares(l).into_iter().filter(asked).map(|share| {
            let first = if share.has_first { 1.0 } else { 0.0 };
            let (every, all) = (layer.every_bytes as f64, layer.ffn_bytes as f64);
            let read = every * first + (all - every) * visited * share.part;
            let ffn = read / share.speed.bandwidth;
            // The visits are divided among those who hold experts, the rows go to each; what enters a dense branch beside
            // experts goes to the first alone.
            let wire = share.wire.map_or((0.0, 0.0), |wire| {
                let there = 1.0 + first * (layer.n_rows - 1) as f64;
                let back = layer.n_chosen as f64 * share.part + layer.n_every as f64 * first;
                let wire_bytes = row_bytes * (there + back);
                (wire.round_trip, streams * wire_bytes / wire.bandwidth)
            });
            (ffn, wire.0, wire.1)
        });
        let slowest = times.max_by(|a, b| (a.0 + a.1 + a.2).total_cmp(&(b.0 + b.1 + b.2)));
        let (ffn, round_trip, wire) = slowest.unwrap_or_default();
        step.ffn += ffn;
        step.round_trips += round_trip;
        step.wire += wire;
    }
    step
}

/// Tokens/s of one stream on one machine that reads `bandwidth` bytes/s, with feed-forward in another process of it at
/// `round_trip` seconds when there is one.
pub fn predict(shape: &Shape, load: Load, bandwidth: f64, round_trip: Option<f64>) -> f64 {
    let share = Share {
        speed: Speed { bandwidth },
        // Rows in memory travel as fast as memory is read.
        wire: round_trip.map(|round_trip| Wire {
            round_trip,
            bandwidth,
        }),
        part: 1.0,
        has_first: true,
    };
    let step = step(shape, load, Speed { bandwidth }, |_| vec![share]);
    load.n_streams as f64 / step.total()
}

#[cfg(test)]
mod tests {
    use super::super::shape::CacheShape;
    use super::*;

    fn shape(experts: (u64, u64)) -> Shape {
        let is_dense = experts.0 == 1;
        let layer = LayerShape {
            attention_bytes: 1_000_000,
            ffn_bytes: 4_000_000,
            every_bytes: if is_dense { 4_000_000 } else { 0 },
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
            embedding_row_bytes: 0,
            experts,
            context: 4096,
            layers: vec![
                layer,
                LayerShape {
                    window: Some(10),
                    ..layer
                },
            ],
            cache: [CacheShape {
                page_bytes: 0,
                fixed_bytes: 0,
            }; 2],
        }
    }

    const LOAD: Load = Load {
        n_streams: 1,
        context: 100,
        kv: KvType::F16,
        wire_value_bytes: 4,
    };

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn one_machine_reads_everything_once() {
        // Head 2 MB, two layers of 5 MB, cache (100 + 10) tokens of 2 kB: 12.22 MB at 1 GB/s.
        near(predict(&shape((1, 1)), LOAD, 1e9, None), 1.0 / 0.012_22);
    }

    #[test]
    fn a_round_trip_for_each_layer() {
        let alone = 1.0 / predict(&shape((1, 1)), LOAD, 1e9, None);
        let split = 1.0 / predict(&shape((1, 1)), LOAD, 1e9, Some(50e-6));
        // Two layers: 50 microseconds and 8 kB at 1 GB/s each.
        near(split - alone, 2.0 * (50e-6 + 8e-6));
    }

    #[test]
    fn only_visited_experts_are_read() {
        near(distinct_experts(8, 2, 1), 2.0);
        near(distinct_experts(8, 8, 3), 8.0);
        near(distinct_experts(1, 1, 5), 1.0);
        assert!(distinct_experts(128, 8, 64) < 128.0);
        let dense = step(&shape((1, 1)), LOAD, Speed { bandwidth: 1e9 }, whole);
        let routed = step(&shape((8, 2)), LOAD, Speed { bandwidth: 1e9 }, whole);
        near(routed.ffn * 4.0, dense.ffn);
    }

    fn whole(_: usize) -> Vec<Share> {
        vec![Share {
            speed: Speed { bandwidth: 1e9 },
            wire: None,
            part: 1.0,
            has_first: true,
        }]
    }

    #[test]
    fn what_every_token_visits_is_read_once_by_whoever_has_the_first_expert() {
        let mut shape = shape((8, 2));
        for layer in &mut shape.layers {
            (layer.every_bytes, layer.n_every) = (1_000_000, 1);
        }
        let all = step(&shape, LOAD, Speed { bandwidth: 1e9 }, whole);
        // Two layers of 1 MB for every token and a quarter of 3 MB.
        near(all.ffn, 2.0 * 1.75e-3);
        let half = |has_first| Share {
            part: 0.5,
            has_first,
            ..whole(0)[0]
        };
        let of = |has_first| {
            let share = half(has_first);
            step(&shape, LOAD, Speed { bandwidth: 1e9 }, |_| vec![share])
        };
        near(of(true).ffn, 2.0 * 1.375e-3);
        near(of(false).ffn, 2.0 * 0.375e-3);
        // A row there, two of chosen experts and one of what is beside them back.
        assert_eq!(wire_bytes(&shape, 4), 2 * 1000 * 4 * 4);
        shape.layers[0].n_chosen = 0;
        shape.layers[0].every_bytes = shape.layers[0].ffn_bytes;
        let dense = step(&shape, LOAD, Speed { bandwidth: 1e9 }, |_| {
            vec![half(false), half(true)]
        });
        near(dense.ffn, 4e-3 + 1.375e-3);
    }

    #[test]
    fn servers_of_one_layer_work_at_once() {
        let half = Share {
            speed: Speed { bandwidth: 1e9 },
            wire: Some(Wire {
                round_trip: 1e-6,
                bandwidth: 1e9,
            }),
            part: 0.5,
            has_first: true,
        };
        let slow = Share {
            speed: Speed { bandwidth: 5e8 },
            ..half
        };
        let both = step(&shape((8, 2)), LOAD, Speed { bandwidth: 1e9 }, |_| {
            vec![half, slow]
        });
        let one = step(&shape((8, 2)), LOAD, Speed { bandwidth: 1e9 }, |_| {
            vec![slow]
        });
        assert_eq!(both, one);
        near(
            both.on_the_wire() * both.total(),
            both.round_trips + both.wire,
        );
    }
}
