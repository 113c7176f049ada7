//! The keys of a vindex's first part that say what the model is; the tokenizer's are in `tokenizer`.
//!
//! Invariant: for the same model, llama.cpp's converter writes the same keys with the same values, except those that
//! it derives from names of directories. Keys of ours that it does not write are few: a sliding window that it drops, and
//! which layers slide where that is not the family's usual order.

use crate::config::{Config, Experts, Latent, RopeKind, RopeScaling};
use crate::config_json::ConfigJson;
use crate::families::{Family, Window};
use crate::gguf::{MetaArray, MetaValue};
use crate::plan::{PlannedPart, Values};
use crate::recipe::Recipe;

/// Version of the block types' layout that GGUF readers know.
const QUANTIZATION_VERSION: u32 = 2;

/// `general.*` and the keys of the architecture, in writing order.
pub(crate) fn of_model(
    model_name: &str,
    json: &ConfigJson,
    family: &Family,
    config: &Config,
    recipe: Recipe,
    parts: &[PlannedPart],
) -> Vec<(String, MetaValue)> {
    let text = |t: &str| MetaValue::String(t.to_owned());
    let mut keys: Vec<(String, MetaValue)> = vec![
        ("general.architecture".to_owned(), text(family.architecture)),
        ("general.type".to_owned(), text("model")),
        (
            "general.name".to_owned(),
            text(if model_name.is_empty() {
                "model"
            } else {
                model_name
            }),
        ),
        (
            "general.size_label".to_owned(),
            MetaValue::String(size_label(parts)),
        ),
        (
            "general.file_type".to_owned(),
            MetaValue::U32(file_type(recipe, parts)),
        ),
        (
            "general.quantization_version".to_owned(),
            MetaValue::U32(QUANTIZATION_VERSION),
        ),
    ];
    let mut put =
        |key: &str, value: MetaValue| keys.push((format!("{}.{key}", family.architecture), value));
    let (a, rope) = (&config.attention, &config.rope);
    put(
        "block_count",
        MetaValue::U32(config.n_layers + config.n_nextn),
    );
    put("context_length", MetaValue::U32(config.context));
    put("embedding_length", MetaValue::U32(config.hidden));
    if !config.ffn_layers.is_empty() {
        put("feed_forward_length", i32s(&config.ffn_layers));
    } else if config.ffn > 0 {
        put("feed_forward_length", MetaValue::U32(config.ffn));
    }
    if family.writes.llama_keys {
        put("vocab_size", MetaValue::U32(config.vocab));
    }
    put("attention.head_count", MetaValue::U32(a.n_heads));
    if json.has("num_global_key_value_heads") && rope.n_dims_sliding.is_some() {
        let heads: Vec<u32> = (0..config.n_layers)
            .map(|l| config.heads(l).n_kv_heads)
            .collect();
        put("attention.head_count_kv", i32s(&heads));
    } else {
        put("attention.head_count_kv", MetaValue::U32(a.n_kv_heads));
    }
    put(
        "attention.layer_norm_rms_epsilon",
        MetaValue::F32(config.norm_eps),
    );
    if family.writes.head_dim_always || json.has_head_dim() {
        put("attention.key_length", MetaValue::U32(a.key_length));
        put("attention.value_length", MetaValue::U32(a.value_length));
    }
    if let Some(window) = &a.sliding_window {
        put("attention.sliding_window", MetaValue::U32(window.n_tokens));
        // llama.cpp assumes the family's usual order of layers where it is told no other.
        let is_usual = match family.window {
            Window::AllButEach(each) => (1..)
                .zip(&window.layers)
                .all(|(n, &slides): (u32, &bool)| slides != n.is_multiple_of(each)),
            _ => true,
        };
        if !is_usual || window.heads.is_some() {
            let layers = MetaArray::Bools(window.layers.clone());
            put("attention.sliding_window_pattern", MetaValue::Array(layers));
        }
        if let Some(heads) = window.heads {
            put("attention.key_length_swa", MetaValue::U32(heads.key_length));
            put(
                "attention.value_length_swa",
                MetaValue::U32(heads.value_length),
            );
        }
    }
    if let Some(cap) = a.softcap {
        put("attn_logit_softcapping", MetaValue::F32(cap));
    }
    if let Some(cap) = config.logit_softcap {
        put("final_logit_softcapping", MetaValue::F32(cap));
    }
    if family.writes.rope_base_always || rope.base != 10_000.0 {
        put("rope.freq_base", MetaValue::F32(rope.base));
    }
    if let Some(base) = rope.base_sliding {
        put("rope.freq_base_swa", MetaValue::F32(base));
    }
    if family.writes.llama_keys || config.delta_net.is_some() || rope.n_dims_sliding.is_some() {
        put("rope.dimension_count", MetaValue::U32(rope.n_dims));
    }
    if let Some(n_dims) = rope.n_dims_sliding {
        put("rope.dimension_count_swa", MetaValue::U32(n_dims));
        let width = config.layer_embeddings.map_or(0, |e| e.width);
        put(
            "attention.shared_kv_layers",
            MetaValue::U32(a.n_shared_kv_layers),
        );
        put("embedding_length_per_layer_input", MetaValue::U32(width));
    }
    if family.writes.rope_sections {
        let sections = MetaArray::I32s(json.rope_sections());
        put("rope.dimension_sections", MetaValue::Array(sections));
    }
    let of_all_dims = a
        .latent
        .and_then(|_| json.rope_number("mscale_all_dim").ok()?);
    match rope.scaling {
        Some(RopeScaling::Linear { factor }) => {
            put("rope.scaling.type", text("linear"));
            put("rope.scaling.factor", MetaValue::F32(factor));
        }
        Some(RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            fractional: _,
        }) => {
            put("rope.scaling.type", text("yarn"));
            put("rope.scaling.factor", MetaValue::F32(factor));
            put(
                "rope.scaling.original_context_length",
                MetaValue::U32(original_context),
            );
            // Where the configuration is silent, llama.cpp has the same defaults as `transformers`.
            if json.has_rope_parameter("beta_fast") {
                put("rope.scaling.yarn_beta_fast", MetaValue::F32(beta_fast));
            }
            if json.has_rope_parameter("beta_slow") {
                put("rope.scaling.yarn_beta_slow", MetaValue::F32(beta_slow));
            }
            if let Some(factor) = attention_factor
                && json.has_rope_parameter("attention_factor")
            {
                put("rope.scaling.yarn_attn_factor", MetaValue::F32(factor));
            }
            if let Some(of_all) = of_all_dims {
                let multiplier = (0.1 * of_all) as f32;
                put(
                    "rope.scaling.yarn_log_multiplier",
                    MetaValue::F32(multiplier),
                );
            }
        }
        Some(RopeScaling::FrequencyFactors) | None => {}
    }
    if let Some(experts) = &config.experts {
        put("expert_count", MetaValue::U32(experts.n));
        put("expert_used_count", MetaValue::U32(experts.n_used));
        if family.writes.expert_ffn {
            put("expert_feed_forward_length", MetaValue::U32(experts.ffn));
        }
        if let Some(shared) = experts.shared.filter(|shared| shared.gated) {
            put(
                "expert_shared_feed_forward_length",
                MetaValue::U32(shared.ffn),
            );
        }
    }
    if let (Some(latent), Some(experts)) = (&a.latent, &config.experts) {
        put_latent(&mut put, json, config, latent, experts);
    }
    if config.n_nextn > 0 {
        put("nextn_predict_layers", MetaValue::U32(config.n_nextn));
    }
    if let Some(net) = &config.delta_net {
        put("ssm.conv_kernel", MetaValue::U32(net.conv_kernel));
        put("ssm.state_size", MetaValue::U32(net.key_length));
        put("ssm.group_count", MetaValue::U32(net.n_key_heads));
        put("ssm.time_step_rank", MetaValue::U32(net.n_value_heads));
        let inner = net.value_length.saturating_mul(net.n_value_heads);
        put("ssm.inner_size", MetaValue::U32(inner));
        let n_blocks = config.n_layers + config.n_nextn;
        let layers = (0..n_blocks).map(|l| config.is_recurrent(l)).collect();
        put(
            "attention.recurrent_layers",
            MetaValue::Array(MetaArray::Bools(layers)),
        );
        put(
            "full_attention_interval",
            MetaValue::U32(
                family
                    .writes
                    .attention_interval
                    .unwrap_or_else(|| json.attention_interval()),
            ),
        );
    }
    keys
}

