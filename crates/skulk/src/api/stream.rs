//! An answer as server-sent events: `data: {…}` for each chunk, `data: [DONE]` at the end.
//!
//! Invariant: the engine is asked for no more while a client takes nothing; what it generated meanwhile waits, within a
//! place's bound. An error in the middle is one last event with `error` and no `[DONE]`. Dropping the body cancels.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use engine::Event;
use futures::stream;
use serde_json::{Value, json};

use super::running::Running;
use crate::error::ApiError;
use crate::request::StreamOptions;

/// A comment after so much silence keeps proxies from closing.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An answer that can be told in chunks.
pub(super) trait Telling: Send + 'static {
    /// What is certain with an event of choice `i`, as bodies.
    fn chunks(&mut self, i: usize, event: Event) -> Result<Vec<Value>, ApiError>;

    /// A body with these choices.
    fn chunk(&self, choices: Value) -> Value;

    /// The usage of all choices.
    fn usage(&self) -> Value;
}

/// The answer that tells `telling` as `running` goes on.
pub(super) fn respond(running: Running, telling: impl Telling, options: StreamOptions) -> Response {
    let state = State {
        running: Some(running),
        telling,
        options,
        ready: VecDeque::new(),
    };
    let events = stream::unfold(state, |mut state| async move {
        let data = state.next().await?;
        Some((Ok::<_, Infallible>(Sse::default().data(data)), state))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    let sse = axum::response::Sse::new(events).keep_alive(keep_alive);
    // Proxies that gather an answer before they pass it on are told not to.
    ([("x-accel-buffering", "no")], sse).into_response()
}

struct State<T> {
    /// `None` when all was told or an error ended it.
    running: Option<Running>,
    telling: T,
    options: StreamOptions,
    /// Data that is certain and not told.
    ready: VecDeque<String>,
}

impl<T: Telling> State<T> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            match self.running.as_mut()?.next().await {
                Some((i, event)) => match self.telling.chunks(i, event) {
                    Ok(chunks) => {
                        let include_usage = self.options.include_usage;
                        self.ready.extend(chunks.into_iter().map(|mut chunk| {
                            if include_usage {
                                chunk["usage"] = Value::Null;
                            }
                            chunk.to_string()
                        }));
                    }
                    Err(error) => {
                        self.running = None;
                        self.ready.push_back(error.to_json().to_string());
                    }
                },
                None => {
                    self.running = None;
                    if self.options.include_usage {
                        let mut chunk = self.telling.chunk(json!([]));
                        chunk["usage"] = self.telling.usage();
                        self.ready.push_back(chunk.to_string());
                    }
                    self.ready.push_back("[DONE]".to_owned());
                }
            }
        }
    }
}
