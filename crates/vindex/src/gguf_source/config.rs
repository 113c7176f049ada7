//! From GGUF metadata to the numbers of a [`Config`]: what llama.cpp computes when it opens the file.
//!
//! Invariant: where a key is absent, the value is llama.cpp's own default for the architecture, also where the model's
//! authors had another; a key that would change the pass and that `Config` cannot say is an error.
//! Source of the defaults: `llama-model.cpp` of llama.cpp.

use super::files::Model;
use super::keys::Keys;
use super::kinds;
use crate::config::{Attention, Config, Experts, Gating, Rope, RopeScaling, SlidingWindow};
use crate::error::Error;
use crate::families::{Family, Window};
use crate::gguf::{MetaArray, MetaValue};

const LAYERS_MAX: u32 = 10_000;
const EXPERTS_MAX: u32 = 65_536;
/// Tokens that end a generation by their names, whatever the metadata says; the same as llama.cpp's.
const ENDS: [&str; 18] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
];

/// The numbers of a model of `family`.
pub(super) fn read(keys: &Keys<'_>, family: &Family, model: &Model) -> Result<Config, Error> {
    let n_blocks = keys.count("block_count", LAYERS_MAX)?;
    let n_nextn = keys.u32("nextn_predict_layers")?.unwrap_or(0);
    let Some(n_layers) = n_blocks.checked_sub(n_nextn).filter(|n| *n > 0) else {
        let reason = format!("{n_nextn} of the {n_blocks} blocks");
        return Err(keys.wrong_own("nextn_predict_layers", reason));
    };
    let hidden = keys.count("embedding_length", 1 << 24)?;
    let vocab = vocab(keys, model)?;
    let attention = attention(keys, family, model, hidden, n_layers)?;
    let experts = experts(keys, model)?;
    let widths = keys.each("feed_forward_length", n_layers)?;
    let (ffn, ffn_layers) = match widths {
        Some(each) if each.iter().all(|n| *n == each[0]) => (each[0], Vec::new()),
        Some(each) => (each[0], each),
        // Where all layers are routed there may be no other width.
        None if keys.is_routed() => (0, Vec::new()),
        None => return Err(keys.wrong_own("feed_forward_length", "it is missing")),
    };
    let eps = "attention.layer_norm_rms_epsilon";
    let norm_eps = keys.positive(eps)?;
    let logit_softcap = match keys.architecture() {
        "gemma2" => keys.positive("final_logit_softcapping")?.or(Some(30.0)),
        _ => keys.positive("final_logit_softcapping")?,
    };
    if keys.bool("attention.causal")? == Some(false) {
        return unsupported("attention to later tokens (attention.causal)".to_owned());
    }
    let config = Config {
        architecture: keys.architecture().to_owned(),
        n_layers,
        n_nextn,
        hidden,
        ffn,
        ffn_layers,
        vocab,
        context: keys.count("context_length", u32::MAX)?,
        norm_eps: norm_eps.ok_or_else(|| keys.wrong_own(eps, "it is missing"))?,
        post_norms: family.post_norms,
        activation: family.activation,
        ffn_bias: model.tensor("blk.0.ffn_gate.bias").is_some(),
        embedding_scale: if family.scales_embeddings {
            (hidden as f32).sqrt()
        } else {
            1.0
        },
        tied_embeddings: model.tensor("output.weight").is_none(),
        logit_softcap,
        rope: rope(keys, family, model, attention.key_length)?,
        attention,
        experts,
        delta_net: None,
        layer_embeddings: None,
        layer_scale: false,
        bos: keys.token("tokenizer.ggml.bos_token_id", vocab),
        eos: ends(keys, vocab),
    };
    let config = match keys.architecture() {
        "qwen35" | "qwen35moe" | "qwen3next" => kinds::hybrid(keys, model, config)?,
        "gemma4" => kinds::gemma4(keys, model, config)?,
        "gpt-oss" => kinds::gpt_oss(model, config),
        "deepseek2" => kinds::latent(keys, model, config)?,
        _ => config,
    };
    keys.refuse_the_rest()?;
    Ok(config)
}

/// Rows of the embedding matrix, of which each has a token.
fn vocab(keys: &Keys<'_>, model: &Model) -> Result<u32, Error> {
    let name = "token_embd.weight";
    let Some(embeddings) = model.tensor(name) else {
        return Err(Error::MissingTensors {
            tensors: vec![name.to_owned()],
        });
    };
    let n_rows = embeddings.ne.get(1).copied().unwrap_or(1);
    let key = "tokenizer.ggml.tokens";
    let n_tokens = match keys.value(key) {
        Some(MetaValue::Array(MetaArray::Strings(tokens))) => tokens.len() as u64,
        _ => return Err(keys.wrong(key, "a list of texts is expected there")),
    };
    match u32::try_from(n_rows) {
        Ok(vocab) if n_rows == n_tokens => Ok(vocab),
        _ => Err(keys.wrong(
            key,
            format!("there are {n_tokens} tokens for the {n_rows} rows of {name}"),
        )),
    }
}

