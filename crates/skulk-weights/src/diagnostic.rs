//! What is wrong with a catalog file: each finding with its file, line, entry and what to do.
//!
//! Invariant: reading goes on after a finding, so that one run reports all of them. What is kept is bounded: of more than
//! [`KEPT_MAX`] errors or warnings the rest is only counted. Nothing that a file holds reaches a terminal unescaped.

use std::fmt;

use serde::Serialize;

use crate::name;
use crate::yaml::{self, Mapping, Node, Place, Value};

/// The most errors, and the most warnings, that are kept of one load.
pub(crate) const KEPT_MAX: usize = 500;

/// Whether the catalog can be used in spite of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    Error,
    Warning,
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Diagnostic {
    pub(crate) severity: Severity,
    /// The file as the user named it, or `builtin:NAME`.
    pub(crate) file: String,
    /// Counted from 1; absent when the finding is about the whole file.
    pub(crate) line: Option<usize>,
    pub(crate) column: Option<usize>,
    /// The entry at fault: its effective key, or `models[i]` while that is unknown.
    pub(crate) entry: Option<String>,
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.severity {
            Severity::Error => f.write_str("error: ")?,
            Severity::Warning => f.write_str("warning: ")?,
        }
        f.write_str(&printable(&self.file))?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        // "FILE not found" reads as one sentence.
        f.write_str(if self.message.starts_with("not found") {
            " "
        } else {
            ": "
        })?;
        if let Some(entry) = &self.entry {
            write!(f, "{}: ", printable(entry))?;
        }
        f.write_str(&printable(&self.message))?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {}", printable(hint))?;
        }
        Ok(())
    }
}

/// `text`, in which what a file may hold to confuse a terminal is escaped.
fn printable(text: &str) -> String {
    let escape = |c: char| match name::is_invisible(c) {
        true => c.escape_default().collect(),
        false => String::from(c),
    };
    text.chars().map(escape).collect()
}

/// The findings of one load.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// At most [`KEPT_MAX`] errors and as many warnings.
    pub(crate) findings: Vec<Diagnostic>,
    /// All errors, kept or not.
    pub(crate) n_errors: usize,
    n_warnings: usize,
}

impl Report {
    /// Puts the findings of each file in the order of its lines; the files keep their order.
    pub(crate) fn sort(&mut self) {
        let mut files: Vec<String> = Vec::new();
        for finding in &self.findings {
            if !files.contains(&finding.file) {
                files.push(finding.file.clone());
            }
        }
        let rank = |file: &String| files.iter().position(|known| known == file);
        self.findings
            .sort_by_key(|finding| (rank(&finding.file), finding.line, finding.column));
    }

    /// A finding about a file as a whole.
    pub(crate) fn file_error(
        &mut self,
        file: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.keep(of_file(Severity::Error, file, message.into(), hint.into()));
    }

    /// A remark about a file as a whole.
    pub(crate) fn file_warning(
        &mut self,
        file: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.keep(of_file(
            Severity::Warning,
            file,
            message.into(),
            hint.into(),
        ));
    }

    /// The mapping that `text`, the whole of `file`, holds; `None` when it holds none, which is reported. `first` is the
    /// key that such a file begins with.
    pub(crate) fn mapping(&mut self, file: &str, text: &str, first: &str) -> Option<Mapping> {
        match yaml::parse(text) {
            Ok(Node {
                value: Value::Mapping(mapping),
                ..
            }) => return Some(mapping),
            Ok(root) => self.file_error(
                file,
                "must contain a top-level mapping",
                format!("it holds {}; start it with `{first}:`", root.kind()),
            ),
            Err(error) => {
                let at = At {
                    file,
                    place: error.place,
                    entry: None,
                };
                self.error(
                    &at,
                    format!("not readable as YAML: {}", error.message),
                    "correct the text at this line; nothing else in the file was checked",
                );
            }
        }
        None
    }

    /// A finding without which the catalog would be usable.
    pub(crate) fn error(
        &mut self,
        at: &At<'_>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.push(Severity::Error, at, message.into(), hint.into());
    }

    /// A finding in spite of which the catalog is usable.
    pub(crate) fn warning(
        &mut self,
        at: &At<'_>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.push(Severity::Warning, at, message.into(), hint.into());
    }

    fn push(&mut self, severity: Severity, at: &At<'_>, message: String, hint: String) {
        self.keep(Diagnostic {
            severity,
            file: at.file.to_owned(),
            line: Some(at.place.line),
            column: Some(at.place.column),
            entry: at.entry.map(str::to_owned),
            message,
            hint: Some(hint),
        });
    }

    fn keep(&mut self, finding: Diagnostic) {
        let n = match finding.severity {
            Severity::Error => &mut self.n_errors,
            Severity::Warning => &mut self.n_warnings,
        };
        *n += 1;
        if *n <= KEPT_MAX {
            self.findings.push(finding);
        }
    }
}

fn of_file(severity: Severity, file: &str, message: String, hint: String) -> Diagnostic {
    Diagnostic {
        severity,
        file: file.to_owned(),
        line: None,
        column: None,
        entry: None,
        message,
        hint: Some(hint),
    }
}

/// Where a finding is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At<'a> {
    pub(crate) file: &'a str,
    pub(crate) place: Place,
    pub(crate) entry: Option<&'a str>,
}

/// The known name that `name` was probably meant to be.
pub(crate) fn did_you_mean<'a>(
    name: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let n_edits_max = (name.chars().count() / 3).clamp(1, 4);
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(n_edits, _)| *n_edits <= n_edits_max)
        .min_by_key(|(n_edits, _)| *n_edits)
        .map(|(_, candidate)| candidate)
}
