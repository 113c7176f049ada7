//! The seam between attention and feed-forward: one method over a batch of rows.
//!
//! A feed-forward layer is a list of experts; a dense layer has one, expert 0. What every token goes through beside the
//! experts that are chosen for it (shared experts, a dense branch) is one more expert: its number is the one after the
//! last that can be chosen, and whoever holds expert 0 holds it too. The router stays with attention: whoever
//! answers here is told which rows visit which experts, and gives back one row for each visit. Weighting and summing
//! them is the caller's, in the router's order and then what is beside, so that nothing depends on who holds what.
//!
//! Invariant: the row of a visit depends on the input row, the layer and the expert, and on nothing else.

use std::time::Duration;

use vindex::Experts;

/// That a row goes through an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Which of the batch's rows.
    pub row: u32,
    /// Which expert of the layer; 0 in a dense layer.
    pub expert: u32,
}

/// The expert beside those that a router chooses from, where there is one.
pub(crate) fn beside(experts: &Experts) -> Option<u32> {
    (experts.shared.is_some() || experts.dense_branch).then_some(experts.n)
}

/// Rows that enter one feed-forward layer.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `(n_rows, hidden)`, row-major: the residual stream after a feed-forward norm of the layer; where a dense branch has
    /// another norm than the experts, a token has a row for each.
    pub rows: &'a [f32],
    /// Who goes where: sorted by row, the visits of a row in the router's order.
    pub visits: &'a [Visit],
}

/// Whoever computes feed-forward rows: weights in this process, or peers on a network.
pub trait FeedForward: Send + Sync {
    /// Fills `out`, `(n_visits, hidden)` row-major, with the unweighted result of each visit: for input `x` and the
    /// expert's matrices `down · (activation(gate · x) * (up · x))`.
    ///
    /// # Errors
    /// [`FfnError`]; `out` is then unspecified and the layer may be asked again.
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError>;
}

/// Why feed-forward rows could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FfnError {
    /// Nobody that is reachable holds these weights.
    #[error("no weight server holds layer {layer}, expert {expert}: {reason}")]
    NoPeer {
        /// Layer asked for.
        layer: u32,
        /// First expert asked for that nobody answers for.
        expert: u32,
        /// What became of those who do hold it.
        reason: String,
    },
    /// Every attempt together took longer than the request may.
    #[error("layer {layer} was not answered within {deadline:?} (last asked: {peer})")]
    Deadline {
        /// Layer asked for.
        layer: u32,
        /// How long an answer may take, over all attempts.
        deadline: Duration,
        /// The peer that was asked last.
        peer: String,
    },
    /// The layer, an expert or the width is not that of the model.
    #[error("{0}")]
    Invalid(String),
}