/// Tokens that end a generation: the one that ends texts, the one that ends turns, and those of telling names.
fn ends(keys: &Keys<'_>, vocab: u32) -> Vec<u32> {
    let mut ends = Vec::new();
    for kind in ["eos", "eot", "eom"] {
        ends.extend(keys.token(&format!("tokenizer.ggml.{kind}_token_id"), vocab));
    }
    if let Some(MetaValue::Array(MetaArray::Strings(tokens))) = keys.value("tokenizer.ggml.tokens")
    {
        let named = (0..).zip(tokens);
        ends.extend(
            named
                .filter(|(_, t)| ENDS.contains(&t.as_str()))
                .map(|(id, _): (u32, _)| id),
        );
    }
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|id| seen.insert(*id));
    ends
}

fn attention(
    keys: &Keys<'_>,
    family: &Family,
    model: &Model,
    hidden: u32,
    n_layers: u32,
) -> Result<Attention, Error> {
    let n_heads = keys.count("attention.head_count", 1 << 16)?;
    // Gemma 4 has numbers of its own for layers that slide, which are looked at later.
    let n_kv_heads = match keys.each("attention.head_count_kv", n_layers) {
        Ok(Some(each)) if keys.architecture() == "gemma4" => each[n_layers as usize - 1],
        _ => keys.u32("attention.head_count_kv")?.unwrap_or(n_heads),
    };
    if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
        return Err(keys.wrong_own(
            "attention.head_count_kv",
            format!("{n_kv_heads} does not divide the {n_heads} query heads"),
        ));
    }
    let length = |key: &str| match keys.u32(key)?.unwrap_or(hidden / n_heads) {
        n if n > 0 && n.is_multiple_of(2) && n <= 1 << 16 => Ok(n),
        n => Err(keys.wrong_own(key, format!("heads cannot be {n} wide"))),
    };
    let key_length = length("attention.key_length")?;
    // The largest Gemma models divide by something else, which the metadata does not tell.
    let is_gemma_27b = matches!(
        (keys.architecture(), n_layers),
        ("gemma2", 46) | ("gemma3", 62)
    );
    let scalar = if is_gemma_27b {
        hidden / n_heads
    } else {
        key_length
    };
    let softcap = match keys.architecture() {
        "gemma2" => keys.positive("attn_logit_softcapping")?.or(Some(50.0)),
        _ => keys.positive("attn_logit_softcapping")?,
    };
    let has = |name: &str| model.tensor(name).is_some();
    Ok(Attention {
        n_heads,
        n_kv_heads,
        key_length,
        value_length: length("attention.value_length")?,
        scale: match keys.positive("attention.scale")? {
            Some(scale) => scale,
            None => (1.0 / f64::from(scalar).sqrt()) as f32,
        },
        softcap,
        qk_norm: family.qk_norm,
        qkv_bias: has("blk.0.attn_q.bias"),
        output_bias: has("blk.0.attn_output.bias"),
        sliding_window: sliding_window(keys, family, n_layers)?,
        value_norm: false,
        keys_are_values: false,
        output_gate: false,
        sinks: false,
        n_shared_kv_layers: 0,
        latent: None,
    })
}

fn sliding_window(
    keys: &Keys<'_>,
    family: &Family,
    n_layers: u32,
) -> Result<Option<SlidingWindow>, Error> {
    let key = "attention.sliding_window";
    let default = (keys.architecture() == "gemma2").then_some(4096);
    let n_tokens = keys.u32(key)?.or(default).filter(|n| *n > 0);
    let pattern = "attention.sliding_window_pattern";
    let layers: Vec<bool> = match (keys.own(pattern), family.window) {
        (Some(MetaValue::Array(_)), _) => {
            let each = keys.each(pattern, n_layers)?.unwrap_or_default();
            each.iter().map(|&n| n != 0).collect()
        }
        (Some(_), _) => all_but_each(keys.u32(pattern)?.unwrap_or(0), n_layers),
        (None, Window::AllButEach(each)) => all_but_each(each, n_layers),
        // llama.cpp drops the window of this architecture, which all of the model's layers have.
        (None, _) if keys.architecture() == "llama" => vec![true; n_layers as usize],
        (None, _) if n_tokens.is_none() => Vec::new(),
        (None, _) => {
            return unsupported(format!(
                "{} without {pattern}, which would say which layers it is for",
                keys.whole(key)
            ));
        }
    };
    let window = n_tokens.filter(|_| layers.contains(&true));
    Ok(window.map(|n_tokens| SlidingWindow {
        n_tokens,
        layers,
        heads: None,
    }))
}

/// All layers slide but each `each`th; with 0 all do.
fn all_but_each(each: u32, n_layers: u32) -> Vec<bool> {
    (1..=n_layers)
        .map(|n| each == 0 || !n.is_multiple_of(each))
        .collect()
}

