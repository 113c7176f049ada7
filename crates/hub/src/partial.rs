//! A file that is being fetched: `<target>.incomplete`, and `<target>.incomplete.json`, which records which ranges of it
//! are there and of which content.
//!
//! Invariant: one process at a time works on it (a lock), a range is recorded after it was written, and a record of
//! other content counts for nothing; so a killed download goes on where it was, in any process, from any commit that
//! holds the same content.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::Error;

const STATE_BYTES_MAX: u64 = 16 << 20;

/// Removes the record of a file that is whole: a process that ended between the two steps of [`Part::finish`] left it.
pub(crate) fn forget_record(target: &Path) -> Result<(), Error> {
    // Whoever fetches the file anew has the partial file too.
    if beside(target, ".incomplete").exists() {
        return Ok(());
    }
    remove_if_there(&beside(target, ".incomplete.json"))
}

fn beside(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The partial file and its record, locked against other processes.
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    state_path: PathBuf,
    shared: Arc<Mutex<(File, State)>>,
}

impl Part {
    /// Opens, or begins, what will be `target`. `content` names the bytes of the whole file.
    pub(crate) fn open(target: &Path, content: &str, size_bytes: u64) -> Result<Part, Error> {
        let (path, state_path) = (
            beside(target, ".incomplete"),
            beside(target, ".incomplete.json"),
        );
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
            content: content.to_owned(),
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

    /// What of `wanted`, ascending and disjoint, is not on disk yet, in pieces of at most `chunk_bytes`.
    pub(crate) fn missing(&self, wanted: &[Range<u64>], chunk_bytes: u64) -> Vec<Range<u64>> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let done = &shared.1.done;
        let mut missing: Vec<Range<u64>> = Vec::new();
        for range in wanted {
            let mut at = range.start;
            let overlapping = done
                .iter()
                .copied()
                .filter(|&(start, end)| start < range.end && end > range.start);
            for (start, end) in overlapping.chain([(range.end, range.end)]) {
                while at < start {
                    // A piece that goes on where the one before ends is fetched with it.
                    match missing.last_mut() {
                        Some(last) if last.end == at && last.end - last.start < chunk_bytes => {
                            at = start.min(last.start + chunk_bytes);
                            last.end = at;
                        }
                        _ => {
                            let next = start.min(at + chunk_bytes);
                            missing.push(at..next);
                            at = next;
                        }
                    }
                }
                at = at.max(end);
            }
        }
        missing
    }

    /// Writes `block` at `offset_bytes`, then records it; gives the emptied block back.
    pub(crate) async fn write(
        &self,
        offset_bytes: u64,
        mut block: Vec<u8>,
    ) -> Result<Vec<u8>, Error> {
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
    pub(crate) fn sync(&self) -> Result<File, Error> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let flushed = shared.0.sync_all().and_then(|()| shared.0.try_clone());
        flushed.map_err(Error::io("flush", &self.path))
    }

    /// The lock is held until nothing is left to take up.
    pub(crate) fn finish(self, target: &Path) -> Result<(), Error> {
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

    /// These bytes are wrong and count as missing.
    pub(crate) fn forget(self, range: Range<u64>) -> Result<(), Error> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut shared.1;
        state.remove(range);
        write_state(&self.state_path, state).map_err(Error::io("write", &self.state_path))
    }

    pub(crate) fn discard(self) -> Result<(), Error> {
        remove_if_there(&self.state_path)?;
        remove_if_there(&self.path)
    }
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

    fn remove(&mut self, range: Range<u64>) {
        let before = self
            .done
            .iter()
            .map(|&(start, end)| (start, end.min(range.start)));
        let after = self
            .done
            .iter()
            .map(|&(start, end)| (start.max(range.end), end));
        let mut left: Vec<_> = before
            .chain(after)
            .filter(|(start, end)| start < end)
            .collect();
        left.sort_unstable();
        self.done = left;
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
    fn what_is_wrong_is_missing_again() {
        let mut s = state(&[(0, 20), (30, 40)]);
        s.remove(15..35);
        assert_eq!(s.done, [(0, 15), (35, 40)]);
        s.remove(3..5);
        assert_eq!(s.done, [(0, 3), (5, 15), (35, 40)]);
        s.remove(0..100);
        assert!(s.done.is_empty());
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
        let part = Part::open(&dir.path().join("f"), "git:x", 100).unwrap();
        part.shared.lock().unwrap().1.done = vec![(10, 20), (90, 100)];
        assert_eq!(
            part.missing(std::slice::from_ref(&(0..100)), 40),
            [0..10, 20..60, 60..90]
        );
        assert_eq!(
            part.missing(&[0..5, 5..10, 12..20, 30..91], 40),
            [0..10, 30..70, 70..90]
        );
        assert_eq!(
            part.missing(&[0..4, 4..8, 15..25, 80..100], 6),
            [0..6, 6..8, 20..25, 80..86, 86..90]
        );
    }
}
