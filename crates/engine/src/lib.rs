//! Tokens to logits: attention here, feed-forward rows from whoever holds the weights.
//!
//! Read in this order: [`Forward`] (the pass, on one page), `mixer` and [`KvCache`] (what a row sees of the rows
//! before it), [`FeedForward`] (the seam: one method over a batch of rows) and [`Local`] (the weights of this process),
//! [`Request`] and [`Event`] (what goes in and comes out), [`Tokenizer`] and [`ChatTemplate`] (texts to tokens and back),
//! [`Sampler`] and [`Grammar`] (logits to a token), [`Engine`] (many generations at once), [`Drafts`] (several tokens of
//! one in a step).
//!
//! Invariant: a row's result depends on that row alone, not on the rows computed beside it, on threads, or on who
//! computed it; so a split run gives bit for bit the logits of an unsplit one. No async and no HTTP here.

mod chat;
mod collector;
mod draft;
mod ffn;
mod forward;
mod grammar;
mod kv;
mod local;
mod mixer;
mod model;
mod request;
mod rope;
mod router;
mod rows;
mod sampler;
mod scheduler;
mod state;
mod stop;
mod threads;
mod tokenizer;
mod weights;
pub mod wire;

pub use chat::{ChatError, ChatTemplate, Conversation};
pub use collector::{Collector, ColumnSums};
pub use draft::{
    Assistant, DRAFT_DEPTH_MAX, DraftChoice, DraftError, Drafts, Head, HeadError, HeadNumbers,
    HeadPass, HeadWork, Routing,
};
pub use ffn::{Batch, FeedForward, FfnError, Visit};
pub use forward::{Forward, StepError, Wanted, Work};
pub use grammar::{Grammar, GrammarError, GrammarFactory};
pub use kv::{KvCache, KvType, OutOfPages, PAGE, Sequence, UnknownKvType};
pub use local::Local;
pub use model::Model;
pub use request::{
    EngineError, Event, FinishReason, Request, Sampling, Sink, Token, TokenLogprob, Usage,
};
pub use sampler::{Sampler, logprobs, most_likely};
pub use scheduler::{Engine, EngineOptions, EngineParts, EngineStats, Ticket};
pub use stop::{Passed, Stops};
pub use threads::Pool;
pub use tokenizer::{Decoder, Tokenizer, TokenizerError};
pub use weights::ModelError;
