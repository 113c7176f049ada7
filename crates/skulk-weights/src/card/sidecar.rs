//! The card of a sidecar's repository: what is beside a model, from where, and with which sums.
//!
//! Invariant: as for a vindex's card, the same facts and time give the same text.

use std::fmt::Write as _;

use terminal::size;

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
}

impl SidecarFacts<'_> {
    /// `mtp-sidecar` or `vision-sidecar`.
    fn artifact_type(&self) -> &'static str {
        match self.contents {
            SidecarContents::Mtp { .. } => "mtp-sidecar",
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
        }
        let target = self.target_model;
        let _ = match self.contents {
            SidecarContents::Mtp { .. } => writeln!(
                out,
                "\n## Usage\n\nSkulk loads `mtp.safetensors` beside the model when speculative decoding is on for a deployment of {target}. The file's\n\
                 `__metadata__` says how the heads are put together, what each tensor was called, and its sha256."
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
