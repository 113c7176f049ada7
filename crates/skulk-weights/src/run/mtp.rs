//! Carries out the MTP step of a plan: look, fetch and convert what is missing, one commit, file.
//!
//! Invariant: a sidecar that is there is left as it is without `--force`. The repository is made when it is known that
//! there are heads to put there: before the work where the token's right to make it has to be tried, after it otherwise.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Right, Upload};
use terminal::{Failure, Meter, Output, tell};

use super::{Published, card_addition, card_of, filing, remove};
use crate::card::{self, sidecar::SidecarContents, sidecar::SidecarFacts};
use crate::log::Log;
use crate::mtp::inspection::{self, Action, MTP_FILE, Named};
use crate::mtp::layout::Layout;
use crate::mtp::write::{self, Written};
use crate::plan::{Artifact, MtpStep, PublishPlan};

/// Publishes the sidecar, or finds that it is there, and files it.
pub(super) async fn publish(
    plan: &PublishPlan,
    step: &MtpStep,
    hub: &Hub,
    output: Output,
) -> Result<Published, Failure> {
    let repo: RepoId = step
        .sidecar_repo
        .parse()
        .map_err(Failure::of::<hub::Error>("cannot publish"))?;
    let mut named = inspection::names(step, plan.force, hub).await?;
    let mut published = Published::new(Artifact::Mtp, hub, &repo);
    if named.inspection.action == Action::Skip {
        named
            .inspection
            .warnings
            .iter()
            .for_each(|text| tell(format_args!("warning: {text}")));
        output.text(format_args!(
            "mtp: hf://{repo}/{MTP_FILE} already exists and covers {} and every quantization of it; --force replaces it",
            step.source_repo
        ))?;
        published.skipped = true;
    } else {
        let has_heads = named
            .names
            .as_ref()
            .is_some_and(|names| names.spelling().is_some());
        // A token whose right nobody can tell is tried before anything large is read.
        let is_tried = !named.target_exists && has_heads && !may_write(hub, &repo).await;
        if is_tried {
            create(hub, &repo).await?;
        }
        let Some(layout) = named.layout(step).await? else {
            return Err(Failure::new(format!(
                "no MTP head tensors found in {}",
                step.source_repo
            )));
        };
        output.text(named.inspection.to_string().trim_end())?;
        let written = write_file(step, Arc::new(layout.clone()), &named, hub).await?;
        if !is_tried && !named.target_exists {
            create(hub, &repo).await?;
        }
        published.fetched_bytes = Some(written.fetched_bytes);
        published.commit = commit(plan, step, &named, &layout, &written, hub, &repo).await?;
        remove(&step.output_path)?;
        remove(&log_path(step))?;
    }
    if published.commit.is_none() {
        published.commit = hub
            .head(&repo)
            .await
            .ok()
            .flatten()
            .map(|head| head.commit().to_string());
    }
    if let Some(title) = &step.collection {
        published.collection = Some(filing::file_by_title(hub, title, &repo).await?);
    }
    Ok(published)
}

/// Whether the Hub says that our token may write to the repository's owner.
async fn may_write(hub: &Hub, repo: &RepoId) -> bool {
    match hub.whoami().await {
        Ok(me) => me.can_write(repo.owner()) == Right::Yes,
        Err(_) => false,
    }
}

async fn create(hub: &Hub, repo: &RepoId) -> Result<(), Failure> {
    hub.create_repo(repo, false).await.map_err(|error| {
        Failure::new(format!("cannot make the repository {repo}"))
            .cause(error)
            .hint("nothing was fetched or published")
    })?;
    Ok(())
}

fn log_path(step: &MtpStep) -> PathBuf {
    let name = step
        .output_path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    step.output_path.with_file_name(format!(".{name}.journal"))
}

