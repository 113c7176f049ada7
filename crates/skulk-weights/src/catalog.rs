//! The catalog: every entry of every source, in order, checked against each other.
//!
//! Invariant: a `Catalog` has no errors; loading reports all of them at once. Reads files, never the network.

use std::path::{Path, PathBuf};

use terminal::Failure;

use crate::config::{self, Item};
use crate::diagnostic::{Diagnostic, KEPT_MAX, Report, did_you_mean};
use crate::entry::{Entry, Source, SourceKind, Tier};
use crate::manifest::{self, Draft};
use crate::{unique, yaml};

/// The built-in catalog.
const FOXLIGHT: &str = include_str!("foxlight.yaml");
/// The config that is read from the working directory, and its older name.
const CONFIG: &str = "skulk-weights.yaml";
const CONFIG_LEGACY: &str = "skulk-vindex.yaml";

/// Which files make up the catalog.
#[derive(Debug, Clone)]
pub(crate) enum View {
    /// One manifest and nothing else, without namespace and owner.
    Manifest(PathBuf),
    /// The sources that a config lists.
    Config(PathBuf),
    /// The config in the working directory, else the built-in catalog.
    Default,
    /// The built-in catalog alone.
    Builtin,
}

/// The merged view.
#[derive(Debug, Clone)]
pub(crate) struct Catalog {
    pub(crate) sources: Vec<Source>,
    /// In the order of the sources and of their files.
    pub(crate) entries: Vec<Entry>,
    pub(crate) warnings: Vec<Diagnostic>,
}

/// Everything that is wrong with a catalog, warnings included; at least one finding is an error.
#[derive(Debug, thiserror::Error)]
#[error("the catalog has {n_errors} error{}{}", if *n_errors == 1 { "" } else { "s" }, more(*n_errors))]
pub(crate) struct Invalid {
    pub(crate) findings: Vec<Diagnostic>,
    /// All errors; `findings` holds the first [`KEPT_MAX`] of them.
    pub(crate) n_errors: usize,
}

fn more(n_errors: usize) -> String {
    match n_errors.checked_sub(KEPT_MAX) {
        None | Some(0) => String::new(),
        Some(_) => format!("; the first {KEPT_MAX} are shown"),
    }
}

impl From<Invalid> for Failure {
    fn from(invalid: Invalid) -> Failure {
        let lines = invalid
            .findings
            .iter()
            .map(|finding| format!("{finding}\n"));
        Failure::Several {
            text: lines.collect::<String>() + &format!("error: {invalid}"),
            value: serde_json::json!({"valid": false, "error": invalid.to_string(), "findings": invalid.findings}),
        }
    }
}

impl Catalog {
    /// Reads and checks the view. `working_dir` is where the default configs are looked for, `home` what `~` stands for.
    pub(crate) fn load(
        view: &View,
        working_dir: &Path,
        home: Option<&Path>,
    ) -> Result<Catalog, Invalid> {
        let mut report = Report::default();
        let mut drafts = Vec::new();
        let mut sources = Vec::new();
        for item in items(view, working_dir, home, &mut report) {
            let (mut source, text) = match item {
                Item::Builtin => (Catalog::foxlight(), Some(FOXLIGHT.to_owned())),
                Item::Path(path, source) => (source, read_text(&path, &mut report)),
            };
            let Some(text) = text else { continue };
            let read = manifest::read(&source, &text, &mut report);
            source.entries = read.len();
            drafts.extend(read);
            sources.push(source);
        }
        unique::check(&drafts, &mut report);
        report.sort();
        if report.n_errors > 0 {
            return Err(Invalid {
                findings: report.findings,
                n_errors: report.n_errors,
            });
        }
        let entries = drafts
            .into_iter()
            .filter_map(|draft: Draft| draft.entry)
            .collect();
        Ok(Catalog {
            sources,
            entries,
            warnings: report.findings,
        })
    }

    /// The source of the built-in catalog.
    pub(crate) fn foxlight() -> Source {
        Source {
            kind: SourceKind::Builtin,
            name: "foxlight".to_owned(),
            namespace: Some("foxlight".to_owned()),
            hf_owner: Some("FoxlightAI".to_owned()),
            hf_collection: Some("FoxlightAI/vindexes-6a124406dd5fb439c431b051".to_owned()),
            entries: 0,
            origin: "package:foxlight".to_owned(),
        }
    }

    /// The entry of that effective key.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// What to say to a user who asked for a key that is not there.
    pub(crate) fn missing_key_hint(&self, key: &str) -> String {
        let short = |entry: &&Entry| entry.key.rsplit('/').next() == Some(key);
        match self.entries.iter().find(short) {
            Some(entry) => format!("the key includes its namespace: {}", entry.key),
            None => match did_you_mean(key, self.entries.iter().map(|entry| entry.key.as_str())) {
                Some(known) => format!("did you mean {known}?"),
                None => "`skulk-weights catalog list` prints the keys".to_owned(),
            },
        }
    }

    /// Keys of a tier, or of all.
    pub(crate) fn keys(&self, tier: Option<Tier>) -> Vec<&str> {
        self.entries
            .iter()
            .filter(|entry| tier.is_none_or(|tier| entry.tier == tier))
            .map(|entry| entry.key.as_str())
            .collect()
    }
}

fn items(view: &View, working_dir: &Path, home: Option<&Path>, report: &mut Report) -> Vec<Item> {
    let path = match view {
        View::Manifest(path) => {
            let source = Source {
                kind: SourceKind::Manifest,
                name: path
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                namespace: None,
                hf_owner: None,
                hf_collection: None,
                entries: 0,
                origin: path.display().to_string(),
            };
            return vec![Item::Path(path.clone(), source)];
        }
        View::Config(path) => path.clone(),
        View::Default if working_dir.join(CONFIG).is_file() => PathBuf::from(CONFIG),
        View::Default if working_dir.join(CONFIG_LEGACY).is_file() => {
            report.file_warning(
                CONFIG_LEGACY,
                "this name of the config is deprecated",
                format!("rename it to {CONFIG}"),
            );
            PathBuf::from(CONFIG_LEGACY)
        }
        View::Default | View::Builtin => return vec![Item::Builtin],
    };
    read_text(&path, report)
        .map(|text| config::read(&path, &text, home, report))
        .unwrap_or_default()
}

fn read_text(path: &Path, report: &mut Report) -> Option<String> {
    let file = path.display().to_string();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata,
        Ok(_) => {
            report.file_error(
                &file,
                "not found",
                "there is a directory of that name; name a YAML file",
            );
            return None;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            report.file_error(&file, "not found", "check the path; a relative one starts at the working directory, in a config at the config's directory");
            return None;
        }
        Err(error) => {
            report.file_error(
                &file,
                format!("cannot be read: {error}"),
                "check the path and its permissions",
            );
            return None;
        }
    };
    if metadata.len() > yaml::TEXT_BYTES_MAX {
        report.file_error(
            &file,
            format!("is {} bytes long", metadata.len()),
            format!("a catalog file has at most {} bytes", yaml::TEXT_BYTES_MAX),
        );
        return None;
    }
    match std::fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) => Some(text),
        Ok(Err(error)) => {
            let at = error.utf8_error().valid_up_to();
            report.file_error(
                &file,
                format!("is not UTF-8 text (byte {at})"),
                "save the file as UTF-8",
            );
            None
        }
        Err(error) => {
            report.file_error(
                &file,
                format!("cannot be read: {error}"),
                "check the path and its permissions",
            );
            None
        }
    }
}

#[cfg(test)]
mod tests;
