//! The model card of a published vindex, and what all cards have in common: front matter that machines read, a page that
//! people read. Sidecars' cards are in `sidecar`.
//!
//! Invariant: a card is a function of its [`Facts`] and a time, and of nothing else, so that the same publication gives
//! the same card; [`same_but_time`] tells when only the time would differ. Every value from outside is quoted for YAML
//! and for Markdown. Left out: looking the facts up.

pub(crate) mod sidecar;

use std::fmt::Write as _;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value;
use vindex::{Index, Slice, VindexId, slice_files_of_index};

/// What wrote the card.
const TOOL: &str = concat!("skulk-weights ", env!("CARGO_PKG_VERSION"));

/// What a card tells.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) repo: &'a str,
    pub(crate) source_model: &'a str,
    /// The commit that was extracted; `None` when the Hub did not tell.
    pub(crate) source_commit: Option<&'a str>,
    pub(crate) license: &'a License,
    pub(crate) quant: &'a str,
    pub(crate) catalog_key: &'a str,
    /// What was published; `None` when it is no vindex of ours.
    pub(crate) contents: Option<Contents<'a>>,
}

/// A vindex and the slice of it that was published.
#[derive(Debug)]
pub(crate) struct Contents<'a> {
    pub(crate) id: VindexId,
    pub(crate) index: &'a Index,
    pub(crate) slice: Slice,
}

/// The licence fields of the source's card, as they stand there; empty when it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct License {
    /// `license`: an identifier, or several.
    pub(crate) ids: Vec<String>,
    /// The source gives a list, even of one.
    pub(crate) is_list: bool,
    /// `license_name`, for a custom licence.
    pub(crate) name: Option<String>,
    /// `license_link`.
    pub(crate) link: Option<String>,
}

