//! One commit: files added and deleted, large ones uploaded first.
//!
//! Route: read the head; hash what the caller did not hash; leave out what the head holds already; ask the
//! Hub which files are large (`preupload`); upload those (`lfs`, `xet`); send one commit whose parent is
//! the head that was read. Invariant: one call makes at most one commit. When the answer to it is lost, the
//! head is read again: it holds our files (then it was made), or still is the parent (then it is sent
//! again), or moved (then the call ends with a conflict).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;
use sha1::Digest as _;
use sha2::Sha256;

use crate::content::{git_hasher, git_oid_of, is_sha256, sha256_of};
use crate::lfs::{self, Object};
use crate::partial::blocking;
use crate::retry::Patience;
use crate::snapshot::is_plain;
use crate::wire::{About, Again, parse};
use crate::{Commit, Error, File, Hub, RepoId, Snapshot};

/// Files that the Hub classifies in one call.
const N_PREUPLOAD_MAX: usize = 256;
const SAMPLE_BYTES: u64 = 512;
/// Largest file that goes inside the commit itself, and all such files together.
const INLINE_BYTES_MAX: u64 = 10_000_000;
const INLINE_BYTES_TOTAL_MAX: u64 = 64_000_000;
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// Bytes to commit.
#[derive(Clone, Debug)]
pub enum Content {
    /// Held in memory.
    Bytes(Vec<u8>),
    /// A local file, streamed; nobody may write to it meanwhile.
    File(PathBuf),
    /// A file of another repository, streamed from there; its listing must tell its sha256.
    Remote(Snapshot, String),
}

/// A file to add or replace.
#[derive(Clone, Debug)]
pub struct Addition {
    /// Path in the repository.
    pub path: String,
    /// Its bytes.
    pub content: Content,
    /// sha256 of the bytes, hex, when known; computed otherwise.
    pub sha256: Option<String>,
    /// Length of the bytes.
    pub size_bytes: u64,
}

/// What one commit to `main` changes.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// First line of the message.
    pub summary: String,
    /// Files to add or replace.
    pub additions: Vec<Addition>,
    /// Files to delete; those that are not there are left out.
    pub deletions: Vec<String>,
}

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReport {
    /// The commit made; `None` when the head was like this already.
    pub commit: Option<Commit>,
    /// Files that the commit added or replaced.
    pub uploaded: Vec<String>,
    /// Files that the head held already.
    pub skipped: Vec<String>,
    /// Files deleted.
    pub deleted: Vec<String>,
    /// Bytes of file content that went over the wire.
    pub bytes_sent: u64,
}

/// How a commit goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upload {
    /// So many more bytes were hashed.
    Hashed(u64),
    /// The uploads start.
    Started {
        /// Files to upload, small ones included.
        n_files: usize,
        /// Their length together.
        bytes_total: u64,
    },
    /// So many more bytes were sent.
    Bytes(u64),
    /// Everything is there; the commit is being made.
    Committing,
}

