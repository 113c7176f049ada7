//! The answers of one HTTP request under way in the engine.
//!
//! Invariant: when a [`Running`] is dropped, because all was told or because the client went away, every generation of
//! it that has not ended is cancelled. It holds a place among the node's requests until then, so that what readers have
//! not taken yet is bounded: places times a context of tokens.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use engine::{Engine, EngineError, Event, Request, Ticket};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Place;
use crate::metrics::{Metrics, Watch};

/// Generations, each with its place in the answer.
pub(super) struct Running {
    events: UnboundedReceiver<(usize, Event)>,
    /// `None` once it has ended.
    answers: Vec<Option<Answer>>,
    metrics: Arc<Metrics>,
    _place: Place,
}

struct Answer {
    ticket: Ticket,
    watch: Arc<Mutex<Watch>>,
}

impl Running {
    /// Submits `requests`; all of them or none.
    pub(super) fn start(
        engine: &Engine,
        metrics: &Arc<Metrics>,
        requests: Vec<Request>,
        place: Place,
    ) -> Result<Running, EngineError> {
        let (sender, events) = unbounded_channel();
        let mut running = Running {
            events,
            answers: Vec::with_capacity(requests.len()),
            metrics: metrics.clone(),
            _place: place,
        };
        for (i, request) in requests.into_iter().enumerate() {
            let watch = Arc::new(Mutex::new(Watch::new()));
            let (sender, metrics, seen) = (sender.clone(), metrics.clone(), watch.clone());
            let sink = move |event: Event| {
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .see(&event, &metrics);
                match sender.send((i, event)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            };
            let ticket = engine.submit(request, Box::new(sink))?;
            running.answers.push(Some(Answer { ticket, watch }));
        }
        Ok(running)
    }

    /// The next event and whose it is; `None` when all have ended.
    pub(super) async fn next(&mut self) -> Option<(usize, Event)> {
        loop {
            if self.answers.iter().all(Option::is_none) {
                return None;
            }
            let (i, event) = self.events.recv().await?;
            // What was sent before a cancellation arrived is not wanted any more.
            if self.answers[i].is_none() {
                continue;
            }
            if matches!(event, Event::Finished { .. } | Event::Failed(_)) {
                self.answers[i] = None;
            }
            return Some((i, event));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for answer in self.answers.drain(..).flatten() {
            answer.ticket.cancel();
            answer
                .watch
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .cancelled(&self.metrics);
        }
    }
}