impl License {
    /// The fields of a card's front matter.
    pub(crate) fn of(card_data: &Value) -> License {
        let text = |name: &str| {
            let text = card_data.get(name)?.as_str()?.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        let list = card_data.get("license").and_then(Value::as_array);
        License {
            ids: match list {
                Some(list) => list
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
                None => text("license").into_iter().collect(),
            },
            is_list: list.is_some(),
            name: text("license_name"),
            link: text("license_link"),
        }
    }

    /// For people: the custom name before the identifier.
    fn title(&self) -> Option<String> {
        match (&self.name, self.ids.as_slice()) {
            (Some(name), _) => Some(name.clone()),
            (None, []) => None,
            (None, ids) => Some(ids.join(", ")),
        }
    }
}

/// The card.
pub(crate) fn render(facts: &Facts<'_>, generated_at: &str) -> String {
    let mut text = String::from("---\n");
    front_matter(facts, generated_at, &mut text);
    text.push_str("---\n\n");
    body(facts, generated_at, &mut text);
    text
}

/// The time in `old`, when `old` is what `render` gives at another time.
pub(crate) fn same_but_time(render: impl Fn(&str) -> String, old: &str) -> Option<String> {
    let front = hub::card::front_matter(old).ok()??;
    let time = front
        .get("foxlight")?
        .get("generated_at")?
        .as_str()?
        .to_owned();
    (render(&time) == old).then_some(time)
}

/// This second in UTC, `2026-01-31T23:59:59Z`.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// Writing to a `String` does not fail; the results are dropped for that reason.
fn front_matter(facts: &Facts<'_>, generated_at: &str, out: &mut String) {
    let mut line = |indent: usize, key: &str, value: &str| {
        let _ = writeln!(out, "{:indent$}{key}: {}", "", yaml(value));
    };
    line(0, "base_model", facts.source_model);
    line(0, "base_model_relation", "quantized");
    if facts.contents.is_some() {
        line(0, "library_name", "gguf");
    }
    list(out, "tags", &["vindex", "skulk", "foxlight", facts.quant]);
    license_lines(facts.license, out);
    out.push_str("foxlight:\n");
    let mut line = |key: &str, value: Option<&str>| {
        if let Some(value) = value {
            let _ = writeln!(out, "  {key}: {}", yaml(value));
        }
    };
    line("artifact_type", Some("vindex"));
    line("source_repo", Some(facts.source_model));
    line("source_revision", facts.source_commit);
    line("target_model", Some(facts.source_model));
    line("quant", Some(facts.quant));
    line("catalog_key", Some(facts.catalog_key));
    line("extracted_with", Some(TOOL));
    line("generated_at", Some(generated_at));
    let Some(contents) = &facts.contents else {
        return;
    };
    line("vindex_id", Some(&contents.id.to_string()));
    line("recipe", Some(contents.index.recipe.name()));
    line("slice", Some(contents.slice.name()));
    let _ = writeln!(out, "  size_bytes: {}", contents.size_bytes());
    let types = contents.index.census(contents.slice);
    let _ = writeln!(
        out,
        "  n_tensors: {}",
        types.values().map(|kind| kind.n_tensors).sum::<usize>()
    );
    out.push_str("  tensor_types:\n");
    for (name, kind) in &types {
        let _ = writeln!(out, "    {name}: {}", kind.n_tensors);
    }
    out.push_str("  parts:\n");
    for part in slice_files_of_index(contents.index, contents.slice) {
        let _ = writeln!(
            out,
            "  - file: {}\n    size_bytes: {}\n    sha256: {}",
            yaml(&part.file),
            part.size_bytes,
            yaml(&part.sha256)
        );
    }
}

/// The licence fields of a front matter.
fn license_lines(license: &License, out: &mut String) {
    match (license.ids.as_slice(), license.is_list) {
        ([], _) => {}
        ([one], false) => {
            let _ = writeln!(out, "license: {}", yaml(one));
        }
        (ids, _) => list(
            out,
            "license",
            &ids.iter().map(String::as_str).collect::<Vec<_>>(),
        ),
    }
    for (key, value) in [
        ("license_name", &license.name),
        ("license_link", &license.link),
    ] {
        if let Some(value) = value {
            let _ = writeln!(out, "{key}: {}", yaml(value));
        }
    }
}

fn list(out: &mut String, key: &str, values: &[&str]) {
    let _ = writeln!(out, "{key}:");
    for value in values {
        let _ = writeln!(out, "- {}", yaml(value));
    }
}

fn body(facts: &Facts<'_>, generated_at: &str, out: &mut String) {
    let source = facts.source_model;
    let _ = writeln!(out, "# {}\n", facts.repo);
    let _ = writeln!(
        out,
        "The weights of [{source}](https://huggingface.co/{source}) as a vindex: parts by layer and role, so that attention can\n\
         run where the GPU is and feed-forward weights can be served from cheap memory. Made for Skulk."
    );
    if let Some(Contents {
        slice: Slice::ExpertServer,
        ..
    }) = facts.contents
    {
        out.push_str("This repository holds the slice `expert-server`: metadata and feed-forward weights, without attention and embeddings.\n");
    }
    out.push_str("\n## Provenance\n\n| Field | Value |\n|---|---|\n");
    let unknown = "unknown";
    let mut row = |field: &str, value: &str| {
        let _ = writeln!(out, "| {field} | {} |", cell(value));
    };
    row("Artifact type", "vindex");
    row("Source model", source);
    row("Source revision", facts.source_commit.unwrap_or(unknown));
    row("Target model", source);
    row("Quantization", facts.quant);
    row("Catalog key", facts.catalog_key);
    row("Extracted with", TOOL);
    row("Generated", generated_at);
    if let Some(contents) = &facts.contents {
        row("VindexId", &contents.id.to_string());
        row("Slice", contents.slice.name());
        contents_section(contents, out);
    }
    usage(facts, out);
    license_section(facts.license, source, out);
}

fn contents_section(contents: &Contents<'_>, out: &mut String) {
    let parts = slice_files_of_index(contents.index, contents.slice);
    let _ = writeln!(
        out,
        "\n## Contents\n\n{} GGUF parts, {} bytes.\n",
        parts.len(),
        contents.size_bytes()
    );
    out.push_str("| Tensor type | Tensors | Bytes |\n|---|---:|---:|\n");
    for (name, kind) in contents.index.census(contents.slice) {
        let _ = writeln!(out, "| {name} | {} | {} |", kind.n_tensors, kind.size_bytes);
    }
    out.push_str("\n| Part | Bytes | sha256 |\n|---|---:|---|\n");
    for part in parts {
        let _ = writeln!(
            out,
            "| {} | {} | `{}` |",
            cell(&part.file),
            part.size_bytes,
            part.sha256
        );
    }
}

fn usage(facts: &Facts<'_>, out: &mut String) {
    out.push_str("\n## Usage\n\n");
    let Some(contents) = &facts.contents else {
        out.push_str(
            "This vindex was written by another larql than Skulk's; read it with that one.\n",
        );
        return;
    };
    let repo = facts.repo;
    let dir = "vindex";
    let _ = writeln!(
        out,
        "```sh\nlarql pull {repo} -o {dir}\nlarql verify {dir}\nlarql dump {dir}\n```"
    );
    match (contents.slice, contents.index.parts.first()) {
        (Slice::Full, Some(first)) => {
            let _ = writeln!(
                out,
                "\nA weight server needs the feed-forward parts alone:\n\n\
                 ```sh\nlarql pull {repo} -o experts --slice expert-server\n```\n\n\
                 The whole directory also opens in llama.cpp as a split GGUF:\n\n\
                 ```sh\nllama-cli -m {dir}/{} -p \"Hello\"\n```",
                first.file
            );
        }
        _ => out.push_str("\nA node takes the other parts from a repository of the full vindex with the same VindexId.\n"),
    }
}

fn license_section(license: &License, source: &str, out: &mut String) {
    out.push_str("\n## License\n\n");
    let _ = match (license.title(), &license.link) {
        (Some(title), Some(link)) => writeln!(
            out,
            "Derived from {source} and published under its license, unchanged: {} (<{}>).",
            cell(&title),
            link.replace(['<', '>', '\n'], "")
        ),
        (Some(title), None) => writeln!(
            out,
            "Derived from {source} and published under its license, unchanged: {}.",
            cell(&title)
        ),
        (None, _) => writeln!(
            out,
            "Derived from {source}; the license follows the source, whose card states none that could be read."
        ),
    };
}

impl Contents<'_> {
    fn size_bytes(&self) -> u64 {
        slice_files_of_index(self.index, self.slice)
            .iter()
            .map(|part| part.size_bytes)
            .sum()
    }
}

