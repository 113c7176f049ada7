//! How much room is left where something is to be written.

use std::path::Path;

/// Free bytes on the file system of `path` or of its nearest ancestor that exists; `None` where that cannot be told.
#[cfg(unix)]
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let found = absolute
        .ancestors()
        .find_map(|path| rustix::fs::statvfs(path).ok())?;
    found.f_bavail.checked_mul(found.f_frsize)
}

/// Free bytes on the file system of `path`: not known on this system.
#[cfg(not(unix))]
pub(crate) fn free_bytes(_path: &Path) -> Option<u64> {
    None
}
