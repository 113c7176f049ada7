//! Commits and trees: what a repository held, and when.
//!
//! ```text
//! commits/<40 hex>   {"tree","parent","title","message","author","date"}; the name is the sha1 of these bytes
//! trees/<40 hex>     {"<path>": {"size","sha256","oid","lfs"}, …}, sorted; the name is the sha1 of these bytes
//! ```
//!
//! Invariant: both are written before anything points at them and never change, so that a commit id stands for the same
//! bytes for ever. Left out: Git's own object format; ids look like Git's and are compared by nobody.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::disk::{self, Disk};
use crate::names::check_path;
use crate::{Error, blobs};

/// Every file of a commit by its path.
pub(crate) type Tree = BTreeMap<String, Entry>;

/// One file of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// In bytes.
    pub(crate) size: u64,
    /// Of the content; the name of the blob.
    pub(crate) sha256: String,
    /// What Git would call it: the sha1 of the content as a Git blob, or of the pointer file for LFS.
    pub(crate) oid: String,
    /// Whether clients see it as an LFS object.
    pub(crate) lfs: bool,
}

impl Entry {
    /// A file small enough to be sent within a commit.
    pub(crate) fn regular(disk: &Disk, content: &[u8]) -> Result<Entry, Error> {
        let mut spool = blobs::Spool::new(disk)?;
        spool
            .write(content)
            .map_err(Error::io("write", Path::new("blobs")))?;
        let sha256 = spool.store(disk)?;
        Ok(Entry {
            size: content.len() as u64,
            sha256,
            oid: git_blob_id(content),
            lfs: false,
        })
    }

    /// A file whose bytes were uploaded before the commit.
    pub(crate) fn lfs(sha256: String, size: u64) -> Entry {
        let oid = git_blob_id(pointer(&sha256, size).as_bytes());
        Entry {
            size,
            sha256,
            oid,
            lfs: true,
        }
    }

    /// The size of the pointer file that stands for an LFS object in Git.
    pub(crate) fn pointer_size(&self) -> u64 {
        pointer(&self.sha256, self.size).len() as u64
    }

    /// What the client compares to find out whether its copy is current.
    pub(crate) fn etag(&self) -> &str {
        if self.lfs { &self.sha256 } else { &self.oid }
    }
}

/// The text of a Git LFS pointer file, version 1.
fn pointer(sha256: &str, size: u64) -> String {
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n")
}

fn git_blob_id(content: &[u8]) -> String {
    let mut sha1 = Sha1::new();
    sha1.update(format!("blob {}\0", content.len()));
    sha1.update(content);
    hex::encode(sha1.finalize())
}

/// A state of a repository, and how it came about.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Commit {
    /// The id of the tree.
    pub(crate) tree: String,
    pub(crate) parent: Option<String>,
    pub(crate) title: String,
    pub(crate) message: String,
    pub(crate) author: String,
    pub(crate) date: String,
}

/// One step from a tree to the next, in the order the client gave.
#[derive(Debug)]
pub(crate) enum Change {
    Put { path: String, entry: Entry },
    DeleteFile { path: String },
    DeleteFolder { path: String },
}

/// Applies changes; `commit` is named where a deleted path is not there.
pub(crate) fn apply(tree: &mut Tree, changes: Vec<Change>, commit: &str) -> Result<(), Error> {
    let missing = |path: String| Error::NoEntry {
        path,
        commit: commit.to_owned(),
    };
    for change in changes {
        match change {
            Change::Put { path, entry } => {
                check_path(&path)?;
                if let Some(other) = clash(tree, &path) {
                    return Err(Error::invalid(
                        format!("path in repository '{path}'"),
                        format!(
                            "'{other}' is there, and one of the two would have to be a file and a folder"
                        ),
                    ));
                }
                tree.insert(path, entry);
            }
            Change::DeleteFile { path } => {
                tree.remove(&path).ok_or_else(|| missing(path))?;
            }
            Change::DeleteFolder { path } => {
                let prefix = format!("{}/", path.trim_end_matches('/'));
                let inside: Vec<String> =
                    below(tree, &prefix).map(|(path, _)| path.clone()).collect();
                if inside.is_empty() {
                    return Err(missing(path));
                }
                for path in inside {
                    tree.remove(&path);
                }
            }
        }
    }
    Ok(())
}

