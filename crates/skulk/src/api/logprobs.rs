//! Log-probabilities as the API tells them.
//!
//! Invariant: `bytes` are those of the token itself; its text may be half a character, shown as a replacement character.

use engine::{Token, Tokenizer};
use serde_json::{Map, Value, json};

/// Told instead of minus infinity, which JSON has not; OpenAI's value for what is as good as impossible.
const IMPOSSIBLE: f32 = -9999.0;

fn told(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(IMPOSSIBLE)
    } else {
        IMPOSSIBLE
    }
}

fn text(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

/// A token in the form of chat; `None` when its probability was not asked for.
pub(super) fn chat(tokenizer: &Tokenizer, token: &Token) -> Option<Value> {
    let one = |id: u32, logprob: f32| json!({"token": text(tokenizer, id), "logprob": told(logprob), "bytes": tokenizer.token_bytes(id)});
    let mut entry = one(token.id, token.logprob?);
    let top = token.top.iter().map(|top| one(top.id, top.logprob));
    entry["top_logprobs"] = top.collect();
    Some(entry)
}

/// Tokens in the form of completions: four lists that run along the text.
#[derive(Debug, Default)]
pub(super) struct Lists {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<Value>,
    /// Characters of the text so far.
    n_chars: usize,
}

impl Lists {
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: &Token) {
        let Some(logprob) = token.logprob else {
            return;
        };
        let own = text(tokenizer, token.id);
        self.offsets.push(self.n_chars.into());
        self.n_chars += own.chars().count();
        self.logprobs.push(told(logprob).into());
        let mut top: Map<String, Value> = Map::new();
        for other in &token.top {
            let likelier = top.entry(text(tokenizer, other.id));
            // Two tokens may have the same text; the likelier comes first.
            likelier.or_insert_with(|| told(other.logprob).into());
        }
        // The token itself is always there, as OpenAI has it.
        top.entry(own.clone())
            .or_insert_with(|| told(logprob).into());
        self.top.push(top.into());
        self.tokens.push(own.into());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// What was pushed since the last time.
    pub(super) fn take(&mut self) -> Value {
        use std::mem::take;
        json!({
            "tokens": take(&mut self.tokens), "token_logprobs": take(&mut self.logprobs),
            "top_logprobs": take(&mut self.top), "text_offset": take(&mut self.offsets),
        })
    }
}
