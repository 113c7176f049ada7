//! The secret that a request may carry.
//!
//! Invariant: it cannot be printed; only [`Token::header`] reveals it, to the wire.

use std::fmt;

use reqwest::header::HeaderValue;

/// An access token of the Hub; prints as `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token in `text`, without the white space around it; `None` when nothing is left.
    #[must_use]
    pub fn new(text: &str) -> Option<Token> {
        let text = text.trim();
        (!text.is_empty()).then(|| Token(text.to_owned()))
    }

    /// The `Authorization` header; `None` when the token holds bytes that no header may carry.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_never_prints() {
        let token = Token::new(" hf_secret\n").unwrap();
        assert_eq!(format!("{token} {token:?}"), "*** ***");
        assert!(!format!("{:?}", token.header()).contains("secret"));
        assert_eq!(Token::new("  \n"), None);
    }
}
