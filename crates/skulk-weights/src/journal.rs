//! How far a publication has come: a file in scratch beside the output, one JSON object a line.
//!
//! The first line is the work; each further line is a step that is done. A line that a crash cut counts
//! for nothing. The file is locked while a publication runs, so two runs on one output do not meet. Invariant: a step
//! is recorded after it is done, never before; another work's journal is never gone on from.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use terminal::Failure;

use crate::plan::PublishPlan;

const JOURNAL_BYTES_MAX: u64 = 64 << 10;

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
    path: PathBuf,
    file: File,
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
        let path = beside(plan, "journal");
        fs::create_dir_all(&plan.scratch).map_err(|error| {
            Failure::io("cannot make the scratch directory", &plan.scratch, error)
                .hint("name another with --scratch")
        })?;
        let unusable = |error| Failure::io("cannot use the journal", &path, error);
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(format!(
                    "another run is publishing from {}",
                    plan.output_path.display()
                ))
                .hint("wait for it, or name another directory with --scratch"));
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        let mut text = String::new();
        (&mut file)
            .take(JOURNAL_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(unusable)?;
        let (mut work, mut step, mut whole_bytes) = (None, Step::Begun, 0);
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            match serde_json::from_str(line) {
                Ok(Line::Work(begun)) => work = Some(begun),
                Ok(Line::Done(done)) => step = step.max(done),
                Err(_) => break,
            }
            whole_bytes += line.len() as u64;
        }
        file.set_len(whole_bytes).map_err(unusable)?;
        Ok(Journal {
            path,
            file,
            work,
            step,
        })
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
        self.file
            .set_len(0)
            .map_err(|error| Failure::io("cannot write", &self.path, error))?;
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
        fs::remove_file(&self.path).map_err(|error| Failure::io("cannot remove", &self.path, error))
    }

    fn append(&mut self, line: &Line) -> Result<(), Failure> {
        let text = serde_json::to_string(line)
            .map(|text| text + "\n")
            .map_err(std::io::Error::from);
        let written = text
            .and_then(|text| self.file.write_all(text.as_bytes()))
            .and_then(|()| self.file.sync_data());
        written.map_err(|error| Failure::io("cannot write", &self.path, error))
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
