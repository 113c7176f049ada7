//! Answers as JSON: whole ones and the chunks of a stream, in the shapes that OpenAI's clients parse.
//!
//! Invariant: the deltas of a choice, joined, are the message of the whole answer; one code collects both.

use engine::{FinishReason, Token, Tokenizer, Usage};
use serde_json::{Value, json};

use super::calls::{Piece, Reader};
use super::logprobs;

/// What every part of an answer repeats.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    /// Of the weights, so that a client can tell when they change.
    pub(super) fingerprint: String,
}

impl Head {
    /// An answer without its choices.
    pub(super) fn body(&self, object: &str) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        })
    }
}

/// The usage of all choices: the prompt counts once for each prompt, however many answers it has.
pub(super) fn usage(
    prompts: impl IntoIterator<Item = Usage>,
    choices: impl IntoIterator<Item = Usage>,
) -> Value {
    let (mut prompt, mut cached) = (0, 0);
    for usage in prompts {
        prompt += usage.prompt_tokens;
        cached += usage.cached_tokens;
    }
    let (mut completion, mut accepted, mut rejected) = (0, 0, 0);
    for usage in choices {
        completion += usage.completion_tokens;
        accepted += usage.accepted_tokens;
        rejected += usage.rejected_tokens;
    }
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected,
        },
    })
}

/// How calls are told apart from text, and what an answer looks like then.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) reader: Reader,
    /// The function is named by the request; OpenAI then says `stop` at the end.
    pub(super) is_named: bool,
    /// Ids of nine letters and digits.
    pub(super) short_ids: bool,
}

/// A choice of a chat answer, as it grows.
#[derive(Debug)]
pub(super) struct ChatChoice {
    index: usize,
    manner: Manner,
    /// The stream has told who speaks.
    begun: bool,
    content: String,
    calls: Vec<Value>,
    /// The JSON text of the arguments of each call.
    arguments: Vec<String>,
    /// `None` when they were not asked for.
    logprobs: Option<Vec<Value>>,
    /// Of `logprobs`, how many a stream has told.
    n_told: usize,
    finish: Option<&'static str>,
    pub(super) usage: Usage,
}

impl ChatChoice {
    pub(super) fn new(index: usize, manner: Manner, with_logprobs: bool) -> ChatChoice {
        ChatChoice {
            index,
            manner,
            begun: false,
            content: String::new(),
            calls: Vec::new(),
            arguments: Vec::new(),
            logprobs: with_logprobs.then(Vec::new),
            n_told: 0,
            finish: None,
            usage: Usage::default(),
        }
    }

    /// Takes in a token; the deltas that are certain with it.
    pub(super) fn token(&mut self, tokenizer: &Tokenizer, token: &Token) -> Vec<Value> {
        if let Some(list) = &mut self.logprobs {
            list.extend(logprobs::chat(tokenizer, token));
        }
        let pieces = self.manner.reader.push(&token.text);
        self.deltas(pieces)
    }

