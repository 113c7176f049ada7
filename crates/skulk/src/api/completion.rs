//! `POST /v1/completions`: prompts gone on with.
//!
//! Invariant: choice `p * n + i` is answer `i` to prompt `p`, whole or as a stream.

use std::sync::Arc;

use axum::response::Response;
use engine::{Event, Request};
use serde_json::{Value, json};

use super::Place;
use super::answer::{Head, TextChoice, usage};
use super::node::Node;
use super::running::Running;
use super::stream::{self, Telling};
use crate::error::ApiError;
use crate::request::{CompletionRequest, Prompt, StreamOptions};

/// Prompts ready for the engine.
pub(super) struct Prepared {
    requests: Vec<Request>,
    /// What each choice begins with.
    echoes: Vec<String>,
    /// Answers to each prompt.
    n: usize,
    with_logprobs: bool,
    stream: Option<StreamOptions>,
}

/// Checks the rest of a request and makes the engine's of it. Encodes: not for an async thread.
pub(super) fn prepare(node: &Node, request: CompletionRequest) -> Result<Prepared, ApiError> {
    node.serves(&request.common.model)?;
    let common = &request.common;
    let mut prepared = Prepared {
        requests: Vec::new(),
        echoes: Vec::new(),
        n: common.n,
        with_logprobs: request.top_logprobs.is_some(),
        stream: common.stream,
    };
    for prompt in request.prompts {
        let (ids, text) = match prompt {
            Prompt::Text(text) => (node.encode(&text, true)?, text),
            Prompt::Tokens(ids) => {
                node.known(&ids)?;
                let text = if request.echo {
                    node.tokenizer.decode(&ids, true)
                } else {
                    String::new()
                };
                (ids, text)
            }
        };
        if ids.is_empty() {
            return Err(ApiError::value("prompt", "it has no token to go on from"));
        }
        let room = node.room(ids.len(), "prompt")?;
        let echo = if request.echo { text } else { String::new() };
        prepared.echoes.extend(std::iter::repeat_n(echo, common.n));
        let stop = common.stop.clone();
        let requests = node.requests(common, ids, room, stop, request.top_logprobs, None)?;
        prepared.requests.extend(requests);
    }
    Ok(prepared)
}

/// Starts what was prepared; the answer, whole or as a stream.
pub(super) async fn answer(
    node: Arc<Node>,
    prepared: Prepared,
    place: Place,
) -> Result<Response, ApiError> {
    let head = node.head("cmpl-");
    let running = Running::start(&node.engine, &node.metrics, prepared.requests, place)?;
    let choice = |(i, echo)| TextChoice::new(i, echo, prepared.with_logprobs);
    let texts = Texts {
        node,
        head,
        n: prepared.n,
        choices: prepared
            .echoes
            .into_iter()
            .enumerate()
            .map(choice)
            .collect(),
    };
    match prepared.stream {
        Some(options) => Ok(stream::respond(running, texts, options)),
        None => texts.whole(running).await,
    }
}

/// Answers as they grow.
struct Texts {
    node: Arc<Node>,
    head: Head,
    n: usize,
    choices: Vec<TextChoice>,
}

impl Texts {
    async fn whole(mut self, mut running: Running) -> Result<Response, ApiError> {
        while let Some((i, event)) = running.next().await {
            self.take(i, event)?;
        }
        let mut body = self.head.body("text_completion");
        let choices: Vec<Value> = self
            .choices
            .iter_mut()
            .filter_map(TextChoice::take)
            .collect();
        body["choices"] = choices.into();
        body["usage"] = self.usage();
        Ok(super::json_response(200, &body))
    }

    fn take(&mut self, i: usize, event: Event) -> Result<(), ApiError> {
        let choice = &mut self.choices[i];
        match event {
            Event::Token(token) => choice.token(&self.node.tokenizer, &token),
            Event::Finished {
                reason,
                text,
                usage,
            } => choice.finished(reason, &text, usage),
            Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Telling for Texts {
    fn chunks(&mut self, i: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        self.take(i, event)?;
        let choice = self.choices[i].take();
        Ok(choice
            .map(|choice| self.chunk(json!([choice])))
            .into_iter()
            .collect())
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut body = self.head.body("text_completion");
        body["choices"] = choices;
        body
    }

    fn usage(&self) -> Value {
        let each = || self.choices.iter().map(|choice| choice.usage);
        usage(each().step_by(self.n), each())
    }
}
