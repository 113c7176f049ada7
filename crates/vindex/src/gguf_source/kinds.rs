//! What the metadata of newer architectures says beyond that of all: delta nets and gates, two sizes of heads, per-layer
//! embeddings, sinks, compressed keys. Invariant: as in `config.rs`, absent keys have llama.cpp's defaults.

use super::files::Model;
use super::keys::Keys;
use crate::config::{
    Config, DeltaNet, Groups, Heads, Latent, LayerEmbeddings, RopeScaling, Shared,
};
use crate::error::Error;

/// Each so many-th layer is of attention where no list says which.
const ATTENTION_INTERVAL: u32 = 4;

/// Qwen3.5 and Qwen3-Next: layers that are delta nets or attention with gates.
pub(super) fn hybrid(keys: &Keys<'_>, model: &Model, mut config: Config) -> Result<Config, Error> {
    let is_next = keys.architecture() == "qwen3next";
    let n_blocks = config.n_layers + config.n_nextn;
    let each = keys.each("attention.recurrent_layers", n_blocks)?;
    let interval = keys.u32("full_attention_interval")?;
    let interval = interval.filter(|n| *n > 0).unwrap_or(ATTENTION_INTERVAL);
    let layers = match each {
        Some(each) => each
            .iter()
            .take(config.n_layers as usize)
            .map(|n| *n != 0)
            .collect(),
        None => (1..=config.n_layers)
            .map(|n| !n.is_multiple_of(interval))
            .collect(),
    };
    let n_value_heads = keys.count("ssm.time_step_rank", 1 << 16)?;
    let n_key_heads = keys.count("ssm.group_count", 1 << 16)?;
    let inner = keys.count("ssm.inner_size", 1 << 28)?;
    if !n_value_heads.is_multiple_of(n_key_heads) || !inner.is_multiple_of(n_value_heads) {
        let reason =
            format!("{n_key_heads} heads of keys, {n_value_heads} of values, {inner} values");
        return Err(keys.wrong_own("ssm.group_count", reason));
    }
    config.delta_net = Some(DeltaNet {
        layers,
        n_key_heads,
        n_value_heads,
        key_length: keys.count("ssm.state_size", 1 << 16)?,
        value_length: inner / n_value_heads,
        conv_kernel: keys.count("ssm.conv_kernel", 1 << 16)?,
        tiled: !is_next,
        fused_ba: is_next,
    });
    config.attention.output_gate = true;
    // How the pairs of a head turn for images; in a text all turn by its positions.
    let _ = keys.own("rope.dimension_sections");
    let shared = keys.u32("expert_shared_feed_forward_length")?;
    if let Some(experts) = &mut config.experts {
        let stored = model.tensor("blk.0.ffn_gate_shexp.weight");
        let stored = stored.and_then(|t| u32::try_from(*t.ne.get(1)?).ok());
        experts.shared = shared
            .filter(|n| *n > 0)
            .or(stored)
            .map(|ffn| Shared { ffn, gated: true });
    }
    Ok(config)
}

/// Gemma 4: heads of another size in layers that slide, values that are keys, layers that use the keys and values of
/// others, per-layer embeddings, experts beside a dense layer.
pub(super) fn gemma4(keys: &Keys<'_>, model: &Model, mut config: Config) -> Result<Config, Error> {
    let a = &mut config.attention;
    let n_kv_heads = keys.each("attention.head_count_kv", config.n_layers)?;
    let key_length = keys.u32("attention.key_length_swa")?;
    let value_length = keys.u32("attention.value_length_swa")?;
    if let Some(window) = &mut a.sliding_window {
        let sliding = window.layers.iter().position(|&slides| slides).unwrap_or(0);
        window.heads = Some(Heads {
            n_kv_heads: n_kv_heads.map_or(a.n_kv_heads, |each| each[sliding]),
            key_length: key_length.unwrap_or(a.key_length),
            value_length: value_length.unwrap_or(a.value_length),
        });
    }
    config.rope.n_dims_sliding = keys.u32("rope.dimension_count_swa")?.or(key_length);
    a.value_norm = true;
    // Queries and keys are normed, and scores are taken as they are.
    a.scale = 1.0;
    a.n_shared_kv_layers = keys.u32("attention.shared_kv_layers")?.unwrap_or(0);
    if a.n_shared_kv_layers >= config.n_layers {
        let reason = format!("all {} layers would use those of others", config.n_layers);
        return Err(keys.wrong_own("attention.shared_kv_layers", reason));
    }
    let has = |l: u32, name: &str| model.tensor(&format!("blk.{l}.{name}")).is_some();
    let n_own = config.n_layers - config.attention.n_shared_kv_layers;
    config.attention.keys_are_values =
        (0..n_own).any(|l| !config.slides(l) && !has(l, "attn_v.weight"));
    config.layer_scale = has(0, "layer_output_scale.weight");
    let width = keys.u32("embedding_length_per_layer_input")?.unwrap_or(0);
    config.layer_embeddings = (width > 0).then_some(LayerEmbeddings { width });
    if let Some(experts) = &mut config.experts {
        experts.dense_branch = true;
    }
    Ok(config)
}

