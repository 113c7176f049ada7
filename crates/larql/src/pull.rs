//! `pull`: a slice of a published vindex becomes a directory.
//!
//! Order: pin the commit; read its index; fetch the parts of the slice, each checked against the index; `slice.json`,
//! `provenance.json`; `index.json` last. Invariant: the directory opens as a vindex only when every part of its slice
//! is there with the right hash. What is here already is kept, so an interrupted pull goes on.

use std::path::Path;
use std::{fs, io};

use hub::{Download, Downloaded, Snapshot};
use terminal::{Failure, Meter, size};
use vindex::{
    INDEX_FILE, Index, JOURNAL_FILE, PROVENANCE_FILE, Part, SLICE_FILE, Slice, Vindex, VindexId,
    slice_files_of_index,
};

use crate::cli::Pull;
use crate::context::Context;
use crate::directory::{self, sha256};
use crate::publish::TEXT_BYTES_MAX;

/// Fetches what is missing of a slice.
pub(crate) fn pull(args: &Pull, context: &Context) -> Result<(), Failure> {
    context.on_interrupt("what is fetched stays; the same command goes on after it");
    let output = context.output;
    let hub = context.hub()?;
    let repo = &args.from.repo;
    let failed = || Failure::of(format!("cannot pull {repo}"));
    let snapshot = context
        .wait(hub.snapshot(repo, args.from.revision.as_deref()))
        .map_err(failed())?;
    let index_json = context
        .wait(snapshot.read_file(INDEX_FILE, TEXT_BYTES_MAX))
        .map_err(|error| match error {
            hub::Error::EntryNotFound { .. } => Failure::new(format!(
                "{repo} holds no vindex at commit {}: it has no {INDEX_FILE}",
                snapshot.commit()
            )),
            error => failed()(error),
        })?;
    let id = VindexId::of(&index_json);
    let index = Index::from_json(&index_json).map_err(|reason| {
        Failure::new(format!(
            "{repo} holds no vindex of ours at commit {}: {INDEX_FILE}: {reason}",
            snapshot.commit()
        ))
    })?;
    let slice = choose(&snapshot, &index, args.slice)?;
    let parts = slice_files_of_index(&index, slice);
    for part in &parts {
        agree(&snapshot, part)?;
    }
    make_room(&args.output, id, args.force)?;
    output.text(format_args!(
        "source: hf://{repo} at commit {}",
        snapshot.commit()
    ))?;
    let size_bytes = parts.iter().map(|part| part.size_bytes).sum();
    output.text(format_args!(
        "vindex: {id}, slice {slice}: {} parts, {}",
        parts.len(),
        size(size_bytes)
    ))?;

    let (n_fetched, bytes_fetched) = fetch(&snapshot, &parts, &args.output, context)?;
    finish(&snapshot, &args.output, slice, &index_json, context)?;
    output.text(format_args!(
        "pulled {}: {n_fetched} parts fetched ({}), {} here already; every byte is what the index says",
        args.output.display(),
        size(bytes_fetched),
        parts.len() - n_fetched
    ))?;
    output.value(&serde_json::json!({
        "repo": repo.to_string(), "commit": snapshot.commit().to_string(), "vindex": id.to_string(), "slice": slice,
        "output": args.output, "n_parts": parts.len(), "n_fetched": n_fetched, "bytes_fetched": bytes_fetched,
    }))
}

/// The slice to pull: the one that is asked for, else the largest that the repository holds.
fn choose(snapshot: &Snapshot, index: &Index, wanted: Option<Slice>) -> Result<Slice, Failure> {
    let missing = |slice: Slice| {
        slice_files_of_index(index, slice)
            .into_iter()
            .find(|part| snapshot.file(&part.file).is_err())
            .map(|part| &part.file)
    };
    let held = || {
        Slice::ALL
            .into_iter()
            .find(|&slice| missing(slice).is_none())
    };
    match wanted {
        Some(slice) => match missing(slice) {
            None => Ok(slice),
            Some(file) => Err(Failure::new(format!(
                "{} does not hold the slice {slice}: it has no {file}",
                snapshot.repo()
            ))
            .hint(match held() {
                Some(held) => format!("it holds the slice {held}"),
                None => "it holds no slice whole; publish it again".to_owned(),
            })),
        },
        None => held().ok_or_else(|| {
            Failure::new(format!(
                "{} holds no slice of its vindex whole",
                snapshot.repo()
            ))
            .hint("publish it again")
        }),
    }
}

