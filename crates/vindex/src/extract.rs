//! Executes a [`Plan`]: from a checkpoint's bytes to a directory that is a vindex.
//!
//! 1. `layout.rs` computes every file's length and every offset from the plan.
//! 2. `journal.rs` says which parts an interrupted run has finished; those are hashed again and kept.
//! 3. `chunk.rs` cuts the missing parts' tensors into pieces, by the places that `view.rs` computes; `pipeline.rs` reads,
//!    encodes, writes and hashes them.
//! 4. `index.json` is written last and makes the directory a vindex.
//!
//! Invariant: plan and checkpoint alone decide the bytes. A file has its final name only when it is whole and synced,
//! and until `index.json` is there the directory opens as nothing at all, so a crash at any moment loses at most the
//! parts in flight. Left out: deciding to overwrite anything; what is not ours is refused.

mod chunk;
mod coded;
mod journal;
mod layout;
mod packed;
mod pipeline;
mod view;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::directory::write_whole;
use crate::error::Error;
use crate::gguf;
use crate::index::{FORMAT, INDEX_FILE, Index, Part, Tensor, VindexId, hash_range, n_experts};
use crate::open::read_index;
use crate::plan::Plan;
use crate::provenance::{PROVENANCE_FILE, Provenance};
use crate::share::Share;
use crate::slice::{SLICE_FILE, Slice};
use crate::source::{Files, Origin, Source};
pub use journal::JOURNAL_FILE;
use journal::{FinishedPart, Journal};
use layout::Layout;
pub use pipeline::EXTRACTION_MEMORY_BYTES_MAX;
pub(crate) use pipeline::PARTIAL;

/// How to extract. None of it changes a byte of the vindex.
#[derive(Clone, Copy, Debug)]
pub struct ExtractOptions {
    /// Threads that encode; at least 1, at most 256 are used.
    pub threads: usize,
    /// Store NaN and infinities as the block type does, and report them, instead of refusing the checkpoint.
    pub allow_nonfinite: bool,
}

/// What an extraction or a verification tells while it runs, from its own threads.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Once, first.
    Started {
        /// Parts of the plan, or of the slice.
        n_parts: usize,
        /// Bytes that will be told by `Bytes` and `PartKept` together.
        bytes_total: u64,
    },
    /// A part of an interrupted extraction is intact and need not be made again.
    PartKept {
        /// From 0, in the order of the files.
        index: usize,
        /// Parts of the plan, or of the slice.
        n_parts: usize,
        /// Its name.
        file: String,
        /// Its length.
        size_bytes: u64,
    },
    /// So many more bytes are written, or verified.
    Bytes(u64),
    /// A part has its final name, or is verified.
    PartDone {
        /// From 0, in the order of the files.
        index: usize,
        /// Parts of the plan, or of the slice.
        n_parts: usize,
        /// Its name.
        file: String,
        /// Its length.
        size_bytes: u64,
    },
    /// A tensor with values that are NaN, infinite or too large for their type was stored, as was allowed.
    NonFinite {
        /// File of the checkpoint.
        file: String,
        /// Tensor of the checkpoint.
        tensor: String,
        /// How many values.
        count: u64,
    },
}