/// gpt-oss: sinks and biases.
pub(super) fn gpt_oss(model: &Model, mut config: Config) -> Config {
    let has = |name: &str| model.tensor(name).is_some();
    config.attention.sinks = has("blk.0.attn_sinks.weight");
    if let Some(experts) = &mut config.experts {
        experts.router_bias = has("blk.0.ffn_gate_inp.bias");
        experts.bias = has("blk.0.ffn_gate_exps.bias");
    }
    if let Some(RopeScaling::Yarn { fractional, .. }) = &mut config.rope.scaling {
        // The models have it so, and there is no key for it.
        *fractional = true;
    }
    config
}

/// DeepSeek-V3: compressed keys and values, experts chosen by group.
pub(super) fn latent(keys: &Keys<'_>, model: &Model, mut config: Config) -> Result<Config, Error> {
    let (q_rank, kv_rank) = (
        keys.u32("attention.q_lora_rank")?.filter(|n| *n > 0),
        keys.count("attention.kv_lora_rank", 1 << 16)?,
    );
    let whole = keys.count("attention.key_length_mla", 1 << 16)?;
    let value_length = keys.count("attention.value_length_mla", 1 << 16)?;
    let n_rotated = config.rope.n_dims;
    let a = &mut config.attention;
    let is_compressed = a.n_kv_heads == 1
        && a.value_length == kv_rank
        && kv_rank.checked_add(n_rotated) == Some(a.key_length);
    let n_plain = whole.checked_sub(n_rotated).filter(|_| is_compressed);
    let Some(n_plain) = n_plain else {
        return Err(keys.wrong_own(
            "attention.key_length",
            format!(
                "heads of {} are not {kv_rank} compressed and {n_rotated} rotated elements",
                a.key_length
            ),
        ));
    };
    a.latent = Some(Latent {
        q_rank,
        n_plain,
        value_length,
    });
    let mut scale = 1.0 / f64::from(whole).sqrt();
    let multiplier = keys.positive("rope.scaling.yarn_log_multiplier")?;
    if let (
        Some(multiplier),
        Some(RopeScaling::Yarn {
            factor,
            attention_factor,
            ..
        }),
    ) = (multiplier, &mut config.rope.scaling)
    {
        // A tenth of the configuration's number, which is a short decimal.
        let of_all = (f64::from(multiplier) * 1e7).round() / 1e6;
        let stretched = 0.1 * of_all * f64::from(*factor).max(1.0).ln() + 1.0;
        scale *= stretched.powi(2);
        // The one of the two numbers that is there stands for both, and they cancel.
        *attention_factor = attention_factor.or(Some(1.0));
    }
    config.attention.scale = scale as f32;
    let n = keys.u32("expert_group_count")?.unwrap_or(1);
    let n_used = keys.u32("expert_group_used_count")?.unwrap_or(n);
    let n_shared = keys.u32("expert_shared_count")?.unwrap_or(0);
    if let Some(experts) = &mut config.experts {
        if n == 0 || n_used == 0 || n_used > n || !experts.n.is_multiple_of(n) {
            let reason = format!("{n_used} of {n} groups of {} experts", experts.n);
            return Err(keys.wrong_own("expert_group_count", reason));
        }
        experts.groups = (n_used < n).then_some(Groups { n, n_used });
        let bias = format!("blk.{}.exp_probs_b.bias", experts.n_leading_dense);
        experts.choice_bias = model.tensor(&bias).is_some();
        experts.shared = (n_shared > 0).then_some(Shared {
            ffn: n_shared.saturating_mul(experts.ffn),
            gated: false,
        });
    }
    Ok(config)
}
