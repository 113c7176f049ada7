//! Repositories: made, found, changed, moved and deleted.
//!
//! ```text
//! repos/<kind>/<owner>/<name>/
//!   repo.json                     {"_id","private","gated","created_at"}
//!   commits/  trees/              see `history`
//!   refs/heads/<name, '/' as %2F> "<commit>\n"; tags beside, in refs/tags
//! ```
//!
//! Invariant: a ref names a commit whose tree and blobs are all there. Every change of a repository happens under its
//! lock, and becomes visible by one rename.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::{self, Disk};
use crate::history::{Change, Commit, Tree, apply, read_object, write_object};
use crate::names::{Kind, RepoId, check_ref_name, is_commit, random_hex};
use crate::{Error, blobs, clock};

/// The branch every repository has.
pub(crate) const MAIN: &str = "main";

/// What is recorded of a repository beside its history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Meta {
    #[serde(rename = "_id")]
    pub(crate) id: String,
    pub(crate) private: bool,
    pub(crate) gated: Gated,
    pub(crate) created_at: String,
}

/// Whether readers must be let in one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Gated {
    Open,
    Auto,
    Manual,
}

/// Branches or tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RefKind {
    Branch,
    Tag,
}

impl RefKind {
    fn folder(self) -> &'static str {
        match self {
            RefKind::Branch => "heads",
            RefKind::Tag => "tags",
        }
    }

    /// As in `refs/heads/main`.
    pub(crate) fn full_name(self, name: &str) -> String {
        format!("refs/{}/{name}", self.folder())
    }

    fn noun(self) -> &'static str {
        match self {
            RefKind::Branch => "branch",
            RefKind::Tag => "tag",
        }
    }
}

/// A commit that is to be made.
pub(crate) struct Draft {
    pub(crate) branch: String,
    pub(crate) title: String,
    pub(crate) message: String,
    pub(crate) author: String,
    /// Where the branch must be: a commit id, or its first 7 digits or more.
    pub(crate) parent: Option<String>,
    pub(crate) changes: Vec<Change>,
}

/// A repository that was there when it was looked up.
pub(crate) struct Repo<'a> {
    disk: &'a Disk,
    pub(crate) id: RepoId,
    pub(crate) meta: Meta,
    dir: PathBuf,
}

/// Makes a repository with one empty commit on `main`. Fails with `Exists`.
pub(crate) fn create(disk: &Disk, id: &RepoId, private: bool, author: &str) -> Result<(), Error> {
    let _lock = lock(disk, id)?;
    let dir = dir(disk, id);
    if dir.exists() {
        return Err(Error::Exists {
            what: format!("repository {id}"),
            slug: None,
        });
    }
    let temp = disk.temp_dir()?;
    let meta = Meta {
        id: random_hex::<12>(),
        private,
        gated: Gated::Open,
        created_at: clock::now(),
    };
    write_meta(disk, &temp.path().join("repo.json"), &meta)?;
    let commit = Commit {
        tree: write_object(disk, &temp.path().join("trees"), &Tree::new())?,
        parent: None,
        title: "initial commit".to_owned(),
        message: String::new(),
        author: author.to_owned(),
        date: clock::now(),
    };
    let commit_id = write_object(disk, &temp.path().join("commits"), &commit)?;
    disk.write(
        &temp.path().join("refs/heads").join(MAIN),
        format!("{commit_id}\n").as_bytes(),
    )?;
    disk.rename_dir(temp.path(), &dir)?;
    // The folder is where it belongs; there is nothing left to clean up.
    let _ = temp.keep();
    Ok(())
}

/// Takes a repository away, with its history.
pub(crate) fn delete(disk: &Disk, id: &RepoId) -> Result<(), Error> {
    let _lock = lock(disk, id)?;
    find(disk, id)?;
    disk.remove_dir(&dir(disk, id))
}

/// Gives a repository another name. Fails with `Exists` if that name is taken.
pub(crate) fn rename(disk: &Disk, source: &RepoId, target: &RepoId) -> Result<(), Error> {
    // Locks are taken in the order of the names, so that two renames cannot wait for each other.
    let (first, second) = if source <= target {
        (source, target)
    } else {
        (target, source)
    };
    let _first = lock(disk, first)?;
    let _second = if first == second {
        None
    } else {
        Some(lock(disk, second)?)
    };
    find(disk, source)?;
    if dir(disk, target).exists() {
        return Err(Error::Exists {
            what: format!("repository {target}"),
            slug: None,
        });
    }
    disk.rename_dir(&dir(disk, source), &dir(disk, target))
}

