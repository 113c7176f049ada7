//! A checkpoint in a directory of this machine, also in the layout of the Hugging Face cache.
//!
//! Invariant: no read leaves the directory. The one exception is the cache's own: a snapshot's files are links
//! into the `blobs` folder beside it; another is a file that was named itself. Files in subdirectories are not listed; no checkpoint keeps its own there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::Error;
use crate::gguf_source;
use crate::source::{Origin, Source, SourceError, SourceFile};

/// A directory with a checkpoint's files, listed once when it is opened.
#[derive(Debug)]
pub struct LocalDir {
    files: BTreeMap<String, LocalFile>,
    origin: Origin,
}

#[derive(Debug)]
struct LocalFile {
    path: PathBuf,
    size_bytes: u64,
    is_inside: bool,
    handle: OnceLock<File>,
}

impl LocalDir {
    /// Lists `dir`. The model's name is the directory's; in a snapshot of the Hugging Face cache
    /// (`models--owner--name/snapshots/<sha>`) it is the repository's, and repository and commit are known too.
    ///
    /// # Errors
    /// [`Error::Io`] when `dir` is not a directory that can be listed.
    pub fn open(dir: &Path) -> Result<LocalDir, Error> {
        let root = fs::canonicalize(dir).map_err(Error::io("open", dir))?;
        let cached = CachedSnapshot::of(&root);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&root).map_err(Error::io("list", dir))? {
            let path = entry.map_err(Error::io("list", dir))?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
                continue;
            };
            // A dangling link is no file of the checkpoint; whoever needs it is told that it is missing.
            let Ok(target) = fs::canonicalize(&path) else {
                continue;
            };
            let Ok(metadata) = fs::metadata(&target) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let is_inside = target.starts_with(&root)
                || cached
                    .as_ref()
                    .is_some_and(|c| target.starts_with(&c.blobs));
            files.insert(
                name,
                LocalFile {
                    path: target,
                    size_bytes: metadata.len(),
                    is_inside,
                    handle: OnceLock::new(),
                },
            );
        }
        let origin = match cached {
            Some(c) => Origin {
                model_name: c.model_name,
                repo: Some(c.repo),
                commit: Some(c.commit),
            },
            None => Origin {
                model_name: root
                    .file_name()
                    .map(|n| n.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                ..Origin::default()
            },
        };
        Ok(LocalDir { files, origin })
    }

    /// One file alone, a model in GGUF, with the others of its directory that it is split into. It may be a link. The
    /// model's name is the file's.
    ///
    /// # Errors
    /// [`Error::Io`] when its directory cannot be listed.
    pub fn of_file(path: &Path) -> Result<LocalDir, Error> {
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let mut dir = LocalDir::open(parent)?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let of_model = gguf_source::files_of(name);
        dir.files.retain(|file, _| of_model.contains(file));
        for file in dir.files.values_mut() {
            // Whoever names a file wants what is there, wherever it lies.
            file.is_inside = true;
        }
        if dir.origin.repo.is_none() {
            dir.origin.model_name = gguf_source::stem(name).to_owned();
        }
        Ok(dir)
    }
}

impl Source for LocalDir {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        Ok(self
            .files
            .iter()
            .map(|(path, f)| SourceFile {
                path: path.clone(),
                size_bytes: f.size_bytes,
            })
            .collect())
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let file = self
            .files
            .get(path)
            .ok_or_else(|| format!("there is no file {path} in the directory"))?;
        if !file.is_inside {
            return Err(format!(
                "{path} is a link to {}, outside of the checkpoint's directory; copy the file there",
                file.path.display()
            )
            .into());
        }
        let handle = match file.handle.get() {
            Some(handle) => handle,
            None => {
                let opened = File::open(&file.path)?;
                file.handle.get_or_init(|| opened)
            }
        };
        read_exact_at(handle, offset_bytes, buf)?;
        Ok(())
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }

    /// Paths, sizes and times of change.
    fn fingerprint(&self) -> Result<String, SourceError> {
        let mut text = String::new();
        for file in self.files.values() {
            let _ = writeln!(
                text,
                "{:?} {} {:?}",
                file.path,
                file.size_bytes,
                fs::metadata(&file.path)?.modified()?
            );
        }
        Ok(text)
    }
}

/// What the path of a snapshot in the Hugging Face cache tells.
struct CachedSnapshot {
    model_name: String,
    repo: String,
    commit: String,
    blobs: PathBuf,
}

impl CachedSnapshot {
    fn of(root: &Path) -> Option<CachedSnapshot> {
        let commit = root.file_name()?.to_str()?;
        let is_sha = commit.len() == 40
            && commit
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let snapshots = root.parent()?;
        let repo_dir = snapshots.parent()?;
        if !is_sha || snapshots.file_name()?.to_str()? != "snapshots" {
            return None;
        }
        let (owner, name) = repo_dir
            .file_name()?
            .to_str()?
            .strip_prefix("models--")?
            .split_once("--")?;
        Some(CachedSnapshot {
            model_name: name.to_owned(),
            repo: format!("{owner}/{name}"),
            commit: commit.to_owned(),
            blobs: repo_dir.join("blobs"),
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset_bytes)
}

#[cfg(windows)]
fn read_exact_at(file: &File, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match std::os::windows::fs::FileExt::seek_read(
            file,
            &mut buf[done..],
            offset_bytes + done as u64,
        ) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
