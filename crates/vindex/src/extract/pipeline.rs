//! The moving parts of an extraction: chunks on their way from the source to finished files.
//!
//! ```text
//! readers ──raw──> encoders ──blocks──> writer ──written──> hasher ──closed part──> committer
//! (several)        (options.threads)    (one, in order)     (one)                   (one: sync, rename, journal)
//! ```
//!
//! Invariant: at most [`Window::size`] chunks are between "being read" and "hashed", so memory is bounded whatever the
//! size of a tensor and whoever is slow; the writer puts chunks back in order, so bytes and errors do not depend on
//! the number of threads. Reading waits apart from encoding because a source may be far away, hashing apart from
//! writing and syncing because each would stall the other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use sha2::{Digest, Sha256};

use super::Progress;
use super::chunk::{Chunk, Job, Scratch, fit};
use super::journal::{FinishedPart, Journal};
use super::layout::Layout;
use crate::error::Error;
use crate::source::Source;

/// Reads in flight. A source on the network needs several to fill its line; local ones do not mind.
const N_READERS: usize = 8;
/// Most values of a chunk: reads of 4 MiB of a 16-bit checkpoint.
const CHUNK_VALUES_MAX: usize = 2 << 20;
/// Values of all chunks in flight: at most 128 MiB as f32.
const VALUES_IN_FLIGHT: usize = 32 << 20;

/// Most memory that an extraction takes beside the checkpoint's headers: of each value in flight what was read and what it
/// is encoded to, four bytes each at most.
pub const EXTRACTION_MEMORY_BYTES_MAX: u64 = 2 * 4 * VALUES_IN_FLIGHT as u64;

/// Suffix of a part that is being written.
pub(crate) const PARTIAL: &str = ".partial";

/// What the stages share.
pub(crate) struct Run<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) layout: &'a Layout<'a>,
    pub(crate) jobs: &'a [Job<'a>],
    pub(crate) dir: &'a Path,
    pub(crate) n_threads: usize,
    pub(crate) allow_nonfinite: bool,
    pub(crate) progress: &'a (dyn Fn(Progress) + Sync),
}

/// Writes the parts `wanted` (indices of the layout, ascending), whose tensors are the jobs.
///
/// # Errors
/// The first in the order of the chunks, except that failures of the file system may come earlier.
pub(crate) fn run(run: &Run<'_>, wanted: &[usize], journal: &mut Journal) -> Result<(), Error> {
    let window_size = N_READERS + 2 * run.n_threads;
    let max_values = (VALUES_IN_FLIGHT / window_size).clamp(1, CHUNK_VALUES_MAX);
    let mut chunks: Vec<Chunk> = Vec::new();
    for (i, job) in run.jobs.iter().enumerate() {
        chunks.extend(job.chunks(i, max_values)?);
    }
    // Where some chunks cannot be as small as that, fewer are on their way.
    let largest = chunks.iter().map(Chunk::read_values).max().unwrap_or(0);
    let window_size = match VALUES_IN_FLIGHT as u64 / (largest + 1) {
        n if n < window_size as u64 => n.max(1) as usize,
        _ => window_size,
    };
    let window = Window::new(window_size);
    let spare = Spare::default();
    let (to_encoders, from_readers) = channel();
    let from_readers = Mutex::new(from_readers);
    let (to_writer, from_encoders) = channel();
    let (to_hasher, from_writer) = channel();
    let (to_committer, from_hasher) = sync_channel(4);
    let (window, spare, chunks) = (&window, &spare, chunks.as_slice());
    thread::scope(|scope| {
        for _ in 0..N_READERS {
            let to_encoders = to_encoders.clone();
            scope.spawn(move || read(run, chunks, window, spare, &to_encoders));
        }
        drop(to_encoders);
        for _ in 0..run.n_threads {
            let (to_writer, from_readers) = (to_writer.clone(), &from_readers);
            scope.spawn(move || encode(run, chunks, window, spare, from_readers, &to_writer));
        }
        drop(to_writer);
        let writer =
            scope.spawn(move || write(run, chunks, wanted, window, &from_encoders, &to_hasher));
        let hasher = scope.spawn(move || hash(run, window, spare, &from_writer, &to_committer));
        let committed = commit(run, window, &from_hasher, journal);
        drop(from_hasher);
        let written = writer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        hasher
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(committed)
    })
}

/// Bytes of one chunk: as read, or an error on the way to the writer, which reports the first in order.
struct Numbered<T> {
    seq: usize,
    value: Result<T, Error>,
}

/// Blocks of one chunk.
struct Blocks {
    bytes: Vec<u8>,
    n_nonfinite: u64,
}

/// What the writer tells the hasher.
enum Written {
    /// The header of a part, written to its partial file.
    Begin {
        part: usize,
        file: File,
        header: Vec<u8>,
    },
    /// The next bytes of it.
    Chunk { chunk: Chunk, bytes: Vec<u8> },
    /// All of it is written.
    End,
}

