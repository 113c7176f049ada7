//! What a catalog is made of: sources, and the entries that they list.
//!
//! Invariant: an [`Entry`] was made by `manifest` and satisfies every rule; nothing checks it again.

use std::fmt;

use serde::Serialize;

/// A publication group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tier {
    /// Small models, published to try the whole path.
    Smoke,
    /// Mixture-of-experts models.
    Moe,
}

/// Which parts of a vindex are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Slice {
    Full,
    ExpertServer,
}

/// Where the extra weights of an entry come from and go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Sidecar {
    pub(crate) source_repo: String,
    pub(crate) sidecar_repo: String,
}

/// A publishable model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The effective key: `namespace/key`, or `key` where the source has no namespace.
    pub(crate) key: String,
    pub(crate) source_model: String,
    pub(crate) quant: String,
    pub(crate) tier: Tier,
    /// Never empty; `Full` is alone.
    pub(crate) slices: Vec<Slice>,
    pub(crate) output_name: String,
    pub(crate) hf_repo: String,
    /// The entry's own collection, else that of its source.
    pub(crate) hf_collection: Option<String>,
    pub(crate) mtp: Option<Sidecar>,
    pub(crate) assistant_model_repo: Option<String>,
    pub(crate) vision: Option<Sidecar>,
}

/// What a manifest's entries have in common: how the file is called and whose it is.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Source {
    pub(crate) kind: SourceKind,
    pub(crate) name: String,
    pub(crate) namespace: Option<String>,
    pub(crate) hf_owner: Option<String>,
    pub(crate) hf_collection: Option<String>,
    pub(crate) entries: usize,
    /// The file's path, or `package:NAME` for a built-in.
    pub(crate) origin: String,
}

/// How a source came into the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SourceKind {
    Builtin,
    Path,
    Manifest,
}

impl Tier {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Tier::Smoke => "smoke",
            Tier::Moe => "moe",
        }
    }
}

impl Slice {
    /// As manifests and `larql publish --slices` spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Slice::Full => "full",
            Slice::ExpertServer => "expert-server",
        }
    }
}

impl Entry {
    /// All 13 fields in the order of their names; unset ones are null.
    pub(crate) fn fields(&self) -> serde_json::Map<String, serde_json::Value> {
        let value = serde_json::json!({
            "key": self.key,
            "source_model": self.source_model,
            "quant": self.quant,
            "tier": self.tier,
            "slices": self.slices,
            "output_name": self.output_name,
            "hf_repo": self.hf_repo,
            "hf_collection": self.hf_collection,
            "mtp_source_repo": self.mtp.as_ref().map(|sidecar| &sidecar.source_repo),
            "mtp_sidecar_repo": self.mtp.as_ref().map(|sidecar| &sidecar.sidecar_repo),
            "assistant_model_repo": self.assistant_model_repo,
            "vision_source_repo": self.vision.as_ref().map(|sidecar| &sidecar.source_repo),
            "vision_sidecar_repo": self.vision.as_ref().map(|sidecar| &sidecar.sidecar_repo),
        });
        match value {
            serde_json::Value::Object(mut fields) => {
                fields.sort_keys();
                fields
            }
            _ => serde_json::Map::new(),
        }
    }
}

impl Source {
    /// How messages name the source's file.
    pub(crate) fn label(&self) -> String {
        match self.kind {
            SourceKind::Builtin => format!("builtin:{}", self.name),
            SourceKind::Path | SourceKind::Manifest => self.origin.clone(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            SourceKind::Builtin => "builtin",
            SourceKind::Path => "path",
            SourceKind::Manifest => "manifest",
        };
        let (namespace, owner, collection) = (
            or_dash(&self.namespace),
            or_dash(&self.hf_owner),
            or_dash(&self.hf_collection),
        );
        write!(
            f,
            "{kind} {} namespace={namespace} hf_owner={owner} hf_collection={collection} ",
            self.name
        )?;
        write!(f, "entries={} origin={}", self.entries, self.origin)
    }
}

fn or_dash(field: &Option<String>) -> &str {
    field.as_deref().unwrap_or("-")
}
