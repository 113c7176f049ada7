//! Carries out a plan: its vindex, its MTP sidecar, its vision sidecar, one after another, each in a file here.
//!
//! Invariant: an artifact's repository changes by one commit that holds everything of it, after all of it is there and
//! was checked; each artifact is complete before the next begins, so that the same command does only what is missing.

mod done;
mod filing;
mod mtp;
mod vindex;
mod vision;

use std::fs;
use std::path::{Path, PathBuf};

use hub::{Addition, Content, Hub, RepoId, Snapshot};
use serde::{Deserialize, Serialize};
use terminal::{Failure, Output};

use crate::plan::{Artifact, PublishPlan, Step};

/// Name of the card in a repository.
const CARD_FILE: &str = "README.md";
const CARD_BYTES_MAX: u64 = 4 << 20;

pub(crate) use done::Done;

/// A publication to carry out.
pub(crate) struct Request<'a> {
    pub(crate) plan: PublishPlan,
    pub(crate) hub: Hub,
    /// The program to run; empty when the plan has no vindex step.
    pub(crate) larql: PathBuf,
    /// What earlier invocations of the same kind have published.
    pub(crate) done: Option<&'a mut Done>,
    pub(crate) output: Output,
}

/// What was done with one artifact.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Published {
    artifact: Artifact,
    repo: String,
    page: String,
    /// It was there already, and nothing was changed.
    pub(crate) skipped: bool,
    vindex: Option<String>,
    commit: Option<String>,
    collection: Option<String>,
    /// Bytes that were read from the source by this run, for sidecars.
    fetched_bytes: Option<u64>,
}

impl Published {
    fn new(artifact: Artifact, hub: &Hub, repo: &RepoId) -> Published {
        Published {
            artifact,
            repo: repo.to_string(),
            page: hub.page(repo),
            skipped: false,
            vindex: None,
            commit: None,
            collection: None,
            fetched_bytes: None,
        }
    }
}

/// Carries out every step of the plan and tells what was done; an interrupt ends it, and larql with it.
pub(crate) async fn publish(request: Request<'_>) -> Result<Vec<Published>, Failure> {
    let output = request.output;
    let published = tokio::select! {
        published = carry_out(request) => published?,
        Ok(()) = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
    };
    published
        .iter()
        .try_for_each(|published| output.text(published))?;
    Ok(published)
}

async fn carry_out(request: Request<'_>) -> Result<Vec<Published>, Failure> {
    let Request {
        plan,
        hub,
        larql,
        done,
        output,
    } = request;
    let mut published = Vec::new();
    if let Some(words) = &plan.vindex {
        published.push(vindex::publish(&plan, words, &hub, &larql, done, output).await?);
    }
    if let Step::Planned(step) = &plan.mtp {
        published.push(mtp::publish(&plan, step, &hub, output).await?);
    }
    if let Step::Planned(step) = &plan.vision {
        published.push(vision::publish(&plan, step, &hub, output).await?);
    }
    Ok(published)
}

/// The card of a repository; `None` when it has none that is text.
pub(crate) async fn card_of(target: &Snapshot) -> Result<Option<String>, hub::Error> {
    match target.read_file(CARD_FILE, CARD_BYTES_MAX).await {
        Ok(bytes) => Ok(String::from_utf8(bytes.to_vec()).ok()),
        Err(hub::Error::EntryNotFound { .. } | hub::Error::TooLarge { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn card_addition(card: String) -> Addition {
    Addition {
        path: CARD_FILE.to_owned(),
        size_bytes: card.len() as u64,
        sha256: None,
        content: Content::Bytes(card.into_bytes()),
    }
}

/// Removes a file or a directory, if it is there.
fn remove(path: &Path) -> Result<(), Failure> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(|error| Failure::io("cannot remove", path, error))
}

impl std::fmt::Display for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verb = if self.skipped {
            "already published"
        } else {
            "published"
        };
        write!(f, "{verb} hf://{}", self.repo)?;
        let mut line = |label: &str, value: &Option<String>| match value {
            Some(value) => write!(f, "\n  {:<12}{value}", format!("{label}:")),
            None => Ok(()),
        };
        line("vindex", &self.vindex)?;
        line("commit", &self.commit)?;
        line("collection", &self.collection)?;
        line("page", &Some(self.page.clone()))
    }
}
