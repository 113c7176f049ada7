//! Tokens to logits: attention here, feed-forward rows from whoever holds the weights.
//!
//! Read in this order: [`FeedForward`] (the seam: one method over a batch of rows), [`Request`] and [`Event`] (what
//! goes in and comes out), [`Tokenizer`] (texts to tokens and back).
//!
//! Invariant: a row's result depends on that row alone, not on the rows computed beside it, on threads, or on who
//! computed it; so a split run gives bit for bit the logits of an unsplit one. No async and no HTTP here.

mod ffn;
mod request;
mod tokenizer;

pub use ffn::{Batch, FeedForward, FfnError, Visit};
pub use request::{
    EngineError, Event, FinishReason, Request, Sampling, Sink, Token, TokenLogprob, Usage,
};
pub use tokenizer::{Decoder, Tokenizer, TokenizerError};
