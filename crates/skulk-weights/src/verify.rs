//! `verify KEY`: what is published for an entry, read again and compared with its source.
//!
//! An MTP sidecar is made again in memory, piece by piece, from the commit that its card names; a vision sidecar's files
//! are held against the hashes of that commit; a vindex's parts against its index, and the index against the card.
//! Invariant: nothing is written anywhere. Left out: extracting a vindex again (`larql` does, and compares by id).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use hub::{Commit, Hub, RepoId, Snapshot};
use serde::Serialize;
use terminal::{Failure, Meter, Output, tell};
use vindex::{INDEX_FILE, Index, Source, VindexId, safetensors_header};

use crate::card::License;
use crate::card::sidecar::ArtifactOf;
use crate::entry::{Entry, Sidecar};
use crate::mtp::convert::convert;
use crate::mtp::heads::{self, Heads};
use crate::mtp::inspection::MTP_FILE;
use crate::mtp::layout::{Layout, SourceFacts};
use crate::mtp::source;
use crate::plan::Artifact;
use crate::vision::{self, is_same};

const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Differences that are told one by one.
const N_TOLD_MAX: usize = 20;

/// What was found about one artifact.
#[derive(Debug, Serialize)]
struct Finding {
    artifact: Artifact,
    repo: String,
    commit: Option<String>,
    /// The commit of the source that it was compared with.
    source_commit: Option<String>,
    /// What was compared, for people.
    compared: String,
    differences: Vec<String>,
}

/// Compares every artifact of the entry, or the one that was asked for; a difference is a failure.
pub(crate) async fn verify(
    entry: &Entry,
    artifact: Artifact,
    hub: &Hub,
    output: Output,
) -> Result<(), Failure> {
    let asked = |wanted| artifact == Artifact::All || artifact == wanted;
    let mut findings = Vec::new();
    if asked(Artifact::Vindex) {
        findings.push(vindex_of(entry, hub).await?);
    }
    if let (true, Some(sidecar)) = (asked(Artifact::Mtp), &entry.mtp) {
        findings.push(mtp_of(sidecar, hub).await?);
    }
    if let (true, Some(sidecar)) = (asked(Artifact::Vision), &entry.vision) {
        findings.push(vision_of(sidecar, hub).await?);
    }
    if findings.is_empty() {
        return Err(Failure::new(format!(
            "{} has no {} to verify",
            entry.key,
            artifact.name()
        )));
    }
    output.value(&serde_json::json!({"key": entry.key, "findings": findings}))?;
    findings
        .iter()
        .try_for_each(|finding| output.text(finding))?;
    let n: usize = findings
        .iter()
        .map(|finding| finding.differences.len())
        .sum();
    match n {
        0 => Ok(()),
        n => Err(Failure::new(format!(
            "{} differs from its source in {n} place(s)",
            entry.key
        ))
        .hint("`skulk-weights publish --force` replaces what is published")),
    }
}

/// The repository's head and its card.
async fn published(repo: &str, hub: &Hub) -> Result<(Snapshot, Option<String>), Failure> {
    let unseen = || Failure::of::<hub::Error>(format!("cannot see what {repo} holds"));
    let id: RepoId = repo.parse().map_err(unseen())?;
    let Some(head) = hub.head(&id).await.map_err(unseen())? else {
        return Err(Failure::new(format!("{repo} is not published"))
            .hint("nothing to verify: publish it first"));
    };
    let card = crate::run::card_of(&head).await.map_err(unseen())?;
    Ok((head, card))
}

async fn vindex_of(entry: &Entry, hub: &Hub) -> Result<Finding, Failure> {
    let (head, card) = published(&entry.hf_repo, hub).await?;
    let made = ArtifactOf::card(card.as_deref());
    let mut finding = Finding::new(Artifact::Vindex, &head, &made);
    let unread =
        || Failure::of::<hub::Error>(format!("cannot read {INDEX_FILE} of {}", entry.hf_repo));
    if head.file(INDEX_FILE).is_err() {
        finding.differences.push(format!("it has no {INDEX_FILE}"));
        return Ok(finding);
    }
    let text = head
        .read_checked(INDEX_FILE, INDEX_BYTES_MAX)
        .await
        .map_err(unread())?;
    let id = VindexId::of(&text).to_string();
    let index = match Index::from_json(&text) {
        Ok(index) => index,
        Err(error) => {
            finding
                .differences
                .push(format!("{INDEX_FILE} is none of ours: {error}"));
            return Ok(finding);
        }
    };
    let front = card
        .as_deref()
        .and_then(|card| hub::card::front_matter(card).ok()?);
    let told = front
        .as_ref()
        .and_then(|front| front.get("foxlight")?.get("vindex_id")?.as_str());
    if told != Some(id.as_str()) {
        finding.differences.push(format!(
            "the card names the vindex {}, it is {id}",
            told.unwrap_or("none")
        ));
    }
    if made
        .source_repo
        .as_ref()
        .is_some_and(|repo| *repo != entry.source_model)
    {
        finding.differences.push(format!(
            "its card says that it was made from {}",
            made.source_repo.clone().unwrap_or_default()
        ));
    }
    let mut n_there = 0;
    for part in &index.parts {
        // A slice has some of the parts.
        let Ok(file) = head.file(&part.file) else {
            continue;
        };
        n_there += 1;
        if file.size_bytes != part.size_bytes
            || file.sha256.as_ref().is_some_and(|sum| *sum != part.sha256)
        {
            finding
                .differences
                .push(format!("{} is not the part of the index", part.file));
        }
    }
    if n_there == 0 {
        finding
            .differences
            .push("it has none of the parts of its index".to_owned());
    }
    finding.compared = format!(
        "vindex {id}, {n_there} of {} parts against the index and the card",
        index.parts.len()
    );
    Ok(finding)
}

