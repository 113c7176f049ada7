//! `provenance.json`: where a vindex came from. Nothing here is part of its identity.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::source::Origin;

/// Name in the directory.
pub const PROVENANCE_FILE: &str = "provenance.json";

/// Where a vindex came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// `owner/name` on the Hub, when the checkpoint was read from there.
    pub repo: Option<String>,
    /// The commit that was read, 40 lower-case hex digits.
    pub commit: Option<String>,
    /// What wrote the vindex, with its version.
    pub tool: String,
    /// When, in UTC: `2026-01-31T23:59:59Z`.
    pub extracted_at: String,
}

impl Provenance {
    pub(crate) fn now(origin: &Origin) -> Provenance {
        Provenance {
            repo: origin.repo.clone(),
            commit: origin.commit.clone(),
            tool: concat!("vindex ", env!("CARGO_PKG_VERSION")).to_owned(),
            extracted_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        }
    }

    /// The text of `provenance.json`.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data serialises");
        text.push('\n');
        text
    }
}
