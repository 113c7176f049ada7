//! The bytes of one range of one file, piece by piece, whatever happens to the connection.
//!
//! Invariant: exactly the bytes asked for come out, in order, each once: an answer for another range or
//! commit, a longer or shorter body is an error, a cut is taken up again at the byte where it happened.
//!
//! The Hub counts requests to `/resolve/` and sends large files elsewhere; that address serves the following
//! ranges of the file as well ([`Addresses`]), without asking the Hub again.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};

use crate::retry::Patience;
use crate::wire::{About, Ask, Failure, Reply, Wire};
use crate::{Commit, Error, RepoId};

/// How much of a body is thrown away to reach a range when a server ignores `Range`.
const SKIP_BYTES_MAX: u64 = 64 << 20;
/// How long an address that the Hub sent us to is used again; those of the public Hub are good for an hour.
const ADDRESS_LIFETIME: Duration = Duration::from_secs(300);
/// Progress after which patience starts anew.
const PROGRESS_BYTES: u64 = 64 << 10;

/// Where the files of a snapshot are, by their paths. Signed, therefore never printed.
#[derive(Default)]
pub(crate) struct Addresses {
    known: Mutex<HashMap<String, (Url, Instant)>>,
}

impl Addresses {
    fn get(&self, path: &str) -> Option<Url> {
        let known = self.lock();
        let (url, since) = known.get(path)?;
        (since.elapsed() < ADDRESS_LIFETIME).then(|| url.clone())
    }

    fn keep(&self, path: &str, url: &Url) {
        self.lock()
            .insert(path.to_owned(), (url.clone(), Instant::now()));
    }

    fn forget(&self, path: &str) {
        self.lock().remove(path);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Url, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Addresses")
    }
}

/// A file at a commit.
#[derive(Clone, Debug)]
pub(crate) struct Pin {
    pub(crate) addresses: Arc<Addresses>,
    pub(crate) repo: RepoId,
    pub(crate) commit: Commit,
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
}

/// A range being read.
#[derive(Debug)]
pub(crate) struct RangeReader {
    wire: Arc<Wire>,
    pin: Pin,
    at: u64,
    end: u64,
    body: Option<Body>,
    patience: Patience,
    progress_bytes: u64,
}

#[derive(Debug)]
struct Body {
    response: Response,
    /// Bytes to throw away first: a whole file came instead of the range.
    skip_bytes: u64,
    whole: bool,
}

impl RangeReader {
    /// `range` must lie inside the file.
    pub(crate) fn new(wire: Arc<Wire>, pin: Pin, range: Range<u64>) -> RangeReader {
        let patience = Patience::new(wire.settings());
        RangeReader {
            wire,
            pin,
            at: range.start,
            end: range.end,
            body: None,
            patience,
            progress_bytes: 0,
        }
    }