impl Hub {
    /// Makes one commit on `main`, or none when nothing would change.
    ///
    /// # Errors
    /// [`Error::Changed`] when a file is not what `sha256` or `size_bytes` say; [`Error::Conflict`] when the
    /// head moved; [`Error::TooLarge`] for a file that the Hub wants inline but is over 10 MB; otherwise as
    /// every request. After any error, the repository has at most the old head or exactly this commit.
    pub async fn commit(
        &self,
        repo: &RepoId,
        request: &CommitRequest,
        progress: &(dyn Fn(Upload) + Send + Sync),
    ) -> Result<CommitReport, Error> {
        let parent = self.model_info(repo, Some("main")).await?.sha;
        let held = self.held(repo, parent.as_ref()).await?;
        let files = prepare(request, progress).await?;
        let mut report = CommitReport {
            commit: None,
            uploaded: Vec::new(),
            skipped: Vec::new(),
            deleted: request
                .deletions
                .iter()
                .filter(|path| held.contains_key(*path))
                .cloned()
                .collect(),
            bytes_sent: 0,
        };
        let mut changed = Vec::new();
        for file in &files {
            let path = file.object.path.to_owned();
            if file.is_held(held.get(&path)).await? {
                report.skipped.push(path);
            } else {
                report.uploaded.push(path);
                changed.push(file);
            }
        }
        if changed.is_empty() && report.deleted.is_empty() {
            return Ok(report);
        }
        let modes = self.classify(repo, &changed).await?;
        let (large, small): (Vec<_>, Vec<_>) = changed
            .iter()
            .partition(|file| modes.get(file.object.path) == Some(&Mode::Large));
        bound_inline(&small)?;
        let bytes_total = changed.iter().map(|file| file.object.size_bytes).sum();
        progress(Upload::Started {
            n_files: changed.len(),
            bytes_total,
        });
        let objects: Vec<_> = large.iter().map(|file| file.object.clone()).collect();
        report.bytes_sent = lfs::upload(&self.wire, repo, &objects, progress).await?;
        let mut lines = head_line(&request.summary, parent.as_ref());
        for file in small {
            lines.push_str(&file.inline_line().await?);
            report.bytes_sent += file.object.size_bytes;
            progress(Upload::Bytes(file.object.size_bytes));
        }
        for Object {
            path,
            sha256,
            size_bytes,
            ..
        } in &objects
        {
            let value =
                json!({"path": path, "algo": "sha256", "oid": &**sha256, "size": size_bytes});
            push_line(&mut lines, "lfsFile", value);
        }
        for path in &report.deleted {
            push_line(&mut lines, "deletedFile", json!({"path": path}));
        }
        progress(Upload::Committing);
        let wanted = Wanted {
            files: &files,
            deleted: &report.deleted,
        };
        report.commit = Some(self.make(repo, parent, lines, &wanted).await?);
        Ok(report)
    }

    /// Sends the commit until it is known what became of it.
    async fn make(
        &self,
        repo: &RepoId,
        parent: Option<Commit>,
        lines: String,
        wanted: &Wanted<'_>,
    ) -> Result<Commit, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Made {
            commit_oid: String,
        }
        let url = self.wire.model_url(repo, &["commit", "main"]);
        let about = About {
            repo: Some(repo),
            revision: Some("main"),
            file: None,
        };
        let mut ask = self.wire.post(
            format!("commit to {repo}"),
            url,
            about,
            "application/x-ndjson",
            lines,
        );
        ask.again = Again::IfRefused;
        let mut patience = Patience::new(self.settings());
        let mut is_lost = false;
        loop {
            patience.attempt();
            let result = self.wire.fetch(&ask, ANSWER_BYTES_MAX).await;
            let error = match result.and_then(|(_, body)| parse::<Made>(&ask.what, &body)) {
                Ok(made) => match made.commit_oid.parse() {
                    Ok(commit) => return Ok(commit),
                    Err(_) => Error::Protocol {
                        what: ask.what.clone(),
                        detail: "the answer names no commit".to_owned(),
                    },
                },
                Err(error) => error,
            };
            match &error {
                Error::Http { .. } | Error::Protocol { .. } => {}
                Error::Refused { answer, .. } if answer.status >= 500 => {}
                Error::Conflict { .. } if is_lost => {}
                _ => return Err(error),
            }
            if !is_lost {
                // The Hub may have worked on the commit for longer than our patience before it failed.
                is_lost = true;
                patience.renew();
            }
            // The answer is lost: the head tells whether the commit is.
            let Ok(info) = self.model_info(repo, Some("main")).await else {
                return Err(error);
            };
            if info.sha == parent {
                let Some(wait) = patience.wait(None) else {
                    return Err(error);
                };
                tokio::time::sleep(wait).await;
                continue;
            }
            let held = self.held(repo, info.sha.as_ref()).await?;
            return match info.sha {
                Some(head) if wanted.is_held(&held).await? => Ok(head),
                head => Err(Error::Moved {
                    repo: repo.clone(),
                    parent,
                    head,
                }),
            };
        }
    }

    /// The files of a commit by their paths.
    async fn held(
        &self,
        repo: &RepoId,
        commit: Option<&Commit>,
    ) -> Result<BTreeMap<String, File>, Error> {
        let Some(commit) = commit else {
            return Ok(BTreeMap::new());
        };
        let snapshot = self.snapshot_at(repo, commit).await?;
        Ok(snapshot
            .files()
            .iter()
            .map(|file| (file.path.clone(), file.clone()))
            .collect())
    }

    /// Asks the Hub which files are large.
    async fn classify(
        &self,
        repo: &RepoId,
        files: &[&Prepared<'_>],
    ) -> Result<HashMap<String, Mode>, Error> {
        #[derive(Deserialize)]
        struct Answer {
            files: Vec<Class>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Class {
            path: String,
            upload_mode: String,
            #[serde(default)]
            should_ignore: bool,
        }
        let what = format!("ask {repo} which files are large");
        let mut modes = HashMap::new();
        for files in files.chunks(N_PREUPLOAD_MAX) {
            let list: Vec<_> = files
                .iter()
                .map(|f| json!({"path": f.object.path, "size": f.object.size_bytes, "sample": BASE64.encode(&f.sample)}))
                .collect();
            let url = self.wire.model_url(repo, &["preupload", "main"]);
            let about = About {
                repo: Some(repo),
                revision: Some("main"),
                file: None,
            };
            let ask = self
                .wire
                .post_json(&what, url, about, &json!({"files": list}));
            for class in self
                .wire
                .json::<Answer>(&ask, ANSWER_BYTES_MAX)
                .await?
                .files
            {
                if class.should_ignore {
                    return Err(Error::Ignored {
                        repo: repo.clone(),
                        path: class.path,
                    });
                }
                let mode = if class.upload_mode == "lfs" {
                    Mode::Large
                } else {
                    Mode::Small
                };
                modes.insert(class.path, mode);
            }
            for Prepared { object, .. } in files {
                // Empty files are never LFS objects.
                let mode = modes.get_mut(object.path).ok_or_else(|| Error::Protocol {
                    what: what.clone(),
                    detail: format!("it says nothing about {}", object.path),
                })?;
                if object.size_bytes == 0 {
                    *mode = Mode::Small;
                }
            }
        }
        Ok(modes)
    }
}

/// How a file travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Inside the commit.
    Small,
    /// As an LFS object, before it.
    Large,
}