/// A part whose bytes are all written and hashed, not yet synced.
struct Closed {
    part: usize,
    file: File,
    finished: FinishedPart,
}

fn read(
    run: &Run<'_>,
    chunks: &[Chunk],
    window: &Window,
    spare: &Spare,
    to_encoders: &Sender<Numbered<Vec<u8>>>,
) {
    let _guard = StopOnPanic(window);
    while let Some(seq) = window.next(chunks.len()) {
        let chunk = &chunks[seq];
        let reads = run.jobs[chunk.job].reads(chunk);
        let mut raw = spare.take();
        fit(&mut raw, reads.iter().map(|(.., len)| len).sum());
        let mut left = raw.as_mut_slice();
        let read = reads.into_iter().try_for_each(|(name, tensor, at, len)| {
            let (piece, rest) = std::mem::take(&mut left).split_at_mut(len);
            left = rest;
            let read = run.source.read_at(&tensor.file, at, piece);
            read.map_err(|e| Error::Values {
                file: tensor.file.clone(),
                tensor: name.to_owned(),
                source: e,
            })
        });
        let value = read.map(|()| raw);
        if to_encoders.send(Numbered { seq, value }).is_err() {
            return;
        }
    }
}

fn encode(
    run: &Run<'_>,
    chunks: &[Chunk],
    window: &Window,
    spare: &Spare,
    from_readers: &Mutex<Receiver<Numbered<Vec<u8>>>>,
    to_writer: &Sender<Numbered<Blocks>>,
) {
    let _guard = StopOnPanic(window);
    let mut scratch = Scratch::default();
    loop {
        let Ok(Numbered { seq, value }) = lock(from_readers).recv() else {
            return;
        };
        let value = value.map(|raw| {
            let mut bytes = spare.take();
            let chunk = &chunks[seq];
            let n_nonfinite = run.jobs[chunk.job].encode(chunk, &raw, &mut scratch, &mut bytes);
            spare.give(raw);
            Blocks { bytes, n_nonfinite }
        });
        if to_writer.send(Numbered { seq, value }).is_err() {
            return;
        }
    }
}

