//! How checkpoints spell the names of their heads, and the one spelling in which sidecars have them.
//!
//! Invariant: whether a name belongs to a head depends on the name and the two counts of the configuration alone; a
//! look-alike of the trunk (`model.layers.0.mtpx.weight`, `model.layers.30.…` beside layer 3) does not. Left out: what
//! the tensors hold.

use std::ops::Range;

use serde_json::Value;

/// Parts of a name that may come before its layers in a language model; a vision tower has others.
const TRUNKS: [&str; 3] = ["model", "language_model", "text_model"];
/// Where `config.json` nests the configuration of the language model.
const NESTED: [&str; 4] = [
    "text_config",
    "language_config",
    "llm_config",
    "language_model",
];

/// The convention that a checkpoint's names follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// `mtp.X`, or `P.mtp.X`.
    Namespace,
    /// `model.mtp_layers.{i}.X`.
    MtpLayers,
    /// `model.mtp_block.{i}.X` and its three companions.
    MtpBlock,
    /// `model.layers.{n_layers + i}.X`.
    ExtraLayers {
        /// The layers that are heads.
        layers: Range<u32>,
    },
}

impl Spelling {
    /// The first convention that any of `names` follows; `config` is the checkpoint's `config.json`.
    pub(crate) fn of<'a>(
        names: impl Iterator<Item = &'a str> + Clone,
        config: &Value,
    ) -> Option<Spelling> {
        let extra = extra_layers(config).map(|layers| Spelling::ExtraLayers { layers });
        [Spelling::Namespace, Spelling::MtpLayers, Spelling::MtpBlock]
            .into_iter()
            .chain(extra)
            .find(|spelling| names.clone().any(|name| spelling.rename(name).is_some()))
    }

    /// The name in a sidecar; `None` when `name` belongs to no head.
    pub(crate) fn rename(&self, name: &str) -> Option<String> {
        match self {
            Spelling::Namespace => {
                if name.starts_with("mtp.") {
                    return Some(name.to_owned());
                }
                let at = name.find(".mtp.")?;
                Some(name[at + 1..].to_owned())
            }
            Spelling::MtpLayers => {
                let (head, rest) = numbered(name, "mtp_layers")?;
                let (first, below) = rest.split_once('.').unwrap_or((rest, ""));
                let first = match first {
                    "input_proj" => "eh_proj",
                    "token_layernorm" => "enorm",
                    "hidden_layernorm" => "hnorm",
                    "final_layernorm" => "shared_head.norm",
                    other => other,
                };
                Some(match below {
                    "" => format!("mtp.{head}.{first}"),
                    below => format!("mtp.{head}.{first}.{below}"),
                })
            }
            Spelling::MtpBlock => {
                const PARTS: [(&str, &str); 4] = [
                    ("mtp_block", ""),
                    ("mtp_emb_norm", "enorm."),
                    ("mtp_hidden_norm", "hnorm."),
                    ("mtp_linear_proj", "eh_proj."),
                ];
                PARTS.iter().find_map(|(component, target)| {
                    let (head, rest) = numbered(name, component)?;
                    Some(format!("mtp.{head}.{target}{rest}"))
                })
            }
            Spelling::ExtraLayers { layers } => {
                let (layer, rest) = numbered(name, "layers")?;
                let head = layer.checked_sub(layers.start)?;
                layers
                    .contains(&layer)
                    .then(|| format!("mtp.{head}.{rest}"))
            }
        }
    }
}

/// `P.{component}.{number}.{rest}` with `P` of a trunk.
fn numbered<'a>(name: &'a str, component: &str) -> Option<(u32, &'a str)> {
    let mut rest = name;
    loop {
        let (first, below) = rest.split_once('.')?;
        rest = below;
        if first == component {
            break;
        }
        if !TRUNKS.contains(&first) {
            return None;
        }
    }
    let (number, rest) = rest.split_once('.')?;
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    (is_number && !rest.is_empty()).then(|| Some((number.parse().ok()?, rest)))?
}

