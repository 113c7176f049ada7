//! `publish`: a slice of a vindex becomes the content of a repository, in one commit.
//!
//! Order: open; ask what the repository holds; say what would change; hash everything; create; commit. Invariant: the
//! named repository receives the slice and its card and nothing else is touched; what is not intact is not sent; the
//! repository shows the old vindex or the new one and nothing between.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use hub::{Addition, CommitRequest, Content, Hub, Snapshot, Upload};
use serde::Serialize;
use sha2::{Digest, Sha256};
use terminal::{Failure, Meter, size, tell};
use vindex::{
    INDEX_FILE, Index, PROVENANCE_FILE, Progress, Provenance, SliceContent, SliceFile, Vindex,
    VindexId,
};

use crate::cli::Publish;
use crate::context::Context;
use crate::extract::show;

/// Name of the card in a repository.
const CARD_FILE: &str = "README.md";
const CARD_BYTES_MAX: u64 = 4 << 20;
/// Files that the Hub keeps as text are compared byte by byte up to this size; index.json is the largest.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What a publication does to a repository.
#[derive(Debug, Serialize)]
struct Changes {
    repo: String,
    /// The head that was looked at; `None` when there is no repository yet.
    head: Option<String>,
    vindex: String,
    /// The vindex that the repository holds now.
    replaces: Option<String>,
    slice: vindex::Slice,
    files: Vec<Change>,
    deletions: Vec<String>,
}

/// One file of the publication.
#[derive(Debug, Serialize)]
struct Change {
    path: String,
    size_bytes: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// The repository has no such file.
    Add,
    /// The repository has another one.
    Replace,
    /// The repository has it.
    Keep,
}

/// Publishes, or with `--dry-run` only says what would change.
pub(crate) fn publish(args: &Publish, context: &Context) -> Result<(), Failure> {
    context.on_interrupt(
        "nothing is visible before the commit; the same command goes on, and sends nothing twice",
    );
    let output = context.output;
    let vindex = Vindex::open(&args.dir).map_err(Failure::of(format!(
        "cannot publish {}",
        args.dir.display()
    )))?;
    let mut files = vindex::slice_files(&vindex, args.slices).map_err(Failure::of(format!(
        "cannot publish the slice {} of {}",
        args.slices,
        args.dir.display()
    )))?;
    if let Some(path) = &args.card {
        files.push(card(path)?);
    }
    let hub = context.hub()?;
    if hub.settings().token.is_none() && !args.dry_run {
        return Err(Failure::new(format!("publishing to {} needs a token", args.repo))
            .hint("set HF_TOKEN to a token that may write, or store one with `hf auth login`; --dry-run needs none"));
    }
    let changes = context.wait(compare(&hub, args, &vindex, &mut files))?;
    output.text(&changes)?;
    if args.dry_run {
        output.value(&changes)?;
        return output.text("dry run complete: nothing was sent");
    }
    let meter = Meter::new("verify");
    let verified = vindex::verify(&args.dir, &|progress| match progress {
        // The files are listed above already.
        Progress::PartDone { .. } => {}
        progress => show(&meter, progress),
    });
    drop(meter);
    verified.map_err(Failure::of(format!(
        "{} is not intact, so nothing was sent",
        args.dir.display()
    )))?;
    if let Some(path) = &args.card {
        context.wait(check_card(&hub, path))?;
    }
    let report = context.wait(send(&hub, args, &changes, files));
    let report = report.map_err(Failure::of(format!(
        "cannot publish to {}; it shows what it showed before",
        args.repo
    )))?;
    match &report.commit {
        Some(commit) => output.text(format_args!(
            "published hf://{} at commit {commit}: {} files sent ({}), {} there already, {} deleted",
            args.repo,
            report.uploaded.len(),
            size(report.bytes_sent),
            report.skipped.len() + changes.kept(),
            report.deleted.len()
        ))?,
        None => output.text(format_args!("hf://{} holds all of this already; no commit was needed", args.repo))?,
    }
    output.text(format_args!("see {}", hub.page(&args.repo)))?;
    output.value(&serde_json::json!({
        "repo": args.repo.to_string(), "vindex": changes.vindex, "slice": changes.slice,
        "commit": report.commit.as_ref().map(ToString::to_string), "page": hub.page(&args.repo),
        "uploaded": report.uploaded, "deleted": report.deleted, "bytes_sent": report.bytes_sent,
    }))
}