/// A file whose hash is known.
struct Prepared<'a> {
    object: Object<'a>,
    /// The first bytes, for the Hub to tell text from binary.
    sample: Vec<u8>,
}

/// What the head holds after the commit.
struct Wanted<'a> {
    files: &'a [Prepared<'a>],
    deleted: &'a [String],
}

impl Wanted<'_> {
    async fn is_held(&self, held: &BTreeMap<String, File>) -> Result<bool, Error> {
        for file in self.files {
            if !file.is_held(held.get(file.object.path)).await? {
                return Ok(false);
            }
        }
        Ok(self.deleted.iter().all(|path| !held.contains_key(path)))
    }
}

impl Prepared<'_> {
    /// Whether the Hub's file has these bytes.
    async fn is_held(&self, held: Option<&File>) -> Result<bool, Error> {
        let Some(held) = held else { return Ok(false) };
        if held.size_bytes != self.object.size_bytes {
            return Ok(false);
        }
        if let Some(sha256) = &held.sha256 {
            return Ok(sha256 == &*self.object.sha256);
        }
        let oid = match self.object.content {
            Content::Bytes(bytes) => hex::encode(
                git_hasher(bytes.len() as u64)
                    .chain_update(bytes)
                    .finalize(),
            ),
            Content::File(path) => {
                blocking("read", path, |path| git_oid_of(std::fs::File::open(path)?)).await?
            }
            // It would have to be read twice; sending it again changes nothing.
            Content::Remote(..) => return Ok(false),
        };
        Ok(oid == held.git_oid)
    }

    /// The line of the commit that carries the whole file.
    async fn inline_line(&self) -> Result<String, Error> {
        let object = &self.object;
        let bytes = match object.content {
            Content::Bytes(bytes) => bytes.clone(),
            Content::File(path) => {
                let size_bytes_max = object.size_bytes + 1;
                blocking("read", path, move |path| {
                    let mut bytes = Vec::new();
                    std::fs::File::open(path)?
                        .take(size_bytes_max)
                        .read_to_end(&mut bytes)?;
                    Ok(bytes)
                })
                .await?
            }
            Content::Remote(snapshot, path) => {
                let bytes = snapshot.read_range(path, 0..object.size_bytes).await?;
                bytes.to_vec()
            }
        };
        let got = hex::encode(Sha256::digest(&bytes));
        if got != *object.sha256 {
            return Err(object.changed(format!("sha256 {} announced, {got} read", object.sha256)));
        }
        let mut line = String::new();
        let value =
            json!({"path": object.path, "content": BASE64.encode(&bytes), "encoding": "base64"});
        push_line(&mut line, "file", value);
        Ok(line)
    }
}

