//! What DeepSeek-V3 says beyond other families: the ranks of its latent attention, groups of experts, dense layers first.

use super::{ConfigJson, HEAD_DIM_MAX, invalid, unsupported};
use crate::config::{Config, Gating, Groups, Latent, RopeKind, RopeScaling, Shared};
use crate::error::Error;

pub(crate) fn numbers(json: &ConfigJson, mut config: Config) -> Result<Config, Error> {
    for (key, expected) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if let Some(other) = json.get(key).filter(|v| v.as_str() != Some(expected)) {
            return unsupported(format!("{key} {other}; {expected} is expected"));
        }
    }
    if json.u32("moe_layer_freq")?.is_some_and(|each| each != 1) {
        return unsupported("dense layers among the routed ones (moe_layer_freq)".to_owned());
    }
    if json.bool("attention_bias")? == Some(true) {
        return unsupported("biases in latent attention (attention_bias)".to_owned());
    }
    attention(json, &mut config)?;
    experts(json, &mut config)?;
    Ok(config)
}

fn attention(json: &ConfigJson, config: &mut Config) -> Result<(), Error> {
    let count = |key: &str, default: u32| json.count(key, Some(default), HEAD_DIM_MAX);
    let q_rank = match json.is_null("q_lora_rank") {
        true => None,
        false => Some(count("q_lora_rank", 1536)?),
    };
    let (kv_rank, n_rotated) = (count("kv_lora_rank", 512)?, count("qk_rope_head_dim", 64)?);
    let n_plain = count("qk_nope_head_dim", 128)?;
    if !n_rotated.is_multiple_of(2) {
        let reason = format!("{n_rotated} is odd; rope needs pairs");
        return Err(invalid("qk_rope_head_dim", reason));
    }
    let a = &mut config.attention;
    if a.n_kv_heads != a.n_heads {
        let reason = format!("{}, expected the {} query heads", a.n_kv_heads, a.n_heads);
        return Err(invalid("num_key_value_heads", reason));
    }
    a.n_kv_heads = 1;
    a.key_length = kv_rank + n_rotated;
    a.value_length = kv_rank;
    a.latent = Some(Latent {
        q_rank,
        n_plain,
        value_length: count("v_head_dim", 128)?,
    });
    let mut scale = 1.0 / f64::from(n_plain + n_rotated).sqrt();
    if let Some(RopeScaling::Yarn { factor, .. }) = config.rope.scaling
        && let Some(of_all) = json.rope_number("mscale_all_dim")?
    {
        scale *= ConfigJson::yarn_scale(factor.into(), of_all).powi(2);
    }
    a.scale = scale as f32;
    config.rope.n_dims = n_rotated;
    if json.bool("rope_interleave")? == Some(false) {
        config.rope.kind = RopeKind::Neox;
    }
    Ok(())
}

fn experts(json: &ConfigJson, config: &mut Config) -> Result<(), Error> {
    let n_layers = config.n_layers;
    let dense = config.ffn;
    let Some(experts) = &mut config.experts else {
        return Ok(());
    };
    experts.gating = Gating::Sigmoid;
    experts.choice_bias = true;
    experts.scale = json.f64("routed_scaling_factor")?.unwrap_or(2.5) as f32;
    experts.n_leading_dense = json
        .u32("first_k_dense_replace")?
        .unwrap_or(3)
        .min(n_layers);
    if experts.n_leading_dense > 0 && dense == 0 {
        return Err(invalid("intermediate_size", "it is missing"));
    }
    let n = json.count("n_group", Some(8), experts.n)?;
    let n_used = json.count("topk_group", Some(4.min(n)), n)?;
    if !experts.n.is_multiple_of(n) || (n > 1 && experts.n / n < 2) {
        let reason = format!(
            "{n} groups of two or more do not make {} experts",
            experts.n
        );
        return Err(invalid("n_group", reason));
    }
    if u64::from(experts.n_used) > u64::from(n_used) * u64::from(experts.n / n) {
        let reason = format!("{} experts are not in {n_used} groups", experts.n_used);
        return Err(invalid("topk_group", reason));
    }
    // With all groups to choose from there is nothing to choose first.
    experts.groups = (n_used < n).then_some(Groups { n, n_used });
    let n_shared = json.u32("n_shared_experts")?;
    let n_shared = match n_shared {
        None if !json.is_null("n_shared_experts") => 1,
        other => other.unwrap_or(0),
    };
    if n_shared > 0 {
        let ffn = n_shared.checked_mul(experts.ffn);
        let ffn = ffn.ok_or_else(|| invalid("n_shared_experts", "they are too wide"))?;
        experts.shared = Some(Shared { ffn, gated: false });
    }
    Ok(())
}