fn card(path: &Path) -> Result<SliceFile, Failure> {
    let size_bytes = fs::metadata(path)
        .map_err(|error| Failure::io("cannot read the card", path, error))?
        .len();
    if size_bytes > CARD_BYTES_MAX {
        return Err(Failure::new(format!(
            "the card {} has {}, at most {} are allowed",
            path.display(),
            size(size_bytes),
            size(CARD_BYTES_MAX)
        )));
    }
    let bytes = fs::read(path).map_err(|error| Failure::io("cannot read the card", path, error))?;
    Ok(SliceFile {
        name: CARD_FILE.to_owned(),
        size_bytes: bytes.len() as u64,
        sha256: sha256(&bytes),
        content: SliceContent::Bytes(bytes),
    })
}

/// Lets the Hub look at the card before anything is sent; a Hub that cannot is no reason to stop.
async fn check_card(hub: &Hub, path: &Path) -> Result<(), Failure> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::io("cannot read the card", path, error))?;
    match hub.validate_card(&text).await {
        Ok(warnings) => warnings.iter().for_each(|warning| {
            tell(format_args!(
                "warning: the card {}: {warning}",
                path.display()
            ))
        }),
        Err(error @ hub::Error::Card { .. }) => {
            return Err(Failure::new(format!(
                "the card {} cannot be published; nothing was sent",
                path.display()
            ))
            .cause(error));
        }
        Err(error) => tell(format_args!(
            "warning: the card {} could not be checked: {error}",
            path.display()
        )),
    }
    Ok(())
}

/// Compares the files with the head of the repository. Provenance that differs in its time alone is taken out of
/// `files`, so that publishing the same again makes no commit.
async fn compare(
    hub: &Hub,
    args: &Publish,
    vindex: &Vindex,
    files: &mut Vec<SliceFile>,
) -> Result<Changes, Failure> {
    let asking = || Failure::of(format!("cannot see what {} holds", args.repo));
    let remote = hub.head(&args.repo).await.map_err(asking())?;
    let mut changes = Changes {
        repo: args.repo.to_string(),
        head: remote.as_ref().map(|remote| remote.commit().to_string()),
        vindex: vindex.id().to_string(),
        replaces: None,
        slice: args.slices,
        files: Vec::new(),
        deletions: Vec::new(),
    };
    let Some(remote) = remote else {
        changes.files = files
            .iter()
            .map(|file| Change::of(file, State::Add))
            .collect();
        return Ok(changes);
    };
    if let Some((index, id)) = remote_index(&remote).await.map_err(asking())? {
        changes.replaces = Some(id.to_string());
        let names: BTreeSet<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let others = index
            .parts
            .iter()
            .map(|part| &part.file)
            .filter(|file| !names.contains(file.as_str()));
        let others: Vec<String> = others
            .filter(|file| remote.file(file).is_ok())
            .cloned()
            .collect();
        if id == vindex.id() && !others.is_empty() {
            return Err(Failure::new(format!(
                "{} holds more of this vindex than the slice {}",
                args.repo, args.slices
            ))
            .hint("publish the slice into a repository of its own"));
        }
        changes.deletions = others;
    }
    let mut kept_provenance = false;
    for file in files.iter() {
        let mut state = state(&remote, file).await.map_err(asking())?;
        if file.name == PROVENANCE_FILE
            && state == State::Replace
            && same_but_time(&remote, vindex).await
        {
            state = State::Keep;
            kept_provenance = true;
        }
        changes.files.push(Change::of(file, state));
    }
    files.retain(|file| !(kept_provenance && file.name == PROVENANCE_FILE));
    Ok(changes)
}

