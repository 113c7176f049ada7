//! The keys that clients show: read once, compared without telling by time how much of one was right, never printed.
//!
//! Invariant: a key is kept as its hash alone, so that nothing here could show it.

use std::fmt;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// The keys of which a client must show one; without any, everyone is let in.
#[derive(Clone, Default)]
pub(crate) struct Keys(Vec<[u8; 32]>);

/// A key shorter than this can be guessed.
const CHARS_MIN: usize = 8;
const KEYS_MAX: usize = 1000;

impl Keys {
    /// One key a line; empty lines and lines that begin with `#` are none.
    ///
    /// # Errors
    /// A sentence that names a line and repeats none.
    pub(crate) fn parse(text: &str) -> Result<Keys, String> {
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if key.len() < CHARS_MIN || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(format!(
                    "line {} is no key: at least {CHARS_MIN} printable characters without spaces",
                    i + 1
                ));
            }
            keys.push(Sha256::digest(key).into());
        }
        match keys.len() {
            0 => Err("there is no key in it".to_owned()),
            n if n > KEYS_MAX => Err(format!("{n} keys; at most {KEYS_MAX} are taken")),
            _ => Ok(Keys(keys)),
        }
    }

    /// Whether everyone is let in.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them. All are compared, whichever it is.
    pub(crate) fn hold(&self, key: &str) -> bool {
        let shown: [u8; 32] = Sha256::digest(key).into();
        let found = self
            .0
            .iter()
            .fold(Choice::from(0), |found, key| found | key.ct_eq(&shown));
        found.into()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_keys_and_comments() {
        let keys = Keys::parse("# ours\nfirst-key-1\n\n  second-key-2 \n").expect("valid");
        assert!(keys.hold("first-key-1") && keys.hold("second-key-2"));
        assert!(!keys.hold("first-key-") && !keys.hold("") && !keys.hold("# ours"));
        assert_eq!(format!("{keys:?}"), "2 keys");
    }

    #[test]
    fn what_is_no_key_is_told_by_its_line_alone() {
        for text in ["", "# none\n", "good-key-1\nshort", "with space in it"] {
            let error = Keys::parse(text).expect_err("refused");
            assert!(
                !error.contains("short") && !error.contains("space in"),
                "{error}"
            );
        }
    }
}