/// The layers beyond the trunk's own, by `num_hidden_layers` and `num_nextn_predict_layers`.
fn extra_layers(config: &Value) -> Option<Range<u32>> {
    language_configs(config).find_map(|config| {
        let count = |name| {
            let n = config.get(name)?.as_u64()?;
            u32::try_from(n).ok().filter(|n| *n > 0)
        };
        let (n_layers, n_heads) = (
            count("num_hidden_layers")?,
            count("num_nextn_predict_layers")?,
        );
        Some(n_layers..n_layers.checked_add(n_heads)?)
    })
}

/// A field of the language model's configuration, which wrappers of other towers nest.
pub(crate) fn language_field<'a>(config: &'a Value, name: &str) -> Option<&'a Value> {
    // The nested one first: the outer `model_type` is the wrapper's.
    let nested = language_configs(config).skip(1);
    nested
        .chain(std::iter::once(config))
        .find_map(|config| config.get(name).filter(|value| !value.is_null()))
}

/// The configuration itself and those nested in it.
fn language_configs(config: &Value) -> impl Iterator<Item = &Value> {
    std::iter::once(config).chain(NESTED.iter().filter_map(|name| config.get(*name)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn renamed(names: &[&str], config: &Value) -> Vec<Option<String>> {
        let spelling = Spelling::of(names.iter().copied(), config);
        names
            .iter()
            .map(|name| spelling.as_ref()?.rename(name))
            .collect()
    }

    #[test]
    fn each_spelling_becomes_the_one_of_sidecars() {
        let config =
            json!({"text_config": {"num_hidden_layers": 3, "num_nextn_predict_layers": 2}});
        for (name, expected) in [
            ("mtp.fc.weight", "mtp.fc.weight"),
            ("mtp.0.enorm.weight", "mtp.0.enorm.weight"),
            ("model.language_model.mtp.layers.0.a", "mtp.layers.0.a"),
            (
                "model.mtp_layers.1.input_proj.weight",
                "mtp.1.eh_proj.weight",
            ),
            (
                "model.mtp_layers.0.final_layernorm.weight",
                "mtp.0.shared_head.norm.weight",
            ),
            (
                "model.mtp_layers.0.self_attn.q_proj.weight",
                "mtp.0.self_attn.q_proj.weight",
            ),
            (
                "model.mtp_block.0.mlp.up_proj.weight",
                "mtp.0.mlp.up_proj.weight",
            ),
            ("model.mtp_emb_norm.0.weight", "mtp.0.enorm.weight"),
            ("model.mtp_linear_proj.0.bias", "mtp.0.eh_proj.bias"),
            ("model.layers.4.eh_proj.weight", "mtp.1.eh_proj.weight"),
            (
                "language_model.model.layers.3.hnorm.weight",
                "mtp.0.hnorm.weight",
            ),
        ] {
            assert_eq!(
                renamed(&[name], &config),
                [Some(expected.to_owned())],
                "{name}"
            );
        }
    }

    #[test]
    fn look_alikes_of_the_trunk_are_no_heads() {
        let config = json!({"num_hidden_layers": 3, "num_nextn_predict_layers": 1});
        for name in [
            "model.layers.0.mtpx.weight",
            "model.mtp_proj.weight",
            "xmtp.weight",
            "model.layers.30.a",
            "model.layers.2.a",
            "model.layers.4.a",
            "vision_tower.encoder.layers.3.a",
            "model.layers.3",
            "model.mtp_layers.x.a",
        ] {
            assert_eq!(renamed(&[name], &config), [None], "{name}");
        }
        assert_eq!(
            renamed(
                &["model.layers.3.a"],
                &json!({"num_hidden_layers": 3, "num_nextn_predict_layers": 0})
            ),
            [None]
        );
    }

    #[test]
    fn names_of_heads_come_before_extra_layers() {
        let config = json!({"num_hidden_layers": 1, "num_nextn_predict_layers": 1});
        assert_eq!(
            renamed(&["model.layers.1.a", "mtp.b"], &config),
            [None, Some("mtp.b".to_owned())]
        );
    }
}