/// Writes the sidecar to scratch on a thread of its own, which ends when nobody waits for it any more.
async fn write_file(
    step: &MtpStep,
    layout: Arc<Layout>,
    named: &Named,
    hub: &Hub,
) -> Result<Written, Failure> {
    let what = format!("making {}", step.output_path.display());
    let log = Log::open(&log_path(step), &what)?;
    let (files, path) = (Arc::clone(&named.opened.files), step.output_path.clone());
    let n_workers = hub.settings().n_parallel;
    let stop = Arc::new(AtomicBool::new(false));
    let (told, done) = tokio::sync::oneshot::channel();
    let (ended, end) = mpsc::channel();
    let worker = Worker {
        stop: Arc::clone(&stop),
        end,
    };
    std::thread::spawn(move || {
        // Dropped when this thread ends, however it ends.
        let _ended: mpsc::Sender<()> = ended;
        let meter = Meter::new("mtp");
        let written = write::write(&layout, &*files, &path, log, n_workers, &meter, &stop);
        // Nobody waits when the run was interrupted.
        let _ = told.send(written);
    });
    let written = done.await;
    drop(worker);
    match written {
        Ok(written) => written,
        Err(_) => Err(Failure::new(format!(
            "making {} ended by a panic",
            step.output_path.display()
        ))),
    }
}

/// A thread that is stopped and waited for when nobody waits for its result any more.
struct Worker {
    stop: Arc<AtomicBool>,
    end: mpsc::Receiver<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // An error: the thread has ended.
        let _ = self.end.recv();
    }
}

/// One commit of weights and card; `None` when the repository held both already.
async fn commit(
    plan: &PublishPlan,
    step: &MtpStep,
    named: &Named,
    layout: &Layout,
    written: &Written,
    hub: &Hub,
    repo: &RepoId,
) -> Result<Option<String>, Failure> {
    let facts = SidecarFacts {
        repo: &step.sidecar_repo,
        source_repo: &step.source_repo,
        source_commit: named.opened.commit.as_deref(),
        target_model: &step.source_repo,
        license: &named.opened.license,
        catalog_key: &plan.model_key,
        contents: SidecarContents::Mtp { layout, written },
    };
    let failed = |error: hub::Error| {
        Failure::new(format!("cannot publish to {repo}"))
            .cause(error)
            .hint("the finished file is kept in scratch: the same command publishes it without fetching again")
    };
    let old = match hub.head(repo).await.map_err(failed)? {
        Some(target) => card_of(&target).await.map_err(failed)?,
        None => None,
    };
    let time = old
        .and_then(|old| card::same_but_time(|time| facts.render(time), &old))
        .unwrap_or_else(card::now);
    let at = named
        .opened
        .commit
        .as_ref()
        .map(|commit| format!("@{commit}"))
        .unwrap_or_default();
    let request = CommitRequest {
        summary: format!("Add MTP sidecar from {}{at}", step.source_repo),
        additions: vec![
            Addition {
                path: MTP_FILE.to_owned(),
                content: Content::File(step.output_path.clone()),
                sha256: Some(written.sha256.clone()),
                size_bytes: layout.file_bytes,
            },
            card_addition(facts.render(&time)),
        ],
        deletions: Vec::new(),
    };
    let meter = Meter::new("mtp upload");
    let report = hub
        .commit(repo, &request, &|upload| match upload {
            Upload::Started { bytes_total, .. } => meter.set_total(bytes_total),
            Upload::Bytes(n_bytes) => meter.add(n_bytes),
            Upload::Hashed(_) | Upload::Committing => {}
        })
        .await
        .map_err(failed)?;
    let head = hub.head(repo).await.map_err(failed)?;
    let is_there = head.as_ref().is_some_and(|head| {
        head.file(MTP_FILE).is_ok_and(|file| {
            file.sha256
                .as_deref()
                .is_none_or(|sum| sum == written.sha256)
        })
    });
    if !is_there {
        return Err(Failure::new(format!(
            "{repo} does not hold the {MTP_FILE} that was committed"
        ))
        .hint("another publication may have replaced it; run the same command again"));
    }
    Ok(report.commit.map(|commit| commit.to_string()))
}
