//! What a file's bytes are, as the Hub names them: the sha256 of an LFS object, the SHA-1 of a git blob.
//!
//! Invariant: files are hashed as a stream, in constant memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Read size of a hashing pass.
const READ_BYTES: usize = 1 << 20;

/// The git blob id of content whose bytes are still to come: `sha1("blob {size}\0" + bytes)`.
pub(crate) fn git_hasher(size_bytes: u64) -> Sha1 {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {size_bytes}\0").as_bytes());
    hasher
}

/// Whether `text` is a sha256 in lower-case hex.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// sha256 of a file from its start, hex; blocks.
pub(crate) fn sha256_of(file: File) -> io::Result<String> {
    hash(file, Sha256::new())
}

/// sha256 of bytes inside a file, hex; blocks.
pub(crate) fn sha256_of_range(mut file: &File, range: Range<u64>) -> io::Result<String> {
    file.seek(SeekFrom::Start(range.start))?;
    let mut sha256 = Sha256::new();
    let mut buf = vec![0; READ_BYTES];
    let mut left = range.end - range.start;
    while left > 0 {
        let piece = &mut buf[..left.min(READ_BYTES as u64) as usize];
        file.read_exact(piece)?;
        sha256.update(&*piece);
        left -= piece.len() as u64;
    }
    Ok(hex::encode(sha256.finalize()))
}

/// git blob id of a file, hex; blocks.
pub(crate) fn git_oid_of(file: File) -> io::Result<String> {
    let size_bytes = file.metadata()?.len();
    hash(file, git_hasher(size_bytes))
}

fn hash<D: Digest>(mut file: File, mut hasher: D) -> io::Result<String> {
    file.rewind()?;
    let mut buf = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buf)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            n => hasher.update(&buf[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_two_hashes_of_the_hub() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello\n").unwrap();
        let open = || file.try_clone().unwrap();
        assert_eq!(
            git_oid_of(open()).unwrap(),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
        assert_eq!(
            sha256_of(open()).unwrap(),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
    }
}
