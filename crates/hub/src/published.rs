//! A vindex in a repository, and how what a role needs of it comes to a directory.
//!
//! Order: pin the commit; read its index; choose the share; hold the listing against the index; fetch the parts of the
//! share, each checked, under a range of experts only their bytes; `provenance.json`, `slice.json`; `index.json` last.
//! Invariant: the directory opens as a vindex only when all of its share is there with the right hashes. What is here
//! already is kept, so an interrupted pull goes on. Nothing is fetched before all that can be refused was refused.

use std::error::Error as StdError;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vindex::{
    Hold, INDEX_FILE, Index, JOURNAL_FILE, PROVENANCE_FILE, Part, SLICE_FILE, Share, Slice, Span,
    Vindex, VindexId, expert_bytes, part_header,
};

use crate::content::sha256_of;
use crate::download::Piece;
use crate::partial::blocking;
use crate::{Commit, Download, Downloaded, Error, Hub, Reference, RepoId, Snapshot};

/// An index and what lies beside it are held in memory; nothing of ours is longer.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What of a vindex is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The slice; `None`: an expert server's when a range is named, else the largest that the repository holds.
    pub slice: Option<Slice>,
    /// Of an expert server, these layers only.
    pub layers: Option<Span>,
    /// Of an expert server, these experts only.
    pub experts: Option<Span>,
}

/// A vindex in a repository at one commit, and the share of it that is wanted.
#[derive(Clone, Debug)]
pub struct Published {
    snapshot: Snapshot,
    index_json: Vec<u8>,
    index: Index,
    share: Share,
}

/// How a pull goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pulling {
    /// It begins.
    Started {
        /// Bytes of the share, those that are here already included.
        bytes_total: u64,
    },
    /// So many more bytes are here.
    Bytes(u64),
    /// All that is wanted of a part is here.
    PartDone {
        /// Number of this part among those of the share, from 0.
        index: usize,
        /// Parts of the share.
        n_parts: usize,
        /// Name of the file.
        file: String,
        /// What is held of it.
        size_bytes: u64,
        /// Whether nothing had to be fetched.
        was_here: bool,
    },
}

/// What a pull did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Parts of the share.
    pub n_parts: usize,
    /// Parts of which something was fetched.
    pub n_fetched: usize,
    /// Bytes fetched.
    pub bytes_fetched: u64,
}

impl Hub {
    /// Finds the vindex of a repository and the share of it that is wanted. Reads the listing and the index.
    ///
    /// # Errors
    /// [`PullError`]: what makes a pull impossible whatever the directory.
    pub async fn published(
        &self,
        from: &Reference,
        wanted: Wanted,
    ) -> Result<Published, PullError> {
        let repo = &from.repo;
        let failed = |source| PullError::Hub {
            repo: repo.clone(),
            source: Box::new(source),
        };
        let snapshot = self.snapshot(repo, from.revision.as_deref()).await;
        let snapshot = snapshot.map_err(failed)?;
        let index_json = snapshot.read_file(INDEX_FILE, TEXT_BYTES_MAX).await;
        let index_json = match index_json {
            Ok(bytes) => bytes.to_vec(),
            Err(Error::EntryNotFound { .. }) => {
                return Err(PullError::NoVindex {
                    repo: repo.clone(),
                    commit: snapshot.commit().clone(),
                });
            }
            Err(error) => return Err(failed(error)),
        };
        let index = Index::from_json(&index_json).map_err(|reason| PullError::NotOurs {
            repo: repo.clone(),
            commit: snapshot.commit().clone(),
            reason,
        })?;
        let share = choose(&snapshot, &index, wanted)?;
        let published = Published {
            snapshot,
            index_json,
            index,
            share,
        };
        for (i, _) in published.parts() {
            published.agree(&published.index.parts[i])?;
        }
        Ok(published)
    }
}

impl Published {
    /// The repository.
    #[must_use]
    pub fn repo(&self) -> &RepoId {
        self.snapshot.repo()
    }

    /// The commit that everything is read from.
    #[must_use]
    pub fn commit(&self) -> &Commit {
        self.snapshot.commit()
    }