fn write(
    run: &Run<'_>,
    chunks: &[Chunk],
    wanted: &[usize],
    window: &Window,
    from_encoders: &Receiver<Numbered<Blocks>>,
    to_hasher: &Sender<Written>,
) -> Result<(), Error> {
    let _guard = StopAtEnd(window);
    // A hasher that went away has failed, and its own error is told; nothing is left to do here.
    let mut early = BTreeMap::new();
    let mut n_nonfinite = 0;
    let mut seq = 0;
    for &part in wanted {
        let path = run.dir.join(run.layout.parts[part].file.clone() + PARTIAL);
        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        let header = run.layout.header(part);
        file.write_all(&header).map_err(Error::io("write", &path))?;
        let handle = file.try_clone().map_err(Error::io("write", &path))?;
        if to_hasher
            .send(Written::Begin {
                part,
                file: handle,
                header,
            })
            .is_err()
        {
            return Ok(());
        }
        while let Some(chunk) = chunks
            .get(seq)
            .filter(|chunk| run.jobs[chunk.job].part == part)
        {
            let blocks = loop {
                if let Some(blocks) = early.remove(&seq) {
                    break blocks;
                }
                match from_encoders.recv() {
                    Ok(arrived) => early.insert(arrived.seq, arrived.value),
                    Err(_) => return Ok(()),
                };
            };
            let Blocks {
                bytes,
                n_nonfinite: n,
            } = blocks?;
            n_nonfinite += n;
            if chunk.ends_source {
                check_nonfinite(run, chunk, n_nonfinite)?;
                n_nonfinite = 0;
            }
            file.write_all(&bytes).map_err(Error::io("write", &path))?;
            if to_hasher
                .send(Written::Chunk {
                    chunk: chunk.clone(),
                    bytes,
                })
                .is_err()
            {
                return Ok(());
            }
            seq += 1;
        }
        if to_hasher.send(Written::End).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn check_nonfinite(run: &Run<'_>, chunk: &Chunk, count: u64) -> Result<(), Error> {
    let Some(source) = run.jobs[chunk.job]
        .sources
        .get(chunk.source)
        .filter(|_| count > 0)
    else {
        return Ok(());
    };
    let (file, tensor) = (source.tensor.file.clone(), source.name.to_owned());
    if !run.allow_nonfinite {
        return Err(Error::NonFinite {
            file,
            tensor,
            count,
        });
    }
    (run.progress)(Progress::NonFinite {
        file,
        tensor,
        count,
    });
    Ok(())
}

fn hash(
    run: &Run<'_>,
    window: &Window,
    spare: &Spare,
    from_writer: &Receiver<Written>,
    to_committer: &SyncSender<Closed>,
) {
    let _guard = StopOnPanic(window);
    let mut open: Option<(Closed, Sha256)> = None;
    let mut experts: Option<ExpertHashes> = None;
    while let Ok(written) = from_writer.recv() {
        match written {
            Written::Begin { part, file, header } => {
                let layout = &run.layout.parts[part];
                let finished = FinishedPart {
                    file: layout.file.clone(),
                    size_bytes: layout.size_bytes,
                    sha256: String::new(),
                    experts: BTreeMap::new(),
                };
                open = Some((
                    Closed {
                        part,
                        file,
                        finished,
                    },
                    Sha256::new_with_prefix(&header),
                ));
                (run.progress)(Progress::Bytes(header.len() as u64));
            }
            Written::Chunk { chunk, bytes } => {
                let Some((closed, sha256)) = &mut open else {
                    return;
                };
                sha256.update(&bytes);
                let tensor = run.jobs[chunk.job].tensor;
                if let Some(n) = run.jobs[chunk.job].n_hashes {
                    let hashes = experts.get_or_insert_with(|| {
                        ExpertHashes::new(run.jobs[chunk.job].size_bytes / n)
                    });
                    hashes.update(&bytes);
                    if chunk.ends_tensor {
                        let mut hashes = experts.take().map(|e| e.finished).unwrap_or_default();
                        hashes.truncate(n as usize);
                        closed.finished.experts.insert(tensor.name.clone(), hashes);
                    }
                }
                (run.progress)(Progress::Bytes(bytes.len() as u64));
                spare.give(bytes);
                window.done();
            }
            Written::End => {
                let Some((mut closed, sha256)) = open.take() else {
                    return;
                };
                closed.finished.sha256 = hex::encode(sha256.finalize());
                if to_committer.send(closed).is_err() {
                    return;
                }
            }
        }
    }
}

/// Hashes of the equal pieces of a tensor; what comes after the last whole one is padding.
struct ExpertHashes {
    expert_bytes: u64,
    left_bytes: u64,
    sha256: Sha256,
    finished: Vec<String>,
}

impl ExpertHashes {
    fn new(expert_bytes: u64) -> ExpertHashes {
        ExpertHashes {
            expert_bytes,
            left_bytes: expert_bytes,
            sha256: Sha256::new(),
            finished: Vec::new(),
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while bytes.len() as u64 >= self.left_bytes {
            let (mine, rest) = bytes.split_at(self.left_bytes as usize);
            self.sha256.update(mine);
            self.finished
                .push(hex::encode(self.sha256.finalize_reset()));
            self.left_bytes = self.expert_bytes;
            bytes = rest;
        }
        self.sha256.update(bytes);
        self.left_bytes -= bytes.len() as u64;
    }
}

fn commit(
    run: &Run<'_>,
    window: &Window,
    from_hasher: &Receiver<Closed>,
    journal: &mut Journal,
) -> Result<(), Error> {
    let _guard = StopAtEnd(window);
    while let Ok(Closed {
        part,
        file,
        finished,
    }) = from_hasher.recv()
    {
        let path = run.dir.join(&finished.file);
        let partial = run.dir.join(finished.file.clone() + PARTIAL);
        file.sync_data().map_err(Error::io("sync", &partial))?;
        std::fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        let (file, size_bytes) = (finished.file.clone(), finished.size_bytes);
        journal.finished(finished)?;
        let n_parts = run.layout.parts.len();
        (run.progress)(Progress::PartDone {
            index: part,
            n_parts,
            file,
            size_bytes,
        });
    }
    Ok(())
}

/// Lets the readers run ahead of the hasher by no more than `size` chunks.
struct Window {
    size: usize,
    state: Mutex<WindowState>,
    moved: Condvar,
}

struct WindowState {
    n_taken: usize,
    n_done: usize,
    stopped: bool,
}

impl Window {
    fn new(size: usize) -> Window {
        Window {
            size,
            state: Mutex::new(WindowState {
                n_taken: 0,
                n_done: 0,
                stopped: false,
            }),
            moved: Condvar::new(),
        }
    }

    /// The number of the next chunk to read, once there is room for it; `None` after the last one, or once stopped.
    fn next(&self, n_chunks: usize) -> Option<usize> {
        let is_full = |state: &mut WindowState| {
            !state.stopped && state.n_taken < n_chunks && state.n_taken - state.n_done >= self.size
        };
        let guard = self.moved.wait_while(lock(&self.state), is_full);
        let mut state = guard.unwrap_or_else(PoisonError::into_inner);
        if state.stopped || state.n_taken == n_chunks {
            return None;
        }
        state.n_taken += 1;
        Some(state.n_taken - 1)
    }

    fn done(&self) {
        lock(&self.state).n_done += 1;
        self.moved.notify_all();
    }

    fn stop(&self) {
        lock(&self.state).stopped = true;
        self.moved.notify_all();
    }
}

/// A stage that dies of a bug must not leave the others waiting: the panic goes on when the scope ends.
struct StopOnPanic<'a>(&'a Window);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

/// When a stage that handles every chunk has ended, well or not, nothing more needs to be read.
struct StopAtEnd<'a>(&'a Window);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Buffers to use again: their pages are already there.
#[derive(Default)]
struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn give(&self, buffer: Vec<u8>) {
        lock(&self.0).push(buffer);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
