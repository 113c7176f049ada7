//! What is asked of the engine and what it answers: a prompt in tokens, and a stream of events.
//!
//! Invariant: every request ends with exactly one [`Event::Finished`] or [`Event::Failed`], and nothing comes after it.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::ffn::FfnError;
use crate::grammar::Grammar;

/// A generation. [`Request::new`] is greedy and without conditions; the fields say the rest.
#[derive(Debug)]
pub struct Request {
    /// Tokens, with the ones that begin a text where the model wants them. Not empty.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; the model's context ends a generation too.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Texts that end the generation and are not part of it.
    pub stop: Vec<String>,
    /// Goes on past the tokens that end a text.
    pub ignore_eos: bool,
    /// How many alternatives are told for each token; `Some(0)` tells the chosen token's logprob only.
    pub top_logprobs: Option<usize>,
    /// What the answer has to be a text of. It ends the generation when nothing may follow.
    pub grammar: Option<Grammar>,
    /// Special tokens have their names in the text, for whoever looks for them there.
    pub show_special: bool,
    /// When it fails if it has not ended.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A greedy generation of at most `max_tokens` after `prompt`.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Request {
        Request {
            prompt,
            max_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            ignore_eos: false,
            top_logprobs: None,
            grammar: None,
            show_special: false,
            deadline: None,
        }
    }
}

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token. Else logits are divided by this.
    pub temperature: f32,
    /// Only the k most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// Logits of tokens that occurred, in the prompt or since, are divided (positive) or multiplied (negative) by
    /// this; 1: off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that was generated.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token for each time that it was generated.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed, prompt and settings give the same tokens. None: another each time.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// Where the events of a request go. It is called on the engine's thread and must not wait; `Break` cancels the request
/// (whoever breaks hears no more of it).
pub type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// What became of a request, bit by bit.
#[derive(Clone, Debug)]
pub enum Event {
    /// One more token.
    Token(Token),
    /// The end; all text was told.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Text that was held back until now.
        text: String,
        /// What it took.
        usage: Usage,
    },
    /// The end, with an error.
    Failed(EngineError),
}

/// A generated token.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// Text that is certain with it: empty while a character is incomplete or a stop text may be beginning.
    pub text: String,
    /// When asked for: itself, under the distribution before temperature and filters.
    pub logprob: Option<f32>,
    /// When asked for: the most likely tokens, most likely first.
    pub top: Vec<TokenLogprob>,
}

/// A token and how likely it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token's number.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A token that ends a text, or a stop text, or a grammar that is complete.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, how many were found in the cache.
    pub cached_tokens: usize,
    /// Tokens generated, the one that ended the text included.
    pub completion_tokens: usize,
    /// Guesses that were right: tokens of the answer that took no step of their own.
    pub accepted_tokens: usize,
    /// Guesses that were wrong.
    pub rejected_tokens: usize,
}

/// Why a request was refused or ended early.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// Too many requests wait already.
    #[error("{n_waiting} requests wait already; try again later")]
    Busy {
        /// How many.
        n_waiting: usize,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {got} tokens; this model takes {max} with the answer")]
    PromptTooLong {
        /// Tokens of the prompt.
        got: usize,
        /// Tokens of prompt and answer together.
        max: usize,
    },
    /// Something in the request cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The feed-forward weights could not be reached.
    #[error("feed-forward failed: {0}")]
    Ffn(#[from] FfnError),
    /// The request was not done when its deadline came.
    #[error("the request did not end before its deadline; {n_generated} tokens were generated")]
    Deadline {
        /// Tokens until then.
        n_generated: usize,
    },
    /// Whoever asked wants it no more.
    #[error("the request was cancelled")]
    Cancelled,
    /// The engine failed in a way that is a mistake of its own.
    #[error("the engine failed: {0}")]
    Internal(String),
    /// The engine is shutting down.
    #[error("the engine is stopping")]
    Stopping,
}