    /// The identity of the vindex.
    #[must_use]
    pub fn id(&self) -> VindexId {
        VindexId::of(&self.index_json)
    }

    /// What the whole vindex holds.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What is wanted of it.
    #[must_use]
    pub fn share(&self) -> Share {
        self.share
    }

    /// Parts of which something is wanted.
    #[must_use]
    pub fn n_parts(&self) -> usize {
        self.parts().len()
    }

    /// Bytes that are wanted.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.share.size_bytes(&self.index)
    }

    /// Fetches what is missing into `dir`, which is made, and makes it a vindex. With `force`, another vindex that is
    /// there is removed.
    ///
    /// A directory that holds more of the same vindex stays complete for that.
    ///
    /// # Errors
    /// [`PullError`]; what was fetched stays, and the same call goes on after it.
    pub async fn pull(
        &self,
        dir: &Path,
        force: bool,
        progress: &(dyn Fn(Pulling) + Send + Sync),
    ) -> Result<Pulled, PullError> {
        let there = self.make_room(dir, force)?;
        let share = there
            .filter(|there| there.covers(&self.share))
            .unwrap_or(self.share);
        let parts = self.parts();
        let mut pulled = Pulled {
            n_parts: parts.len(),
            n_fetched: 0,
            bytes_fetched: 0,
        };
        progress(Pulling::Started {
            bytes_total: self.size_bytes(),
        });
        for (nth, &(i, size_bytes)) in parts.iter().enumerate() {
            let part = &self.index.parts[i];
            let hold = share.of_part(&self.index, i);
            let done = self.fetch(i, hold, &dir.join(&part.file), progress).await;
            let done = done.map_err(|source| match source {
                Fetch::Error(source) => PullError::Part {
                    repo: self.repo().clone(),
                    file: part.file.clone(),
                    source: Box::new(source),
                },
                Fetch::Disagrees(what) => self.disagrees(&part.file, what),
            })?;
            let was_here = done == Downloaded::AlreadyThere;
            match done {
                Downloaded::Fetched { bytes } => {
                    pulled.n_fetched += 1;
                    pulled.bytes_fetched += bytes;
                }
                Downloaded::AlreadyThere => progress(Pulling::Bytes(size_bytes)),
            }
            progress(Pulling::PartDone {
                index: nth,
                n_parts: parts.len(),
                file: part.file.clone(),
                size_bytes,
                was_here,
            });
        }
        self.finish(dir, share).await?;
        Ok(pulled)
    }

    /// Number of each part of which something is wanted, and how many bytes.
    fn parts(&self) -> Vec<(usize, u64)> {
        let index = &self.index;
        let wanted = |i: usize| match self.share.of_part(index, i) {
            Hold::Nothing => None,
            Hold::Whole => Some((i, index.parts[i].size_bytes)),
            Hold::Experts(span) => {
                let experts = expert_bytes(index, i, span);
                let sizes = experts
                    .iter()
                    .map(|expert| expert.range.end - expert.range.start);
                Some((i, sizes.sum()))
            }
        };
        (0..index.parts.len()).filter_map(wanted).collect()
    }

    /// The listing must announce what the index says, before a byte is fetched.
    fn agree(&self, part: &Part) -> Result<(), PullError> {
        let Ok(file) = self.snapshot.file(&part.file) else {
            return Err(self.disagrees(&part.file, "it is missing".to_owned()));
        };
        if file.size_bytes != part.size_bytes {
            let what = format!(
                "{} bytes, the index says {}",
                file.size_bytes, part.size_bytes
            );
            return Err(self.disagrees(&part.file, what));
        }
        match &file.sha256 {
            Some(sha256) if *sha256 != part.sha256 => {
                let what = format!("sha256 {sha256}, the index says {}", part.sha256);
                Err(self.disagrees(&part.file, what))
            }
            _ => Ok(()),
        }
    }

    fn disagrees(&self, file: &str, what: String) -> PullError {
        PullError::Disagrees {
            repo: self.repo().clone(),
            file: file.to_owned(),
            what,
        }
    }

    /// Makes `dir`, or refuses one that holds something else; with `force` that is removed. What it holds of this
    /// vindex already.
    fn make_room(&self, dir: &Path, force: bool) -> Result<Option<Share>, PullError> {
        let path = dir.join(INDEX_FILE);
        let there = match fs::read(&path) {
            Ok(text) if VindexId::of(&text) == self.id() => match Vindex::open(dir) {
                Ok(vindex) => {
                    let there = vindex.share();
                    // Parts that are whole serve every share. Under a range of experts they have holes, and what would
                    // be fetched beside it takes their place.
                    let mixes = there.experts.is_some() || self.share.experts.is_some();
                    if !mixes || there.covers(&self.share) {
                        return Ok(Some(there));
                    }
                    format!("{there} of the same vindex")
                }
                // Not intact: what is recorded there is no promise until this pull has ended.
                Err(_) => {
                    fs::remove_file(&path).map_err(disk("remove", &path))?;
                    return Ok(None);
                }
            },
            Ok(text) => format!("another vindex, {}", VindexId::of(&text)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(disk("read", &path)(error));
            }
            Err(_) if dir.join(JOURNAL_FILE).exists() => {
                "an extraction that did not finish".to_owned()
            }
            Err(_) => {
                fs::create_dir_all(dir).map_err(disk("create", dir))?;
                return Ok(None);
            }
        };
        if !force {
            return Err(PullError::Occupied {
                dir: dir.to_owned(),
                there,
            });
        }
        vindex::clear(dir)?;
        Ok(None)
    }

    async fn fetch(
        &self,
        i: usize,
        hold: Hold,
        target: &Path,
        progress: &(dyn Fn(Pulling) + Send + Sync),
    ) -> Result<Downloaded, Fetch> {
        let part = &self.index.parts[i];
        let progress = |download| match download {
            Download::Started { kept_bytes, .. } => progress(Pulling::Bytes(kept_bytes)),
            Download::Bytes(bytes) => progress(Pulling::Bytes(bytes)),
            Download::Verifying => {}
        };
        let (span, head) = match (hold, part_header(&self.index, i)) {
            (Hold::Experts(span), Some(head)) => (span, head),
            _ => {
                let done = self
                    .snapshot
                    .download(&part.file, target, &progress)
                    .await?;
                self.hold_against_index(part, target).await?;
                return Ok(done);
            }
        };
        let pieces = expert_bytes(&self.index, i, span)
            .into_iter()
            .map(|expert| Piece {
                what: format!("expert {} of {}", expert.expert, expert.tensor),
                range: expert.range,
                sha256: expert.sha256.to_owned(),
            })
            .collect();
        let done = self
            .snapshot
            .download_pieces(&part.file, target, head, pieces, &progress);
        Ok(done.await?)
    }

    /// A part that the Hub keeps as text has another hash in the listing; the index is held against the bytes.
    async fn hold_against_index(&self, part: &Part, target: &Path) -> Result<(), Fetch> {
        if self
            .snapshot
            .file(&part.file)
            .is_ok_and(|file| file.sha256.is_some())
        {
            return Ok(());
        }
        let got = blocking("read", target, |path| sha256_of(fs::File::open(path)?)).await?;
        if got == part.sha256 {
            return Ok(());
        }
        fs::remove_file(target).map_err(Error::io("remove", target))?;
        Err(Fetch::Disagrees(format!(
            "sha256 {got}, the index says {}",
            part.sha256
        )))
    }

    /// Writes what makes the directory a vindex that is complete for `share`.
    async fn finish(&self, dir: &Path, share: Share) -> Result<(), PullError> {
        if self.snapshot.file(PROVENANCE_FILE).is_ok() {
            let provenance = self
                .snapshot
                .read_file(PROVENANCE_FILE, TEXT_BYTES_MAX)
                .await;
            let provenance = provenance.map_err(|source| PullError::Hub {
                repo: self.repo().clone(),
                source: Box::new(source),
            })?;
            vindex::write_whole(dir, PROVENANCE_FILE, &provenance)?;
        }
        vindex::write_whole(dir, SLICE_FILE, share.to_json().as_bytes())?;
        vindex::write_whole(dir, INDEX_FILE, &self.index_json)?;
        Ok(())
    }
}