/// The vindex of a repository; `None` when it holds none that we can read.
async fn remote_index(remote: &Snapshot) -> Result<Option<(Index, VindexId)>, hub::Error> {
    if remote.file(INDEX_FILE).is_err() {
        return Ok(None);
    }
    let text = match remote.read_file(INDEX_FILE, TEXT_BYTES_MAX).await {
        Ok(text) => text,
        Err(hub::Error::TooLarge { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Index::from_json(&text)
        .ok()
        .map(|index| (index, VindexId::of(&text))))
}

async fn state(remote: &Snapshot, file: &SliceFile) -> Result<State, hub::Error> {
    let Ok(there) = remote.file(&file.name) else {
        return Ok(State::Add);
    };
    let same = match &there.sha256 {
        _ if there.size_bytes != file.size_bytes => false,
        Some(sha256) => *sha256 == file.sha256,
        None => sha256(&remote.read_file(&file.name, TEXT_BYTES_MAX).await?) == file.sha256,
    };
    Ok(if same { State::Keep } else { State::Replace })
}

async fn same_but_time(remote: &Snapshot, vindex: &Vindex) -> bool {
    let Ok(text) = remote.read_file(PROVENANCE_FILE, TEXT_BYTES_MAX).await else {
        return false;
    };
    match (
        serde_json::from_slice::<Provenance>(&text),
        vindex.provenance(),
    ) {
        (Ok(there), Some(here)) => {
            Provenance {
                extracted_at: here.extracted_at.clone(),
                ..there
            } == *here
        }
        _ => false,
    }
}

async fn send(
    hub: &Hub,
    args: &Publish,
    changes: &Changes,
    files: Vec<SliceFile>,
) -> Result<hub::CommitReport, hub::Error> {
    hub.create_repo(&args.repo, args.private).await?;
    let additions = files.into_iter().map(|file| Addition {
        path: file.name,
        content: match file.content {
            SliceContent::Path(path) => Content::File(path),
            SliceContent::Bytes(bytes) => Content::Bytes(bytes),
        },
        sha256: Some(file.sha256),
        size_bytes: file.size_bytes,
    });
    let request = CommitRequest {
        summary: format!(
            "Publish vindex {} ({})",
            &changes.vindex[..12],
            changes.slice
        ),
        additions: additions.collect(),
        deletions: changes.deletions.clone(),
    };
    let meter = Meter::new("publish");
    hub.commit(&args.repo, &request, &|upload| match upload {
        Upload::Started {
            n_files,
            bytes_total,
        } => {
            meter.set_total(bytes_total);
            meter.item(format!("{n_files} files to send, {}", size(bytes_total)));
        }
        Upload::Bytes(bytes) => meter.add(bytes),
        Upload::Committing => meter.item("committing"),
        _ => {}
    })
    .await
}

impl Changes {
    /// Files that are not even compared again.
    fn kept(&self) -> usize {
        usize::from(
            self.files
                .iter()
                .any(|file| file.path == PROVENANCE_FILE && file.state == State::Keep),
        )
    }
}

impl Change {
    fn of(file: &SliceFile, state: State) -> Change {
        Change {
            path: file.name.clone(),
            size_bytes: file.size_bytes,
            state,
        }
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "target: hf://{}", self.repo)?;
        match &self.head {
            Some(head) => write!(f, " at commit {head}")?,
            None => write!(f, ", to be created")?,
        }
        write!(f, "\nvindex: {}, slice {}", self.vindex, self.slice)?;
        match &self.replaces {
            Some(id) if *id != self.vindex => write!(f, "\nreplaces: vindex {id}")?,
            _ => {}
        }
        let width = self
            .files
            .iter()
            .map(|file| file.path.len())
            .max()
            .unwrap_or(0);
        for file in &self.files {
            let word = match file.state {
                State::Add => "add",
                State::Replace => "replace",
                State::Keep => "keep",
            };
            write!(
                f,
                "\n  {word:<8}{:<width$}  {:>10}",
                file.path,
                size(file.size_bytes).to_string()
            )?;
        }
        for path in &self.deletions {
            write!(f, "\n  delete  {path}")?;
        }
        Ok(())
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
