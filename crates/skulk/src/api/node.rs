//! What all requests of a node share, and the steps that chat and completions have in common.
//!
//! Invariant: nothing in it changes while it serves, but for counters.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::wire::{Remote, RemoteStats};
use engine::{ChatTemplate, Engine, Grammar, GrammarFactory, Request, Tokenizer};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::answer::{Head, random};
use super::calls::Spelling;
use crate::error::ApiError;
use crate::keys::Keys;
use crate::metrics::{DraftCounts, Load, Metrics};
use crate::request::Common;

/// A model that is served.
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// `None`: the model has none, and chat is refused.
    pub(crate) template: Option<Template>,
    /// `None`: the tokenizer cannot be used with grammars, for this reason.
    pub(crate) grammars: Result<GrammarFactory, String>,
    /// As the API names the model.
    pub(crate) name: String,
    /// Tokens of a prompt with its answer.
    pub(crate) context: usize,
    /// Of the weights.
    pub(crate) fingerprint: String,
    /// When it began to serve, seconds since 1970.
    pub(crate) created: u64,
    /// How long a request may take.
    pub(crate) deadline: Duration,
    pub(crate) remote: Option<Arc<Remote>>,
    pub(crate) keys: Keys,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether tokens are guessed.
    pub(crate) drafts: bool,
    /// Requests that are taken at once.
    pub(crate) places: Arc<Semaphore>,
    /// Large bodies that are held at once.
    pub(crate) large_bodies: Arc<Semaphore>,
    /// And that are worked on.
    pub(crate) large_work: Arc<Semaphore>,
    /// It takes no more requests.
    pub(crate) stopping: AtomicBool,
}

/// How the model is talked to.
pub(crate) struct Template {
    pub(crate) chat: ChatTemplate,
    /// How it writes tool calls.
    pub(super) spelling: Option<Spelling>,
    /// All its texts.
    source: String,
}

impl Template {
    /// The template with this text; `bos` and `eos` are the tokens it may write.
    pub(crate) fn of_text(
        source: String,
        bos: &str,
        eos: &str,
    ) -> Result<Template, engine::ChatError> {
        Ok(Template {
            chat: ChatTemplate::new(&source, bos, eos)?,
            spelling: Spelling::of(&source),
            source,
        })
    }

    /// The model's own.
    pub(crate) fn of_model(tokenizer: &Tokenizer) -> Result<Option<Template>, engine::ChatError> {
        let templates: &BTreeMap<String, String> = tokenizer.templates();
        let source = templates.values().cloned().collect::<Vec<_>>().join("\n");
        let chat = ChatTemplate::of(tokenizer)?;
        Ok(chat.map(|chat| Template {
            chat,
            spelling: Spelling::of(&source),
            source,
        }))
    }

    /// Whether it reads a variable or a role of this name.
    pub(super) fn reads(&self, name: &str) -> bool {
        self.source.contains(name)
    }
}

impl Node {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// What the engine does at this moment.
    pub(super) fn load(&self) -> Load {
        let stats = self.engine.stats();
        Load {
            n_running: stats.n_running,
            n_waiting: stats.n_waiting,
            kv_usage: stats.n_pages_used as f64 / stats.n_pages.max(1) as f64,
            drafts: self.drafts.then_some(DraftCounts {
                n: stats.n_drafts,
                n_tokens: stats.n_drafted,
                n_accepted: stats.n_accepted,
                n_accepted_at: stats.n_accepted_at,
            }),
        }
    }

    /// What the node saw of its weight servers.
    pub(super) fn remote_stats(&self) -> Option<RemoteStats> {
        self.remote.as_ref().map(|remote| remote.stats())
    }

    /// The beginning of an answer.
    pub(super) fn head(&self, prefix: &str) -> Head {
        Head {
            id: format!("{prefix}{}", random(24)),
            created: now_seconds(),
            model: self.name.clone(),
            fingerprint: self.fingerprint.clone(),
        }
    }

    pub(super) fn serves(&self, model: &str) -> Result<(), ApiError> {
        if model == self.name {
            Ok(())
        } else {
            Err(ApiError::model(model, &self.name))
        }
    }

    pub(super) fn template(&self) -> Result<&Template, ApiError> {
        self.template.as_ref().ok_or_else(|| {
            let why = "this model has no chat template; give the node one with --chat-template, or use /v1/completions";
            ApiError::unsupported("messages", why)
        })
    }

    /// The tokens of a text. `add_special`: with those that the model wants around one.
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        self.tokenizer
            .encode(text, add_special)
            .map_err(|error| ApiError::value("prompt", causes(&error)))
    }

    /// Whether all of these tokens exist.
    pub(super) fn known(&self, ids: &[u32]) -> Result<(), ApiError> {
        let n = self.tokenizer.n_vocab();
        match ids.iter().find(|&&id| id as usize >= n) {
            None => Ok(()),
            Some(id) => Err(ApiError::value(
                "prompt",
                format_args!("token {id} is beyond the vocabulary of {n}"),
            )),
        }
    }

    /// Tokens that are left for an answer to a prompt of `n_tokens`, at least one.
    pub(super) fn room(&self, n_tokens: usize, param: &str) -> Result<usize, ApiError> {
        match self.context.checked_sub(n_tokens) {
            None | Some(0) => Err(ApiError::context_length(param, n_tokens, self.context)),
            Some(room) => Ok(room),
        }
    }

    /// A grammar of the JSON that `schema` allows.
    pub(super) fn schema(&self, param: &str, schema: &Value) -> Result<Grammar, ApiError> {
        let factory = self.grammars.as_ref();
        let factory = factory.map_err(|why| ApiError::unsupported(param, why))?;
        factory
            .json_schema(schema)
            .map_err(|error| ApiError::value(param, causes(&error)))
    }

    /// The engine's requests for `common.n` answers to one prompt; answer `i` has the seed `seed + i`.
    pub(super) fn requests(
        &self,
        common: &Common,
        prompt: Vec<u32>,
        room: usize,
        stop: Vec<String>,
        top_logprobs: Option<usize>,
        grammar: Option<Grammar>,
    ) -> Result<Vec<Request>, ApiError> {
        let n_vocab = self.tokenizer.n_vocab();
        if let Some((id, _)) = common
            .sampling
            .logit_bias
            .iter()
            .find(|(id, _)| *id as usize >= n_vocab)
        {
            let path = format!("logit_bias.{id}");
            return Err(ApiError::value(
                path,
                format_args!("the vocabulary has {n_vocab} tokens"),
            ));
        }
        let max_tokens = common.max_tokens.map_or(room, |max| max.min(room));
        let deadline = Instant::now().checked_add(self.deadline);
        let one = |i: usize| {
            let mut request = Request::new(prompt.clone(), max_tokens);
            request.sampling = common.sampling.clone();
            request.sampling.seed = common.sampling.seed.map(|seed| seed.wrapping_add(i as u64));
            request.stop.clone_from(&stop);
            request.ignore_eos = common.ignore_eos;
            request.top_logprobs = top_logprobs;
            request.grammar.clone_from(&grammar);
            request.deadline = deadline;
            request
        };
        Ok((0..common.n).map(one).collect())
    }
}

/// Seconds since 1970.
pub(crate) fn now_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// An error and what is behind it, as one line without a full stop.
pub(super) fn causes(error: &dyn Error) -> String {
    const CHARS_MAX: usize = 400;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    let line: String = text.replace('\n', " ").chars().take(CHARS_MAX).collect();
    line.trim_end_matches('.').to_owned()
}
