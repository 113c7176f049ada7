//! Large files to a Hub, each object once: one question for a hundred objects, then a `PUT` (basic), several
//! (multipart), or Xet where the Hub chose it.
//!
//! Invariant: a body is streamed with its length, never held or inlined; signed addresses never see the
//! token; the bytes are hashed again on their way, so that a file that changed is never committed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response, Url};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::commit::{Content, Upload};
use crate::retry::Patience;
use crate::wire::{About, Ask, Failure, Wire, too_slow};
use crate::{Error, RepoId, xet};

const LFS_JSON: &str = "application/vnd.git-lfs+json";
const N_OBJECTS_A_BATCH: usize = 100;
const N_PARTS_MAX: u64 = 10_000;
const ANSWER_BYTES_MAX: usize = 32 << 20;
const READ_BYTES: usize = 256 << 10;
/// How often a running upload is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A large file of a commit.
#[derive(Clone, Debug)]
pub(crate) struct Object<'a> {
    pub(crate) path: &'a str,
    pub(crate) content: &'a Content,
    /// Hex.
    pub(crate) sha256: Arc<str>,
    pub(crate) size_bytes: u64,
}

impl Object<'_> {
    /// The place to name when the content is not what it was.
    pub(crate) fn place(&self) -> PathBuf {
        match self.content {
            Content::File(path) => path.clone(),
            Content::Bytes(_) | Content::Remote(..) => PathBuf::from(self.path),
        }
    }

    pub(crate) fn changed(&self, detail: String) -> Error {
        Error::Changed {
            path: self.place(),
            detail,
        }
    }

    /// The length of the content now.
    pub(crate) async fn size_bytes_now(&self) -> Result<u64, Error> {
        match self.content {
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
            Content::File(path) => {
                let metadata = tokio::fs::metadata(path).await;
                Ok(metadata.map_err(Error::io("look at", path))?.len())
            }
            Content::Remote(snapshot, path) => Ok(snapshot.file(path)?.size_bytes),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Batch {
    transfer: Option<String>,
    objects: Vec<BatchObject>,
}

#[derive(Debug, Deserialize)]
struct BatchObject {
    oid: String,
    actions: Option<Actions>,
    error: Option<BatchError>,
}

#[derive(Debug, Deserialize)]
struct BatchError {
    #[serde(default)]
    message: String,
}

#[derive(Debug, Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Debug, Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Option<Map<String, Value>>,
}

/// Uploads the objects that the Hub lacks; returns the bytes sent.
pub(crate) async fn upload(
    wire: &Wire,
    repo: &RepoId,
    objects: &[Object<'_>],
    progress: &(dyn Fn(Upload) + Send + Sync),
) -> Result<u64, Error> {
    let mut seen = HashSet::new();
    let objects: Vec<_> = objects
        .iter()
        .filter(|object| seen.insert(&object.sha256))
        .collect();
    let mut bytes_sent = 0;
    for objects in objects.chunks(N_OBJECTS_A_BATCH) {
        let batch = ask_batch(wire, repo, objects).await?;
        if batch.transfer.as_deref() == Some("xet") {
            if !wire.settings().xet {
                return Err(wrong(
                    repo,
                    "it chose Xet, which was not on offer".to_owned(),
                ));
            }
            bytes_sent += xet::upload(wire, repo, objects, progress).await?;
            continue;
        }
        let mut by_oid: HashMap<_, _> = batch
            .objects
            .into_iter()
            .map(|o| (o.oid.clone(), o))
            .collect();
        let mut jobs = Vec::new();
        for object in objects {
            let answer = by_oid.remove(&*object.sha256);
            let answer = answer
                .ok_or_else(|| wrong(repo, format!("it says nothing about {}", object.path)))?;
            if let Some(error) = answer.error {
                return Err(wrong(
                    repo,
                    format!("it refuses {}: {}", object.path, error.message),
                ));
            }
            match answer.actions {
                Some(Actions {
                    upload: Some(upload),
                    verify,
                }) => jobs.push((*object, upload, verify)),
                _ => progress(Upload::Bytes(object.size_bytes)),
            }
        }
        bytes_sent += stream::iter(jobs)
            .map(|(object, upload, verify)| {
                put_object(wire, repo, object, upload, verify, progress)
            })
            .buffer_unordered(wire.settings().n_parallel.max(1))
            .try_fold(0, async |sum, n| Ok(sum + n))
            .await?;
    }
    Ok(bytes_sent)
}

async fn ask_batch(wire: &Wire, repo: &RepoId, objects: &[&Object<'_>]) -> Result<Batch, Error> {
    // The Xet client takes files and bytes only.
    let is_remote = |object: &&Object<'_>| matches!(object.content, Content::Remote(..));
    let transfers: &[&str] = if wire.settings().xet && !objects.iter().any(is_remote) {
        &["basic", "multipart", "xet"]
    } else {
        &["basic", "multipart"]
    };
    let list: Vec<_> = objects
        .iter()
        .map(|o| json!({"oid": &*o.sha256, "size": o.size_bytes}))
        .collect();
    let body = json!({
        "operation": "upload",
        "transfers": transfers,
        "objects": list,
        "hash_algo": "sha256",
        "ref": {"name": "main"},
    });
    let url = wire.url(&[
        repo.owner(),
        &format!("{}.git", repo.name()),
        "info",
        "lfs",
        "objects",
        "batch",
    ]);
    let about = About {
        repo: Some(repo),
        ..About::default()
    };
    let mut ask = wire.post(
        format!("ask {repo} where large files go"),
        url,
        about,
        LFS_JSON,
        body.to_string(),
    );
    ask.headers
        .insert(reqwest::header::ACCEPT, HeaderValue::from_static(LFS_JSON));
    wire.json(&ask, ANSWER_BYTES_MAX).await
}

async fn put_object(
    wire: &Wire,
    repo: &RepoId,
    object: &Object<'_>,
    upload: Action,
    verify: Option<Action>,
    progress: &(dyn Fn(Upload) + Send + Sync),
) -> Result<u64, Error> {
    let what = format!("upload {} to {repo}", object.path);
    let mut sending = Sending {
        wire,
        what,
        object,
        hasher: Sha256::new(),
        n_sent: 0,
        progress,
    };
    let href = address(repo, &upload.href)?;
    match Parts::of(repo, &upload, object.size_bytes)? {
        Some(parts) => sending.multipart(&href, parts).await?,
        None => {
            let headers = headers(repo, &upload)?;
            sending.part(&href, headers, 0..object.size_bytes).await?;
        }
    }
    if let Some(verify) = verify {
        let body = json!({"oid": &*object.sha256, "size": object.size_bytes});
        let what = format!("verify the upload of {} to {repo}", object.path);
        let mut ask = wire.post(
            what,
            address(repo, &verify.href)?,
            About::default(),
            LFS_JSON,
            body.to_string(),
        );
        ask.headers.extend(headers(repo, &verify)?);
        wire.fetch(&ask, ANSWER_BYTES_MAX).await?;
    }
    Ok(sending.n_sent)
}

/// The parts of a multipart upload.
struct Parts {
    chunk_bytes: u64,
    /// Part number, from 1, to its address.
    hrefs: BTreeMap<u64, Url>,
}

impl Parts {
    /// `None` for a basic upload.
    fn of(repo: &RepoId, upload: &Action, size_bytes: u64) -> Result<Option<Parts>, Error> {
        let Some(header) = &upload.header else {
            return Ok(None);
        };
        let Some(chunk_bytes) = header.get("chunk_size") else {
            return Ok(None);
        };
        let chunk_bytes = chunk_bytes
            .as_u64()
            .or_else(|| chunk_bytes.as_str()?.parse().ok())
            .unwrap_or(0);
        if chunk_bytes == 0 {
            return Err(wrong(
                repo,
                "a multipart upload without a chunk size".to_owned(),
            ));
        }
        let mut hrefs = BTreeMap::new();
        for (name, href) in header {
            if let (Ok(number), Some(href)) = (name.parse::<u64>(), href.as_str()) {
                hrefs.insert(number, address(repo, href)?);
            }
        }
        let n_parts = size_bytes.div_ceil(chunk_bytes);
        if n_parts > N_PARTS_MAX || !hrefs.keys().copied().eq(1..=n_parts) {
            let detail = format!(
                "{} addresses for {n_parts} parts of {chunk_bytes} bytes",
                hrefs.len()
            );
            return Err(wrong(repo, detail));
        }
        Ok(Some(Parts { chunk_bytes, hrefs }))
    }
}

/// One object on its way.
struct Sending<'a> {
    wire: &'a Wire,
    what: String,
    object: &'a Object<'a>,
    /// Of the parts that have arrived, which go in order.
    hasher: Sha256,
    n_sent: u64,
    progress: &'a (dyn Fn(Upload) + Send + Sync),
}

impl Sending<'_> {
    async fn multipart(&mut self, href: &Url, parts: Parts) -> Result<(), Error> {
        let mut done = Vec::new();
        for (number, part_href) in &parts.hrefs {
            let start = (number - 1) * parts.chunk_bytes;
            let end = self.object.size_bytes.min(start + parts.chunk_bytes);
            let response = self.part(part_href, HeaderMap::new(), start..end).await?;
            let etag = response.headers().get("etag").and_then(|v| v.to_str().ok());
            let etag = etag.ok_or_else(|| Error::Protocol {
                what: self.what.clone(),
                detail: format!("no ETag for part {number}"),
            })?;
            done.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": &*self.object.sha256, "parts": done});
        let what = format!("{} (complete)", self.what);
        let mut ask = self.wire.post(
            what,
            href.clone(),
            About::default(),
            LFS_JSON,
            body.to_string(),
        );
        ask.with_token = false;
        self.wire.fetch(&ask, ANSWER_BYTES_MAX).await?;
        Ok(())
    }

    /// `PUT`s the bytes `range`, again where that makes sense.
    async fn part(
        &mut self,
        href: &Url,
        headers: HeaderMap,
        range: Range<u64>,
    ) -> Result<Response, Error> {
        let mut ask = self.wire.get(&self.what, href.clone(), About::default());
        ask.method = Method::PUT;
        ask.with_token = false;
        ask.headers = headers;
        ask.headers
            .insert(CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
        let mut patience = Patience::new(self.wire.settings());
        let mut n_reported = 0;
        loop {
            patience.attempt();
            let begun = Instant::now();
            let passing = Arc::new(Passing {
                latest: Mutex::new((self.hasher.clone(), begun)),
                n_bytes: AtomicU64::new(0),
            });
            let result = self.attempt(&ask, &range, &passing, &mut n_reported).await;
            let n_bytes = passing.n_bytes.load(Ordering::Relaxed);
            self.n_sent += n_bytes;
            let (hasher, moved_at) = passing.lock().clone();
            patience.forgive(moved_at - begun);
            self.check(&range, n_bytes, &hasher).await?;
            match result {
                Ok(response) => {
                    self.hasher = hasher;
                    (self.progress)(Upload::Bytes(
                        (range.end - range.start).saturating_sub(n_reported),
                    ));
                    return Ok(response);
                }
                Err(failure) => self.wire.pause(&ask, failure, &patience).await?,
            }
        }
    }

    async fn attempt(
        &self,
        ask: &Ask<'_>,
        range: &Range<u64>,
        passing: &Arc<Passing>,
        n_reported: &mut u64,
    ) -> Result<Response, Failure> {
        let bytes = open(self.object.content, range.clone())
            .await
            .map_err(Failure::Final)?;
        let watched = Arc::clone(passing);
        let body = reqwest::Body::wrap_stream(bytes.inspect_ok(move |bytes| watched.pass(bytes)));
        let request = self
            .wire
            .client()
            .put(ask.url.clone())
            .headers(ask.headers.clone())
            .body(body);
        let settings = self.wire.settings();
        let mut send = pin!(self.wire.head(request, Duration::MAX));
        let (mut n_seen, mut quiet_since) = (0, Instant::now());
        loop {
            tokio::select! {
                response = &mut send => {
                    let response = response?;
                    return if response.status().is_success() { Ok(response) } else { Err(Failure::Status(response)) };
                }
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let n_bytes = passing.n_bytes.load(Ordering::Relaxed);
            if n_bytes > n_seen {
                (n_seen, quiet_since) = (n_bytes, Instant::now());
                (self.progress)(Upload::Bytes(n_bytes.saturating_sub(*n_reported)));
                *n_reported = n_bytes.max(*n_reported);
            }
            let all_sent = n_bytes == range.end - range.start;
            let wait = if all_sent {
                settings.write_timeout
            } else {
                settings.download_timeout * 3
            };
            if quiet_since.elapsed() > wait {
                return Err(Failure::Lost(too_slow(
                    "no bytes taken and no answer",
                    wait,
                )));
            }
        }
    }

    /// Whether what was read is still what was announced.
    async fn check(&self, range: &Range<u64>, n_bytes: u64, hasher: &Sha256) -> Result<(), Error> {
        let size_bytes = self.object.size_bytes_now().await?;
        if size_bytes != self.object.size_bytes {
            return Err(self.object.changed(format!(
                "{} bytes announced, {size_bytes} now",
                self.object.size_bytes
            )));
        }
        if range.end == size_bytes && n_bytes == range.end - range.start {
            let got = hex::encode(hasher.clone().finalize());
            if got != *self.object.sha256 {
                return Err(self.object.changed(format!(
                    "sha256 {} announced, {got} read",
                    self.object.sha256
                )));
            }
        }
        Ok(())
    }
}

/// What the body of one attempt has taken so far.
struct Passing {
    /// The hash of all bytes so far, and when the last of them went.
    latest: Mutex<(Sha256, Instant)>,
    n_bytes: AtomicU64,
}

impl Passing {
    fn pass(&self, bytes: &Bytes) {
        let mut latest = self.lock();
        latest.0.update(bytes);
        latest.1 = Instant::now();
        self.n_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, (Sha256, Instant)> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes `range` of `content`, in pieces.
async fn open(
    content: &Content,
    range: Range<u64>,
) -> Result<BoxStream<'static, io::Result<Bytes>>, Error> {
    match content {
        Content::Bytes(bytes) => {
            let pieces = bytes
                .get(range.start as usize..range.end as usize)
                .unwrap_or_default()
                .chunks(READ_BYTES);
            let pieces: Vec<_> = pieces
                .map(|piece| Ok(Bytes::copy_from_slice(piece)))
                .collect();
            Ok(stream::iter(pieces).boxed())
        }
        Content::File(path) => {
            let mut file = tokio::fs::File::open(path)
                .await
                .map_err(Error::io("open", path))?;
            file.seek(io::SeekFrom::Start(range.start))
                .await
                .map_err(Error::io("read", path))?;
            Ok(ReaderStream::with_capacity(file.take(range.end - range.start), READ_BYTES).boxed())
        }
        Content::Remote(snapshot, path) => {
            let reader = snapshot.reader(path, range)?;
            let pieces = stream::try_unfold(reader, async |mut reader| {
                let piece = reader.next().await.map_err(io::Error::other)?;
                Ok(piece.map(|piece| (piece, reader)))
            });
            Ok(pieces.boxed())
        }
    }
}

fn address(repo: &RepoId, href: &str) -> Result<Url, Error> {
    let url = Url::parse(href)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"));
    url.ok_or_else(|| wrong(repo, "an upload address that is none".to_owned()))
}

/// The headers that an action wants sent with it.
fn headers(repo: &RepoId, action: &Action) -> Result<HeaderMap, Error> {
    let mut headers = HeaderMap::new();
    for (name, value) in action.header.iter().flatten() {
        let name = name.to_ascii_lowercase();
        if matches!(
            name.as_str(),
            "host" | "content-length" | "transfer-encoding" | "connection"
        ) {
            continue;
        }
        let pair = (
            HeaderName::from_bytes(name.as_bytes()),
            value.as_str().map(HeaderValue::from_str),
        );
        let (Ok(name), Some(Ok(value))) = pair else {
            return Err(wrong(
                repo,
                format!("a header {name:?} that cannot be sent"),
            ));
        };
        headers.insert(name, value);
    }
    Ok(headers)
}

fn wrong(repo: &RepoId, detail: String) -> Error {
    Error::Protocol {
        what: format!("upload large files to {repo}"),
        detail,
    }
}