/// A file that cannot be beside `path`: one of its parents, or one inside it.
fn clash<'a>(tree: &'a Tree, path: &str) -> Option<&'a String> {
    let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
    let parent = parents
        .filter_map(|parent| tree.get_key_value(parent))
        .next();
    let prefix = format!("{path}/");
    let inside = || {
        tree.range(prefix.clone()..)
            .next()
            .filter(|(other, _)| other.starts_with(&prefix))
    };
    parent.or_else(inside).map(|(path, _)| path)
}

/// The entries whose path begins with `prefix` (empty, or ending in `/`).
pub(crate) fn below<'a>(
    tree: &'a Tree,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a String, &'a Entry)> {
    tree.range(prefix.to_owned()..)
        .take_while(move |(path, _)| path.starts_with(prefix))
}

/// An id for the folder `prefix`: the sha1 of what is in it.
pub(crate) fn folder_id(tree: &Tree, prefix: &str) -> String {
    let mut sha1 = Sha1::new();
    for (path, entry) in below(tree, prefix) {
        sha1.update(format!("{}\0{}\0", &path[prefix.len()..], entry.oid));
    }
    hex::encode(sha1.finalize())
}

/// Writes a tree or a commit below `dir` under the sha1 of its text, which is returned.
pub(crate) fn write_object<T: Serialize>(
    disk: &Disk,
    dir: &Path,
    object: &T,
) -> Result<String, Error> {
    let bytes = serde_json::to_vec(object).map_err(|e| Error::corrupt(dir, e))?;
    let id = hex::encode(Sha1::digest(&bytes));
    let target = dir.join(&id);
    if !target.exists() {
        disk.write(&target, &bytes)?;
    }
    Ok(id)
}

/// Reads a tree or a commit, or `None` if there is none of that id.
pub(crate) fn read_object<T: DeserializeOwned>(dir: &Path, id: &str) -> Result<Option<T>, Error> {
    let path = dir.join(id);
    match disk::read(&path)? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::corrupt(&path, e)),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> Tree {
        paths
            .iter()
            .map(|path| ((*path).to_owned(), Entry::lfs("0".repeat(64), 1)))
            .collect()
    }

    #[test]
    fn git_knows_these_ids() {
        assert_eq!(git_blob_id(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(
            git_blob_id(b"hello\n"),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
    }

    #[test]
    fn files_and_folders_do_not_share_a_name() {
        for (there, added) in [("a", "a/b"), ("a/b/c", "a"), ("a/b", "a/b/c/d")] {
            let put = Change::Put {
                path: added.into(),
                entry: Entry::lfs("0".repeat(64), 1),
            };
            assert!(
                apply(&mut tree(&[there]), vec![put], "x").is_err(),
                "{there} {added}"
            );
        }
        let put = Change::Put {
            path: "a/bb".into(),
            entry: Entry::lfs("0".repeat(64), 1),
        };
        assert!(apply(&mut tree(&["a/b", "a-"]), vec![put], "x").is_ok());
    }

    #[test]
    fn deleting_a_folder_takes_what_is_in_it_and_no_more() {
        let mut tree = tree(&["a-b", "a/1", "a/2/3", "ab"]);
        apply(
            &mut tree,
            vec![Change::DeleteFolder { path: "a/".into() }],
            "x",
        )
        .unwrap();
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["a-b", "ab"]);
        assert!(
            apply(
                &mut tree,
                vec![Change::DeleteFolder { path: "a/".into() }],
                "x"
            )
            .is_err()
        );
    }
}