    /// Takes in the end; the last deltas.
    pub(super) fn finished(
        &mut self,
        reason: FinishReason,
        text: &str,
        usage: Usage,
    ) -> Vec<Value> {
        let mut pieces = self.manner.reader.push(text);
        pieces.extend(self.manner.reader.finish());
        let called = self.manner.reader.n_calls() > 0 && !self.manner.is_named;
        self.finish = Some(match reason {
            FinishReason::Stop if called => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        self.usage = usage;
        self.deltas(pieces)
    }

    fn deltas(&mut self, pieces: Vec<Piece>) -> Vec<Value> {
        let delta = |piece| match piece {
            Piece::Text(text) => {
                self.content.push_str(&text);
                json!({ "content": text })
            }
            Piece::Call { name, arguments } => {
                let id = call_id(self.manner.short_ids);
                let function = json!({"name": name, "arguments": arguments});
                let call = json!({"id": id, "type": "function", "function": function});
                let mut delta = call.clone();
                delta["index"] = self.calls.len().into();
                self.calls.push(call);
                self.arguments.push(arguments);
                json!({"tool_calls": [delta]})
            }
            Piece::Arguments(more) => {
                if let Some(arguments) = self.arguments.last_mut() {
                    arguments.push_str(&more);
                }
                let index = self.calls.len().saturating_sub(1);
                json!({"tool_calls": [{"index": index, "function": {"arguments": more}}]})
            }
        };
        pieces.into_iter().map(delta).collect()
    }

    /// The choice whole.
    pub(super) fn whole(mut self) -> Value {
        let has_calls = !self.calls.is_empty();
        let content = if has_calls && self.content.is_empty() {
            Value::Null
        } else {
            self.content.into()
        };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if has_calls {
            for (call, arguments) in self.calls.iter_mut().zip(self.arguments) {
                call["function"]["arguments"] = arguments.into();
            }
            message["tool_calls"] = self.calls.into();
        }
        let logprobs = self
            .logprobs
            .map(|list| json!({"content": list, "refusal": null}));
        json!({"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish})
    }

    /// The choices of the chunks for these deltas: the first says who speaks, the last, once all has ended, why.
    pub(super) fn chunks(&mut self, deltas: Vec<Value>) -> Vec<Value> {
        let mut choices = Vec::new();
        if !self.begun {
            self.begun = true;
            choices.push(self.chunk(json!({"role": "assistant", "content": "", "refusal": null})));
        }
        for delta in deltas {
            let mut choice = self.chunk(delta);
            self.tell_logprobs(&mut choice);
            choices.push(choice);
        }
        if let Some(finish) = self.finish {
            let mut choice = self.chunk(json!({}));
            self.tell_logprobs(&mut choice);
            choice["finish_reason"] = finish.into();
            choices.push(choice);
        }
        choices
    }

    fn chunk(&self, delta: Value) -> Value {
        json!({"index": self.index, "delta": delta, "logprobs": null, "finish_reason": null})
    }

    /// Log-probabilities go with the first text that is told after their tokens.
    fn tell_logprobs(&mut self, choice: &mut Value) {
        let Some(list) = &self.logprobs else {
            return;
        };
        if list.len() > self.n_told {
            choice["logprobs"] = json!({"content": list[self.n_told..], "refusal": null});
            self.n_told = list.len();
        }
    }
}

/// A choice of a completion, as it grows.
#[derive(Debug)]
pub(super) struct TextChoice {
    index: usize,
    /// What was not told yet in a stream; all of it in a whole answer.
    text: String,
    logprobs: Option<logprobs::Lists>,
    finish: Option<&'static str>,
    pub(super) usage: Usage,
}

impl TextChoice {
    /// A choice that begins with `echo`.
    pub(super) fn new(index: usize, echo: String, with_logprobs: bool) -> TextChoice {
        TextChoice {
            index,
            text: echo,
            logprobs: with_logprobs.then(logprobs::Lists::default),
            finish: None,
            usage: Usage::default(),
        }
    }

    pub(super) fn token(&mut self, tokenizer: &Tokenizer, token: &Token) {
        self.text.push_str(&token.text);
        if let Some(lists) = &mut self.logprobs {
            lists.push(tokenizer, token);
        }
    }

    pub(super) fn finished(&mut self, reason: FinishReason, text: &str, usage: Usage) {
        self.text.push_str(text);
        self.finish = Some(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        self.usage = usage;
    }

    /// The choice with what was not told yet: all of a whole answer, or the next chunk; `None` when there is nothing.
    pub(super) fn take(&mut self) -> Option<Value> {
        if self.text.is_empty() && self.finish.is_none() {
            return None;
        }
        let logprobs = self.logprobs.as_mut();
        let logprobs = logprobs.filter(|lists| !lists.is_empty() || self.finish.is_some());
        Some(json!({
            "index": self.index, "text": std::mem::take(&mut self.text),
            "logprobs": logprobs.map(logprobs::Lists::take), "finish_reason": self.finish,
        }))
    }
}

/// A random text of `n` letters and digits.
pub(super) fn random(n: usize) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnopqrstuvwxyz2345678";
    let mut bytes = vec![0; n];
    // Without randomness ids repeat; nothing rests on them but clients' logs.
    let _ = getrandom::fill(&mut bytes);
    let letter = |byte: u8| char::from(LETTERS[usize::from(byte % 32)]);
    bytes.into_iter().map(letter).collect()
}

fn call_id(short: bool) -> String {
    if short {
        random(9)
    } else {
        format!("call_{}", random(24))
    }
}

#[cfg(test)]
mod tests {
    use super::super::calls::Spelling;
    use super::*;

    fn choice(reader: Reader) -> ChatChoice {
        let manner = Manner {
            reader,
            is_named: false,
            short_ids: false,
        };
        ChatChoice::new(0, manner, false)
    }

    fn usage_of(prompt_tokens: usize, cached_tokens: usize, completion_tokens: usize) -> Usage {
        Usage {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            accepted_tokens: completion_tokens / 2,
            rejected_tokens: 1,
        }
    }

    #[test]
    fn a_stream_and_a_whole_answer_say_the_same() {
        let text = "Well. <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
        let reader = Reader::spelled(Spelling::Hermes, vec!["f".to_owned()], 8);
        let mut one = choice(reader.clone());
        let deltas = one.finished(FinishReason::Stop, text, usage_of(1, 0, 2));
        let chunks = one.chunks(deltas);
        assert_eq!(chunks[0]["delta"]["role"], "assistant");
        assert_eq!(chunks[1]["delta"]["content"], "Well.");
        let call = &chunks[2]["delta"]["tool_calls"][0];
        assert_eq!(
            (&call["index"], &call["function"]["arguments"]),
            (&json!(0), &json!("{\"a\":1}"))
        );
        assert_eq!(chunks[3]["finish_reason"], "tool_calls");
        assert_eq!(chunks[3]["delta"], json!({}));

        let mut other = choice(reader);
        other.finished(FinishReason::Stop, text, usage_of(1, 0, 2));
        let whole = other.whole();
        assert_eq!(whole["message"]["content"], "Well.");
        assert_eq!(
            whole["message"]["tool_calls"][0]["function"],
            call["function"]
        );
        assert_eq!(whole["finish_reason"], "tool_calls");
    }

    #[test]
    fn a_named_function_grows_argument_by_argument() {
        let mut choice = choice(Reader::named("g".to_owned()));
        choice.manner.is_named = true;
        let mut deltas = choice.finished(FinishReason::Stop, "{\"a\"", usage_of(1, 0, 1));
        let pieces = choice.manner.reader.push(": 1}");
        deltas.extend(choice.deltas(pieces));
        assert_eq!(
            deltas[1]["tool_calls"][0],
            json!({"index": 0, "function": {"arguments": ": 1}"}})
        );
        let whole = choice.whole();
        assert_eq!(whole["finish_reason"], "stop");
        assert_eq!(whole["message"]["content"], Value::Null);
        assert_eq!(
            whole["message"]["tool_calls"][0]["function"]["arguments"],
            "{\"a\": 1}"
        );
    }

    #[test]
    fn usage_counts_a_prompt_once() {
        let choices = [usage_of(10, 4, 3), usage_of(10, 9, 5)];
        assert_eq!(
            usage([choices[0]], choices),
            json!({"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}})
        );
    }

    #[test]
    fn a_completion_is_told_once() {
        let mut choice = TextChoice::new(1, "In the ".to_owned(), false);
        assert_eq!(choice.take().expect("the echo")["text"], "In the ");
        assert!(choice.take().is_none());
        choice.finished(FinishReason::Length, "end", usage_of(2, 0, 1));
        let last = choice.take().expect("the end");
        assert_eq!(
            (&last["text"], &last["finish_reason"]),
            (&json!("end"), &json!("length"))
        );
    }

    #[test]
    fn ids_are_of_the_length_that_templates_ask_for() {
        assert_eq!(call_id(true).len(), 9);
        assert!(call_id(false).starts_with("call_"));
        assert_ne!(random(16), random(16));
    }
}
