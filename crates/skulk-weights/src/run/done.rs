//! Which vindexes an invocation has published already: what the next one need not do again when something after them
//! failed. Sidecars need no record: their repositories tell.
//!
//! Invariant: a record counts only for the same work on the same commit of the source, and is gone once everything of
//! its invocation is published.

use std::path::Path;

use hub::{Hub, RepoId};
use serde::{Deserialize, Serialize};
use terminal::Failure;

use super::Published;
use crate::journal::Work;
use crate::log::Log;
use crate::plan::PublishPlan;

/// The record of an invocation that publishes more than one thing.
#[derive(Debug)]
pub(crate) struct Done {
    log: Log,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    work: Work,
    published: Published,
}

impl Done {
    /// Opens the record called `name` in `scratch`.
    pub(crate) fn open(scratch: &Path, name: &str) -> Result<Done, Failure> {
        let path = scratch.join(format!(".{}.published", name.replace('/', "--")));
        let (log, lines) = Log::open(&path, &format!("publishing {name}"))?;
        Ok(Done { log, lines })
    }

    /// What an earlier invocation published by this plan, if the source is where it was.
    pub(super) async fn find(&self, plan: &PublishPlan, hub: &Hub) -> Option<&Published> {
        let is_alike = |line: &&Line| line.work == Work::of(plan, line.work.commit());
        let line = self.lines.iter().rev().find(is_alike)?;
        let repo: RepoId = plan.source_model.parse().ok()?;
        let now = hub.model_info(&repo, None).await.ok()?.sha?;
        (line.work.commit() == Some(now.as_str())).then_some(&line.published)
    }

    /// Records a vindex.
    pub(super) fn add(&mut self, work: Work, published: &Published) -> Result<(), Failure> {
        let line = Line {
            work,
            published: published.clone(),
        };
        self.log.append(&line)?;
        self.log.sync()
    }

    /// Everything is published.
    pub(crate) fn remove(self) -> Result<(), Failure> {
        self.log.remove()
    }
}