/// A text as a YAML scalar that every reader takes for the same text: plain where nothing could mistake it for a
/// number (of any base), a date, a truth value or syntax, else in double quotes with JSON's escapes, which YAML shares.
fn yaml(text: &str) -> String {
    const WORDS: [&str; 10] = [
        "true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan",
    ];
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ' '))
        && !text.ends_with(' ')
        && !text.chars().all(|c| c.is_ascii_hexdigit())
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    if is_plain {
        text.to_owned()
    } else {
        Value::from(text).to_string().replace('\u{7f}', "\\u007f")
    }
}

/// A text inside a table of Markdown.
fn cell(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace(['\n', '\r'], " ")
        .replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(license: &License) -> Facts<'_> {
        Facts {
            repo: "acme/m-vindex",
            source_model: "owner/m",
            source_commit: Some("1111111111111111111111111111111111111111"),
            license,
            quant: "q4k",
            catalog_key: "acme/m",
            contents: None,
        }
    }

    #[test]
    fn a_card_of_a_vindex_that_is_not_ours() {
        let license = License::of(
            &serde_json::json!({"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}),
        );
        insta::assert_snapshot!(render(&facts(&license), "2026-01-31T23:59:59Z"));
    }

    #[test]
    fn front_matter_reads_back_as_it_was_meant() {
        let license = License::of(
            &serde_json::json!({"license": ["mit", "no"], "license_name": "a: \"b\" # c", "license_link": 7}),
        );
        let text = render(&facts(&license), "2026-01-31T23:59:59Z");
        let front = hub::card::front_matter(&text).unwrap().unwrap();
        assert_eq!(front["license"], serde_json::json!(["mit", "no"]));
        assert_eq!(front["license_name"], "a: \"b\" # c");
        assert_eq!(front.get("license_link"), None);
        assert_eq!(
            front["foxlight"]["source_revision"],
            "1111111111111111111111111111111111111111"
        );
        assert_eq!(front["foxlight"]["generated_at"], "2026-01-31T23:59:59Z");
        assert_eq!(
            front["tags"],
            serde_json::json!(["vindex", "skulk", "foxlight", "q4k"])
        );
    }

    #[test]
    fn a_card_that_differs_in_its_time_alone_is_known() {
        let (mit, none) = (
            License::of(&serde_json::json!({"license": "mit"})),
            License::default(),
        );
        let old = render(&facts(&mit), "2020-01-01T00:00:00Z");
        assert_eq!(
            same_but_time(|time| render(&facts(&mit), time), &old).as_deref(),
            Some("2020-01-01T00:00:00Z")
        );
        assert_eq!(
            same_but_time(|time| render(&facts(&none), time), &old),
            None
        );
        assert_eq!(
            same_but_time(|time| render(&facts(&mit), time), "# no card\n"),
            None
        );
    }
}
