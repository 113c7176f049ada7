//! The scratch directory: where it is, and its removal.
//!
//! Invariant: nothing is removed that could be more than a scratch: the refusal comes before any question, looks at the
//! path with all links resolved, and no option overrides it.

use std::ffi::OsStr;
use std::io::{self, BufRead, Write};
use std::path::{Component, Path, PathBuf};

use terminal::Failure;

/// The variable that names the scratch directory.
pub(crate) const VARIABLE: &str = "SKULK_WEIGHTS_SCRATCH";

/// Directories that belong to the system, with everything below them.
const SYSTEM: [&str; 16] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
    "/System",
    "/Library",
    "/Applications",
    "/var/lib/dpkg",
    "/var/log",
];
/// Files that show a directory to be the root of something else.
const MARKERS: [&str; 6] = [
    ".git",
    ".hg",
    "Cargo.toml",
    "pyproject.toml",
    "skulk-weights.yaml",
    "package.json",
];

/// The scratch directory: the option, else the variable, else `.scratch` in the working directory.
pub(crate) fn root(
    option: Option<&Path>,
    variable: Option<&OsStr>,
    working_dir: &Path,
    home: Option<&Path>,
) -> PathBuf {
    match (option, variable.filter(|value| !value.is_empty())) {
        (Some(path), _) => expand_home(path, home),
        (None, Some(value)) => expand_home(Path::new(value), home),
        (None, None) => working_dir.join(".scratch"),
    }
}

/// `path` with a leading `~` replaced by the home directory.
pub(crate) fn expand_home(path: &Path, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

/// What became of a scratch directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cleaned {
    Deleted,
    Declined,
    Absent,
}

/// Removes `scratch` with everything in it, after a question on `ask` unless `yes`. Links inside are not followed.
pub(crate) fn clean(
    scratch: &Path,
    working_dir: &Path,
    home: Option<&Path>,
    yes: bool,
    answers: &mut dyn BufRead,
    ask: &mut dyn Write,
) -> Result<Cleaned, Failure> {
    let path = working_dir.join(scratch);
    let resolved = resolve(&path);
    if let Some(reason) = too_broad(
        &resolved,
        &resolve(working_dir),
        home.map(resolve).as_deref(),
    ) {
        return Err(refusal(scratch, &format!("path is too broad: {reason}")));
    }
    let metadata = match std::fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Cleaned::Absent),
        Err(error) => {
            return Err(Failure::io(
                "cannot look at the scratch directory",
                scratch,
                error,
            ));
        }
    };
    if metadata.is_symlink() {
        return Err(refusal(
            scratch,
            &format!("it is a link to {}", resolved.display()),
        ));
    }
    if !metadata.is_dir() {
        return Err(refusal(scratch, "it is not a directory"));
    }
    if let Some(marker) = MARKERS
        .into_iter()
        .find(|marker| resolved.join(marker).exists())
    {
        return Err(refusal(
            scratch,
            &format!("it holds {marker}, so it is not a scratch directory"),
        ));
    }
    if !yes {
        write!(ask, "Delete {}? [y/N] ", scratch.display())
            .and_then(|()| ask.flush())
            .map_err(Failure::Output)?;
        let mut answer = String::new();
        answers
            .read_line(&mut answer)
            .map_err(|error| Failure::io("cannot read the answer for", scratch, error))?;
        if !answer.trim().eq_ignore_ascii_case("y") {
            return Ok(Cleaned::Declined);
        }
    }
    std::fs::remove_dir_all(&path).map_err(|error| Failure::io("cannot delete", scratch, error))?;
    Ok(Cleaned::Deleted)
}

fn refusal(scratch: &Path, reason: &str) -> Failure {
    Failure::new(format!(
        "refusing to delete {}: {reason}",
        scratch.display()
    ))
    .hint(format!(
        "name the scratch directory itself with --scratch or {VARIABLE}, or remove it by hand"
    ))
}

/// Why `path`, resolved, may be more than a scratch directory.
fn too_broad(path: &Path, working_dir: &Path, home: Option<&Path>) -> Option<String> {
    let n_parts = path
        .components()
        .filter(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        .count();
    if n_parts <= 2 {
        return Some("it is at the top of the file system".to_owned());
    }
    if working_dir.starts_with(path) {
        return Some("it is or contains the working directory".to_owned());
    }
    if let Some(home) = home
        && home.starts_with(path)
    {
        return Some("it is or contains the home directory".to_owned());
    }
    if let Some(system) = SYSTEM.into_iter().find(|system| path.starts_with(system)) {
        return Some(format!("{system} belongs to the system"));
    }
    if n_parts == 3
        && ["/home", "/Users", "/var"]
            .iter()
            .any(|parent| path.starts_with(parent))
    {
        return Some("it is a directory of the system or of a user".to_owned());
    }
    None
}

/// `path` without links and `..`, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    if let Ok(resolved) = path.canonicalize() {
        return resolved;
    }
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            Component::CurDir => {}
            part => resolved.push(part),
        }
        if let Ok(real) = resolved.canonicalize() {
            resolved = real;
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_a_scratch_is_refused() {
        let (working_dir, home) = (Path::new("/srv/job/cwd"), Path::new("/home/me"));
        for path in [
            "/",
            "/srv",
            "/srv/job",
            "/srv/job/cwd",
            "/home",
            "/home/me",
            "/home/other",
            "/usr/lib",
            "/etc/ssl/certs",
            "/var/tmp",
        ] {
            assert!(
                too_broad(Path::new(path), working_dir, Some(home)).is_some(),
                "{path}"
            );
        }
        for path in [
            "/srv/job/cwd/.scratch",
            "/srv/other/fast",
            "/home/me/sc",
            "/mnt/fast",
            "/var/tmp/sc",
            "/home/other/sc",
        ] {
            assert!(
                too_broad(Path::new(path), working_dir, Some(home)).is_none(),
                "{path}: {:?}",
                too_broad(Path::new(path), working_dir, Some(home))
            );
        }
    }

    #[test]
    fn the_option_comes_before_the_variable_before_the_working_directory() {
        let (here, home) = (Path::new("/w"), Some(Path::new("/h")));
        assert_eq!(
            root(Some(Path::new("rel")), Some(OsStr::new("/env")), here, home),
            Path::new("rel")
        );
        assert_eq!(
            root(None, Some(OsStr::new("~/sc")), here, home),
            Path::new("/h/sc")
        );
        assert_eq!(
            root(None, Some(OsStr::new("")), here, home),
            Path::new("/w/.scratch")
        );
        assert_eq!(
            root(Some(Path::new("~")), None, here, home),
            Path::new("/h/")
        );
    }
}