/// Checks the request against itself and this disk, and hashes what the caller did not.
async fn prepare<'a>(
    request: &'a CommitRequest,
    progress: &(dyn Fn(Upload) + Send + Sync),
) -> Result<Vec<Prepared<'a>>, Error> {
    let mut seen = HashSet::new();
    let paths = request
        .additions
        .iter()
        .map(|a| &a.path)
        .chain(&request.deletions);
    for path in paths {
        let reason = match (is_plain(path), seen.insert(path)) {
            (false, _) => "no path inside a repository",
            (_, false) => "named twice in one commit",
            _ => continue,
        };
        return Err(Error::Id {
            text: path.clone(),
            reason,
        });
    }
    let mut files = Vec::with_capacity(request.additions.len());
    for addition in &request.additions {
        let Addition {
            path,
            content,
            sha256,
            size_bytes,
        } = addition;
        let mut object = Object {
            path,
            content,
            sha256: "".into(),
            size_bytes: *size_bytes,
        };
        let found = object.size_bytes_now().await?;
        if found != *size_bytes {
            return Err(object.changed(format!("{size_bytes} bytes announced, {found} found")));
        }
        object.sha256 = match (sha256, content) {
            (Some(sha256), _) if !is_sha256(sha256) => {
                return Err(Error::Id {
                    text: sha256.clone(),
                    reason: "a sha256 is 64 lower-case hex digits",
                });
            }
            (Some(sha256), _) => sha256.as_str().into(),
            (None, Content::Bytes(bytes)) => hex::encode(Sha256::digest(bytes)).into(),
            (None, Content::File(path)) => {
                let sha256 =
                    blocking("read", path, |path| sha256_of(std::fs::File::open(path)?)).await?;
                progress(Upload::Hashed(*size_bytes));
                sha256.into()
            }
            (None, Content::Remote(_, path)) => {
                return Err(Error::Id {
                    text: path.clone(),
                    reason: "the listing of a file elsewhere must tell its sha256",
                });
            }
        };
        let sample = match content {
            Content::Bytes(bytes) => bytes[..bytes.len().min(SAMPLE_BYTES as usize)].to_vec(),
            Content::File(path) => {
                blocking("read", path, |path| {
                    let mut sample = Vec::new();
                    std::fs::File::open(path)?
                        .take(SAMPLE_BYTES)
                        .read_to_end(&mut sample)?;
                    Ok(sample)
                })
                .await?
            }
            Content::Remote(snapshot, path) => {
                let sample = snapshot.read_range(path, 0..SAMPLE_BYTES.min(*size_bytes));
                sample.await?.to_vec()
            }
        };
        files.push(Prepared { object, sample });
    }
    Ok(files)
}

/// Refuses what would have to be held in memory and sent as text.
fn bound_inline(files: &[&Prepared<'_>]) -> Result<(), Error> {
    let mut total = 0;
    for Prepared { object, .. } in files {
        total += object.size_bytes;
        let (size_bytes, size_bytes_max) = match object.size_bytes {
            n if n > INLINE_BYTES_MAX => (n, INLINE_BYTES_MAX),
            _ if total > INLINE_BYTES_TOTAL_MAX => (total, INLINE_BYTES_TOTAL_MAX),
            _ => continue,
        };
        return Err(Error::TooLarge {
            path: object.path.to_owned(),
            size_bytes,
            size_bytes_max,
        });
    }
    Ok(())
}

fn head_line(summary: &str, parent: Option<&Commit>) -> String {
    let mut value = json!({"summary": summary, "description": ""});
    if let Some(parent) = parent {
        value["parentCommit"] = parent.as_str().into();
    }
    let mut line = String::new();
    push_line(&mut line, "header", value);
    line
}

fn push_line(lines: &mut String, key: &str, value: serde_json::Value) {
    // Writing to a String cannot fail.
    let _ = writeln!(lines, "{}", json!({"key": key, "value": value}));
}