enum Fetch {
    Error(Error),
    Disagrees(String),
}

impl From<Error> for Fetch {
    fn from(error: Error) -> Fetch {
        Fetch::Error(error)
    }
}

/// The share to pull. Of a repository that holds less than a slice, a range may still be there.
fn choose(snapshot: &Snapshot, index: &Index, wanted: Wanted) -> Result<Share, PullError> {
    let repo = || snapshot.repo().clone();
    let missing = |share: &Share| {
        let mut parts =
            (0..index.parts.len()).filter(|&i| share.of_part(index, i) != Hold::Nothing);
        let missing = parts.find(|&i| snapshot.file(&index.parts[i].file).is_err());
        missing.map(|i| index.parts[i].file.clone())
    };
    let held = || {
        let mut slices = Slice::ALL.into_iter();
        slices.find(|&slice| missing(&slice.into()).is_none())
    };
    let is_ranged = wanted.layers.is_some() || wanted.experts.is_some();
    let share = match wanted.slice {
        Some(Slice::ExpertServer) | None if is_ranged => {
            Share::of_experts(index, wanted.layers, wanted.experts).map_err(|reason| {
                PullError::NoShare {
                    repo: repo(),
                    reason,
                }
            })?
        }
        Some(slice) if is_ranged => {
            return Err(PullError::NoShare {
                repo: repo(),
                reason: format!("the slice {slice} has no ranges of layers or experts"),
            });
        }
        Some(slice) => slice.into(),
        None => match held() {
            Some(slice) => slice.into(),
            None => return Err(PullError::NothingWhole { repo: repo() }),
        },
    };
    match missing(&share) {
        None => Ok(share),
        Some(file) => Err(PullError::ShareNotHeld {
            repo: repo(),
            share,
            file,
            held: held(),
        }),
    }
}

