//! Rotary positions: base, which elements turn, scaling, and the factors computed from them.

use serde_json::Value;

use super::{ConfigJson, clip, invalid, positive, unsupported};
use crate::config::{Config, Rope, RopeKind, RopeScaling};
use crate::error::Error;
use crate::families::Family;

/// Gemma 4's kind: pairs as in a head that turns whole, but only the first ones turn.
const PROPORTIONAL: &str = "proportional";
/// The part of them where the configuration is silent.
const PROPORTION: f64 = 1.0;
/// A pair whose frequency is divided by this stands still at every position; the converter's number.
const NOT_TURNING: f32 = 1e30;

impl ConfigJson {
    /// `rope_parameters` (also the nested form by kind of layer), or `rope_scaling` with keys at the top level.
    pub(super) fn rope_parameters(&self) -> (Option<&Value>, Option<&Value>) {
        let all = self
            .get("rope_parameters")
            .or_else(|| self.get("rope_scaling"));
        match all {
            Some(Value::Object(o))
                if o.contains_key("full_attention") || o.contains_key("sliding_attention") =>
            {
                (o.get("full_attention"), o.get("sliding_attention"))
            }
            _ => (all, None),
        }
    }

    pub(super) fn rope(&self, family: &Family, key_length: u32) -> Result<Rope, Error> {
        let (full, sliding) = self.rope_parameters();
        let within =
            |parameters: Option<&Value>, key: &str| match parameters.and_then(|p| p.get(key)) {
                Some(value) if !value.is_null() => positive(key, value).map(Some),
                _ => Ok(None),
            };
        let d = &family.defaults;
        let base = match within(full, "rope_theta")? {
            Some(base) => base,
            None => self.f64("rope_theta")?.unwrap_or(d.rope_base),
        };
        let base_sliding = match (d.rope_base_sliding, within(sliding, "rope_theta")?) {
            (None, _) => None,
            (Some(_), Some(base)) => Some(base),
            (Some(default), None) => Some(self.f64("rope_local_base_freq")?.unwrap_or(default)),
        };
        let kind_of = |parameters: Option<&Value>| {
            let text = |key: &str| parameters?.get(key)?.as_str().map(str::to_owned);
            text("rope_type")
                .or_else(|| text("type"))
                .unwrap_or_else(|| "default".to_owned())
        };
        let kind = kind_of(full);
        if kind_of(sliding) != "default" {
            return unsupported("rope scaling of the layers that slide".to_owned());
        }
        let key = "partial_rotary_factor";
        let rotated = match within(full, key)? {
            Some(part) => Some(part),
            None => self.f64(key)?,
        };
        let is_partial = |part: Option<f64>| part.is_some_and(|part| part != 1.0);
        if is_partial(within(sliding, key)?) || (d.rotated.is_none() && is_partial(rotated)) {
            return unsupported(format!("{key} other than 1"));
        }
        let rotated = d.rotated.map_or(1.0, |default| rotated.unwrap_or(default));
        // The proportional kind turns the same pairs as all do, some of them not at all.
        let n_dims = match kind.as_str() {
            PROPORTIONAL => key_length,
            _ => (f64::from(key_length) * rotated) as u32,
        };
        if n_dims == 0 || n_dims > key_length || !n_dims.is_multiple_of(2) {
            let reason =
                format!("{n_dims} of the {key_length} elements of a head cannot be rotated");
            return Err(invalid(key, reason));
        }
        let factor = || {
            let value = full.and_then(|p| p.get("factor")).unwrap_or(&Value::Null);
            positive("rope_scaling.factor", value).map(|f| f as f32)
        };
        let scaling = match kind.as_str() {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: factor()? }),
            "llama3" => Some(RopeScaling::FrequencyFactors),
            PROPORTIONAL if d.rotated.is_some() => Some(RopeScaling::FrequencyFactors),
            "yarn" => {
                let factor = factor()?;
                let attention_factor = match within(full, "attention_factor")? {
                    Some(given) => Some(given),
                    // Both or none.
                    None => self
                        .rope_number("mscale")?
                        .zip(self.rope_number("mscale_all_dim")?)
                        .map(|(one, of_all)| {
                            let scale = |mscale| ConfigJson::yarn_scale(factor.into(), mscale);
                            scale(one) / scale(of_all)
                        }),
                };
                let key = "original_max_position_embeddings";
                let original = match within(full, key)? {
                    Some(n) if n >= 1.0 => n as u32,
                    Some(n) => return Err(invalid(key, format!("{n} is less than one token"))),
                    None => {
                        let context = self.u32("max_position_embeddings")?;
                        self.count(key, context, u32::MAX)?
                    }
                };
                Some(RopeScaling::Yarn {
                    factor,
                    original_context: original,
                    beta_fast: within(full, "beta_fast")?.unwrap_or(32.0) as f32,
                    beta_slow: within(full, "beta_slow")?.unwrap_or(1.0) as f32,
                    attention_factor: attention_factor.map(|f| f as f32),
                    fractional: full.and_then(|p| p.get("truncate")) == Some(&Value::Bool(false)),
                })
            }
            other => {
                return unsupported(format!("rope scaling of kind {:?}", clip(other)));
            }
        };
        if kind == "llama3" && family.rope != RopeKind::Interleaved {
            return unsupported(format!(
                "rope scaling \"llama3\" in the architecture {}",
                family.architecture
            ));
        }
        Ok(Rope {
            kind: family.rope,
            n_dims,
            base: base as f32,
            base_sliding: base_sliding.map(|b| b as f32),
            n_dims_sliding: None,
            scaling,
        })
    }

    /// What each pair's frequency is divided by; element `i` is for pair `i`. Of the proportional kind, the first pairs turn
    /// and the others do not, which is said by a large number. In llama3's rope scaling short wavelengths are kept, long
    /// ones stretched by `factor`, those between are interpolated.
    ///
    /// The formulas are those of `transformers` (`_compute_proportional_rope_parameters`, `_compute_llama3_parameters`) in
    /// the form of llama.cpp's converter, in single precision like both.
    pub(crate) fn rope_factors(&self, config: &Config) -> Result<Option<Vec<f32>>, Error> {
        if config.rope.scaling != Some(RopeScaling::FrequencyFactors) {
            return Ok(None);
        }
        let (parameters, _) = self.rope_parameters();
        let n_dims = config.rope.n_dims;
        let kind = parameters.and_then(|p| p.get("rope_type"));
        if kind.and_then(Value::as_str) == Some(PROPORTIONAL) {
            let given = parameters.and_then(|p| p.get("partial_rotary_factor"));
            let part = given.map_or(Ok(PROPORTION), |v| positive("partial_rotary_factor", v))?;
            let factor = parameters.and_then(|p| p.get("factor"));
            let factor = factor.map_or(Ok(1.0), |v| positive("factor", v))? as f32;
            let n_turning = (f64::from(n_dims) * part / 2.0) as u32;
            let factor_of = |pair| {
                if pair < n_turning {
                    factor
                } else {
                    NOT_TURNING
                }
            };
            return Ok(Some((0..n_dims / 2).map(factor_of).collect()));
        }
        let number = |key: &str, default: f64| match parameters.and_then(|p| p.get(key)) {
            Some(value) if !value.is_null() => positive(key, value).map(|v| v as f32),
            _ => Ok(default as f32),
        };
        let factor = number("factor", 8.0)?;
        let low = number("low_freq_factor", 1.0)?;
        let high = number("high_freq_factor", 4.0)?;
        let context = number("original_max_position_embeddings", 8192.0)?;
        let factors = (0..n_dims / 2).map(|pair| {
            let exponent = (2 * pair) as f32 / n_dims as f32;
            // The power is taken in double precision, so that every machine rounds to the same single.
            let frequency = 1.0 / f64::from(config.rope.base).powf(f64::from(exponent)) as f32;
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength < context / high {
                1.0
            } else if wavelength > context / low {
                factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        });
        let factors: Vec<f32> = factors.collect();
        if factors.iter().any(|f| !f.is_finite()) {
            return Err(invalid(
                "rope_scaling",
                "its numbers give frequencies that are no numbers",
            ));
        }
        Ok(Some(factors))
    }

    /// How much larger queries and keys are made for a context that is `factor` times as long (`yarn_get_mscale` of
    /// `transformers`).
    pub(super) fn yarn_scale(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    }

    /// A number among the parameters of rope; 0 is as good as absent.
    pub(crate) fn rope_number(&self, key: &str) -> Result<Option<f64>, Error> {
        let (full, _) = self.rope_parameters();
        let value = full.and_then(|p| p.get(key));
        let value = value.filter(|v| !v.is_null() && v.as_f64() != Some(0.0));
        value.map(|v| positive(key, v)).transpose()
    }

    /// True when `config.json` itself has this parameter of its rope scaling.
    pub(crate) fn has_rope_parameter(&self, key: &str) -> bool {
        let (full, _) = self.rope_parameters();
        full.and_then(|p| p.get(key)).is_some_and(|v| !v.is_null())
    }
}
