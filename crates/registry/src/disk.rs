//! The folder under a registry: whole files or none.
//!
//! ```text
//! root/
//!   registry.json                       the format of everything below
//!   blobs/<2 hex>/<62 hex>              content, named by its sha256
//!   repos/<kind>/<owner>/<name>/        see `repos`
//!   collections/<owner>/<24 hex>.json   see `collections`
//!   locks/<name>                        one file a thing that is locked
//!   tmp/<session>/                      unfinished files of one process; `lock` in it is held while it lives
//! ```
//!
//! Invariant: a file outside `tmp` is complete and synced, because it was written in `tmp` and renamed. A process that
//! dies leaves its session behind, which the next `open` removes: its lock is free.
//! Left out: collecting blobs that no commit names.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::Error;
use crate::names::random_hex;

const FORMAT: &str = "{\"format\":\"skulk-registry/1\"}\n";

#[derive(Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    session: PathBuf,
    /// Held as long as this process uses the session.
    _session_lock: File,
}

impl Disk {
    /// Opens or creates the folder, and removes what dead processes left unfinished.
    pub(crate) fn open(root: &Path) -> Result<Disk, Error> {
        for name in ["blobs", "repos", "collections", "locks", "tmp"] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        let root = root.canonicalize().map_err(Error::io("open", root))?;
        // One process at a time opens: between making a session and locking it nobody looks.
        let _opening = lock_file(&root.join("locks/open"))?;
        let format = root.join("registry.json");
        let tmp = root.join("tmp");
        remove_dead_sessions(&tmp)?;
        let session = tmp.join(random_hex::<8>());
        fs::create_dir(&session).map_err(Error::io("create", &session))?;
        let session_lock = lock_file(&session.join("lock"))?;
        let disk = Disk {
            root,
            session,
            _session_lock: session_lock,
        };
        match fs::read_to_string(&format) {
            Ok(text) if text == FORMAT => {}
            Ok(_) => return Err(Error::corrupt(&format, "not a registry of this version")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                disk.write(&format, FORMAT.as_bytes())?
            }
            Err(e) => return Err(Error::io("read", &format)(e)),
        }
        Ok(disk)
    }

    /// A path below the root; `parts` are names that were checked.
    pub(crate) fn path(&self, parts: &[&str]) -> PathBuf {
        parts
            .iter()
            .fold(self.root.clone(), |path, part| path.join(part))
    }

    /// A new unfinished file; gone when dropped, unless placed.
    pub(crate) fn temp(&self) -> Result<NamedTempFile, Error> {
        NamedTempFile::new_in(&self.session).map_err(Error::io("create a file in", &self.session))
    }

    /// A new unfinished folder; gone when dropped, unless placed.
    pub(crate) fn temp_dir(&self) -> Result<tempfile::TempDir, Error> {
        tempfile::TempDir::new_in(&self.session)
            .map_err(Error::io("create a folder in", &self.session))
    }

    /// Writes a whole file beside, then renames it over `target`. Folders on the way are made.
    pub(crate) fn write(&self, target: &Path, bytes: &[u8]) -> Result<(), Error> {
        let mut temp = self.temp()?;
        temp.write_all(bytes).map_err(Error::io("write", target))?;
        self.place(temp, target)
    }

    /// Syncs an unfinished file and renames it over `target`.
    pub(crate) fn place(&self, temp: NamedTempFile, target: &Path) -> Result<(), Error> {
        temp.as_file()
            .sync_all()
            .map_err(Error::io("sync", target))?;
        let parent = target.parent().unwrap_or(&self.root);
        self.make_dir(parent)?;
        temp.persist(target)
            .map_err(|e| Error::io("write", target)(e.error))?;
        sync_dir(parent)
    }

    /// Makes a folder and its parents, so that they outlast a power cut.
    pub(crate) fn make_dir(&self, dir: &Path) -> Result<(), Error> {
        if dir.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        for dir in dir
            .ancestors()
            .skip(1)
            .take_while(|dir| dir.starts_with(&self.root))
        {
            sync_dir(dir)?;
        }
        Ok(())
    }

    /// Renames a folder; `target` must not exist.
    pub(crate) fn rename_dir(&self, source: &Path, target: &Path) -> Result<(), Error> {
        let parent = target.parent().unwrap_or(&self.root);
        self.make_dir(parent)?;
        fs::rename(source, target).map_err(Error::io("rename to", target))?;
        sync_dir(parent)?;
        source.parent().map_or(Ok(()), sync_dir)
    }

    /// Takes a file away, and says whether it was there.
    pub(crate) fn remove(&self, target: &Path) -> Result<bool, Error> {
        match fs::remove_file(target) {
            Ok(()) => target.parent().map_or(Ok(()), sync_dir).map(|()| true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("remove", target)(e)),
        }
    }

    /// Takes a folder away in one step, then frees its space.
    pub(crate) fn remove_dir(&self, target: &Path) -> Result<(), Error> {
        let away = self.session.join(random_hex::<8>());
        self.rename_dir(target, &away)?;
        fs::remove_dir_all(&away).map_err(Error::io("remove", &away))
    }

    /// Waits for the lock of that name. It holds against other threads and other processes, until dropped.
    pub(crate) fn lock(&self, name: &str) -> Result<File, Error> {
        lock_file(&self.path(&["locks", name]))
    }

    /// The names in a folder, sorted; none if there is no such folder.
    pub(crate) fn names(&self, dir: &Path) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("list", dir)(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("list", dir))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next `open`.
        let _ = fs::remove_dir_all(&self.session);
    }
}

/// A small file of the registry's own, or `None` if it is not there.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

fn lock_file(path: &Path) -> Result<File, Error> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::io("open", path))?;
    file.lock().map_err(Error::io("lock", path))?;
    Ok(file)
}

fn remove_dead_sessions(tmp: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(tmp).map_err(Error::io("list", tmp))? {
        let session = entry.map_err(Error::io("list", tmp))?.path();
        match File::options().write(true).open(session.join("lock")) {
            Ok(lock) => match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &session)(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("open", &session)(e)),
        }
        match fs::remove_dir_all(&session) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &session)(e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes renames in a folder durable. Only Unix can open a folder for that; elsewhere the file system decides.
fn sync_dir(dir: &Path) -> Result<(), Error> {
    if cfg!(unix) {
        let file = File::open(dir).map_err(Error::io("open", dir))?;
        file.sync_all().map_err(Error::io("sync", dir))?;
    }
    Ok(())
}
