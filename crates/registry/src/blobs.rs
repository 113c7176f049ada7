//! Content, named by its sha256.
//!
//! Invariant: `blobs/ab/cdef…` holds exactly the bytes whose sha256 is `abcdef…`; it is never changed afterwards.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::Error;
use crate::disk::Disk;

/// Bytes on their way into the store, hashed as they come.
pub(crate) struct Spool {
    temp: NamedTempFile,
    sha256: Sha256,
    size_bytes: u64,
}

impl Spool {
    pub(crate) fn new(disk: &Disk) -> Result<Spool, Error> {
        Ok(Spool {
            temp: disk.temp()?,
            sha256: Sha256::new(),
            size_bytes: 0,
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sha256.update(bytes);
        self.size_bytes += bytes.len() as u64;
        self.temp.write_all(bytes)
    }

    /// Stores the bytes under their hash, which is returned.
    pub(crate) fn store(self, disk: &Disk) -> Result<String, Error> {
        let sha256 = hex::encode(self.sha256.finalize());
        place(disk, self.temp, &sha256)?;
        Ok(sha256)
    }

    /// Stores the bytes if they are what was announced; else nothing is stored.
    pub(crate) fn store_as(self, disk: &Disk, sha256: &str, size_bytes: u64) -> Result<(), Error> {
        check("size", size_bytes.to_string(), self.size_bytes.to_string())?;
        check(
            "sha256",
            sha256.to_owned(),
            hex::encode(self.sha256.finalize()),
        )?;
        place(disk, self.temp, sha256)
    }
}

/// Stores a file that was written out of order (the parts of a multipart upload), reading it once to hash it.
pub(crate) fn store_file(
    disk: &Disk,
    temp: NamedTempFile,
    sha256: &str,
    size_bytes: u64,
) -> Result<(), Error> {
    let path = temp.path().to_owned();
    let mut file = File::open(&path).map_err(Error::io("open", &path))?;
    let (mut hash, mut buffer, mut read_bytes) = (Sha256::new(), vec![0; 1 << 20], 0u64);
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", &path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        read_bytes += n as u64;
    }
    check("size", size_bytes.to_string(), read_bytes.to_string())?;
    check("sha256", sha256.to_owned(), hex::encode(hash.finalize()))?;
    place(disk, temp, sha256)
}

/// The size of a stored blob, or `None` if it is not there.
pub(crate) fn size(disk: &Disk, sha256: &str) -> Result<Option<u64>, Error> {
    let path = path(disk, sha256);
    match path.metadata() {
        Ok(meta) => Ok(Some(meta.len())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("open", &path)(e)),
    }
}

/// Opens a blob that a commit names.
pub(crate) fn open(disk: &Disk, sha256: &str) -> Result<File, Error> {
    let path = path(disk, sha256);
    File::open(&path).map_err(Error::io("open", &path))
}

/// Reads a blob that is known to be small.
pub(crate) fn read(disk: &Disk, sha256: &str, max_bytes: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    open(disk, sha256)?
        .take(max_bytes)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", &path(disk, sha256)))?;
    Ok(bytes)
}

fn place(disk: &Disk, temp: NamedTempFile, sha256: &str) -> Result<(), Error> {
    let target = path(disk, sha256);
    if target.exists() {
        return Ok(());
    }
    disk.place(temp, &target)
}

/// `sha256` was checked to be 64 hex digits.
fn path(disk: &Disk, sha256: &str) -> PathBuf {
    disk.path(&["blobs", &sha256[..2], &sha256[2..]])
}

fn check(what: &'static str, expected: String, got: String) -> Result<(), Error> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Mismatch {
            what,
            expected,
            got,
        })
    }
}