/// A vindex of a repository in the cache.
#[derive(Clone, Debug)]
pub struct Cached {
    /// The directory.
    pub dir: PathBuf,
    /// Its commit.
    pub commit: Commit,
    /// What was fetched; `None` when nothing was asked of the Hub but, for a revision that is no commit, its commit.
    pub pulled: Option<Pulled>,
}

/// What is wanted of a published vindex, in a directory below `cache` that its repository, commit and share name; fetched
/// when it is not there yet. A revision that is a commit's full hash needs no Hub once it is there.
///
/// # Errors
/// As [`Hub::published`] and [`Published::pull`].
pub async fn cached_vindex(
    hub: &Hub,
    from: &Reference,
    wanted: Wanted,
    cache: &Path,
    progress: &(dyn Fn(Pulling) + Send + Sync),
) -> Result<Cached, PullError> {
    let named = from
        .revision
        .as_deref()
        .and_then(|revision| revision.parse::<Commit>().ok());
    let commit = match named {
        Some(commit) => commit,
        None => {
            let resolved = hub.resolve(&from.repo, from.revision.as_deref()).await;
            resolved.map_err(|source| PullError::Hub {
                repo: from.repo.clone(),
                source: Box::new(source),
            })?
        }
    };
    let place = |share: &Share| {
        let repo = format!("{}--{}", from.repo.owner(), from.repo.name());
        let range = |name: &str, span: Option<Span>| {
            span.map(|span| format!("-{name}-{span}"))
                .unwrap_or_default()
        };
        let ranges = range("layers", share.layers) + &range("experts", share.experts);
        cache
            .join(repo)
            .join(commit.as_str())
            .join(format!("{}{ranges}", share.slice))
    };
    let is_complete = |dir: &Path, share: &Share| {
        Vindex::open(dir).is_ok_and(|there| there.share().covers(share))
    };
    let wanted_share = wanted.slice.map(|slice| Share {
        slice,
        layers: wanted.layers,
        experts: wanted.experts,
    });
    if let Some(share) = wanted_share
        && is_complete(&place(&share), &share)
    {
        let dir = place(&share);
        return Ok(Cached {
            dir,
            commit,
            pulled: None,
        });
    }
    let at_commit = Reference {
        repo: from.repo.clone(),
        revision: Some(commit.to_string()),
    };
    let published = hub.published(&at_commit, wanted).await?;
    let dir = place(&published.share());
    let pulled = match is_complete(&dir, &published.share()) {
        true => None,
        false => Some(published.pull(&dir, false, progress).await?),
    };
    Ok(Cached {
        dir,
        commit,
        pulled,
    })
}

