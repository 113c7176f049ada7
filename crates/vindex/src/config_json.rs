//! From `config.json` to the numbers of a [`Config`], and to the rope factors computed from them.
//!
//! Invariant: whatever is accepted here is consistent (heads divide, widths are even, counts are bounded), and a
//! setting that would change the forward pass and that `Config` cannot say is an error, never ignored.
//! Defaults where the file is silent come from the family's row.

pub(crate) mod gemma4;
pub(crate) mod gpt_oss;
pub(crate) mod hybrid;
pub(crate) mod latent;
mod rope;

use serde_json::{Map, Value};

use crate::checkpoint::Quantization;
use crate::config::{Activation, Attention, Config, Experts, Gating, SlidingWindow};
use crate::error::Error;
use crate::families::{Bias, Family, Window};
use crate::source::Files;

/// Largest `config.json` and the like that we read.
const JSON_BYTES_MAX: u64 = 4 << 20;
const LAYERS_MAX: u32 = 10_000;
const EXPERTS_MAX: u32 = 65_536;
const HEAD_DIM_MAX: u32 = 65_536;
/// Sixteen times the largest of today's; a list of tokens is made from it.
const VOCAB_MAX: u32 = 1 << 22;

/// `config.json`, in which `text_config` wins over the top level.
pub(crate) struct ConfigJson {
    root: Map<String, Value>,
}

impl ConfigJson {
    pub(crate) fn read(files: &Files<'_>) -> Result<ConfigJson, Error> {
        let root = files.json("config.json", JSON_BYTES_MAX)?;
        Ok(ConfigJson { root })
    }

