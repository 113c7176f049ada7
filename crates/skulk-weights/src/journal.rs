//! How far a publication has come: a file in scratch beside the output, one JSON object a line.
//!
//! The first line is the digest of the plan; each further line is a step that is done. A line that a crash cut counts
//! for nothing. The file is locked while a publication runs, so two runs on one output do not meet. Invariant: a step
//! is recorded after it is done, never before; another plan's journal is never gone on from.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
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
    Plan(String),
    Done(Step),
}

/// The locked journal of a publication.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Digest of the plan that the lines belong to; `None` in a new journal.
    plan: Option<String>,
    step: Step,
}

/// What a plan does, as far as it decides the bytes and where they go: not the collection, which may be changed
/// between a failure and the next try.
pub(crate) fn digest(plan: &PublishPlan, commit: Option<&str>) -> String {
    let text = serde_json::json!({
        "source_model": plan.source_model,
        "commit": commit,
        "quant": plan.quant,
        "output_path": plan.output_path,
        "target_repo": plan.target_repo,
        "publish_slices": plan.publish_slices,
    });
    Sha256::digest(text.to_string())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
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
        let (mut plan, mut step, mut whole_bytes) = (None, Step::Begun, 0);
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            match serde_json::from_str(line) {
                Ok(Line::Plan(digest)) => plan = Some(digest),
                Ok(Line::Done(done)) => step = step.max(done),
                Err(_) => break,
            }
            whole_bytes += line.len() as u64;
        }
        file.set_len(whole_bytes).map_err(unusable)?;
        Ok(Journal {
            path,
            file,
            plan,
            step,
        })
    }

    /// How far the plan with this digest has come; `None` when the journal is new or another plan's.
    pub(crate) fn step_of(&self, digest: &str) -> Option<Step> {
        (self.plan.as_deref() == Some(digest)).then_some(self.step)
    }

    /// Whether it belongs to some plan.
    pub(crate) fn is_begun(&self) -> bool {
        self.plan.is_some()
    }

    /// Starts anew for the plan with this digest.
    pub(crate) fn begin(&mut self, digest: &str) -> Result<(), Failure> {
        self.file
            .set_len(0)
            .map_err(|error| Failure::io("cannot write", &self.path, error))?;
        self.append(&Line::Plan(digest.to_owned()))?;
        (self.plan, self.step) = (Some(digest.to_owned()), Step::Begun);
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
