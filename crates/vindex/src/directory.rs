//! Small work on the files of a directory that is, or is to become, a vindex: removing them, writing one whole.
//!
//! Invariant: only files that vindexes are made of are removed, `index.json` first, so that a directory that is half
//! cleared is no vindex; whatever else lies there stays.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::error::Error;
use crate::extract::{JOURNAL_FILE, PARTIAL};
use crate::index::INDEX_FILE;
use crate::provenance::PROVENANCE_FILE;
use crate::slice::SLICE_FILE;

/// Removes the vindex, or the beginning of one, that is in `dir`, and nothing else; there need be no such directory.
///
/// # Errors
/// [`Error::Io`].
pub fn clear(dir: &Path) -> Result<(), Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let mut names = vec![
        INDEX_FILE.to_owned(),
        SLICE_FILE.to_owned(),
        PROVENANCE_FILE.to_owned(),
        JOURNAL_FILE.to_owned(),
    ];
    for entry in entries {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        names.extend(
            name.to_str()
                .filter(|name| is_part(name))
                .map(str::to_owned),
        );
    }
    for name in names {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("remove", &path)(error)),
        }
    }
    Ok(())
}

/// Whether a file has the name of a part (`<stem>-00001-of-00009.gguf`), or of one that is being written or fetched.
fn is_part(name: &str) -> bool {
    let Some((stem, suffix)) = name.rsplit_once(".gguf") else {
        return false;
    };
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let numbered = stem.rsplit_once("-of-").is_some_and(|(front, total)| {
        digits(total)
            && front
                .rsplit_once('-')
                .is_some_and(|(_, number)| digits(number))
    });
    numbered && matches!(suffix, "" | ".partial" | ".incomplete" | ".incomplete.json")
}

/// Writes `dir/name` so that it is there whole or not at all: beside, synced, renamed.
///
/// # Errors
/// [`Error::Io`].
pub fn write_whole(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let partial = dir.join(format!("{name}{PARTIAL}"));
    let mut file = fs::File::create(&partial).map_err(Error::io("create", &partial))?;
    file.write_all(bytes)
        .map_err(Error::io("write", &partial))?;
    file.sync_all().map_err(Error::io("sync", &partial))?;
    fs::rename(&partial, dir.join(name)).map_err(Error::io("rename", &partial))
}

#[cfg(test)]
mod tests {
    use super::is_part;

    #[test]
    fn parts_and_their_beginnings_are_told_from_other_files() {
        for part in [
            "m-q4k-00001-of-00009.gguf",
            "a-00010-of-00010.gguf.partial",
            "a-00010-of-00010.gguf.incomplete.json",
        ] {
            assert!(is_part(part), "{part}");
        }
        for other in [
            "model.gguf",
            "m-1-of-9.gguf",
            "m-00001-of-00009.gguf.bak",
            "index.json",
            "m-00001-of-00009.safetensors",
        ] {
            assert!(!is_part(other), "{other}");
        }
    }
}