    /// The next piece; `None` when the range is complete.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.at == self.end {
                return self.finish().await;
            }
            match self.step().await {
                Ok(Some(bytes)) => {
                    self.at += bytes.len() as u64;
                    self.progress_bytes += bytes.len() as u64;
                    if self.progress_bytes >= PROGRESS_BYTES {
                        self.progress_bytes = 0;
                        self.patience.renew();
                    }
                    return Ok(Some(bytes));
                }
                Ok(None) => {}
                Err(failure) => {
                    self.body = None;
                    let wire = Arc::clone(&self.wire);
                    let pin = self.pin.clone();
                    let ask = ask(&wire, &pin, self.at..self.end);
                    wire.pause(&ask, failure, &self.patience).await?;
                }
            }
        }
    }

    /// One piece of the open body, or `None` when it was skipped over; opens a body when there is none.
    async fn step(&mut self) -> Result<Option<Bytes>, Failure> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => self.open().await?,
        };
        let left = self.end - self.at;
        let Some(mut bytes) = self.wire.chunk(&mut body.response).await? else {
            return Err(Failure::Lost(
                format!("the body ended {left} bytes early").into(),
            ));
        };
        if body.skip_bytes > 0 {
            let skipped = body.skip_bytes.min(bytes.len() as u64);
            body.skip_bytes -= skipped;
            bytes = bytes.slice(skipped as usize..);
        }
        if bytes.len() as u64 > left {
            if !body.whole {
                return Err(Failure::Final(
                    self.wrong("more bytes than asked for".to_owned()),
                ));
            }
            bytes.truncate(left as usize);
        }
        self.body = Some(body);
        Ok((!bytes.is_empty()).then_some(bytes))
    }

    /// After the last byte: a body without a length must end here.
    async fn finish(&mut self) -> Result<Option<Bytes>, Error> {
        if let Some(mut body) = self.body.take()
            && !body.whole
            && body.response.content_length().is_none()
            && let Ok(Some(more)) = self.wire.chunk(&mut body.response).await
            && !more.is_empty()
        {
            return Err(self.wrong("more bytes than asked for".to_owned()));
        }
        Ok(None)
    }

    async fn open(&mut self) -> Result<Body, Failure> {
        self.patience.attempt();
        let reply = self.exchange().await?;
        if let Some(commit) = reply.own.get("x-repo-commit")
            && commit.as_bytes() != self.pin.commit.as_str().as_bytes()
        {
            return Err(Failure::Final(
                self.wrong("the bytes of another commit".to_owned()),
            ));
        }
        let response = reply.response;
        let length = response.content_length();
        let (skip_bytes, whole, expected) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let text = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|v| v.to_str().ok())
                    .unwrap_or("none");
                if text != format!("bytes {}-{}/{}", self.at, self.end - 1, self.pin.size_bytes) {
                    let asked = format!(
                        "bytes {}-{} of {}",
                        self.at,
                        self.end - 1,
                        self.pin.size_bytes
                    );
                    return Err(Failure::Final(
                        self.wrong(format!("asked for {asked}, got Content-Range {text:?}")),
                    ));
                }
                (0, false, self.end - self.at)
            }
            StatusCode::OK => {
                if self.at > SKIP_BYTES_MAX {
                    return Err(Failure::Final(
                        self.wrong("this server does not send ranges of files".to_owned()),
                    ));
                }
                (self.at, true, self.pin.size_bytes)
            }
            other => return Err(Failure::Final(self.wrong(format!("status {other}")))),
        };
        match length {
            Some(n) if n != expected => Err(Failure::Final(self.wrong(format!(
                "{n} bytes announced where {expected} were expected"
            )))),
            _ => Ok(Body {
                response,
                skip_bytes,
                whole,
            }),
        }
    }

    /// Asks at the address that we were sent to before, or else the Hub.
    async fn exchange(&self) -> Result<Reply, Failure> {
        let (addresses, path) = (&self.pin.addresses, self.pin.path.as_str());
        let mut ask = ask(&self.wire, &self.pin, self.at..self.end);
        if let Some(known) = addresses.get(path) {
            let own = std::mem::replace(&mut ask.url, known);
            match self.wire.exchange(&ask).await {
                // Most likely its signature has expired.
                Err(Failure::Status(_)) => {
                    addresses.forget(path);
                    ask.url = own;
                }
                Err(failure) => {
                    addresses.forget(path);
                    return Err(failure);
                }
                Ok(reply) => return Ok(reply),
            }
        }
        let reply = self.wire.exchange(&ask).await?;
        let url = reply.response.url();
        if reply.response.status() == StatusCode::PARTIAL_CONTENT && !self.wire.is_own(url) {
            addresses.keep(path, url);
        }
        Ok(reply)
    }

    fn wrong(&self, detail: String) -> Error {
        Error::Protocol {
            what: self.pin.what(),
            detail,
        }
    }
}

impl Pin {
    fn what(&self) -> String {
        format!("read {} of {}@{}", self.path, self.repo, self.commit)
    }
}

fn ask<'a>(wire: &Wire, pin: &'a Pin, range: Range<u64>) -> Ask<'a> {
    let mut segments = vec![
        pin.repo.owner(),
        pin.repo.name(),
        "resolve",
        pin.commit.as_str(),
    ];
    segments.extend(pin.path.split('/'));
    let about = About {
        repo: Some(&pin.repo),
        revision: None,
        file: Some((&pin.commit, &pin.path)),
    };
    let mut ask = wire.get(pin.what(), wire.url(&segments), about);
    let value = format!("bytes={}-{}", range.start, range.end - 1);
    if let Ok(value) = HeaderValue::from_str(&value) {
        ask.headers = HeaderMap::from_iter([(RANGE, value)]);
    }
    ask
}
