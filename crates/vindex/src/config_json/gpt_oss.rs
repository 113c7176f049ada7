//! What gpt-oss says beyond other families: sinks, biases, its activation, its stretched rope.

use super::{ConfigJson, unsupported};
use crate::config::{Config, RopeScaling};
use crate::error::Error;

/// `swiglu_limit`; the activation has no other.
const GATE_MAX: f64 = 7.0;

pub(crate) fn numbers(json: &ConfigJson, mut config: Config) -> Result<Config, Error> {
    if let Some(limit) = json.f64("swiglu_limit")?.filter(|limit| *limit != GATE_MAX) {
        return unsupported(format!("swiglu_limit {limit}; {GATE_MAX} is expected"));
    }
    let biased = json.bool("attention_bias")?.unwrap_or(true);
    config.attention.qkv_bias = biased;
    config.attention.output_bias = biased;
    config.attention.sinks = true;
    if let Some(experts) = &mut config.experts {
        experts.router_bias = true;
        experts.bias = true;
    }
    if !json.has("rope_parameters") && !json.has("rope_scaling") {
        // The class of the configuration stretches where the file is silent.
        config.rope.scaling = Some(RopeScaling::Yarn {
            factor: 32.0,
            original_context: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            fractional: true,
        });
    }
    Ok(config)
}
