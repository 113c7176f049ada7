//! A repository at one commit: its files, and their bytes by range.
//!
//! Invariant: every byte comes from the commit that the revision stood for when the snapshot was taken;
//! an answer that names another commit, or another size than the listing, is an error.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use vindex::{Origin, Source, SourceError, SourceFile};

use crate::content::{git_hasher, is_sha256};
use crate::range::{Addresses, Pin, RangeReader};
use crate::wire::{About, Wire, next_page, parse};
use crate::{Commit, Error, Hub, RepoId};

const PAGE_BYTES_MAX: usize = 32 << 20;
const N_PAGES_MAX: usize = 10_000;
const N_FILES_MAX: usize = 1_000_000;
/// Memory reserved before a byte has come; a listing may lie.
const RESERVE_BYTES_MAX: u64 = 16 << 20;
/// A blocking read at offset 0 fetches this much, so that a header usually costs one request.
const HEAD_BYTES: u64 = 128 << 10;

/// One file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Path in the repository, `/` between its parts; stays inside a directory that it is joined to.
    pub path: String,
    /// Length.
    pub size_bytes: u64,
    /// sha256 of the content, hex, for files that are kept as LFS objects.
    pub sha256: Option<String>,
    /// git blob id, hex (of the pointer for an LFS object).
    pub git_oid: String,
}

/// A repository at one commit. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Snapshot {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    wire: Arc<Wire>,
    repo: RepoId,
    commit: Commit,
    /// In order of their paths.
    files: Vec<File>,
    runtime: Handle,
    addresses: Arc<Addresses>,
    /// First bytes of files whose header is being read through [`Source`].
    heads: Mutex<HashMap<String, Bytes>>,
}

impl Hub {
    /// The repository at `revision` (`main` when `None`), pinned to the commit that it stands for now.
    ///
    /// # Errors
    /// As [`Hub::resolve`]; [`Error::Protocol`] for a listing that makes no sense.
    pub async fn snapshot(&self, repo: &RepoId, revision: Option<&str>) -> Result<Snapshot, Error> {
        let commit = self.resolve(repo, revision).await?;
        self.snapshot_at(repo, &commit).await
    }

