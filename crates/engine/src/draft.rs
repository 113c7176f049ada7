//! Drafting: tokens are guessed, and the model checks all guesses in the step in which it would have computed one token.
//!
//! Checking a guess costs a row beside others, and reading the weights, or the way to a weight server and back, is paid
//! once for all rows; so a right guess is a token for little. A generation that guesses `k` tokens contributes `1 + k`
//! rows to a step, and the step gives logits after each. The next token is chosen from each row exactly as without
//! guesses, with the settings, the penalties, the grammar and the random number that are its own; if it is the guessed
//! one, the row after it is right too, and so on until the first that was guessed wrong, whose row has given the right
//! token. What the cache knows of later rows is forgotten.
//!
//! So a token that is told was always chosen from the model's own logits by the request's own random numbers: the same
//! seed gives the same tokens with drafts as without, and the distribution is the model's by construction. For a greedy
//! generation this is what Leviathan et al. (2023) do. For a sampled one it is their acceptance for a proposal that is a
//! function of the random number: drafters draw with the number that the token will be chosen with, so that close
//! distributions choose the same token (Daliri et al. 2024, "Coupling without communication and drafter-invariant
//! speculative decoding"). Accepting by the ratio of probabilities would tie the tokens of a seed to what was guessed,
//! and with that to the time that steps took.
//!
//! Who guesses is a [`Drafts`]. How much is guessed is decided before every step from what was measured (`depth.rs`).
//!
//! Invariant: drafts change when tokens are told, never which.

mod choice;
pub(crate) mod depth;
pub(crate) mod drafter;
mod head;
pub(crate) mod memory;
mod ngram;

use std::fmt;
use std::sync::Arc;

use crate::ffn::FeedForward;
use crate::model::Model;
use crate::request::EngineError;

pub use choice::{DraftChoice, DraftError};
pub use head::{Head, HeadError, HeadNumbers, HeadPass, HeadWork, Routing};
pub(crate) use ngram::repeated;

/// Who guesses the next tokens.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Drafts {
    /// Nobody: one token a step.
    #[default]
    None,
    /// The text itself: what came after the same tokens before. Needs no weights, and is good where answers repeat what
    /// was said: code, summaries, lists.
    NGram,
    /// A head that was trained with the model.
    Head(Arc<Head>),
    /// A smaller model of the same tokens.
    Model(Assistant),
}

/// A model that guesses for another.
#[derive(Clone)]
pub struct Assistant {
    /// Attention, embeddings and output head.
    pub model: Arc<Model>,
    /// Whoever computes its feed-forward rows.
    pub ffn: Arc<dyn FeedForward>,
}

impl fmt::Debug for Assistant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Assistant")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Drafts {
    /// Whether they can guess for `model`.
    pub(crate) fn check(&self, model: &Model) -> Result<(), EngineError> {
        let config = model.config();
        let (what, got, expected) = match self {
            Drafts::None | Drafts::NGram => return Ok(()),
            Drafts::Head(head) => ("hidden states", head.hidden(), config.hidden as usize),
            Drafts::Model(Assistant { model, .. }) => (
                "tokens",
                model.config().vocab as usize,
                config.vocab as usize,
            ),
        };
        if got == expected {
            return Ok(());
        }
        Err(EngineError::Invalid(format!(
            "whoever guesses has {got} {what}, the model {expected}"
        )))
    }
}

/// Most tokens that are guessed for one generation in a step.
pub const DRAFT_DEPTH_MAX: usize = 8;