/// What DeepSeek-V3 says beyond others.
fn put_latent(
    put: &mut dyn FnMut(&str, MetaValue),
    json: &ConfigJson,
    config: &Config,
    latent: &Latent,
    experts: &Experts,
) {
    put("vocab_size", MetaValue::U32(config.vocab));
    if let Some(rank) = latent.q_rank {
        put("attention.q_lora_rank", MetaValue::U32(rank));
    }
    let kv_rank = config.attention.value_length;
    put("attention.kv_lora_rank", MetaValue::U32(kv_rank));
    let key_length = latent.n_plain + config.rope.n_dims;
    put("attention.key_length_mla", MetaValue::U32(key_length));
    put(
        "attention.value_length_mla",
        MetaValue::U32(latent.value_length),
    );
    put("rope.dimension_count", MetaValue::U32(config.rope.n_dims));
    put(
        "leading_dense_block_count",
        MetaValue::U32(experts.n_leading_dense),
    );
    let n_shared = experts.shared.map_or(0, |s| s.ffn / experts.ffn);
    put("expert_shared_count", MetaValue::U32(n_shared));
    for (key, name) in [
        ("n_group", "expert_group_count"),
        ("topk_group", "expert_group_used_count"),
    ] {
        if let Ok(Some(n)) = json.u32(key) {
            put(name, MetaValue::U32(n));
        }
    }
    if json.has("scoring_func") {
        // llama.cpp's number for a sigmoid.
        put("expert_gating_func", MetaValue::U32(2));
    }
    if json.has("routed_scaling_factor") {
        put("expert_weights_scale", MetaValue::F32(experts.scale));
    }
    if json.has("norm_topk_prob") && experts.normalise {
        put("expert_weights_norm", MetaValue::Bool(true));
    }
}

