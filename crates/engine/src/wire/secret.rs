//! What both ends of a connection know and never send.
//!
//! Invariant: no way of printing a secret shows it. Reading it from a file or the environment is the programs' business.

use std::fmt;
use std::sync::Arc;

/// The shared secret of a cluster; empty when none is configured. Its strength is its length in random bytes: whoever
/// records a handshake can try guesses at leisure, so a pass phrase is not enough.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// The secret with these bytes, exactly: a line's end read with it would belong to it.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Secret {
        Secret(bytes.into())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key of a handshake.
    pub(super) fn key(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_prints_as_stars() {
        let secret = Secret::new(*b"hunter2");
        assert_eq!(
            format!("{secret} {secret:?} {:?}", Some(&secret)),
            "*** *** Some(***)"
        );
        assert!(!secret.is_empty() && Secret::default().is_empty());
    }
}
