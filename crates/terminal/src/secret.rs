//! Secrets, tokens and the like, from files.
//!
//! Invariant: what was read is never part of a failure.

use std::fs;
use std::path::Path;

use crate::Failure;

const BYTES_MAX: u64 = 64 << 10;

/// A line of text that is not to be shown; white space around it is the editor's. `what` it is called in a failure.
///
/// # Errors
/// When the file cannot be read, is longer than 64 KiB, or holds nothing.
pub fn read_secret(path: &Path, what: &str) -> Result<String, Failure> {
    let failed = |error| Failure::io(&format!("cannot read the {what} in"), path, error);
    let n_bytes = fs::metadata(path).map_err(failed)?.len();
    if n_bytes > BYTES_MAX {
        return Err(Failure::new(format!(
            "{} is too long for a {what}",
            path.display()
        )));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    match text.trim() {
        "" => Err(
            Failure::new(format!("there is no {what} in {}", path.display()))
                .hint("`openssl rand -hex 32` makes one"),
        ),
        text => Ok(text.to_owned()),
    }
}
