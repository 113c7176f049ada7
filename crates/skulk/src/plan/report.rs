//! A plan told: as a table for people, as one object for programs.
//!
//! Invariant: both tell the same numbers; nothing is computed here but percentages.

use serde_json::{Value, json};
use terminal::size;

use super::formula::{Load, distinct_experts, wire_bytes};
use super::place::{Holds, Place, Plan};
use super::shape::Shape;

/// For people.
pub(super) fn text(shape: &Shape, load: Load, plan: &Plan) -> String {
    let (n, n_used) = shape.experts;
    let mut lines = vec![
        format!(
            "model     {}: {} layers, {} of attention and embeddings, {} of feed-forward weights",
            shape.name,
            shape.layers.len(),
            size(shape.attention_bytes()),
            size(shape.ffn_bytes())
        ),
        format!(
            "load      {} with {} tokens each in a cache of {} bytes a value, {} bytes a value on the wire",
            counted(load.n_streams, "stream"),
            load.context,
            load.kv.value_bytes(),
            load.wire_value_bytes
        ),
    ];
    if n > 1 {
        let visited = distinct_experts(n, n_used, load.n_streams);
        lines.push(format!(
            "experts   a token visits {n_used} of {n}; a step of all streams about {visited:.1}"
        ));
    }
    let row = |cells: [String; 6]| {
        let [node, holds, weights, cache, memory, reads] = cells;
        let line =
            format!("{node:<16} {holds:<22} {weights:>10} {cache:>10} {memory:>10} {reads:>12}");
        line.trim_end().to_owned()
    };
    lines.push(String::new());
    lines.push(row([
        "node", "holds", "weights", "cache", "memory", "reads",
    ]
    .map(str::to_owned)));
    for place in &plan.places {
        lines.push(row([
            place.node.clone(),
            holds(&place.holds),
            size(place.weight_bytes).to_string(),
            if place.kv_bytes > 0 {
                size(place.kv_bytes).to_string()
            } else {
                "-".to_owned()
            },
            size(place.memory_bytes).to_string(),
            format!("{} GB/s", place.bandwidth_gb_s),
        ]));
    }
    let step = plan.step;
    let percent = |part: f64| format!("{:.0} %", 100.0 * part / step.total());
    lines.push(String::new());
    lines.push(format!(
        "tokens/s  {:.1} ({:.1} a stream, {:.3} ms a step)",
        plan.tokens_per_second,
        plan.tokens_per_second / load.n_streams as f64,
        step.total() * 1e3
    ));
    lines.push(format!(
        "time      attention {}, cache {}, feed-forward {}, round trips {}, rows on the wire {}",
        percent(step.attention),
        percent(step.kv),
        percent(step.ffn),
        percent(step.round_trips),
        percent(step.wire)
    ));
    lines.push(format!(
        "cost      {:.2} for a million tokens",
        plan.cost_per_million
    ));
    if !plan.problems.is_empty() {
        lines.push(String::new());
    }
    for problem in &plan.problems {
        lines.push(format!("does not fit: {problem}"));
    }
    lines.join("\n")
}

/// For programs.
pub(super) fn json(shape: &Shape, load: Load, plan: &Plan) -> Value {
    let node = |place: &Place| {
        json!({
            "name": place.node, "holds": holds(&place.holds), "weight_bytes": place.weight_bytes,
            "kv_bytes": place.kv_bytes, "memory_bytes": place.memory_bytes, "on_gpu": place.on_gpu,
            "bandwidth_gb_s": place.bandwidth_gb_s, "price_per_hour": place.price_per_hour,
        })
    };
    let step = plan.step;
    json!({
        "model": shape.name, "n_streams": load.n_streams, "context": load.context,
        "attention_bytes": shape.attention_bytes(), "ffn_bytes": shape.ffn_bytes(),
        "wire_bytes_per_token": wire_bytes(shape, load.wire_value_bytes),
        "tokens_per_second": plan.tokens_per_second, "step_s": step.total(),
        "step": {"attention_s": step.attention, "kv_s": step.kv, "ffn_s": step.ffn,
            "round_trips_s": step.round_trips, "wire_s": step.wire},
        "on_the_wire": step.on_the_wire(), "cost_per_million_tokens": plan.cost_per_million,
        "nodes": plan.places.iter().map(node).collect::<Vec<_>>(),
        "fits": plan.problems.is_empty(), "problems": plan.problems,
    })
}

fn holds(holds: &Holds) -> String {
    match holds {
        Holds::Everything => "everything".to_owned(),
        Holds::Attention => "attention and cache".to_owned(),
        Holds::Layers(layers) => format!("layers {}..{}", layers.start, layers.end),
        Holds::Experts(experts) => format!("experts {}..{}", experts.start, experts.end),
        Holds::Nothing => "nothing".to_owned(),
    }
}

fn counted(n: u64, what: &str) -> String {
    if n == 1 {
        format!("{n} {what}")
    } else {
        format!("{n} {what}s")
    }
}
