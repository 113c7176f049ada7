//! Request bodies: read within a size and a patience.
//!
//! Invariant: no body is held in memory beyond the bound its reader names; a body that pauses too long is given up.

use std::io;
use std::path::Path;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::reply::Refusal;
use crate::Error;

/// The largest JSON or form body, in bytes.
const JSON_BYTES_MAX: u64 = 8 << 20;

/// A body as JSON.
pub(crate) async fn json<T: DeserializeOwned>(body: Body, idle: Duration) -> Result<T, Refusal> {
    let bytes = collect(body, idle).await?;
    // The Hub takes an absent body for an empty object.
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(text)
        .map_err(|e| Refusal::bad_request(format!("the body is not the JSON expected: {e}")))
}

/// A whole body, of at most the size of a JSON body.
pub(crate) async fn collect(body: Body, idle: Duration) -> Result<Vec<u8>, Refusal> {
    let mut chunks = Chunks::new(body, idle, JSON_BYTES_MAX, "the body");
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Streams a body of at most `max_bytes` through `step`, on a thread where that may block. Dropped half-way, nothing but
/// the dropping of `state` happens.
pub(crate) async fn stream<T: Send + 'static>(
    body: Body,
    idle: Duration,
    max_bytes: u64,
    mut state: T,
    mut step: impl FnMut(&mut T, &[u8]) -> io::Result<()> + Send + 'static,
) -> Result<T, Refusal> {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(4);
    let worker = tokio::task::spawn_blocking(move || -> io::Result<T> {
        while let Some(chunk) = receiver.blocking_recv() {
            step(&mut state, &chunk)?;
        }
        Ok(state)
    });
    let mut chunks = Chunks::new(body, idle, max_bytes, "the upload");
    let mut fed = Ok(());
    loop {
        let chunk = match chunks.next().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(refusal) => {
                fed = Err(refusal);
                break;
            }
        };
        if sender.send(chunk).await.is_err() {
            // The worker has stopped, and says why below.
            break;
        }
    }
    drop(sender);
    let worked = worker.await.map_err(|e| Refusal::internal(&e))?;
    fed?;
    worked.map_err(|e| Error::io("write", Path::new("tmp"))(e).into())
}

/// The chunks of a body.
pub(crate) struct Chunks {
    stream: axum::body::BodyDataStream,
    idle: Duration,
    left_bytes: u64,
    max_bytes: u64,
    what: &'static str,
}

impl Chunks {
    pub(crate) fn new(body: Body, idle: Duration, max_bytes: u64, what: &'static str) -> Chunks {
        Chunks {
            stream: body.into_data_stream(),
            idle,
            left_bytes: max_bytes,
            max_bytes,
            what,
        }
    }

    /// The next chunk, or `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Refusal> {
        let chunk = match tokio::time::timeout(self.idle, self.stream.next()).await {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(e))) => {
                return Err(Refusal::bad_request(format!("the body broke off: {e}")));
            }
            Err(_) => {
                let message = format!("no byte of the body for {} s", self.idle.as_secs());
                return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        self.left_bytes = match self.left_bytes.checked_sub(chunk.len() as u64) {
            Some(left_bytes) => left_bytes,
            None => return Err(Refusal::too_large(self.what, self.max_bytes)),
        };
        Ok(Some(chunk))
    }
}
