//! How far a publication has come: a file in scratch beside the output, one JSON object a line.
//!
//! The first line is the work; each further line is a step that is done. The log is locked while a publication runs, so
//! two runs on one output do not meet. Invariant: a step is recorded after it is done, never before; another work's
//! journal is never gone on from.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use terminal::Failure;

use crate::log::Log;
use crate::plan::PublishPlan;

/// What of a publication is done; later steps include the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step {
    /// Nothing.
    Begun,
    /// The vindex is in scratch.
    Extracted,
    /// Vindex and card are in the repository.
    Published,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Line {
    Work(Work),
    Done(Step),
}

/// The locked journal of a publication.
#[derive(Debug)]
pub(crate) struct Journal {
    log: Log,
    /// What the lines belong to; `None` in a new journal.
    work: Option<Work>,
    step: Step,
}

/// What a plan does, as far as it decides the bytes and where they go: not the collection, which may be changed
/// between a failure and the next try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Work {
    source_model: String,
    /// `None` for a directory, and where it cannot be told.
    commit: Option<String>,
    quant: String,
    target_repo: String,
    publish_slices: String,
}

impl Work {
    /// What `plan` does with its source at `commit`.
    pub(crate) fn of(plan: &PublishPlan, commit: Option<&str>) -> Work {
        Work {
            source_model: plan.source_model.clone(),
            commit: commit.map(str::to_owned),
            quant: plan.quant.clone(),
            target_repo: plan.target_repo.clone(),
            publish_slices: plan.publish_slices.clone(),
        }
    }
}

impl Work {
    /// The commit of the source.
    pub(crate) fn commit(&self) -> Option<&str> {
        self.commit.as_deref()
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let commit = self.commit.as_deref().unwrap_or("no known commit");
        write!(
            f,
            "{} at {commit} as {}, slices {}, to {}",
            self.source_model, self.quant, self.publish_slices, self.target_repo
        )
    }
}

impl Journal {
    /// Opens and locks the journal of `plan`'s output; makes it when there is none.
    pub(crate) fn open(plan: &PublishPlan) -> Result<Journal, Failure> {
        let what = format!("publishing from {}", plan.output_path.display());
        let (log, lines) = Log::open(&beside(plan, "journal"), &what)?;
        let (mut work, mut step) = (None, Step::Begun);
        for line in lines {
            match line {
                Line::Work(begun) => work = Some(begun),
                Line::Done(done) => step = step.max(done),
            }
        }
        Ok(Journal { log, work, step })
    }

    /// How far this work has come; `None` when the journal is new or another work's.
    pub(crate) fn step_of(&self, work: &Work) -> Option<Step> {
        (self.work.as_ref() == Some(work)).then_some(self.step)
    }

    /// The work that was begun.
    pub(crate) fn work(&self) -> Option<&Work> {
        self.work.as_ref()
    }

    /// Starts anew with this work.
    pub(crate) fn begin(&mut self, work: &Work) -> Result<(), Failure> {
        self.log.clear()?;
        self.append(&Line::Work(work.clone()))?;
        (self.work, self.step) = (Some(work.clone()), Step::Begun);
        Ok(())
    }

    /// Records a step; on return it is on disk.
    pub(crate) fn done(&mut self, step: Step) -> Result<(), Failure> {
        self.append(&Line::Done(step))?;
        self.step = step;
        Ok(())
    }

    /// Removes the file: the publication is complete, or never began.
    pub(crate) fn remove(self) -> Result<(), Failure> {
        self.log.remove()
    }

    fn append(&mut self, line: &Line) -> Result<(), Failure> {
        self.log.append(line)?;
        self.log.sync()
    }
}

/// A file of ours beside the output: `.<output>.<kind>`.
pub(crate) fn beside(plan: &PublishPlan, kind: &str) -> PathBuf {
    let name = plan
        .output_path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    plan.output_path
        .parent()
        .unwrap_or(Path::new(""))
        .join(format!(".{name}.{kind}"))
}
