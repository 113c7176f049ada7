//! Builds our programs and runs other programs. Invariant: a program that fails is an error that names it, with
//! its arguments and status. Leaves out what the programs do.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a chore says when it cannot go on.
pub(crate) type Done<T = ()> = Result<T, String>;

/// Our programs, as Cargo built them.
pub(crate) struct Programs {
    pub(crate) larql: PathBuf,
    pub(crate) skulk: PathBuf,
}

/// Builds the programs in release mode.
pub(crate) fn programs() -> Done<Programs> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .current_dir(root())
        .args(["build", "--release"])
        .args(["-p", "larql", "-p", "skulk", "-p", "skulk-weights"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run {}: {error}", cargo.display()))?;
    if !output.status.success() {
        return Err("cargo build failed; its messages are above".into());
    }
    let built = |name: &str| {
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|message| message["target"]["name"] == name)
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .ok_or_else(|| format!("cargo build did not say where it put {name}"))
    };
    Ok(Programs {
        larql: built("larql")?,
        skulk: built("skulk")?,
    })
}

/// Runs the demo with the programs that were just built, which lie in one directory.
pub(crate) fn demo(arguments: &[String]) -> Done {
    let programs = programs()?;
    run(Command::new(&programs.skulk)
        .current_dir(root())
        .arg("demo")
        .args(arguments))
}

/// Runs a command to its end, with this terminal.
pub(crate) fn run(command: &mut Command) -> Done {
    let status = command
        .status()
        .map_err(|error| format!("cannot run {}: {error}", words(command)))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{} ended with {status}", words(command)))
    }
}

/// Runs a command to its end and returns what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Done<Vec<u8>> {
    let output = command
        .output()
        .map_err(|error| format!("cannot run {}: {error}", words(command)))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!(
            "{} ended with {}\n{}",
            words(command),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Where chores keep what they make: `target/NAME` of the repository.
pub(crate) fn workspace(name: &str) -> Done<PathBuf> {
    let folder = root().join("target").join(name);
    std::fs::create_dir_all(&folder)
        .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    Ok(folder)
}

fn words(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
