//! The card of a sidecar's repository: what is beside a model, from where, and with which sums.
//!
//! Invariant: as for a vindex's card, the same facts and time give the same text.

use std::fmt::Write as _;

use terminal::{Failure, size};

use super::{License, TOOL, cell, license_lines, license_section, list, yaml};
use crate::mtp::layout::{Kind, Layout};
use crate::mtp::write::Written;

/// Tensors that a card lists one by one; the file's own metadata has all of them.
const N_LISTED_MAX: usize = 100;

/// What a sidecar's card tells.
#[derive(Debug)]
pub(crate) struct SidecarFacts<'a> {
    pub(crate) repo: &'a str,
    pub(crate) source_repo: &'a str,
    /// `None` for a directory.
    pub(crate) source_commit: Option<&'a str>,
    /// The model that it belongs beside.
    pub(crate) target_model: &'a str,
    pub(crate) license: &'a License,
    pub(crate) catalog_key: &'a str,
    pub(crate) contents: SidecarContents<'a>,
}

/// What is in the repository.
#[derive(Debug)]
pub(crate) enum SidecarContents<'a> {
    /// `mtp.safetensors`.
    Mtp {
        layout: &'a Layout,
        written: &'a Written,
    },
    /// Files of the source, byte for byte.
    Vision { files: &'a [VisionFile] },
}

/// One mirrored file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct VisionFile {
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
    /// Of files that the source keeps as LFS objects.
    pub(crate) sha256: Option<String>,
}

/// What the card of a repository says is in it.
#[derive(Debug, Default)]
pub(crate) struct ArtifactOf {
    pub(crate) artifact_type: Option<String>,
    pub(crate) source_repo: Option<String>,
    pub(crate) source_commit: Option<String>,
}

impl ArtifactOf {
    /// Nothing where there is no card, or none of ours.
    pub(crate) fn card(card: Option<&str>) -> ArtifactOf {
        let front = card.and_then(|card| hub::card::front_matter(card).ok()?);
        let field = |name: &str| {
            let value = front.as_ref()?.get("foxlight")?.get(name)?;
            value.as_str().map(str::to_owned)
        };
        ArtifactOf {
            artifact_type: field("artifact_type"),
            source_repo: field("source_repo"),
            source_commit: field("source_revision"),
        }
    }

    /// Refuses a repository that holds something else.
    pub(crate) fn must_be(&self, artifact_type: &str, repo: &str) -> Result<(), Failure> {
        match &self.artifact_type {
            Some(other) if other != artifact_type => Err(Failure::new(format!(
                "{repo} holds a {other}, and a {artifact_type} would take its place"
            ))
            .hint("name another repository in the catalog entry, or replace what is there with --force")),
            _ => Ok(()),
        }
    }
}