    /// The row of the table that is for this model.
    pub(crate) fn family(&self) -> Result<&'static Family, Error> {
        let class = self
            .root
            .get("architectures")
            .and_then(|a| a.get(0))
            .and_then(Value::as_str);
        let class = class.ok_or_else(|| {
            invalid(
                "architectures",
                "the name of the model's class is expected there",
            )
        })?;
        Family::of_class(class).ok_or_else(|| Error::UnknownArchitecture {
            architecture: class.chars().take(80).collect(),
            known: Family::classes(),
        })
    }

    /// True when the model has a part that sees.
    pub(crate) fn has_vision(&self) -> bool {
        self.root.contains_key("vision_config")
    }

    /// True when the model has a part that hears.
    pub(crate) fn hears(&self) -> bool {
        self.get("audio_config").is_some()
    }

    /// Layers of multi-token prediction that follow the model's own.
    pub(crate) fn n_nextn_layers(&self) -> Result<u32, Error> {
        Ok(self.u32("num_nextn_predict_layers")?.unwrap_or(0))
    }

    /// True when `config.json` itself has the width of a head.
    pub(crate) fn has_head_dim(&self) -> bool {
        self.get("head_dim").is_some()
    }

    /// True when `config.json` itself has the key with a value.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// A token id, at the top level or in `text_config`, when it is one number.
    pub(crate) fn token_id(&self, key: &str) -> Option<u32> {
        [Some(&self.root), self.text()]
            .into_iter()
            .flatten()
            .find_map(|level| level.get(key).filter(|v| !v.is_null()))
            .and_then(Value::as_u64)
            .and_then(|id| u32::try_from(id).ok())
    }

    fn text(&self) -> Option<&Map<String, Value>> {
        self.root.get("text_config").and_then(Value::as_object)
    }

    /// The value of a key; null is as good as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        let here = |level: &'_ Map<String, Value>| level.get(key).is_some_and(|v| !v.is_null());
        self.text()
            .filter(|t| here(t))
            .or(Some(&self.root))
            .and_then(|l| l.get(key))
            .filter(|v| !v.is_null())
    }

    /// The key is there and says null, which in places means "none" and not "the default".
    fn is_null(&self, key: &str) -> bool {
        let here = |level: &Map<String, Value>| level.get(key).is_some_and(Value::is_null);
        self.get(key).is_none() && (here(&self.root) || self.text().is_some_and(here))
    }

    pub(crate) fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let n = value.as_u64().and_then(|n| u32::try_from(n).ok());
        n.map(Some).ok_or_else(|| {
            invalid(
                key,
                format!(
                    "a whole number below 2^32 is expected, not {}",
                    short(value)
                ),
            )
        })
    }

    fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key).map(|value| positive(key, value)).transpose()
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value.as_bool().map(Some).ok_or_else(|| {
            invalid(
                key,
                format!("true or false is expected, not {}", short(value)),
            )
        })
    }

    fn count(&self, key: &str, default: Option<u32>, max: u32) -> Result<u32, Error> {
        match self.u32(key)?.or(default) {
            Some(n) if (1..=max).contains(&n) => Ok(n),
            Some(n) => Err(invalid(key, format!("{n} is not between 1 and {max}"))),
            None => Err(invalid(key, "it is missing")),
        }
    }

    /// The numbers of a model of `family`. Tokens that end a text are those of `generation_config.json` and ours.
    ///
    /// # Errors
    /// [`Error::Config`] for a number that is missing or cannot be, [`Error::Unsupported`] for a setting that
    /// the forward pass cannot follow.
    pub(crate) fn numbers(&self, family: &Family, files: &Files<'_>) -> Result<Config, Error> {
        self.refuse_what_cannot_be_followed(family)?;
        let d = &family.defaults;
        let n_layers = self.count("num_hidden_layers", None, LAYERS_MAX)?;
        let hidden = self.count("hidden_size", None, 1 << 24)?;
        let attention = self.attention(family, hidden, n_layers)?;
        let rope = self.rope(family, attention.key_length)?;
        // Where all layers are routed, nothing has that width.
        let ffn = match self.u32("intermediate_size")? {
            None if family.experts.is_some() => 0,
            _ => self.count("intermediate_size", None, 1 << 28)?,
        };
        let vocab = self.count("vocab_size", d.vocab, VOCAB_MAX)?;
        let generation: Option<Map<String, Value>> =
            files.json_if_any("generation_config.json", JSON_BYTES_MAX)?;
        let mut eos = token_ids(generation.as_ref().and_then(|g| g.get("eos_token_id")));
        eos.extend(
            token_ids(self.get("eos_token_id"))
                .into_iter()
                .filter(|id| !eos.contains(id))
                .collect::<Vec<_>>(),
        );
        eos.retain(|&id| id < vocab);
        let config = Config {
            architecture: family.architecture.to_owned(),
            n_layers,
            n_nextn: 0,
            hidden,
            ffn,
            ffn_layers: Vec::new(),
            vocab,
            context: self.count("max_position_embeddings", d.context, u32::MAX)?,
            norm_eps: self.f64("rms_norm_eps")?.unwrap_or(d.norm_eps) as f32,
            post_norms: family.post_norms,
            activation: family.activation,
            ffn_bias: family.bias == Bias::Configured && self.bool("mlp_bias")?.unwrap_or(false),
            embedding_scale: if family.scales_embeddings {
                (hidden as f32).sqrt()
            } else {
                1.0
            },
            tied_embeddings: self.bool("tie_word_embeddings")?.unwrap_or(d.tied),
            logit_softcap: self.softcap("final_logit_softcapping", d.logit_softcap)?,
            attention,
            rope,
            experts: self.experts(family)?,
            delta_net: None,
            layer_embeddings: None,
            layer_scale: false,
            bos: self.token_id("bos_token_id").filter(|&id| id < vocab),
            eos,
        };
        (family.numbers)(self, config)
    }

    fn attention(&self, family: &Family, hidden: u32, n_layers: u32) -> Result<Attention, Error> {
        let d = &family.defaults;
        let n_heads = self.count("num_attention_heads", d.n_heads, 1 << 16)?;
        let silent = d
            .n_kv_heads
            .filter(|_| !self.is_null("num_key_value_heads"));
        let n_kv_heads = self.count(
            "num_key_value_heads",
            Some(silent.unwrap_or(n_heads)),
            1 << 16,
        )?;
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(invalid(
                "num_key_value_heads",
                format!("{n_kv_heads} does not divide the {n_heads} query heads"),
            ));
        }
        let key_length = self.count(
            "head_dim",
            Some(d.head_dim.unwrap_or(hidden / n_heads)),
            HEAD_DIM_MAX,
        )?;
        if !key_length.is_multiple_of(2) {
            return Err(invalid(
                "head_dim",
                format!("{key_length} is odd; rope needs pairs"),
            ));
        }
        let scalar = match d.query_pre_attn_scalar {
            Some(default) => self.f64("query_pre_attn_scalar")?.unwrap_or(default),
            None => f64::from(key_length),
        };
        let biased =
            self.bool("attention_bias")?.unwrap_or(false) && family.bias == Bias::Configured;
        Ok(Attention {
            n_heads,
            n_kv_heads,
            key_length,
            value_length: key_length,
            scale: (1.0 / scalar.sqrt()) as f32,
            softcap: self.softcap("attn_logit_softcapping", d.attention_softcap)?,
            qk_norm: family.qk_norm,
            qkv_bias: family.bias == Bias::Qkv || biased,
            output_bias: biased,
            sliding_window: self.sliding_window(family, n_layers)?,
            value_norm: false,
            keys_are_values: false,
            output_gate: false,
            sinks: false,
            n_shared_kv_layers: 0,
            latent: None,
        })
    }

    /// A soft cap of a family that has them; null in the file means none.
    fn softcap(&self, key: &str, default: Option<f64>) -> Result<Option<f32>, Error> {
        let default = default.filter(|_| !self.is_null(key));
        Ok(self.f64(key)?.or(default).map(|cap| cap as f32))
    }

    fn sliding_window(
        &self,
        family: &Family,
        n_layers: u32,
    ) -> Result<Option<SlidingWindow>, Error> {
        let is_switched = matches!(family.window, Window::Upper | Window::AllIfUsed);
        if family.window == Window::None
            || (is_switched && !self.bool("use_sliding_window")?.unwrap_or(false))
        {
            return Ok(None);
        }
        let silent = family
            .defaults
            .sliding_window
            .filter(|_| !self.is_null("sliding_window"));
        let Some(n_tokens) = self.u32("sliding_window")?.or(silent) else {
            return Ok(None);
        };
        if n_tokens == 0 {
            return Err(invalid(
                "sliding_window",
                "a window of 0 tokens sees nothing",
            ));
        }
        let layers: Vec<bool> = match self.get("layer_types") {
            Some(types) => layer_kinds(types, n_layers, "sliding_attention")?,
            None => {
                let first = match family.window {
                    Window::Upper => self.u32("max_window_layers")?.unwrap_or(28),
                    _ => 0,
                };
                let each = match family.window {
                    Window::AllButEach(each) => {
                        Some(self.count("sliding_window_pattern", Some(each), u32::MAX)?)
                    }
                    _ => None,
                };
                (0..n_layers)
                    .map(|l| l >= first && each.is_none_or(|each| !(l + 1).is_multiple_of(each)))
                    .collect()
            }
        };
        Ok(layers.contains(&true).then_some(SlidingWindow {
            n_tokens,
            layers,
            heads: None,
        }))
    }

    fn experts(&self, family: &Family) -> Result<Option<Experts>, Error> {
        let Some(keys) = family.experts else {
            return Ok(None);
        };
        let [usual, other] = keys.n;
        let is_other = self.get(usual).is_none() && self.get(other).is_some();
        let n = self.count(if is_other { other } else { usual }, None, EXPERTS_MAX)?;
        Ok(Some(Experts {
            n_used: match self.u32("num_experts_per_tok")? {
                None if self.has("experts_per_token") => {
                    self.count("experts_per_token", None, n)?
                }
                _ => self.count("num_experts_per_tok", None, n)?,
            },
            ffn: self.count(keys.ffn, None, 1 << 28)?,
            normalise: match keys.normalise {
                Some((key, default)) => self.bool(key)?.unwrap_or(default),
                None => true,
            },
            ..Experts::new(n, Gating::Softmax)
        }))
    }

    /// How weights are stored that are quantised already.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when that is in a way which is not read.
    pub(crate) fn quantization(&self) -> Result<Quantization, Error> {
        let config = self.get("quantization_config");
        let of_mlx = config.filter(|c| c.get("quant_method").is_none());
        Quantization::of(config, self.get("quantization").or(of_mlx))
    }

    fn refuse_what_cannot_be_followed(&self, family: &Family) -> Result<(), Error> {
        if let Some(quantised) = self.get("quantization_config") {
            let method = quantised
                .get("quant_method")
                .and_then(Value::as_str)
                .unwrap_or("unknown");
            let format = quantised.get("format").and_then(Value::as_str);
            let is_read = match method {
                "mxfp4" => family.keeps_mxfp4,
                "fp8" | "fbgemm_fp8" => true,
                "compressed-tensors" => format == Some("float-quantized"),
                // MLX names no method.
                "unknown" => quantised.get("bits").is_some(),
                _ => false,
            };
            if !is_read {
                return unsupported(format!(
                    "its weights are quantised already (method {}); take the original",
                    clip(method)
                ));
            }
        }
        let activations: &[&str] = match family.activation {
            Activation::Silu => &["silu", "swish"],
            // Early files of Gemma say "gelu" and mean the tanh form.
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
            // The configuration of gpt-oss says the name of what its own activation is made from.
            Activation::SwigluClamped => &["silu"],
        };
        let activation = self
            .get("hidden_activation")
            .or_else(|| self.get("hidden_act"));
        if let Some(other) =
            activation.filter(|v| !v.as_str().is_some_and(|s| activations.contains(&s)))
        {
            return unsupported(format!(
                "hidden_act {}; {} is expected",
                short(other),
                activations[0]
            ));
        }
        // Gemma 4 says for which tokens; those of images never come to this pass.
        let both_ways = match self.get("use_bidirectional_attention") {
            None => false,
            Some(Value::String(tokens)) => tokens != "vision",
            Some(other) => *other != Value::Bool(false),
        };
        if both_ways || self.bool("is_causal")? == Some(false) {
            return unsupported(
                "attention to later tokens (is_causal, use_bidirectional_attention)".to_owned(),
            );
        }
        if family.experts.is_some() {
            let dense = self
                .get("mlp_only_layers")
                .and_then(Value::as_array)
                .is_some_and(|l| !l.is_empty());
            if dense
                || self
                    .u32("decoder_sparse_step")?
                    .is_some_and(|step| step != 1)
            {
                return unsupported(
                    "dense layers among the routed ones (mlp_only_layers, decoder_sparse_step)"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }
}

/// For each layer whether it is of `kind` and not of full attention; no other kind is known.
fn layer_kinds(types: &Value, n_layers: u32, kind: &str) -> Result<Vec<bool>, Error> {
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != n_layers as usize {
        return Err(invalid(
            "layer_types",
            format!("{} entries for {n_layers} layers", types.len()),
        ));
    }
    let is_kind = |value: &Value| match value.as_str() {
        Some(text) if text == kind => Ok(true),
        Some("full_attention") => Ok(false),
        _ => unsupported(format!("a layer of type {}", short(value))),
    };
    types.iter().map(is_kind).collect()
}

fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().take(64).filter_map(one).collect(),
        Some(id) => one(id).into_iter().collect(),
        None => Vec::new(),
    }
}

fn positive(key: &str, value: &Value) -> Result<f64, Error> {
    let n = value
        .as_f64()
        .filter(|n| *n > 0.0 && *n <= f64::from(f32::MAX));
    n.ok_or_else(|| {
        invalid(
            key,
            format!("a positive number is expected, not {}", short(value)),
        )
    })
}

fn unsupported<T>(what: String) -> Result<T, Error> {
    Err(Error::Unsupported { what })
}

fn invalid(key: &str, reason: impl Into<String>) -> Error {
    Error::Config {
        key: key.to_owned(),
        reason: reason.into(),
    }
}

fn short(value: &Value) -> String {
    clip(&value.to_string())
}

fn clip(text: &str) -> String {
    text.chars().take(60).collect()
}