/// The listing must announce what the index says, before a byte is fetched.
fn agree(snapshot: &Snapshot, part: &Part) -> Result<(), Failure> {
    let Ok(file) = snapshot.file(&part.file) else {
        return Err(disagrees(snapshot, &part.file, "it is missing"));
    };
    if file.size_bytes != part.size_bytes {
        let what = format!(
            "{} bytes, the index says {}",
            file.size_bytes, part.size_bytes
        );
        return Err(disagrees(snapshot, &part.file, &what));
    }
    match &file.sha256 {
        Some(sha256) if *sha256 != part.sha256 => Err(disagrees(
            snapshot,
            &part.file,
            &format!("sha256 {sha256}, the index says {}", part.sha256),
        )),
        _ => Ok(()),
    }
}

fn disagrees(snapshot: &Snapshot, file: &str, what: &str) -> Failure {
    Failure::new(format!(
        "{}: {file} does not belong to the repository's own index: {what}",
        snapshot.repo()
    ))
    .hint("publish it again, or pull an earlier commit")
}

/// Makes `dir`, or refuses one that holds something else; with `force` that is removed.
fn make_room(dir: &Path, id: VindexId, force: bool) -> Result<(), Failure> {
    let path = dir.join(INDEX_FILE);
    let there = match fs::read(&path) {
        Ok(text) if VindexId::of(&text) == id => return Ok(()),
        Ok(text) => format!("another vindex, {}", VindexId::of(&text)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Failure::io("cannot read", &path, error));
        }
        Err(_) if dir.join(JOURNAL_FILE).exists() => "an extraction that did not finish".to_owned(),
        Err(_) => {
            return fs::create_dir_all(dir)
                .map_err(|error| Failure::io("cannot create", dir, error));
        }
    };
    if !force {
        return Err(Failure::new(format!("{} holds {there}", dir.display()))
            .hint("name another directory, or replace what is there with --force"));
    }
    directory::clear(dir)
}

/// Fetches the parts that are not here; how many there were, and their bytes.
fn fetch(
    snapshot: &Snapshot,
    parts: &[&Part],
    dir: &Path,
    context: &Context,
) -> Result<(usize, u64), Failure> {
    let meter = Meter::new("pull");
    meter.set_total(parts.iter().map(|part| part.size_bytes).sum());
    let (mut n_fetched, mut bytes_fetched) = (0, 0);
    for (i, part) in parts.iter().enumerate() {
        let target = dir.join(&part.file);
        let done =
            context.wait(
                snapshot.download(&part.file, &target, &|download| match download {
                    Download::Started { kept_bytes, .. } => meter.add(kept_bytes),
                    Download::Bytes(bytes) => meter.add(bytes),
                    Download::Verifying => {}
                }),
            );
        let done = done.map_err(|error| {
            Failure::new(format!("cannot pull {} of {}", part.file, snapshot.repo()))
                .cause(error)
                .hint("what is fetched stays; the same command goes on after it")
        })?;
        if snapshot
            .file(&part.file)
            .is_ok_and(|file| file.sha256.is_none())
        {
            // The Hub keeps it as text and its listing names another hash; the index is held against the bytes.
            let got = sha256(
                &fs::read(&target).map_err(|error| Failure::io("cannot read", &target, error))?,
            );
            if got != part.sha256 {
                fs::remove_file(&target)
                    .map_err(|error| Failure::io("cannot remove", &target, error))?;
                return Err(disagrees(
                    snapshot,
                    &part.file,
                    &format!("sha256 {got}, the index says {}", part.sha256),
                ));
            }
        }
        let word = match done {
            Downloaded::Fetched { bytes } => {
                n_fetched += 1;
                bytes_fetched += bytes;
                ""
            }
            Downloaded::AlreadyThere => {
                meter.add(part.size_bytes);
                " here already"
            }
        };
        meter.item(format!(
            "part {} of {}: {}{word}, {}",
            i + 1,
            parts.len(),
            part.file,
            size(part.size_bytes)
        ));
    }
    Ok((n_fetched, bytes_fetched))
}

/// Writes what makes the directory a vindex.
fn finish(
    snapshot: &Snapshot,
    dir: &Path,
    slice: Slice,
    index_json: &[u8],
    context: &Context,
) -> Result<(), Failure> {
    // A directory that holds more of the same vindex already stays complete for that.
    let slice = match Vindex::open(dir) {
        Ok(there) if there.slice() == Slice::Full => Slice::Full,
        _ => slice,
    };
    if snapshot.file(PROVENANCE_FILE).is_ok() {
        let provenance = context.wait(snapshot.read_file(PROVENANCE_FILE, TEXT_BYTES_MAX));
        let provenance =
            provenance.map_err(Failure::of(format!("cannot pull {}", snapshot.repo())))?;
        directory::write_whole(dir, PROVENANCE_FILE, &provenance)?;
    }
    directory::write_whole(dir, SLICE_FILE, slice.to_json().as_bytes())?;
    directory::write_whole(dir, INDEX_FILE, index_json)
}