/// Why a vindex cannot be pulled. [`PullError::hint`] says what to do, [`PullError::into_cause`] gives the error behind it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The Hub, the network or this disk said no.
    #[error("cannot pull {repo}")]
    Hub {
        /// The repository.
        repo: RepoId,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// The repository has no index.
    #[error("{repo} holds no vindex at commit {commit}: it has no {INDEX_FILE}")]
    NoVindex {
        /// The repository.
        repo: RepoId,
        /// The commit read.
        commit: Commit,
    },
    /// Its index is of another kind.
    #[error("{repo} holds no vindex of ours at commit {commit}: {INDEX_FILE}: {reason}")]
    NotOurs {
        /// The repository.
        repo: RepoId,
        /// The commit read.
        commit: Commit,
        /// What is wrong with the index.
        reason: String,
    },
    /// There can be no such share of this vindex.
    #[error("cannot pull this of {repo}: {reason}")]
    NoShare {
        /// The repository.
        repo: RepoId,
        /// What cannot be.
        reason: String,
    },
    /// A part of what is wanted was not published.
    #[error("{repo} does not hold the slice {share}: it has no {file}")]
    ShareNotHeld {
        /// The repository.
        repo: RepoId,
        /// What is wanted.
        share: Share,
        /// The first part that is not there.
        file: String,
        /// The largest slice that is there.
        held: Option<Slice>,
    },
    /// No slice was published whole.
    #[error("{repo} holds no slice of its vindex whole")]
    NothingWhole {
        /// The repository.
        repo: RepoId,
    },
    /// Index and files of the repository are not of one vindex.
    #[error("{repo}: {file} does not belong to the repository's own index: {what}")]
    Disagrees {
        /// The repository.
        repo: RepoId,
        /// The part.
        file: String,
        /// How they differ.
        what: String,
    },
    /// The directory holds something else.
    #[error("{} holds {there}", dir.display())]
    Occupied {
        /// The directory.
        dir: PathBuf,
        /// What is there.
        there: String,
    },
    /// A part could not be fetched.
    #[error("cannot pull {file} of {repo}")]
    Part {
        /// The repository.
        repo: RepoId,
        /// The part.
        file: String,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// This disk.
    #[error(transparent)]
    Disk(#[from] vindex::Error),
}

impl PullError {
    /// What to do now, when there is more to say than the error itself.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            PullError::ShareNotHeld {
                held: Some(held), ..
            } => format!("it holds the slice {held}"),
            PullError::ShareNotHeld { held: None, .. } => {
                "it holds no slice whole; publish it again".to_owned()
            }
            PullError::NothingWhole { .. } => "publish it again".to_owned(),
            PullError::Disagrees { .. } => "publish it again, or pull an earlier commit".to_owned(),
            PullError::Occupied { .. } => {
                "name another directory, or replace what is there with --force".to_owned()
            }
            PullError::Part { .. } => {
                "what is fetched stays; the same command goes on after it".to_owned()
            }
            _ => return None,
        })
    }

    /// The error behind it.
    #[must_use]
    pub fn into_cause(self) -> Option<Box<dyn StdError + Send + Sync>> {
        match self {
            PullError::Hub { source, .. } | PullError::Part { source, .. } => Some(source),
            PullError::Disk(vindex::Error::Io { source, .. }) => Some(Box::new(source)),
            _ => None,
        }
    }
}

fn disk<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PullError + 'a {
    move |source| {
        PullError::Disk(vindex::Error::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}