async fn vision_of(sidecar: &Sidecar, hub: &Hub) -> Result<Finding, Failure> {
    let (head, card) = published(&sidecar.sidecar_repo, hub).await?;
    let made = ArtifactOf::card(card.as_deref());
    let mut finding = Finding::new(Artifact::Vision, &head, &made);
    let source = source_of(sidecar, &made, hub, &mut finding).await?;
    let left_out = vision::without_vision(&source)
        .await
        .map_err(Failure::of(format!(
            "cannot read the source {}",
            sidecar.source_repo
        )))?;
    let mut n = 0;
    for file in source
        .files()
        .iter()
        .filter(|file| vision::is_mirrored(&file.path) && !left_out.contains(&file.path))
    {
        n += 1;
        match head.file(&file.path) {
            Err(_) => finding
                .differences
                .push(format!("{} is missing", file.path)),
            Ok(held) if is_same(held, file) => {}
            Ok(held) if held.sha256.is_some() == file.sha256.is_some() => {
                finding.differences.push(format!("{} differs", file.path))
            }
            // Kept in another way there: the bytes have to be read.
            Ok(held) => {
                let path = &held.path;
                let ours = head.read_checked(path, INDEX_BYTES_MAX).await;
                let theirs = source.read_checked(path, INDEX_BYTES_MAX).await;
                let read = || Failure::of::<hub::Error>(format!("cannot read {path}"));
                if ours.map_err(read())? != theirs.map_err(read())? {
                    finding.differences.push(format!("{path} differs"));
                }
            }
        }
    }
    finding.compared = format!("{n} files by their hashes");
    Ok(finding)
}

async fn mtp_of(sidecar: &Sidecar, hub: &Hub) -> Result<Finding, Failure> {
    let (head, card) = published(&sidecar.sidecar_repo, hub).await?;
    let made = ArtifactOf::card(card.as_deref());
    let mut finding = Finding::new(Artifact::Mtp, &head, &made);
    let Ok(file) = head.file(MTP_FILE).cloned() else {
        finding.differences.push(format!("it has no {MTP_FILE}"));
        return Ok(finding);
    };
    let opened = match std::path::Path::new(&sidecar.source_repo).is_dir() {
        true => source::open(&sidecar.source_repo, hub).await?,
        false => source::opened(
            source_of(sidecar, &made, hub, &mut finding).await?,
            License::default(),
        ),
    };
    let sidecar_files: Arc<dyn Source> =
        Arc::clone(&source::opened(head, License::default()).files);
    let facts = (sidecar.source_repo.clone(), opened.commit.clone());
    let compare = move || compare_mtp(&*opened.files, &*sidecar_files, file.size_bytes, &facts);
    let compared = tokio::task::spawn_blocking(compare)
        .await
        .map_err(Failure::of("cannot compare"))??;
    finding.compared = format!("{} tensors, value by value", compared.n_tensors);
    finding.differences.extend(compared.differences);
    Ok(finding)
}

struct Compared {
    n_tensors: usize,
    differences: Vec<String>,
}

