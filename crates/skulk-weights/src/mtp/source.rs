//! A sidecar's source: a repository at one commit, or a directory here.
//!
//! Invariant: all reads are pinned to the commit that was told, and ask for the bytes that are needed and no others.

use std::path::Path;
use std::sync::Arc;

use hub::{Hub, RepoId, Snapshot};
use terminal::Failure;
use tokio::runtime::Handle;
use vindex::{LocalDir, Origin, Source, SourceError, SourceFile};

use crate::card::License;

/// An opened source.
pub(crate) struct Opened {
    pub(crate) files: Arc<dyn Source>,
    /// `None` for a directory.
    pub(crate) commit: Option<String>,
    pub(crate) license: License,
}

/// Opens `name`: a directory of that path, else a repository of the Hub at `main`.
pub(crate) async fn open(name: &str, hub: &Hub) -> Result<Opened, Failure> {
    let path = Path::new(name);
    if path.is_dir() {
        let local = LocalDir::open(path).map_err(Failure::of(format!("cannot open {name}")))?;
        return Ok(Opened {
            commit: local.origin().commit,
            license: license_of_dir(path),
            files: Arc::new(local),
        });
    }
    let repo: RepoId = name.parse().map_err(Failure::of::<hub::Error>(format!(
        "cannot read the source {name}"
    )))?;
    open_repo(&repo, hub).await
}

/// Opens a repository of the Hub at `main`.
pub(crate) async fn open_repo(repo: &RepoId, hub: &Hub) -> Result<Opened, Failure> {
    let unreadable =
        |error: hub::Error| Failure::new(format!("cannot read the source {repo}")).cause(error);
    let info = hub.model_info(repo, None).await.map_err(unreadable)?;
    let Some(commit) = info.sha else {
        return Err(Failure::new(format!("the source {repo} names no commit"))
            .hint("it is empty, or gated: accept its terms and use a token of that account"));
    };
    let snapshot = hub.snapshot_at(repo, &commit).await.map_err(unreadable)?;
    Ok(opened(snapshot, License::of(&info.card_data)))
}

/// A snapshot as a source.
pub(crate) fn opened(snapshot: Snapshot, license: License) -> Opened {
    Opened {
        commit: Some(snapshot.commit().to_string()),
        license,
        files: Arc::new(Exact {
            snapshot,
            runtime: Handle::current(),
        }),
    }
}

/// The licence that a directory's card states, if it has one.
fn license_of_dir(dir: &Path) -> License {
    let card = std::fs::read_to_string(dir.join("README.md")).unwrap_or_default();
    match hub::card::front_matter(&card) {
        Ok(Some(front)) => License::of(&front),
        _ => License::default(),
    }
}

/// Blocking reads of a snapshot without reading ahead: a header's neighbours are weights that nobody needs here.
struct Exact {
    snapshot: Snapshot,
    runtime: Handle,
}

impl Source for Exact {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        Source::files(&self.snapshot)
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let range = offset_bytes..offset_bytes + buf.len() as u64;
        let bytes = self
            .runtime
            .block_on(self.snapshot.read_range(path, range))?;
        buf.copy_from_slice(&bytes);
        Ok(())
    }

    fn origin(&self) -> Origin {
        Source::origin(&self.snapshot)
    }
}
