//! Who guesses, as a command line names it.
//!
//! Invariant: a choice names files and opens none.

use std::str::FromStr;

use super::Drafts;

/// Who guesses, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DraftChoice {
    /// `none`.
    #[default]
    None,
    /// `ngram`: the text itself.
    NGram,
}

/// Why nobody can guess.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// The word names nobody.
    #[error("{0:?} guesses no tokens; use none or ngram")]
    Unknown(String),
}

impl FromStr for DraftChoice {
    type Err = DraftError;

    fn from_str(text: &str) -> Result<DraftChoice, DraftError> {
        match text {
            "none" => Ok(DraftChoice::None),
            "ngram" => Ok(DraftChoice::NGram),
            _ => Err(DraftError::Unknown(text.to_owned())),
        }
    }
}

impl Drafts {
    /// Opens what the choice names.
    ///
    /// # Errors
    /// [`DraftError`].
    pub fn open(choice: &DraftChoice) -> Result<Drafts, DraftError> {
        match choice {
            DraftChoice::None => Ok(Drafts::None),
            DraftChoice::NGram => Ok(Drafts::NGram),
        }
    }
}