/// Numbers of layers, which fit.
fn i32s(numbers: &[u32]) -> MetaValue {
    MetaValue::Array(MetaArray::I32s(numbers.iter().map(|&n| n as i32).collect()))
}

/// Where llama.cpp's forward pass is known to leave the model's configuration.
pub(crate) fn not_followed_by_llama_cpp(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(window) = config
        .attention
        .sliding_window
        .as_ref()
        .filter(|_| !config.post_norms && !config.attention.sinks)
    {
        warnings.push(format!(
            "llama.cpp knows no sliding window for the architecture {}: its texts differ beyond {} tokens",
            config.architecture, window.n_tokens
        ));
    }
    if let Some(RopeScaling::Yarn {
        fractional: true, ..
    }) = config.rope.scaling
    {
        warnings.push(
            "llama.cpp stretches rope between whole pairs (truncate), this model does not: their logits differ by a few \
             thousandths, more with longer texts"
                .to_owned(),
        );
    }
    if config.attention.latent.is_some() && config.rope.kind == RopeKind::Neox {
        warnings.push(format!(
            "llama.cpp turns neighbours for the architecture {}, this model turns halves (rope_interleave false)",
            config.architecture
        ));
    }
    if config.experts.is_some_and(|e| !e.normalise) && config.rope.kind == RopeKind::Neox {
        warnings.push(format!(
            "llama.cpp normalises the experts' weights for the architecture {}, this model does not",
            config.architecture
        ));
    }
    warnings
}

/// That of the recipe, or llama.cpp's `MOSTLY_MXFP4_MOE` where experts are kept as they are.
fn file_type(recipe: Recipe, parts: &[PlannedPart]) -> u32 {
    const MXFP4_MOE: u32 = 38;
    let mut tensors = parts.iter().flat_map(|part| &part.tensors);
    match tensors.any(|tensor| matches!(tensor.values, Values::Packed { .. })) {
        true => MXFP4_MOE,
        false => recipe.file_type(),
    }
}

/// How many parameters, as `general.size_label` says it: `0.6B`, `8x7B`. The experts' count stands before the size of
/// all that is shared plus one expert of each layer.
fn size_label(parts: &[PlannedPart]) -> String {
    let (mut shared, mut one_expert, mut n_experts) = (0_u64, 0_u64, None);
    for tensor in parts.iter().flat_map(|p| &p.tensors) {
        let count = tensor.ne.iter().product::<u64>();
        match tensor.ne.as_slice() {
            [_, _, experts] if tensor.name.contains("_exps.") => {
                n_experts = Some(*experts);
                one_expert += count / experts;
            }
            _ => shared += count,
        }
    }
    let size = rounded(shared + one_expert);
    n_experts.map_or(size.clone(), |n| format!("{n}x{size}"))
}

/// A count with at least two digits and its unit.
fn rounded(count: u64) -> String {
    let (scaled, unit) = match count as f64 {
        n if n > 1e12 => (n * 1e-12, "T"),
        n if n > 1e9 => (n * 1e-9, "B"),
        n if n > 1e6 => (n * 1e-6, "M"),
        n => (n * 1e-3, "K"),
    };
    let n_digits = match scaled.round_ties_even() as u64 {
        0 => 0,
        whole => whole.ilog10() as usize + 1,
    };
    format!("{scaled:.*}{unit}", 2_usize.saturating_sub(n_digits))
}