impl SidecarFacts<'_> {
    /// `mtp-sidecar` or `vision-sidecar`.
    fn artifact_type(&self) -> &'static str {
        match self.contents {
            SidecarContents::Mtp { .. } => "mtp-sidecar",
            SidecarContents::Vision { .. } => "vision-sidecar",
        }
    }

    /// The card.
    pub(crate) fn render(&self, generated_at: &str) -> String {
        let mut out = String::from("---\n");
        self.front_matter(generated_at, &mut out);
        out.push_str("---\n\n");
        self.body(generated_at, &mut out);
        out
    }

    /// Writing to a `String` does not fail; the results are dropped for that reason.
    fn front_matter(&self, generated_at: &str, out: &mut String) {
        let kind = self.artifact_type();
        let _ = writeln!(out, "base_model: {}", yaml(self.source_repo));
        list(out, "tags", &[kind, "skulk", "foxlight"]);
        license_lines(self.license, out);
        out.push_str("foxlight:\n");
        let mut line = |key: &str, value: Option<&str>| {
            if let Some(value) = value {
                let _ = writeln!(out, "  {key}: {}", yaml(value));
            }
        };
        line("artifact_type", Some(kind));
        line("source_repo", Some(self.source_repo));
        line("source_revision", self.source_commit);
        line("target_model", Some(self.target_model));
        line("catalog_key", Some(self.catalog_key));
        line("extracted_with", Some(TOOL));
        line("generated_at", Some(generated_at));
        match &self.contents {
            SidecarContents::Mtp { layout, written } => {
                line("layout", Some(layout.kind.name()));
                line("norm_convention", Some(written.norms.name()));
                line("concat_order", Some(layout.concat_order()));
                line("sha256", Some(&written.sha256));
                if let Some(n_heads) = layout.n_heads {
                    let _ = writeln!(out, "  n_heads: {n_heads}");
                }
                let _ = writeln!(out, "  n_tensors: {}", layout.tensors.len());
                let _ = writeln!(out, "  size_bytes: {}", layout.file_bytes);
                out.push_str("  source_types:\n");
                for (dtype, n) in layout.source_types() {
                    let _ = writeln!(out, "    {dtype}: {n}");
                }
            }
            SidecarContents::Vision { files } => {
                out.push_str("  files:\n");
                for file in *files {
                    let _ = writeln!(
                        out,
                        "  - file: {}\n    size_bytes: {}",
                        yaml(&file.path),
                        file.size_bytes
                    );
                    if let Some(sha256) = &file.sha256 {
                        let _ = writeln!(out, "    sha256: {}", yaml(sha256));
                    }
                }
            }
        }
    }

    fn body(&self, generated_at: &str, out: &mut String) {
        let source = self.source_repo;
        let _ = writeln!(out, "# {}\n", self.repo);
        let _ = match self.contents {
            SidecarContents::Mtp { .. } => writeln!(
                out,
                "The multi-token prediction (MTP) heads of [{source}](https://huggingface.co/{source}), unquantized (bf16). Not a model of its\n\
                 own: the heads draft tokens that the model then verifies, and one file serves every quantization of it. Made for Skulk."
            ),
            SidecarContents::Vision { .. } => writeln!(
                out,
                "The vision weights and configuration of [{source}](https://huggingface.co/{source}), byte for byte, for models\n\
                 whose own checkpoint leaves them out. Not a model of its own. Made for Skulk."
            ),
        };
        out.push_str("\n## Provenance\n\n| Field | Value |\n|---|---|\n");
        let mut row = |field: &str, value: &str| {
            let _ = writeln!(out, "| {field} | {} |", cell(value));
        };
        row("Artifact type", self.artifact_type());
        row("Source model", source);
        row("Source revision", self.source_commit.unwrap_or("unknown"));
        row("Target model", self.target_model);
        row("Catalog key", self.catalog_key);
        row("Extracted with", TOOL);
        row("Generated", generated_at);
        match &self.contents {
            SidecarContents::Mtp { layout, written } => mtp_contents(layout, written, out),
            SidecarContents::Vision { files } => {
                out.push_str("\n## Contents\n\n| File | Bytes | sha256 |\n|---|---:|---|\n");
                for file in *files {
                    let sum = file
                        .sha256
                        .as_ref()
                        .map(|sum| format!("`{sum}`"))
                        .unwrap_or_default();
                    let _ = writeln!(
                        out,
                        "| {} | {} | {sum} |",
                        cell(&file.path),
                        file.size_bytes
                    );
                }
            }
        }
        let target = self.target_model;
        let _ = match self.contents {
            SidecarContents::Mtp { .. } => writeln!(
                out,
                "\n## Usage\n\nSkulk loads `mtp.safetensors` beside the model when speculative decoding is on for a deployment of {target}. The file's\n\
                 `__metadata__` says how the heads are put together, what each tensor was called, and its sha256."
            ),
            SidecarContents::Vision { .. } => writeln!(
                out,
                "\n## Usage\n\nSkulk loads the vision weights beside {target}. `skulk-weights verify {}` compares them with their source.",
                self.catalog_key
            ),
        };
        license_section(self.license, source, out);
    }
}

fn mtp_contents(layout: &Layout, written: &Written, out: &mut String) {
    let what = match (layout.kind, layout.n_heads) {
        (Kind::Block | Kind::Layers, Some(1)) => "One head".to_owned(),
        (Kind::Block | Kind::Layers, Some(n)) => format!("{n} heads"),
        _ => "Heads".to_owned(),
    };
    let types: Vec<String> = layout
        .source_types()
        .iter()
        .map(|(dtype, n)| format!("{n} {dtype}"))
        .collect();
    let _ = writeln!(
        out,
        "\n## Contents\n\n{what} of layout `{}`: {} tensors, {}, from {}. Norms are `{}`, the projection takes `{}`.\n\n\
         `mtp.safetensors` has the sha256 `{}`.",
        layout.kind.name(),
        layout.tensors.len(),
        size(layout.file_bytes),
        types.join(", "),
        written.norms.name(),
        layout.concat_order(),
        written.sha256
    );
    if layout.tensors.len() > N_LISTED_MAX {
        return;
    }
    out.push_str("\n| Tensor | Shape | sha256 |\n|---|---|---|\n");
    for (index, sum) in written.sums.iter().enumerate() {
        let tensor = layout.tensor(index);
        let _ = writeln!(
            out,
            "| {} | {:?} | `{sum}` |",
            cell(&tensor.name),
            tensor.shape
        );
    }
}
