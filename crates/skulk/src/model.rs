//! Which model is meant: a directory here, or a repository of the Hub at one revision; and how it comes here.
//!
//! Invariant: a directory that exists wins over a repository of the same name. Of a repository only the slice that the
//! node's role needs is fetched, at one commit.

use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use engine::DraftChoice;
use hub::{Download, PullError, Pulling, Reference, Wanted, cached_vindex};
use terminal::{Failure, Meter, tell};
use vindex::{Index, Share, Slice, Vindex};

use crate::context::Context;

/// A model as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Model {
    /// A directory, or what is neither that nor a repository's name.
    Dir(PathBuf),
    /// `owner/name[@revision]`.
    Repo(Reference),
}

impl FromStr for Model {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Model, Infallible> {
        if Path::new(text).is_dir() {
            return Ok(Model::Dir(text.into()));
        }
        Ok(text
            .parse()
            .map_or_else(|_| Model::Dir(text.into()), Model::Repo))
    }
}

/// A vindex that is here, and the name that it goes by.
pub(crate) struct Opened {
    pub(crate) vindex: Vindex,
    pub(crate) name: String,
}

/// Opens `model`, with feed-forward weights or without; a repository's is pulled into `cache` first.
pub(crate) fn open(
    model: &Model,
    with_ffn: bool,
    cache: &Path,
    context: &Context,
) -> Result<Opened, Failure> {
    let (dir, name) = match model {
        Model::Dir(dir) => (dir.clone(), None),
        Model::Repo(from) => (
            pull(from, with_ffn, cache, context)?,
            Some(from.repo.to_string()),
        ),
    };
    let of_role = |_: &Index, recorded: Share| match with_ffn {
        true => Ok(recorded),
        false => Ok(recorded.attention_half()),
    };
    let vindex = Vindex::open_as(&dir, of_role).map_err(|error| {
        let failure = Failure::new(format!("cannot open the vindex {}", dir.display())).cause(error);
        match model {
            Model::Dir(_) => failure.hint(
                "name a directory that larql extract or larql pull made, or owner/name[@revision] on the Hub",
            ),
            Model::Repo(_) => failure.hint("remove it; it is pulled again then"),
        }
    })?;
    let holds = vindex.slice();
    if holds == Slice::ExpertServer || (with_ffn && holds != Slice::Full) {
        let hint = match holds {
            Slice::Attention => {
                "name the weight servers that hold the rest with --ffn, or pull the full slice"
            }
            _ => "larql serve is what serves it",
        };
        return Err(Failure::new(format!(
            "{} holds the slice {holds} alone, which is not all that this node needs",
            dir.display()
        ))
        .hint(hint));
    }
    let name = name.unwrap_or_else(|| vindex.index().name.clone());
    Ok(Opened { vindex, name })
}

fn pull(
    from: &Reference,
    with_ffn: bool,
    cache: &Path,
    context: &Context,
) -> Result<PathBuf, Failure> {
    let hub = context.hub()?;
    let wanted = Wanted {
        slice: Some(if with_ffn {
            Slice::Full
        } else {
            Slice::Attention
        }),
        ..Wanted::default()
    };
    let meter = Meter::new("pull");
    let progress = |pulling: Pulling| match pulling {
        Pulling::Started { bytes_total } => meter.set_total(bytes_total),
        Pulling::Bytes(bytes) => meter.add(bytes),
        Pulling::PartDone {
            size_bytes,
            was_here,
            ..
        } => {
            if was_here {
                meter.add(size_bytes);
            }
        }
    };
    let cached = context.wait(cached_vindex(&hub, from, wanted, cache, &progress));
    let cached = cached.map_err(|error: PullError| Failure::One {
        message: error.to_string(),
        hint: error.hint(),
        cause: error.into_cause(),
    })?;
    tell(format_args!(
        "{} at commit {} is in {}",
        from.repo,
        cached.commit,
        cached.dir.display()
    ));
    Ok(cached.dir)
}

/// Name of the heads of a model in their repository.
const HEADS_FILE: &str = "mtp.safetensors";

/// `choice` with the path of a file or directory here: heads of a repository are fetched into `cache` first, at one commit.
pub(crate) fn draft_source(
    choice: &DraftChoice,
    cache: &Path,
    context: &Context,
) -> Result<DraftChoice, Failure> {
    let DraftChoice::Mtp(path) = choice else {
        return Ok(choice.clone());
    };
    let from: Option<Reference> = path.to_str().and_then(|text| text.parse().ok());
    let Some(from) = from.filter(|_| !path.exists()) else {
        return Ok(choice.clone());
    };
    let hub = context.hub()?;
    let meter = Meter::new("heads");
    let progress = |download: Download| match download {
        Download::Started {
            size_bytes,
            kept_bytes,
        } => {
            meter.set_total(size_bytes);
            meter.add(kept_bytes);
        }
        Download::Bytes(bytes) => meter.add(bytes),
        _ => {}
    };
    let fetched = context.wait(async {
        let snapshot = hub.snapshot(&from.repo, from.revision.as_deref()).await?;
        let repo = format!("{}--{}", from.repo.owner(), from.repo.name());
        let dir = cache.join(repo).join(snapshot.commit().as_str());
        fs::create_dir_all(&dir).map_err(|error| hub::Error::Io {
            doing: "create",
            path: dir.clone(),
            source: error,
        })?;
        let target = dir.join(HEADS_FILE);
        snapshot.download(HEADS_FILE, &target, &progress).await?;
        Ok::<PathBuf, hub::Error>(target)
    });
    let target = fetched.map_err(Failure::of(format!(
        "cannot fetch the heads of {}",
        from.repo
    )))?;
    tell(format_args!(
        "the heads of {} are in {}",
        from.repo,
        target.display()
    ));
    Ok(DraftChoice::Mtp(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_wins_over_a_repository() {
        let parse = |text: &str| text.parse::<Model>().unwrap_or_else(|never| match never {});
        assert_eq!(parse("src"), Model::Dir("src".into()));
        assert!(
            matches!(parse("acme/m@v1"), Model::Repo(from) if from.revision.as_deref() == Some("v1"))
        );
        assert_eq!(parse("no/such/dir"), Model::Dir("no/such/dir".into()));
    }
}
