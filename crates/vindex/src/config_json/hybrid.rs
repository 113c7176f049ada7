//! What Qwen3-Next and Qwen3.5 say beyond other families: which layers are delta nets, and their heads.

use super::{ConfigJson, HEAD_DIM_MAX, invalid, layer_kinds, unsupported};
use crate::config::{Config, DeltaNet, Shared};
use crate::error::Error;

/// Each so many-th layer is of attention where the configuration is silent.
const ATTENTION_INTERVAL: u32 = 4;
/// `shared_expert_intermediate_size` where it is.
const SHARED_EXPERT_FFN: u32 = 512;
/// `mrope_section` where it is.
const ROPE_SECTIONS: [i32; 3] = [11, 11, 10];

/// The numbers of Qwen3.5, whose matrices are apart and whose heads of values are tiled.
pub(crate) fn numbers(json: &ConfigJson, mut config: Config) -> Result<Config, Error> {
    if json.bool("attn_output_gate")? == Some(false) {
        return unsupported("attention without gates (attn_output_gate false)".to_owned());
    }
    config.attention.output_gate = true;
    let count = |key: &str, default: u32| json.count(key, Some(default), HEAD_DIM_MAX);
    let net = DeltaNet {
        layers: recurrent_layers(json, config.n_layers)?,
        n_key_heads: count("linear_num_key_heads", 16)?,
        n_value_heads: count("linear_num_value_heads", 32)?,
        key_length: count("linear_key_head_dim", 128)?,
        value_length: count("linear_value_head_dim", 128)?,
        conv_kernel: count("linear_conv_kernel_dim", 4)?,
        tiled: true,
        fused_ba: false,
    };
    if !net.n_value_heads.is_multiple_of(net.n_key_heads) {
        return Err(invalid(
            "linear_num_key_heads",
            format!(
                "{} does not divide the {} heads of values",
                net.n_key_heads, net.n_value_heads
            ),
        ));
    }
    config.delta_net = Some(net);
    if let Some(experts) = &mut config.experts {
        let key = "shared_expert_intermediate_size";
        experts.shared = Some(Shared {
            ffn: json.count(key, Some(SHARED_EXPERT_FFN), 1 << 28)?,
            gated: true,
        });
    }
    Ok(config)
}

/// The numbers of Qwen3-Next, whose heads of values stay with their head of keys.
pub(crate) fn numbers_of_next(json: &ConfigJson, config: Config) -> Result<Config, Error> {
    let mut config = numbers(json, config)?;
    if let Some(net) = &mut config.delta_net {
        net.tiled = false;
        net.fused_ba = true;
    }
    Ok(config)
}

fn recurrent_layers(json: &ConfigJson, n_layers: u32) -> Result<Vec<bool>, Error> {
    json.count("full_attention_interval", Some(1), u32::MAX)?;
    match json.get("layer_types") {
        Some(types) => layer_kinds(types, n_layers, "linear_attention"),
        None => {
            let each = json.attention_interval();
            Ok((1..=n_layers).map(|n| !n.is_multiple_of(each)).collect())
        }
    }
}

impl ConfigJson {
    /// Each so many-th layer is of attention, where no list of layers says otherwise.
    pub(crate) fn attention_interval(&self) -> u32 {
        // That it is a number was seen when the layers were read.
        let given = self.u32("full_attention_interval").ok().flatten();
        given.unwrap_or(ATTENTION_INTERVAL)
    }

    /// How many of the pairs of a head turn by time, height and width, for images; in a text all turn by its positions.
    /// Four numbers, as GGUF has them.
    pub(crate) fn rope_sections(&self) -> Vec<i32> {
        let (full, _) = self.rope_parameters();
        let given = full.and_then(|p| p.get("mrope_section")?.as_array());
        let number = |n: &serde_json::Value| n.as_u64().and_then(|n| i32::try_from(n).ok());
        let mut sections: Vec<i32> = match given {
            Some(given) => given.iter().map(|n| number(n).unwrap_or(0)).collect(),
            None => ROPE_SECTIONS.to_vec(),
        };
        sections.resize(4, 0);
        sections
    }
}