/// Extracts `source` as `plan` says into the directory `out`, which is created, or is empty, or holds the same
/// extraction, interrupted. Takes less than 300 MiB of anonymous memory whatever the size of the model.
///
/// # Errors
/// [`Error::OutputExists`], [`Error::OtherPlan`], [`Error::ForeignFile`] and [`Error::Locked`] about `out`;
/// [`Error::NoSpace`] before anything is written; [`Error::NonFinite`], [`Error::Values`] and [`Error::Source`]
/// about the source; [`Error::OtherSource`] when it is not the plan's; [`Error::Plan`] about a plan that makes no sense;
/// [`Error::Io`]. Parts that were finished before the error stay, and the next call continues after them.
pub fn extract(
    source: &dyn Source,
    plan: &Plan,
    out: &Path,
    options: &ExtractOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<VindexId, Error> {
    refuse_another_source(source, plan)?;
    let layout = Layout::new(plan)?;
    chunk::jobs(plan, |_| true)?;
    let digest = digest(source, plan, &layout)?;

    let index_path = out.join(INDEX_FILE);
    if index_path.exists() && !out.join(JOURNAL_FILE).exists() {
        return Err(Error::OutputExists {
            path: out.to_owned(),
        });
    }
    let created = !out.exists();
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let mut journal = Journal::open(out)?;
    let result =
        continue_or_begin(&layout, plan, out, &mut journal, &digest, progress).and_then(|kept| {
            let Some(kept) = kept else {
                return read_index(out).map(|(text, _)| VindexId::of(&text));
            };
            let wanted: Vec<usize> = (0..plan.parts.len())
                .filter(|part| !kept.contains(part))
                .collect();
            let jobs = chunk::jobs(plan, |part| !kept.contains(&part))?;
            let run = pipeline::Run {
                source,
                layout: &layout,
                jobs: &jobs,
                dir: out,
                n_threads: options.threads.clamp(1, 256),
                allow_nonfinite: options.allow_nonfinite,
                progress,
            };
            let written = pipeline::run(&run, &wanted, &mut journal)
                .and_then(|()| finish(plan, &layout, out, &journal.parts));
            if written.is_err() {
                remove_partials(out, &layout);
            }
            written
        });
    if result.is_ok() {
        journal.remove()?;
    } else if journal.parts.is_empty()
        && journal.is_ours(&digest)
        && !has_parts(&layout, out, &journal)
    {
        // Nothing is worth continuing: leave the place as it was, as far as that goes.
        let _ = journal.remove();
        if created {
            let _ = fs::remove_dir(out);
        }
    }
    result
}

/// Lengths of the files that `plan` makes, in their order.
///
/// # Errors
/// [`Error::Plan`] about a plan that makes no sense.
pub(crate) fn part_sizes(plan: &Plan) -> Result<Vec<u64>, Error> {
    let layout = Layout::new(plan)?;
    Ok(layout.parts.iter().map(|part| part.size_bytes).collect())
}

/// True when a part of this extraction has its final name, though perhaps no line in the journal: without the journal
/// the next run would take it for somebody else's.
fn has_parts(layout: &Layout<'_>, out: &Path, journal: &Journal) -> bool {
    let mut parts = layout.parts.iter();
    journal.digest.is_some() && parts.any(|part| out.join(&part.file).exists())
}

/// A plan says where in its source the weights are, so it is of no use with another one.
fn refuse_another_source(source: &dyn Source, plan: &Plan) -> Result<(), Error> {
    let (planned, given) = (&plan.origin, source.origin());
    if given != *planned {
        let named = |o: &Origin| {
            let at = o
                .commit
                .as_deref()
                .map(|c| format!(" at {c}"))
                .unwrap_or_default();
            format!("{}{at}", o.repo.as_ref().unwrap_or(&o.model_name))
        };
        let reason = format!("{} was planned, {} is given", named(planned), named(&given));
        return Err(Error::OtherSource { reason });
    }
    let listed = Files::list(source)?;
    for (file, expected) in plan.checkpoint.files() {
        let got = listed.size_bytes(file);
        if got != Some(expected) {
            let got = got.map_or("absent".to_owned(), |got| format!("{got} bytes long"));
            let reason = format!("{file} is {got}, {expected} bytes were planned");
            return Err(Error::OtherSource { reason });
        }
    }
    Ok(())
}

/// sha256 of everything that decides the output: the plan, the metadata of part 1, the source.
fn digest(source: &dyn Source, plan: &Plan, layout: &Layout<'_>) -> Result<String, Error> {
    let of_source = source.fingerprint().map_err(|source| Error::Source {
        file: "the list of files".to_owned(),
        source,
    })?;
    let of_plan = serde_json::to_vec(plan).expect("a plan is plain data");
    let mut sha256 = Sha256::new();
    for piece in [
        FORMAT.as_bytes(),
        &of_plan,
        &layout.header(0),
        of_source.as_bytes(),
    ] {
        sha256.update((piece.len() as u64).to_le_bytes());
        sha256.update(piece);
    }
    Ok(hex::encode(sha256.finalize()))
}

/// Which parts are finished; `None` when all is, down to `index.json`, and only the journal is left over.
fn continue_or_begin(
    layout: &Layout<'_>,
    plan: &Plan,
    out: &Path,
    journal: &mut Journal,
    digest: &str,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Option<HashSet<usize>>, Error> {
    let is_finished = out.join(INDEX_FILE).exists();
    match &journal.digest {
        Some(of_journal) if of_journal == digest && is_finished => return Ok(None),
        Some(of_journal) if of_journal == digest => {}
        // A finished vindex with the journal of another plan, or one that has just been finished by another process.
        _ if is_finished => {
            return Err(Error::OutputExists {
                path: out.to_owned(),
            });
        }
        Some(of_journal) => {
            return Err(Error::OtherPlan {
                path: out.to_owned(),
                expected: digest.to_owned(),
                got: of_journal.clone(),
            });
        }
        None => {}
    }
    refuse_foreign_files(layout, out, journal.digest.is_some())?;
    remove_partials(out, layout);

    let n_parts = layout.parts.len();
    let bytes_total = layout.parts.iter().map(|part| part.size_bytes).sum();
    let listed = layout.parts.par_iter().enumerate();
    let kept: HashSet<usize> = listed
        .filter(|(_, part)| {
            journal
                .parts
                .get(&part.file)
                .is_some_and(|finished| is_intact(out, finished))
        })
        .map(|(i, _)| i)
        .collect();
    let missing = layout
        .parts
        .iter()
        .enumerate()
        .filter(|(i, _)| !kept.contains(i));
    refuse_small_disk(plan, out, missing.map(|(_, part)| part.size_bytes).sum())?;
    if journal.digest.is_none() {
        journal.begin(digest)?;
        sync_dir(out)?;
    }
    progress(Progress::Started {
        n_parts,
        bytes_total,
    });
    for (index, part) in layout
        .parts
        .iter()
        .enumerate()
        .filter(|(i, _)| kept.contains(i))
    {
        let (file, size_bytes) = (part.file.clone(), part.size_bytes);
        progress(Progress::PartKept {
            index,
            n_parts,
            file,
            size_bytes,
        });
    }
    Ok(Some(kept))
}

/// A new directory must be empty; one with our journal may hold what an extraction leaves behind.
fn refuse_foreign_files(layout: &Layout<'_>, out: &Path, is_continued: bool) -> Result<(), Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(out).map_err(Error::io("list", out))? {
        names.push(
            entry
                .map_err(Error::io("list", out))?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    let is_ours = |name: &str| {
        let name = name.strip_suffix(PARTIAL).unwrap_or(name);
        let mut parts = layout.parts.iter();
        [INDEX_FILE, SLICE_FILE, PROVENANCE_FILE].contains(&name)
            || parts.any(|part| part.file == name)
    };
    match names
        .into_iter()
        .find(|name| name != JOURNAL_FILE && !(is_continued && is_ours(name)))
    {
        Some(file) => Err(Error::ForeignFile {
            path: out.to_owned(),
            file,
        }),
        None => Ok(()),
    }
}

/// Best effort: what cannot be removed is overwritten later, or told then.
fn remove_partials(out: &Path, layout: &Layout<'_>) {
    let others = [INDEX_FILE, SLICE_FILE, PROVENANCE_FILE];
    for file in layout
        .parts
        .iter()
        .map(|part| part.file.as_str())
        .chain(others)
    {
        let _ = fs::remove_file(out.join(format!("{file}{PARTIAL}")));
    }
}

fn is_intact(out: &Path, finished: &FinishedPart) -> bool {
    let Ok(file) = File::open(out.join(&finished.file)) else {
        return false;
    };
    let len = file.metadata().map(|metadata| metadata.len());
    len.is_ok_and(|len| len == finished.size_bytes)
        && hash_range(&file, 0, finished.size_bytes, &|_| ())
            .is_ok_and(|got| got == finished.sha256)
}

fn refuse_small_disk(plan: &Plan, out: &Path, parts_bytes: u64) -> Result<(), Error> {
    // A generous line for each tensor and hash, in the index and in the journal.
    let n_hashes: u64 = plan
        .parts
        .iter()
        .flat_map(|part| part.tensors.iter().filter_map(|t| part.n_hashes(t)))
        .sum();
    let n_tensors = plan
        .parts
        .iter()
        .map(|part| part.tensors.len() as u64)
        .sum::<u64>();
    let needed_bytes =
        parts_bytes.saturating_add(2 * (512 * n_tensors + 70 * n_hashes) + (64 << 10));
    match available_bytes(out)? {
        Some(available_bytes) if available_bytes < needed_bytes => Err(Error::NoSpace {
            path: out.to_owned(),
            needed_bytes,
            available_bytes,
        }),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn available_bytes(dir: &Path) -> Result<Option<u64>, Error> {
    let stat = rustix::fs::statvfs(dir)
        .map_err(|e| Error::io("measure the free space of", dir)(e.into()))?;
    Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Where it cannot be asked, a full disk is told by the write that fails.
#[cfg(not(unix))]
fn available_bytes(_: &Path) -> Result<Option<u64>, Error> {
    Ok(None)
}

/// Writes the small files, the index last.
fn finish(
    plan: &Plan,
    layout: &Layout<'_>,
    out: &Path,
    finished: &BTreeMap<String, FinishedPart>,
) -> Result<VindexId, Error> {
    let index = index(plan, layout, finished).to_json();
    // What we write we can read: a name or a number that the index cannot hold is found before it is published.
    let readable = Index::from_json(index.as_bytes());
    readable.map_err(|reason| Error::Plan {
        tensor: INDEX_FILE.to_owned(),
        reason,
    })?;
    write_whole(
        out,
        PROVENANCE_FILE,
        Provenance::now(&plan.origin).to_json().as_bytes(),
    )?;
    write_whole(
        out,
        SLICE_FILE,
        Share::from(Slice::Full).to_json().as_bytes(),
    )?;
    sync_dir(out)?;
    write_whole(out, INDEX_FILE, index.as_bytes())?;
    sync_dir(out)?;
    Ok(VindexId::of(index.as_bytes()))
}

fn index(plan: &Plan, layout: &Layout<'_>, finished: &BTreeMap<String, FinishedPart>) -> Index {
    let mut parts = Vec::new();
    let mut tensors = Vec::new();
    for (i, (planned, placed)) in plan.parts.iter().zip(&layout.parts).enumerate() {
        let finished = &finished[&placed.file];
        parts.push(Part {
            file: placed.file.clone(),
            component: planned.component,
            size_bytes: placed.size_bytes,
            sha256: finished.sha256.clone(),
        });
        for (tensor, &offset_bytes) in planned.tensors.iter().zip(&placed.offsets_bytes) {
            let stacked = n_experts(&tensor.name, &tensor.ne);
            let hashes = || finished.experts.get(&tensor.name);
            tensors.push(Tensor {
                name: tensor.name.clone(),
                block_type: tensor.block_type,
                ne: tensor.ne.clone(),
                part: i as u32,
                offset_bytes,
                size_bytes: gguf::size_bytes(tensor.block_type, &tensor.ne).unwrap_or(0),
                experts: hashes().filter(|_| stacked.is_some()).cloned(),
                sha256: match stacked {
                    Some(_) => None,
                    None => hashes().and_then(|hashes| hashes.first()).cloned(),
                },
            });
        }
    }
    Index {
        format: FORMAT.to_owned(),
        name: plan.name.clone(),
        stem: plan.stem.clone(),
        recipe: plan.recipe,
        calibration: plan.imatrix.as_ref().map(|imatrix| imatrix.calibration()),
        config: plan.config.clone(),
        parts,
        tensors,
    }
}

#[cfg(unix)]
fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync", dir))
}

/// Other systems have no handle of a directory to sync.
#[cfg(not(unix))]
fn sync_dir(_: &Path) -> Result<(), Error> {
    Ok(())
}
