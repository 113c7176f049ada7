//! Whether the norm weights of heads are scales, or what is added to one.
//!
//! Invariant: the family decides where it is known; else the weights themselves do: scales lie around one, what is
//! added to one lies around zero.

/// Families whose norms are `1 + weight`: of their published modelling code.
const ZERO_CENTRED: [&str; 3] = ["qwen3_next", "qwen3_5", "gemma"];
/// Families whose norms are `weight`, and which are known to have heads.
const ACTUAL_SCALE: [&str; 14] = [
    "qwen2", "qwen3", "llama", "mistral", "deepseek", "glm", "mimo", "ernie", "kimi", "longcat",
    "minimax", "nemotron", "step", "hunyuan",
];
/// Means below this are of weights around zero.
const MEAN_MAX: f64 = 0.5;

/// The convention, and what told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct NormConvention {
    pub(crate) zero_centred: bool,
    pub(crate) from: From,
}

/// What told the convention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum From {
    ModelType,
    Values,
    Default,
}

impl NormConvention {
    /// The one whose words are longest, to reserve room for.
    pub(crate) const LONGEST: NormConvention = NormConvention {
        zero_centred: true,
        from: From::ModelType,
    };

    /// That of a family; `None` when it is not known.
    pub(crate) fn of_family(model_type: Option<&str>) -> Option<NormConvention> {
        let model_type = model_type?;
        let is_of =
            |families: &[&str]| families.iter().any(|family| model_type.starts_with(family));
        let zero_centred = is_of(&ZERO_CENTRED);
        (zero_centred || is_of(&ACTUAL_SCALE)).then_some(NormConvention {
            zero_centred,
            from: From::ModelType,
        })
    }

    /// That of norm weights with this sum.
    pub(crate) fn of_values(sum: f64, n: u64) -> NormConvention {
        if n == 0 || !sum.is_finite() {
            return NormConvention {
                zero_centred: false,
                from: From::Default,
            };
        }
        NormConvention {
            zero_centred: sum / (n as f64) < MEAN_MAX,
            from: From::Values,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        if self.zero_centred {
            "zero_centered"
        } else {
            "actual_scale"
        }
    }
}

impl From {
    pub(crate) fn name(self) -> &'static str {
        match self {
            From::ModelType => "model_type",
            From::Values => "values",
            From::Default => "default",
        }
    }
}

/// Whether a tensor of a sidecar is a norm's weight.
pub(crate) fn is_norm(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|stem| {
        let last = stem.rsplit('.').next().unwrap_or(stem);
        last.contains("norm") || stem.contains("pre_fc_norm")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_decides_and_else_the_values() {
        let of = |name| NormConvention::of_family(Some(name)).map(NormConvention::name);
        assert_eq!(of("qwen3_5_moe"), Some("zero_centered"));
        assert_eq!(of("qwen3"), Some("actual_scale"));
        assert_eq!(of("qwen3_moe"), Some("actual_scale"));
        assert_eq!(of("deepseek_v3"), Some("actual_scale"));
        assert_eq!(of("something_else"), None);
        assert_eq!(NormConvention::of_values(-2.8, 10).name(), "zero_centered");
        assert_eq!(NormConvention::of_values(9.8, 10).name(), "actual_scale");
        assert_eq!(NormConvention::of_values(0.0, 0).from, From::Default);
        assert!(
            is_norm("mtp.pre_fc_norm_hidden.weight")
                && is_norm("mtp.layers.0.self_attn.q_norm.weight")
        );
        assert!(!is_norm("mtp.fc.weight"));
    }
}
