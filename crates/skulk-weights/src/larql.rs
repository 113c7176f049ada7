//! Finds the larql that extracts and publishes vindexes, and runs it.
//!
//! Invariant: it is the one that the operator named, in `SKULK_WEIGHTS_LARQL` or by `PATH`; a program that merely lies
//! beside ours is never run. It inherits our environment, token included, and no argument ever holds a token. It does
//! not outlive us: an interrupt is passed on and waited for, and a larql of ours on Linux ends when we are killed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use terminal::Failure;

use crate::environment::Environment;

/// The variable that names larql: a path, or a name to look for on `PATH`.
pub(crate) const VARIABLE: &str = "SKULK_WEIGHTS_LARQL";

/// The variable that tells larql whose step it is.
const PARENT_VARIABLE: &str = "LARQL_PARENT";

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

/// Runs larql with these words, its output going where ours goes; with `json` all of it to standard error, because
/// standard output then holds our value alone.
pub(crate) async fn run(larql: &Path, words: &[String], json: bool) -> Result<(), Failure> {
    let mut command = tokio::process::Command::new(larql);
    command
        .args(words)
        .stdin(Stdio::null())
        .env(PARENT_VARIABLE, std::process::id().to_string());
    if json {
        command.stdout(std::io::stderr());
    }
    let step = words.first().map_or("", String::as_str);
    let child = command.spawn().map_err(|error| {
        Failure::io("cannot run", larql, error).hint(format!(
            "check that {VARIABLE} or PATH names a program for this machine"
        ))
    })?;
    let mut child = Running(child);
    let status = child
        .0
        .wait()
        .await
        .map_err(|error| Failure::io("cannot wait for", larql, error))?;
    if status.success() {
        return Ok(());
    }
    if is_interrupted(status) {
        return Err(Failure::Interrupted);
    }
    Err(Failure::new(format!("larql {step} failed ({status})")))
}

/// Whether an interrupt ended it, as the shell or as larql tells it.
#[cfg(unix)]
fn is_interrupted(status: std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.code() == Some(130) || status.signal() == Some(2)
}

#[cfg(not(unix))]
fn is_interrupted(status: std::process::ExitStatus) -> bool {
    status.code() == Some(130)
}

/// A larql that is interrupted and waited for when nobody waits for it any more.
struct Running(tokio::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        // No id: it has ended and was waited for.
        if self.0.id().is_none() {
            return;
        }
        interrupt(&mut self.0);
        while let Ok(None) = self.0.try_wait() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(unix)]
fn interrupt(child: &mut tokio::process::Child) {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(rustix::process::Pid::from_raw);
    let sent = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::INT));
    if !matches!(sent, Some(Ok(()))) {
        // It cannot be asked to stop; it is not left running either.
        let _ = child.start_kill();
    }
}

#[cfg(not(unix))]
fn interrupt(child: &mut tokio::process::Child) {
    let _ = child.start_kill();
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
