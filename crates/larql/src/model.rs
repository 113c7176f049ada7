//! Where a checkpoint is: a directory or a file here, or a repository of the Hub at one commit.
//!
//! Invariant: a directory or a file that exists wins over a repository of the same name, and whoever asks is told which it is.

use std::fmt;
use std::path::{Path, PathBuf};

use hub::{Reference, Snapshot};
use terminal::Failure;
use vindex::{LocalDir, Source};

use crate::context::Context;

/// A checkpoint that can be read.
#[derive(Debug)]
pub(crate) enum Model {
    Local { dir: PathBuf, source: LocalDir },
    Hub(Snapshot),
}

impl Model {
    /// Opens `name`, at `revision` if one is asked for.
    pub(crate) fn open(
        name: &str,
        revision: Option<&str>,
        context: &Context,
    ) -> Result<Model, Failure> {
        let dir = Path::new(name);
        let is_file = dir.is_file() && name.ends_with(".gguf");
        if dir.is_dir() || is_file {
            let kind = if is_file { "file" } else { "directory" };
            if let Some(revision) = revision {
                return Err(Failure::new(format!(
                    "{name} is a {kind} here, which has no revision {revision}"
                ))
                .hint(format!(
                    "leave --revision away, or run where no {kind} has this name to read the Hub"
                )));
            }
            let source = match is_file {
                true => LocalDir::of_file(dir),
                false => LocalDir::open(dir),
            };
            let source =
                source.map_err(Failure::of(format!("cannot read the checkpoint {name}")))?;
            return Ok(Model::Local {
                dir: dir.to_owned(),
                source,
            });
        }
        let Ok(reference) = name.parse::<Reference>() else {
            return Err(Failure::new(format!(
                "there is no directory {name}, and it is no repository of the Hub either"
            ))
            .hint(
                "name a directory with config.json and *.safetensors, a file.gguf, or owner/name[@revision]",
            ));
        };
        let revision = match (reference.revision.as_deref(), revision) {
            (Some(one), Some(other)) if one != other => {
                return Err(Failure::new(format!(
                    "{name} names the revision {one}, and --revision names {other}"
                ))
                .hint("name one revision"));
            }
            (one, other) => one.or(other),
        };
        let hub = context.hub()?;
        let snapshot = context.wait(hub.snapshot(&reference.repo, revision));
        Ok(Model::Hub(snapshot.map_err(Failure::of(format!(
            "cannot read the checkpoint {}",
            reference.repo
        )))?))
    }

    /// The files.
    pub(crate) fn source(&self) -> &dyn Source {
        match self {
            Model::Local { source, .. } => source,
            Model::Hub(snapshot) => snapshot,
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Model::Local { dir, .. } => {
                let kind = if dir.is_file() { "file" } else { "directory" };
                write!(f, "{} (a {kind} here)", dir.display())
            }
            Model::Hub(snapshot) => write!(
                f,
                "hf://{} at commit {}",
                snapshot.repo(),
                snapshot.commit()
            ),
        }
    }
}