/// Looks a repository up.
pub(crate) fn find<'a>(disk: &'a Disk, id: &RepoId) -> Result<Repo<'a>, Error> {
    let dir = dir(disk, id);
    let path = dir.join("repo.json");
    let bytes = disk::read(&path)?.ok_or_else(|| Error::NoRepo { id: id.to_string() })?;
    let meta = serde_json::from_slice(&bytes).map_err(|e| Error::corrupt(&path, e))?;
    Ok(Repo {
        disk,
        id: id.clone(),
        meta,
        dir,
    })
}

/// Every repository of a kind, sorted by name.
pub(crate) fn list(disk: &Disk, kind: Kind) -> Result<Vec<RepoId>, Error> {
    let mut repos = Vec::new();
    for owner in owners(disk, kind)? {
        let names = disk.names(&disk.path(&["repos", kind.plural(), &owner]))?;
        repos.extend(
            names
                .iter()
                .filter_map(|name| RepoId::new(kind, &owner, name).ok()),
        );
    }
    Ok(repos)
}

/// Everyone who has, or once had, a repository of a kind.
pub(crate) fn owners(disk: &Disk, kind: Kind) -> Result<Vec<String>, Error> {
    disk.names(&disk.path(&["repos", kind.plural()]))
}

/// Changes what is recorded of a repository.
pub(crate) fn set(disk: &Disk, id: &RepoId, change: impl FnOnce(&mut Meta)) -> Result<(), Error> {
    let _lock = lock(disk, id)?;
    let Repo { mut meta, dir, .. } = find(disk, id)?;
    change(&mut meta);
    write_meta(disk, &dir.join("repo.json"), &meta)
}

/// Adds a commit to a branch, and returns its id. Fails with `ParentMoved`, `MissingObject`, `NoEntry` or `Invalid`, and
/// then nothing has changed.
pub(crate) fn commit(disk: &Disk, id: &RepoId, draft: Draft) -> Result<String, Error> {
    let _lock = lock(disk, id)?;
    let repo = find(disk, id)?;
    let head = repo
        .reference(RefKind::Branch, &draft.branch)?
        .ok_or_else(|| repo.no_revision(&draft.branch))?;
    if let Some(expected) = draft
        .parent
        .filter(|parent| !(parent.len() >= 7 && head.starts_with(parent.as_str())))
    {
        return Err(Error::ParentMoved {
            branch: draft.branch,
            expected,
            got: head,
        });
    }
    let mut tree = repo.tree(&repo.commit(&head)?)?;
    for change in &draft.changes {
        if let Change::Put { path, entry } = change
            && blobs::size(disk, &entry.sha256)? != Some(entry.size)
        {
            return Err(Error::MissingObject {
                path: path.clone(),
                oid: entry.sha256.clone(),
            });
        }
    }
    apply(&mut tree, draft.changes, &head)?;
    let commit = Commit {
        tree: write_object(disk, &repo.dir.join("trees"), &tree)?,
        parent: Some(head),
        title: draft.title,
        message: draft.message,
        author: draft.author,
        date: clock::now(),
    };
    repo.advance(&draft.branch, &commit)
}

/// Replaces a branch's history by one commit of the same content, and returns its id.
pub(crate) fn squash(
    disk: &Disk,
    id: &RepoId,
    branch: &str,
    title: &str,
    author: &str,
) -> Result<String, Error> {
    let _lock = lock(disk, id)?;
    let repo = find(disk, id)?;
    let head = repo
        .reference(RefKind::Branch, branch)?
        .ok_or_else(|| repo.no_revision(branch))?;
    let commit = Commit {
        parent: None,
        title: title.to_owned(),
        message: String::new(),
        author: author.to_owned(),
        date: clock::now(),
        ..repo.commit(&head)?
    };
    repo.advance(branch, &commit)
}

/// Makes a branch or tag at a commit. Fails with `Exists`.
pub(crate) fn create_ref(
    disk: &Disk,
    id: &RepoId,
    kind: RefKind,
    name: &str,
    start: &str,
) -> Result<(), Error> {
    check_ref_name(name)?;
    let _lock = lock(disk, id)?;
    let repo = find(disk, id)?;
    let commit = repo.resolve(start)?;
    if repo.reference(kind, name)?.is_some() {
        return Err(Error::Exists {
            what: format!("{} {name}", kind.noun()),
            slug: None,
        });
    }
    repo.point(kind, name, &commit)
}

