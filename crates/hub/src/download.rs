//! A whole file from a snapshot to this disk.
//!
//! Ranges of [`crate::Settings::chunk_bytes`] are fetched in parallel into `<target>.incomplete`;
//! `<target>.incomplete.json` records which are there and of which content, so that a killed download goes
//! on where it was, in any process, from any commit that holds the same content. Invariant: `target`
//! appears only after its bytes were flushed and match the hash of the listing.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};

use crate::content::{git_oid_of, sha256_of};
use crate::{Error, Snapshot};

/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;
const STATE_BYTES_MAX: u64 = 16 << 20;

/// How a download goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Download {
    /// It starts; `kept_bytes` are here from an earlier try.
    Started {
        /// Length of the file.
        size_bytes: u64,
        /// Bytes that need not be fetched.
        kept_bytes: u64,
    },
    /// So many more bytes are on disk.
    Bytes(u64),
    /// All bytes are here and are being hashed.
    Verifying,
}

/// What a download did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downloaded {
    /// Bytes were fetched.
    Fetched {
        /// How many.
        bytes: u64,
    },
    /// The target had this content already.
    AlreadyThere,
}

/// What `<target>.incomplete.json` holds.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    /// `sha256:…` or `git:…` of the whole content.
    content: String,
    size_bytes: u64,
    /// Ranges on disk: start and end, ascending, disjoint, not touching.
    done: Vec<(u64, u64)>,
}

