//! `provenance.json`: where a vindex came from. Nothing here is part of its identity.

use std::time::{SystemTime, UNIX_EPOCH};

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
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Provenance {
            repo: origin.repo.clone(),
            commit: origin.commit.clone(),
            tool: concat!("vindex ", env!("CARGO_PKG_VERSION")).to_owned(),
            extracted_at: utc(since_epoch.as_secs()),
        }
    }

    /// The text of `provenance.json`.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data serialises");
        text.push('\n');
        text
    }
}

/// Seconds since 1970 as a date of the Gregorian calendar and a time of day.
fn utc(unix_s: u64) -> String {
    let (mut days, second) = (unix_s / 86_400, unix_s % 86_400);
    let mut year = 1970;
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [
        31,
        28 + u64::from(is_leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z",
        month + 1,
        days + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_across_leap_years() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(951_868_799), "2000-02-29T23:59:59Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
        assert_eq!(utc(1_767_225_599), "2025-12-31T23:59:59Z");
    }
}