/// Takes a branch or tag away; `main` stays.
pub(crate) fn delete_ref(disk: &Disk, id: &RepoId, kind: RefKind, name: &str) -> Result<(), Error> {
    check_ref_name(name)?;
    if kind == RefKind::Branch && name == MAIN {
        return Err(Error::Forbidden {
            why: "the branch main cannot be deleted".to_owned(),
        });
    }
    let _lock = lock(disk, id)?;
    let repo = find(disk, id)?;
    if disk.remove(&repo.ref_path(kind, name))? {
        Ok(())
    } else {
        Err(repo.no_revision(name))
    }
}

impl Repo<'_> {
    /// The commit that a branch, tag, full ref name or commit id stands for.
    pub(crate) fn resolve(&self, revision: &str) -> Result<String, Error> {
        if is_commit(revision) {
            return match read_object::<Commit>(&self.dir.join("commits"), revision)? {
                Some(_) => Ok(revision.to_owned()),
                None => Err(self.no_revision(revision)),
            };
        }
        let candidates = match (
            revision.strip_prefix("refs/heads/"),
            revision.strip_prefix("refs/tags/"),
        ) {
            (Some(name), _) => vec![(RefKind::Branch, name)],
            (_, Some(name)) => vec![(RefKind::Tag, name)],
            _ => vec![(RefKind::Branch, revision), (RefKind::Tag, revision)],
        };
        for (kind, name) in candidates {
            if let Some(commit) = self.reference(kind, name)? {
                return Ok(commit);
            }
        }
        Err(self.no_revision(revision))
    }

    /// A commit by its id.
    pub(crate) fn commit(&self, id: &str) -> Result<Commit, Error> {
        read_object(&self.dir.join("commits"), id)?.ok_or_else(|| self.no_revision(id))
    }

    /// The files of a commit.
    pub(crate) fn tree(&self, commit: &Commit) -> Result<Tree, Error> {
        let dir = self.dir.join("trees");
        read_object(&dir, &commit.tree)?
            .ok_or_else(|| Error::corrupt(&dir.join(&commit.tree), "the tree is not there"))
    }

    /// Every branch or tag with its commit, sorted by name.
    pub(crate) fn references(&self, kind: RefKind) -> Result<Vec<(String, String)>, Error> {
        let mut found = Vec::new();
        for file in self
            .disk
            .names(&self.dir.join("refs").join(kind.folder()))?
        {
            let name = file.replace("%2F", "/");
            if let Some(commit) = self.reference(kind, &name)? {
                found.push((name, commit));
            }
        }
        Ok(found)
    }

    fn reference(&self, kind: RefKind, name: &str) -> Result<Option<String>, Error> {
        if check_ref_name(name).is_err() {
            return Ok(None);
        }
        let path = self.ref_path(kind, name);
        let Some(bytes) = disk::read(&path)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_suffix('\n') {
            Some(commit) if is_commit(commit) => Ok(Some(commit.to_owned())),
            _ => Err(Error::corrupt(&path, "no commit id")),
        }
    }

    fn ref_path(&self, kind: RefKind, name: &str) -> PathBuf {
        self.dir
            .join("refs")
            .join(kind.folder())
            .join(name.replace('/', "%2F"))
    }

    fn advance(&self, branch: &str, commit: &Commit) -> Result<String, Error> {
        let id = write_object(self.disk, &self.dir.join("commits"), commit)?;
        self.point(RefKind::Branch, branch, &id)?;
        Ok(id)
    }

    fn point(&self, kind: RefKind, name: &str, commit: &str) -> Result<(), Error> {
        self.disk
            .write(&self.ref_path(kind, name), format!("{commit}\n").as_bytes())
    }

    pub(crate) fn no_revision(&self, revision: &str) -> Error {
        Error::NoRevision {
            repo: self.id.to_string(),
            revision: revision.chars().take(200).collect(),
        }
    }
}

fn dir(disk: &Disk, id: &RepoId) -> PathBuf {
    disk.path(&["repos", id.kind.plural(), &id.owner, &id.name])
}

/// Names hold no `--`, so that the lock's name is unique.
fn lock(disk: &Disk, id: &RepoId) -> Result<std::fs::File, Error> {
    disk.lock(&format!("{}--{}--{}", id.kind.plural(), id.owner, id.name))
}

fn write_meta(disk: &Disk, path: &std::path::Path, meta: &Meta) -> Result<(), Error> {
    let bytes = serde_json::to_vec(meta).map_err(|e| Error::corrupt(path, e))?;
    disk.write(path, &bytes)
}