    /// The head of a repository; `None` when there is no such repository, or nothing in it.
    ///
    /// # Errors
    /// As [`Hub::snapshot`].
    pub async fn head(&self, repo: &RepoId) -> Result<Option<Snapshot>, Error> {
        match self.model_info(repo, None).await {
            Ok(info) => match info.sha {
                Some(commit) => self.snapshot_at(repo, &commit).await.map(Some),
                None => Ok(None),
            },
            Err(Error::RepoNotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The repository at a commit that is known already.
    ///
    /// # Errors
    /// As [`Hub::snapshot`].
    pub async fn snapshot_at(&self, repo: &RepoId, commit: &Commit) -> Result<Snapshot, Error> {
        let files = list(&self.wire, repo, commit).await?;
        Ok(Snapshot {
            shared: Arc::new(Shared {
                wire: Arc::clone(&self.wire),
                repo: repo.clone(),
                commit: commit.clone(),
                files,
                runtime: Handle::current(),
                addresses: Arc::default(),
                heads: Mutex::new(HashMap::new()),
            }),
        })
    }
}

impl Snapshot {
    /// The repository.
    #[must_use]
    pub fn repo(&self) -> &RepoId {
        &self.shared.repo
    }

    /// The commit that every read is pinned to.
    #[must_use]
    pub fn commit(&self) -> &Commit {
        &self.shared.commit
    }

    /// All files, in order of their paths.
    #[must_use]
    pub fn files(&self) -> &[File] {
        &self.shared.files
    }

    /// The file at `path`.
    ///
    /// # Errors
    /// [`Error::EntryNotFound`] when the commit has none.
    pub fn file(&self, path: &str) -> Result<&File, Error> {
        let files = self.files();
        match files.binary_search_by(|file| file.path.as_str().cmp(path)) {
            Ok(index) => Ok(&files[index]),
            Err(_) => Err(Error::EntryNotFound {
                repo: self.repo().clone(),
                commit: self.commit().clone(),
                path: path.to_owned(),
                answer: None,
            }),
        }
    }

    /// The bytes `range` of a file, held in memory; the range must lie inside the file.
    ///
    /// # Errors
    /// [`Error::EntryNotFound`], [`Error::TooLarge`] for a range past the end; otherwise as every request.
    pub async fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        let mut reader = self.reader(path, range.clone())?;
        let mut bytes = Vec::with_capacity(
            range.end.saturating_sub(range.start).min(RESERVE_BYTES_MAX) as usize,
        );
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    /// A whole small file, held in memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when it is longer than `size_bytes_max`; otherwise as [`Snapshot::read_range`].
    pub async fn read_file(&self, path: &str, size_bytes_max: u64) -> Result<Bytes, Error> {
        let size_bytes = self.file(path)?.size_bytes;
        if size_bytes > size_bytes_max {
            return Err(Error::TooLarge {
                path: path.to_owned(),
                size_bytes,
                size_bytes_max,
            });
        }
        self.read_range(path, 0..size_bytes).await
    }

    /// A whole small file, held in memory, whose bytes are what the listing says.
    ///
    /// # Errors
    /// [`Error::Hash`] when they are not; otherwise as [`Snapshot::read_file`].
    pub async fn read_checked(&self, path: &str, size_bytes_max: u64) -> Result<Bytes, Error> {
        let bytes = self.read_file(path, size_bytes_max).await?;
        let file = self.file(path)?;
        let (expected, got) = match &file.sha256 {
            Some(sha256) => (sha256, hex::encode(Sha256::digest(&bytes))),
            None => {
                let hasher = git_hasher(bytes.len() as u64).chain_update(&bytes);
                (&file.git_oid, hex::encode(hasher.finalize()))
            }
        };
        if got == *expected {
            return Ok(bytes);
        }
        Err(Error::Hash {
            repo: self.repo().clone(),
            path: path.to_owned(),
            expected: expected.clone(),
            got,
        })
    }

    pub(crate) fn wire(&self) -> &Arc<Wire> {
        &self.shared.wire
    }

    /// Reads `range` of a file piece by piece.
    pub(crate) fn reader(&self, path: &str, range: Range<u64>) -> Result<RangeReader, Error> {
        let file = self.file(path)?;
        if range.start > range.end || range.end > file.size_bytes {
            return Err(Error::TooLarge {
                path: path.to_owned(),
                size_bytes: range.end.max(range.start),
                size_bytes_max: file.size_bytes,
            });
        }
        let pin = Pin {
            addresses: Arc::clone(&self.shared.addresses),
            repo: self.repo().clone(),
            commit: self.commit().clone(),
            path: path.to_owned(),
            size_bytes: file.size_bytes,
        };
        Ok(RangeReader::new(Arc::clone(self.wire()), pin, range))
    }

    async fn read_into(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), Error> {
        let end = offset_bytes.saturating_add(buf.len() as u64);
        if offset_bytes == 0 && end < HEAD_BYTES {
            let head_end = self.file(path)?.size_bytes.min(HEAD_BYTES).max(end);
            let head = self.read_range(path, 0..head_end).await?;
            buf.copy_from_slice(&head[..buf.len()]);
            if head.len() > buf.len() {
                self.heads().insert(path.to_owned(), head);
            }
            return Ok(());
        }
        let mut at = 0;
        let head = self.heads().get(path).cloned();
        if let Some(head) = head {
            let start = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
            if let Some(known) = head.get(start..) {
                at = known.len().min(buf.len());
                buf[..at].copy_from_slice(&known[..at]);
            }
            if at < buf.len() {
                self.heads().remove(path);
            }
        }
        let mut reader = self.reader(path, offset_bytes + at as u64..end)?;
        while let Some(chunk) = reader.next().await? {
            buf[at..at + chunk.len()].copy_from_slice(&chunk);
            at += chunk.len();
        }
        Ok(())
    }

    fn heads(&self) -> std::sync::MutexGuard<'_, HashMap<String, Bytes>> {
        self.shared
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocking reads for threads that are not tokio's: they wait on the runtime that the snapshot was taken
/// in, which must be multi-threaded and still running. A call from async code panics, as tokio's
/// `Handle::block_on` does.
impl Source for Snapshot {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        let files = Snapshot::files(self).iter();
        Ok(files
            .map(|file| SourceFile {
                path: file.path.clone(),
                size_bytes: file.size_bytes,
            })
            .collect())
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.shared
            .runtime
            .block_on(self.read_into(path, offset_bytes, buf))
            .map_err(SourceError::from)
    }

    fn origin(&self) -> Origin {
        Origin {
            model_name: self.repo().name().to_owned(),
            repo: Some(self.repo().to_string()),
            commit: Some(self.commit().to_string()),
        }
    }
}

/// All files of a commit, page by page.
async fn list(wire: &Wire, repo: &RepoId, commit: &Commit) -> Result<Vec<File>, Error> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "type")]
        kind: String,
        path: String,
        #[serde(default)]
        size: u64,
        #[serde(default)]
        oid: String,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        oid: String,
        size: u64,
    }
    let what = format!("list {repo}@{commit}");
    let wrong = |detail: String| Error::Protocol {
        what: what.clone(),
        detail,
    };
    let about = About {
        repo: Some(repo),
        revision: Some(commit.as_str()),
        file: None,
    };
    let mut url = wire.model_url(repo, &["tree", commit.as_str()]);
    url.query_pairs_mut()
        .append_pair("recursive", "true")
        .append_pair("expand", "false");
    let mut files = BTreeMap::new();
    for _ in 0..N_PAGES_MAX {
        let ask = wire.get(&what, url.clone(), about);
        let (headers, body) = wire.fetch(&ask, PAGE_BYTES_MAX).await?;
        for entry in parse::<Vec<Entry>>(&what, &body)? {
            if entry.kind != "file" {
                continue;
            }
            if !stays_inside(&entry.path) {
                return Err(wrong(format!(
                    "{:?} is no path inside a repository",
                    entry.path
                )));
            }
            let (size_bytes, sha256) = match entry.lfs {
                Some(lfs) if !is_sha256(&lfs.oid) => {
                    return Err(wrong(format!(
                        "{} has the sha256 {:?}",
                        entry.path, lfs.oid
                    )));
                }
                Some(lfs) => (lfs.size, Some(lfs.oid)),
                None => (entry.size, None),
            };
            let file = File {
                path: entry.path.clone(),
                size_bytes,
                sha256,
                git_oid: entry.oid,
            };
            if files
                .insert(entry.path, file)
                .is_some_and(|before| before.size_bytes != size_bytes)
            {
                return Err(wrong(
                    "a file is listed twice with different sizes".to_owned(),
                ));
            }
            if files.len() > N_FILES_MAX {
                return Err(wrong(format!("more than {N_FILES_MAX} files")));
            }
        }
        match next_page(&url, &headers) {
            Some(next) if next == url => {
                return Err(wrong("a page that links to itself".to_owned()));
            }
            Some(next) => url = next,
            None => return Ok(files.into_values().collect()),
        }
    }
    Err(wrong(format!("more than {N_PAGES_MAX} pages")))
}

/// Whether a path stays inside the directory that it is joined to, on every system.
pub(crate) fn is_plain(path: &str) -> bool {
    !path.contains(['\\', ':'])
        && !path.contains(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Whether a path stays inside the directory that it is joined to, on this system: others may have named a
/// file `a:b`, and the rest of their repository can be read all the same.
fn stays_inside(path: &str) -> bool {
    let path = if cfg!(windows) {
        path.to_owned()
    } else {
        path.replace(['\\', ':'], "_")
    };
    is_plain(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        for good in ["a", "a/b.c", ".gitattributes", "a..b/..c"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in [
            "", "/a", "a//b", "../a", "a/..", "./a", "a\\b", "c:/x", "a\0", "a\n",
        ] {
            assert!(!is_plain(bad), "{bad:?}");
            let is_odd_name = cfg!(not(windows)) && bad.contains(['\\', ':']);
            assert_eq!(stays_inside(bad), is_odd_name, "{bad:?}");
        }
    }
}