fn rope(keys: &Keys<'_>, family: &Family, model: &Model, key_length: u32) -> Result<Rope, Error> {
    let base = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let base_sliding = keys.positive("rope.freq_base_swa")?;
    let n_dims = keys.u32("rope.dimension_count")?.unwrap_or(key_length);
    if n_dims == 0 || n_dims > key_length || !n_dims.is_multiple_of(2) {
        return Err(keys.wrong_own(
            "rope.dimension_count",
            format!("{n_dims} of the {key_length} elements of a head cannot be rotated"),
        ));
    }
    Ok(Rope {
        kind: family.rope,
        n_dims,
        base,
        base_sliding: match family.defaults.rope_base_sliding {
            Some(_) => Some(base_sliding.unwrap_or(10_000.0)),
            None => base_sliding,
        },
        n_dims_sliding: None,
        scaling: scaling(keys, model)?,
    })
}

fn scaling(keys: &Keys<'_>, model: &Model) -> Result<Option<RopeScaling>, Error> {
    let old = keys.positive("rope.scale_linear")?;
    let factor = keys.positive("rope.scaling.factor")?.or(old).unwrap_or(1.0);
    let kind = keys.text("rope.scaling.type")?.unwrap_or("linear");
    let whole = "rope.scaling.attn_factor";
    if keys.positive(whole)?.is_some_and(|f| f != 1.0) {
        return unsupported(keys.whole(whole));
    }
    let context = keys.u32("rope.scaling.original_context_length")?;
    let beta_fast = keys.positive("rope.scaling.yarn_beta_fast")?;
    let beta_slow = keys.positive("rope.scaling.yarn_beta_slow")?;
    let attention_factor = keys.positive("rope.scaling.yarn_attn_factor")?;
    let has_factors = model.tensor("rope_freqs.weight").is_some();
    match kind {
        "none" | "linear" if has_factors && (kind == "none" || factor == 1.0) => {
            Ok(Some(RopeScaling::FrequencyFactors))
        }
        _ if has_factors => unsupported(format!("rope_freqs.weight with rope scaling {kind:?}")),
        "none" => Ok(None),
        "linear" if factor == 1.0 => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear { factor })),
        "yarn" => Ok(Some(RopeScaling::Yarn {
            factor,
            original_context: match context {
                Some(n) if n > 0 => n,
                _ => keys.count("context_length", u32::MAX)?,
            },
            beta_fast: beta_fast.unwrap_or(32.0),
            beta_slow: beta_slow.unwrap_or(1.0),
            attention_factor,
            fractional: false,
        })),
        other => {
            let other: String = other.chars().take(60).collect();
            unsupported(format!("rope scaling of kind {other:?}"))
        }
    }
}

fn experts(keys: &Keys<'_>, model: &Model) -> Result<Option<Experts>, Error> {
    // Dense models of the architecture llama have the count too, and it is 0.
    let n_used = keys.u32("expert_used_count")?;
    let ffn = keys.u32("expert_feed_forward_length")?;
    if !keys.is_routed() {
        return Ok(None);
    }
    let n = keys.count("expert_count", EXPERTS_MAX)?;
    let n_used = match n_used {
        Some(n_used) if (1..=n).contains(&n_used) => n_used,
        other => {
            let other = other.map_or("no number".to_owned(), |n| n.to_string());
            return Err(keys.wrong_own("expert_used_count", format!("{other} of {n} experts")));
        }
    };
    let n_leading_dense = keys.u32("leading_dense_block_count")?.unwrap_or(0);
    let gate = model.tensor(&format!("blk.{n_leading_dense}.ffn_gate_exps.weight"));
    let stored = gate.and_then(|gate| u32::try_from(*gate.ne.get(1)?).ok());
    let Some(ffn) = ffn.filter(|n| *n > 0).or(stored) else {
        return Err(keys.wrong_own("expert_feed_forward_length", "it is missing"));
    };
    // 1 is softmax over all experts, which is what architectures without the key have. That over the chosen ones (3) is
    // the same where the weights add up to one.
    let gating = match (keys.u32("expert_gating_func")?, keys.architecture()) {
        (None | Some(1), "llama" | "qwen3moe" | "qwen35moe" | "qwen3next" | "gemma4")
        | (None | Some(1 | 3), "gpt-oss") => Gating::Softmax,
        (Some(2), "deepseek2") => Gating::Sigmoid,
        (other, architecture) => {
            let other = other.map_or("absent".to_owned(), |n| n.to_string());
            return unsupported(format!("expert_gating_func {other} of {architecture}"));
        }
    };
    // Of all architectures only this one does not normalise where it is not told to.
    let normalises = keys.architecture() != "deepseek2";
    Ok(Some(Experts {
        n_used,
        ffn,
        normalise: keys.bool("expert_weights_norm")?.unwrap_or(normalises),
        scale: keys.positive("expert_weights_scale")?.unwrap_or(1.0),
        n_leading_dense,
        ..Experts::new(n, gating)
    }))
}

fn unsupported<T>(what: String) -> Result<T, Error> {
    Err(Error::Unsupported { what })
}
