//! Writes `mtp.safetensors`: fetches what is missing, converts it, checks the file, and puts the header in last.
//!
//! ```text
//! log       {"begun": fingerprint}, {"piece": [number, sha256]} ...
//! file      | zeros where the header goes | pieces, in whatever order they come |
//! ```
//!
//! Invariant: a piece is noted after it was written, with the sum of what was written; a run that goes on fetches only
//! pieces that are not noted, or whose bytes in the file are not those of the note. The header comes after everything
//! was read again and matched, so that a file with a header is whole.

use std::fs::{File, OpenOptions};
use std::io::Read;
#[cfg(not(unix))]
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use terminal::{Failure, Meter};
use vindex::{LocalDir, Source, safetensors_header};

use crate::log::Log;
use crate::mtp::convert::convert;
use crate::mtp::layout::Layout;
use crate::mtp::norms::{NormConvention, is_norm};

/// How often pieces that the disk did not keep are made again.
const N_ROUNDS: usize = 3;
const READ_BYTES: usize = 1 << 20;

/// A finished sidecar.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    /// sha256 of the file, hex.
    pub(crate) sha256: String,
    /// sha256 of each tensor, hex, in the order of the file.
    pub(crate) sums: Vec<String>,
    pub(crate) norms: NormConvention,
    /// Bytes that were read from the source by this run.
    pub(crate) fetched_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Begun(String),
    Piece(usize, String),
}

/// Writes the sidecar to `path`, going on from what `log` and the file hold already. Blocks; `stop` ends it early.
pub(crate) fn write(
    layout: &Layout,
    source: &dyn Source,
    path: &Path,
    (mut log, lines): (Log, Vec<Line>),
    n_workers: usize,
    meter: &Meter,
    stop: &AtomicBool,
) -> Result<Written, Failure> {
    let fingerprint = layout.fingerprint();
    let mut sums: Vec<Option<String>> = vec![None; layout.pieces.len()];
    let mut is_ours = false;
    for line in lines {
        match line {
            Line::Begun(begun) => is_ours = begun == fingerprint,
            Line::Piece(number, sum) if is_ours && number < sums.len() => sums[number] = Some(sum),
            Line::Piece(..) => {}
        }
    }
    let unusable = |error| Failure::io("cannot write", path, error);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(!is_ours)
        .open(path)
        .map_err(unusable)?;
    if !is_ours {
        log.clear()?;
        log.append(&Line::Begun(fingerprint))?;
        sums.fill(None);
    }
    if file.metadata().map_err(unusable)?.len() != layout.file_bytes {
        sums.fill(None);
        file.set_len(layout.file_bytes).map_err(unusable)?;
    }
    // No header while pieces may be missing.
    write_at(&file, path, 0, &[0; 8])?;

    meter.set_total(layout.read_bytes());
    let mut fetched_bytes = 0;
    let mut tensor_sums = None;
    for _ in 0..N_ROUNDS {
        let pieces = Pieces {
            layout,
            source,
            file: &file,
            path,
            state: Mutex::new(State {
                log: &mut log,
                sums: &mut sums,
                fetched_bytes: &mut fetched_bytes,
            }),
            next: AtomicUsize::new(0),
            meter,
            stop,
        };
        pieces.make(n_workers)?;
        meter.item("checking");
        match check(layout, &file, path, &mut sums, stop)? {
            Some(found) => {
                tensor_sums = Some(found);
                break;
            }
            None => meter.warn(format_args!(
                "some of {} was not what was written; it is fetched again",
                path.display()
            )),
        }
    }
    let Some(sums) = tensor_sums else {
        return Err(Failure::new(format!(
            "{} does not keep what is written to it",
            path.display()
        ))
        .hint("check the disk, or name another directory with --scratch"));
    };
    let norms = match NormConvention::of_family(layout.source.model_type.as_deref()) {
        Some(norms) => norms,
        None => norms_of_values(layout, &file, path)?,
    };
    write_at(&file, path, 0, &layout.header(&sums, norms))?;
    file.sync_all().map_err(unusable)?;
    Ok(Written {
        sha256: sum_of(layout, path)?,
        sums,
        norms,
        fetched_bytes,
    })
}

/// Pieces that are being made.
struct Pieces<'a> {
    layout: &'a Layout,
    source: &'a dyn Source,
    file: &'a File,
    path: &'a Path,
    state: Mutex<State<'a>>,
    next: AtomicUsize,
    meter: &'a Meter,
    stop: &'a AtomicBool,
}

struct State<'a> {
    log: &'a mut Log,
    /// Of each piece that is in the file.
    sums: &'a mut [Option<String>],
    fetched_bytes: &'a mut u64,
}

