//! Finds the larql that extracts and publishes vindexes.
//!
//! Invariant: it is the one that the operator named, in `SKULK_WEIGHTS_LARQL` or by `PATH`; a program that merely lies
//! beside ours is never run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::environment::Environment;
use crate::failure::Failure;

/// The variable that names larql: a path, or a name to look for on `PATH`.
pub(crate) const VARIABLE: &str = "SKULK_WEIGHTS_LARQL";

/// The path of larql.
pub(crate) fn find(environment: &Environment) -> Result<PathBuf, Failure> {
    let named = environment.var(VARIABLE).filter(|name| !name.is_empty());
    let name = named.as_deref().unwrap_or("larql");
    let found = if Path::new(name).components().count() > 1 {
        let path = environment.working_dir.join(name);
        is_program(&path).then_some(path)
    } else {
        let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
        environment
            .path()
            .into_iter()
            .map(|dir| dir.join(&file))
            .find(|path| is_program(path))
    };
    found.ok_or_else(|| match &named {
        Some(name) => Failure::new(format!("larql is required for vindex publishing: {VARIABLE} is '{name}', which is not a program"))
            .hint(format!("set {VARIABLE} to the path of larql, or unset it to use the one on PATH")),
        None => Failure::new("larql is required for vindex publishing").hint(format!("put larql on PATH, or set {VARIABLE} to its path")),
    })
}

/// What `larql --version` prints first, when it prints something within ten seconds.
pub(crate) async fn version(larql: &Path) -> Option<String> {
    let mut command = tokio::process::Command::new(larql);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(10), command.output())
        .await
        .ok()?
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line: String = text
        .lines()
        .next()?
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(80)
        .collect();
    (output.status.success() && !line.is_empty()).then_some(line)
}

#[cfg(unix)]
fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(path: &Path) -> bool {
    path.is_file()
}
