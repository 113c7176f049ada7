//! What Gemma 4 says beyond other families: two sizes of heads, layers that use the keys and values of others, per-layer
//! embeddings, experts beside a dense layer.

use super::{ConfigJson, EXPERTS_MAX, HEAD_DIM_MAX, invalid, unsupported};
use crate::config::{Config, Experts, Gating, Heads, LayerEmbeddings, RopeScaling};
use crate::error::Error;

/// `global_head_dim` where the configuration is silent.
const GLOBAL_HEAD_DIM: u32 = 512;

pub(crate) fn numbers(json: &ConfigJson, mut config: Config) -> Result<Config, Error> {
    if json.get("per_layer_config").is_some() {
        return unsupported("sizes of heads for each layer (per_layer_config)".to_owned());
    }
    let a = &mut config.attention;
    let sliding = Heads {
        n_kv_heads: a.n_kv_heads,
        key_length: a.key_length,
        value_length: a.value_length,
    };
    a.key_length = json.count("global_head_dim", Some(GLOBAL_HEAD_DIM), HEAD_DIM_MAX)?;
    a.value_length = a.key_length;
    if !a.key_length.is_multiple_of(2) {
        let reason = format!("{} is odd; rope needs pairs", a.key_length);
        return Err(invalid("global_head_dim", reason));
    }
    a.keys_are_values = json.bool("attention_k_eq_v")?.unwrap_or(false);
    if a.keys_are_values {
        a.n_kv_heads = json.count("num_global_key_value_heads", Some(a.n_kv_heads), 1 << 16)?;
        if !a.n_heads.is_multiple_of(a.n_kv_heads) {
            let reason = format!(
                "{} does not divide the {} query heads",
                a.n_kv_heads, a.n_heads
            );
            return Err(invalid("num_global_key_value_heads", reason));
        }
    }
    a.value_norm = true;
    // Queries and keys are normed, and scores are taken as they are.
    a.scale = 1.0;
    if let Some(window) = &mut a.sliding_window {
        // The class takes the last layer for one of full attention, whatever the list says.
        if window.layers.last() == Some(&true) {
            return unsupported("a last layer with a sliding window".to_owned());
        }
        window.heads = Some(sliding);
    }
    if config.rope.scaling != Some(RopeScaling::FrequencyFactors) {
        return unsupported("full attention whose rope is not of the proportional kind".to_owned());
    }
    config.rope.n_dims = a.key_length;
    config.rope.n_dims_sliding = Some(sliding.key_length);

    a.n_shared_kv_layers = json.u32("num_kv_shared_layers")?.unwrap_or(0);
    if a.n_shared_kv_layers >= config.n_layers {
        let reason = format!("all {} layers would use those of others", config.n_layers);
        return Err(invalid("num_kv_shared_layers", reason));
    }
    let n_own = config.n_layers - a.n_shared_kv_layers;
    if json.bool("use_double_wide_mlp")?.unwrap_or(false) {
        let wide = config.ffn.checked_mul(2);
        let wide = wide.ok_or_else(|| invalid("intermediate_size", "twice that is too wide"))?;
        config.ffn_layers = (0..config.n_layers)
            .map(|l| if l < n_own { config.ffn } else { wide })
            .collect();
    }
    if let Some(l) = (n_own..config.n_layers).find(|&l| config.kv_layer(l).is_none()) {
        let reason = format!("layer {l} has no layer of its kind before it to share with");
        return Err(invalid("num_kv_shared_layers", reason));
    }
    config.layer_scale = true;
    config.layer_embeddings = layer_embeddings(json, &config)?;
    if json.bool("enable_moe_block")?.unwrap_or(false) {
        let n = json.count("num_experts", None, EXPERTS_MAX)?;
        let key = "expert_intermediate_size";
        let key = if json.get(key).is_some() {
            key
        } else {
            "moe_intermediate_size"
        };
        config.experts = Some(Experts {
            n_used: json.count("top_k_experts", None, n)?,
            ffn: json.count(key, None, 1 << 28)?,
            normalise: true,
            dense_branch: true,
            ..Experts::new(n, Gating::Softmax)
        });
    }
    Ok(config)
}

fn layer_embeddings(json: &ConfigJson, config: &Config) -> Result<Option<LayerEmbeddings>, Error> {
    let width = json.u32("hidden_size_per_layer_input")?;
    // The class of the configuration has per-layer embeddings unless told otherwise; null and 0 tell so.
    let silent = !json.is_null("hidden_size_per_layer_input");
    let width = match width {
        None if silent => 256,
        other => other.unwrap_or(0),
    };
    if width == 0 {
        return Ok(None);
    }
    if u64::from(width) * u64::from(config.n_layers) > 1 << 28 {
        return Err(invalid(
            "hidden_size_per_layer_input",
            format!("{width} for each layer is too wide"),
        ));
    }
    let rows = json.u32("vocab_size_per_layer_input")?.unwrap_or(262_144);
    if rows != config.vocab {
        return unsupported(format!(
            "per-layer embeddings of {rows} tokens where the vocabulary has {}",
            config.vocab
        ));
    }
    Ok(Some(LayerEmbeddings { width }))
}