impl Snapshot {
    /// Fetches `path` into `target`, whose directory must exist; resumes an earlier try.
    ///
    /// # Errors
    /// [`Error::Hash`] when the bytes are not those of the listing (they are discarded); [`Error::Busy`] when
    /// another process is at it; [`Error::Io`]; otherwise as [`Snapshot::read_range`].
    pub async fn download(
        &self,
        path: &str,
        target: &Path,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<Downloaded, Error> {
        let file = self.file(path)?.clone();
        let content = Content::of(&file);
        let size_bytes = file.size_bytes;
        if fs::metadata(target).is_ok_and(|m| m.is_file() && m.len() == size_bytes)
            && let Ok(there) = File::open(target)
            && content.matches(target, there).await?.is_ok()
        {
            return Ok(Downloaded::AlreadyThere);
        }
        let part = Part::open(target, &content, size_bytes)?;
        let missing = part.missing(self.wire().settings().chunk_bytes.max(1));
        let kept_bytes = size_bytes - missing.iter().map(|r| r.end - r.start).sum::<u64>();
        progress(Download::Started {
            size_bytes,
            kept_bytes,
        });
        self.fetch_ranges(path, &part, missing, progress).await?;
        progress(Download::Verifying);
        match content.matches(&part.path, part.sync()?).await? {
            Ok(()) => part.finish(target)?,
            Err(got) => {
                part.discard()?;
                let expected = content.hex().to_owned();
                return Err(Error::Hash {
                    repo: self.repo().clone(),
                    path: path.to_owned(),
                    expected,
                    got,
                });
            }
        }
        Ok(Downloaded::Fetched {
            bytes: size_bytes - kept_bytes,
        })
    }

    async fn fetch_ranges(
        &self,
        path: &str,
        part: &Part,
        missing: Vec<Range<u64>>,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<(), Error> {
        let mut waiting = missing.into_iter();
        let mut running = FuturesUnordered::new();
        let n_parallel = self.wire().settings().n_parallel.max(1);
        loop {
            while running.len() < n_parallel
                && let Some(range) = waiting.next()
            {
                running.push(self.fetch_range(path, part, range, progress));
            }
            match running.next().await {
                Some(result) => result?,
                None => return Ok(()),
            }
        }
    }

    async fn fetch_range(
        &self,
        path: &str,
        part: &Part,
        range: Range<u64>,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<(), Error> {
        let mut reader = self.reader(path, range.clone())?;
        let mut at = range.start;
        let mut block = Vec::with_capacity(WRITE_BYTES);
        loop {
            let chunk = reader.next().await;
            if let Ok(Some(bytes)) = &chunk {
                block.extend_from_slice(bytes);
            }
            // On an error as well: what is here is kept for the next try.
            if !block.is_empty() && (block.len() >= WRITE_BYTES || !matches!(chunk, Ok(Some(_)))) {
                let n = block.len() as u64;
                block = part.write(at, block).await?;
                at += n;
                progress(Download::Bytes(n));
            }
            if chunk?.is_none() {
                return Ok(());
            }
        }
    }
}

/// The content that a listing promises.
enum Content {
    Sha256(String),
    GitOid(String),
}

impl Content {
    fn of(file: &crate::File) -> Content {
        match &file.sha256 {
            Some(sha256) => Content::Sha256(sha256.clone()),
            None => Content::GitOid(file.git_oid.clone()),
        }
    }

    fn hex(&self) -> &str {
        match self {
            Content::Sha256(hex) | Content::GitOid(hex) => hex,
        }
    }

    fn key(&self) -> String {
        match self {
            Content::Sha256(hex) => format!("sha256:{hex}"),
            Content::GitOid(hex) => format!("git:{hex}"),
        }
    }

    /// Hashes a file; `Err` holds the hash that it has instead.
    async fn matches(&self, path: &Path, file: File) -> Result<Result<(), String>, Error> {
        let hash = match self {
            Content::Sha256(_) => sha256_of,
            Content::GitOid(_) => git_oid_of,
        };
        let got = blocking("read", path, move |_| hash(file)).await?;
        Ok(if got == self.hex() { Ok(()) } else { Err(got) })
    }
}

/// The partial file and its record, locked against other processes.
struct Part {
    path: PathBuf,
    state_path: PathBuf,
    shared: Arc<Mutex<(File, State)>>,
}

impl Part {
    fn open(target: &Path, content: &Content, size_bytes: u64) -> Result<Part, Error> {
        let beside = |suffix: &str| {
            let mut name = target.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let (path, state_path) = (beside(".incomplete"), beside(".incomplete.json"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(Error::Busy { path }),
            Err(fs::TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(fs::TryLockError::Error(source)) => {
                return Err(Error::Io {
                    doing: "lock",
                    path,
                    source,
                });
            }
        }
        if !is_at(&file, &path) {
            // Another process has just finished: what we opened is the target now.
            return Err(Error::Busy { path });
        }
        let fresh = State {
            content: content.key(),
            size_bytes,
            done: Vec::new(),
        };
        let state = match read_state(&state_path) {
            Some(state)
                if state.is_sound()
                    && state.content == fresh.content
                    && state.size_bytes == size_bytes =>
            {
                state
            }
            _ => fresh,
        };
        if state.done.is_empty() {
            file.set_len(0).map_err(Error::io("truncate", &path))?;
        }
        file.set_len(size_bytes)
            .map_err(Error::io("reserve", &path))?;
        Ok(Part {
            path,
            state_path,
            shared: Arc::new(Mutex::new((file, state))),
        })
    }

    /// What is not on disk yet, in pieces of at most `chunk_bytes`.
    fn missing(&self, chunk_bytes: u64) -> Vec<Range<u64>> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &shared.1;
        let mut missing = Vec::new();
        let mut at = 0;
        for (start, end) in state
            .done
            .iter()
            .copied()
            .chain([(state.size_bytes, state.size_bytes)])
        {
            while at < start {
                let next = start.min(at + chunk_bytes);
                missing.push(at..next);
                at = next;
            }
            at = end;
        }
        missing
    }

    /// Writes `block` at `offset_bytes`, then records it; gives the emptied block back.
    async fn write(&self, offset_bytes: u64, mut block: Vec<u8>) -> Result<Vec<u8>, Error> {
        let shared = Arc::clone(&self.shared);
        let state_path = self.state_path.clone();
        blocking("write", &self.path, move |_| {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let (file, state) = &mut *shared;
            file.seek(SeekFrom::Start(offset_bytes))?;
            file.write_all(&block)?;
            state.add(offset_bytes, offset_bytes + block.len() as u64);
            write_state(&state_path, state)?;
            block.clear();
            Ok(block)
        })
        .await
    }

    /// Flushes the bytes; returns the same open file, because a lock may keep others from reading it.
    fn sync(&self) -> Result<File, Error> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let flushed = shared.0.sync_all().and_then(|()| shared.0.try_clone());
        flushed.map_err(Error::io("flush", &self.path))
    }

    /// The lock is held until nothing is left to take up.
    fn finish(self, target: &Path) -> Result<(), Error> {
        fs::rename(&self.path, target).map_err(Error::io("rename into place", target))?;
        remove_if_there(&self.state_path)?;
        // Best effort: not every system can flush a directory.
        if let Some(dir) = target.parent()
            && let Ok(dir) = File::open(if dir.as_os_str().is_empty() {
                Path::new(".")
            } else {
                dir
            })
        {
            let _ = dir.sync_all();
        }
        Ok(())
    }

    fn discard(self) -> Result<(), Error> {
        remove_if_there(&self.state_path)?;
        remove_if_there(&self.path)
    }
}

impl State {
    /// Whether the ranges are ascending, disjoint and inside the file.
    fn is_sound(&self) -> bool {
        let mut at = 0;
        self.done.iter().all(|&(start, end)| {
            let ok = at <= start && start < end && end <= self.size_bytes;
            at = end;
            ok
        })
    }

    fn add(&mut self, start: u64, end: u64) {
        let index = self.done.partition_point(|&(s, _)| s < start);
        self.done.insert(index, (start, end));
        self.done.dedup_by(|next, before| {
            let touches = next.0 <= before.1;
            if touches {
                before.1 = before.1.max(next.1);
            }
            touches
        });
    }
}

/// Whether `path` still names the open `file`. Where the system has no file numbers: whether it names one.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (ours, there) = (file.metadata().map(id), fs::metadata(path).map(id));
        ours.is_ok_and(|ours| there.is_ok_and(|there| ours == there))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

fn read_state(path: &Path) -> Option<State> {
    if fs::metadata(path).ok()?.len() > STATE_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write_state(path: &Path, state: &State) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    fs::write(&beside, serde_json::to_vec(state)?)?;
    fs::rename(&beside, path)
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Runs blocking work on a file away from the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    doing: &'static str,
    path: &Path,
    work: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let owned = path.to_owned();
    let done = tokio::task::spawn_blocking(move || work(&owned))
        .await
        .map_err(std::io::Error::other);
    done.and_then(|result| result)
        .map_err(Error::io(doing, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(done: &[(u64, u64)]) -> State {
        State {
            content: "git:x".to_owned(),
            size_bytes: 100,
            done: done.to_vec(),
        }
    }

    #[test]
    fn ranges_merge() {
        let mut s = state(&[]);
        for (a, b) in [(20, 30), (0, 10), (40, 50), (10, 20), (30, 40)] {
            s.add(a, b);
            assert!(s.is_sound());
        }
        assert_eq!(s.done, [(0, 50)]);
    }

    #[test]
    fn a_lying_record_is_not_believed() {
        for done in [
            [(0, 101), (101, 102)],
            [(50, 60), (0, 10)],
            [(0, 10), (5, 20)],
            [(5, 5), (6, 7)],
        ] {
            assert!(!state(&done).is_sound(), "{done:?}");
        }
    }

    #[test]
    fn a_file_that_was_renamed_is_no_longer_at_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("f.incomplete"), dir.path().join("f"));
        let file = File::create(&path).unwrap();
        assert!(is_at(&file, &path));
        fs::rename(&path, &target).unwrap();
        assert!(!is_at(&file, &path) && is_at(&file, &target));
        #[cfg(unix)]
        {
            File::create(&path).unwrap();
            assert!(!is_at(&file, &path));
        }
    }

    #[test]
    fn missing_is_what_is_not_done() {
        let dir = tempfile::tempdir().unwrap();
        let part =
            Part::open(&dir.path().join("f"), &Content::GitOid("x".to_owned()), 100).unwrap();
        part.shared.lock().unwrap().1.done = vec![(10, 20), (90, 100)];
        assert_eq!(part.missing(40), [0..10, 20..60, 60..90]);
    }
}