/// Makes every piece again and compares it with what is published.
fn compare_mtp(
    source: &dyn Source,
    sidecar: &dyn Source,
    file_bytes: u64,
    (repo, commit): &(String, Option<String>),
) -> Result<Compared, Failure> {
    let mut differences = Vec::new();
    let header = safetensors_header(sidecar, MTP_FILE, file_bytes)
        .map_err(Failure::of(format!("cannot read the header of {MTP_FILE}")))?;
    let there: BTreeMap<String, _> = header.into_iter().collect();
    let keep_f32 = there
        .values()
        .any(|tensor| tensor.dtype == vindex::Dtype::F32);
    let names = heads::names(source)?;
    let Some(found) = Heads::read(source, &names, keep_f32)? else {
        return Err(Failure::new(format!("no MTP head tensors found in {repo}")));
    };
    let layout = Layout::new(
        found,
        SourceFacts::new(repo, commit.as_deref(), &names.config),
    );
    let meter = Meter::new("verify");
    meter.set_total(layout.read_bytes());
    let mut pieces = layout.pieces.iter().peekable();
    for (index, placed) in layout.tensors.iter().enumerate() {
        let tensor = layout.tensor(index);
        let dtype = if tensor.is_f32() { "F32" } else { "BF16" };
        // Sidecars of other tools keep the checkpoint's names.
        let held = there
            .get(&tensor.name)
            .or_else(|| there.get(&tensor.original));
        let is_alike = match held {
            None => {
                differences.push(format!("{} is missing", tensor.name));
                false
            }
            Some(held) if held.dtype.to_string() != dtype || held.shape != tensor.shape => {
                differences.push(format!(
                    "{} is {} {:?}, not {dtype} {:?}",
                    tensor.name, held.dtype, held.shape, tensor.shape
                ));
                false
            }
            Some(_) => true,
        };
        let mut is_same = true;
        while let Some(piece) = pieces.next_if(|piece| piece.tensor == index) {
            let (true, true, Some(held)) = (is_alike, is_same, held) else {
                continue;
            };
            let (expected, n_read) = convert(source, tensor, &piece.part)?;
            let mut found = vec![0; expected.len()];
            let offset_bytes = held.offset_bytes + piece.bytes.start - placed.bytes.start;
            sidecar
                .read_at(MTP_FILE, offset_bytes, &mut found)
                .map_err(|error| Failure::new(format!("cannot read {MTP_FILE}: {error}")))?;
            meter.add(n_read);
            is_same = expected == found;
        }
        if is_alike && !is_same {
            differences.push(format!("{} has other values", tensor.name));
        }
    }
    let is_expected = |name: &str| {
        layout
            .heads
            .tensors
            .iter()
            .any(|tensor| tensor.name == name || tensor.original == name)
    };
    differences.extend(
        there
            .keys()
            .filter(|name| !is_expected(name))
            .map(|name| format!("{name} is not in the source")),
    );
    Ok(Compared {
        n_tensors: layout.tensors.len(),
        differences,
    })
}

/// The source at the commit that the card names, or now where it names none.
async fn source_of(
    sidecar: &Sidecar,
    made: &ArtifactOf,
    hub: &Hub,
    finding: &mut Finding,
) -> Result<Snapshot, Failure> {
    let name = &sidecar.source_repo;
    let unread = || Failure::of::<hub::Error>(format!("cannot read the source {name}"));
    let repo: RepoId = name.parse().map_err(unread())?;
    if let Some(other) = made.source_repo.as_ref().filter(|other| *other != name) {
        finding.differences.push(format!(
            "its card says that it was made from {other}, the entry names {name}"
        ));
    }
    let now = hub.resolve(&repo, None).await.map_err(unread())?;
    let commit = match &made.source_commit {
        None => {
            tell(format_args!(
                "warning: the card of {} names no commit of its source; compared with {now}",
                sidecar.sidecar_repo
            ));
            now
        }
        Some(text) => {
            let commit: Commit = text.parse().map_err(unread())?;
            if commit != now {
                tell(format_args!(
                    "note: {} was made from {name} at {commit}, which is at {now} now",
                    sidecar.sidecar_repo
                ));
            }
            commit
        }
    };
    finding.source_commit = Some(commit.to_string());
    hub.snapshot_at(&repo, &commit).await.map_err(unread())
}

impl Finding {
    fn new(artifact: Artifact, head: &Snapshot, made: &ArtifactOf) -> Finding {
        Finding {
            artifact,
            repo: head.repo().to_string(),
            commit: Some(head.commit().to_string()),
            source_commit: made.source_commit.clone(),
            compared: "nothing".to_owned(),
            differences: Vec::new(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, repo) = (self.artifact.name(), &self.repo);
        if self.differences.is_empty() {
            return write!(f, "{name}: hf://{repo} is as its source: {}", self.compared);
        }
        write!(
            f,
            "{name}: hf://{repo} differs ({} compared)",
            self.compared
        )?;
        for difference in self.differences.iter().take(N_TOLD_MAX) {
            write!(f, "\n  {difference}")?;
        }
        match self.differences.len().checked_sub(N_TOLD_MAX) {
            None | Some(0) => Ok(()),
            Some(n) => write!(f, "\n  and {n} more"),
        }
    }
}