impl<'a> Pieces<'a> {
    /// Makes all that have no sum, on `n_workers` threads; the first failure ends it.
    fn make(&self, n_workers: usize) -> Result<(), Failure> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..n_workers.max(1))
                .map(|_| scope.spawn(|| self.work()))
                .collect();
            let mut result = Ok(());
            for worker in workers {
                match worker.join() {
                    Ok(ended) => result = result.and(ended),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result
        })
    }

    fn work(&self) -> Result<(), Failure> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = self.layout.pieces.get(number) else {
                return Ok(());
            };
            if self.stop.load(Ordering::Relaxed) {
                return Err(Failure::Interrupted);
            }
            if self.lock().sums[number].is_some() {
                continue;
            }
            let tensor = self.layout.tensor(piece.tensor);
            let made = convert(self.source, tensor, &piece.part).and_then(|(bytes, n_read)| {
                debug_assert_eq!(bytes.len() as u64, piece.bytes.end - piece.bytes.start);
                write_at(
                    self.file,
                    self.path,
                    self.layout.data_start + piece.bytes.start,
                    &bytes,
                )?;
                let sum = hex::encode(Sha256::digest(&bytes));
                let mut state = self.lock();
                state.log.append(&Line::Piece(number, sum.clone()))?;
                state.sums[number] = Some(sum);
                *state.fetched_bytes += n_read;
                self.meter.add(n_read);
                Ok(())
            });
            if made.is_err() {
                // Nobody begins another piece.
                self.next.store(self.layout.pieces.len(), Ordering::Relaxed);
                return made;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<'a>> {
        // Nothing panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads everything again: the sums of the tensors, or `None` when some piece is not what was written, which then has
/// lost its sum.
fn check(
    layout: &Layout,
    file: &File,
    path: &Path,
    sums: &mut [Option<String>],
    stop: &AtomicBool,
) -> Result<Option<Vec<String>>, Failure> {
    let mut tensor_sums = Vec::with_capacity(layout.tensors.len());
    let mut is_good = true;
    let mut number = 0;
    let mut bytes = Vec::new();
    for index in 0..layout.tensors.len() {
        let first = number;
        let mut whole = Sha256::new();
        while let Some(piece) = layout
            .pieces
            .get(number)
            .filter(|piece| piece.tensor == index)
        {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Interrupted);
            }
            bytes.resize((piece.bytes.end - piece.bytes.start) as usize, 0);
            read_at(
                file,
                path,
                layout.data_start + piece.bytes.start,
                &mut bytes,
            )?;
            if sums[number] != Some(hex::encode(Sha256::digest(&bytes))) {
                sums[number] = None;
                is_good = false;
            }
            number += 1;
            let is_only = number == first + 1
                && layout
                    .pieces
                    .get(number)
                    .is_none_or(|next| next.tensor != index);
            if !is_only {
                whole.update(&bytes);
            }
        }
        let sum = match &sums[first..number] {
            [only] => only.clone().unwrap_or_default(),
            _ => hex::encode(whole.finalize()),
        };
        tensor_sums.push(sum);
    }
    Ok(is_good.then_some(tensor_sums))
}

/// The convention that the norm weights in the file have.
fn norms_of_values(layout: &Layout, file: &File, path: &Path) -> Result<NormConvention, Failure> {
    let (mut sum, mut n) = (0.0, 0);
    for (index, placed) in layout.tensors.iter().enumerate() {
        let tensor = layout.tensor(index);
        let n_bytes = placed.bytes.end - placed.bytes.start;
        if !is_norm(&tensor.name)
            || tensor.is_f32()
            || tensor.shape.len() != 1
            || n_bytes > READ_BYTES as u64
        {
            continue;
        }
        let mut bytes = vec![0; n_bytes as usize];
        read_at(
            file,
            path,
            layout.data_start + placed.bytes.start,
            &mut bytes,
        )?;
        let mut values = vec![0.0; bytes.len() / 2];
        quant::decode(quant::BlockType::BF16, &bytes, &mut values);
        sum += values.iter().map(|&x| f64::from(x)).sum::<f64>();
        n += values.len() as u64;
    }
    Ok(NormConvention::of_values(sum, n))
}

/// Reads the finished file as a stranger would: its header must list every tensor with its type, shape and place, in
/// order. Returns the sha256 of all of it.
fn sum_of(layout: &Layout, path: &Path) -> Result<String, Failure> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let wrong = |what: String| Failure::new(format!("{}: {what}", path.display()));
    let local = LocalDir::open(dir).map_err(Failure::of("cannot read what was written"))?;
    let header = safetensors_header(&local, &name, layout.file_bytes)
        .map_err(Failure::of("cannot read what was written"))?;
    if header.len() != layout.tensors.len() {
        return Err(wrong(format!(
            "{} tensors instead of {}",
            header.len(),
            layout.tensors.len()
        )));
    }
    for (index, ((name, found), placed)) in header.iter().zip(&layout.tensors).enumerate() {
        let tensor = layout.tensor(index);
        let is_right = *name == tensor.name
            && found.shape == tensor.shape
            && found.dtype.to_string() == if tensor.is_f32() { "F32" } else { "BF16" }
            && found.offset_bytes == layout.data_start + placed.bytes.start;
        if !is_right {
            return Err(wrong(format!(
                "the tensor {name} is not {} as it was written",
                tensor.name
            )));
        }
    }
    let unreadable = |error| Failure::io("cannot read", path, error);
    let mut file = File::open(path).map_err(unreadable)?;
    let mut sha256 = Sha256::new();
    let mut bytes = vec![0; READ_BYTES];
    loop {
        match file.read(&mut bytes).map_err(unreadable)? {
            0 => return Ok(hex::encode(sha256.finalize())),
            n => sha256.update(&bytes[..n]),
        }
    }
}

#[cfg(unix)]
fn write_at(file: &File, path: &Path, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset_bytes)
        .map_err(|error| Failure::io("cannot write", path, error))
}

#[cfg(unix)]
fn read_at(file: &File, path: &Path, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset_bytes)
        .map_err(|error| Failure::io("cannot read", path, error))
}

/// Elsewhere through a handle of its own, whose position nobody shares.
#[cfg(not(unix))]
fn write_at(_file: &File, path: &Path, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
    let written = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| {
            file.seek(SeekFrom::Start(offset_bytes))?;
            file.write_all(bytes)
        });
    written.map_err(|error| Failure::io("cannot write", path, error))
}

#[cfg(not(unix))]
fn read_at(_file: &File, path: &Path, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(offset_bytes))?;
        file.read_exact(bytes)
    });
    read.map_err(|error| Failure::io("cannot read", path, error))
}

#[cfg(test)]
mod tests;
