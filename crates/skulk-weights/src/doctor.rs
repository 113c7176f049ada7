//! `doctor`: whether this machine can do its work.
//!
//! Invariant: every check runs, whatever the others found. Without `--publish` nothing is asked of the network and
//! larql is not mentioned.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::catalog::{Catalog, Invalid, View};
use crate::cli::Doctor;
use crate::environment::Environment;
use crate::failure::Failure;
use crate::output::Output;
use crate::plan::Artifact;
use crate::{inspect, larql, publish};

/// One finding.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    ok: bool,
    message: String,
}

/// Runs the checks and prints a line for each: good ones on standard output, failures on standard error.
pub(crate) fn doctor(
    args: &Doctor,
    view: &View,
    catalog: Result<&Catalog, &Invalid>,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let scratch = environment.scratch(args.scratch.path.as_deref());
    let mut checks = Vec::new();
    if args.publish {
        environment.block_on(publishing(environment, &mut checks))?;
    }
    checks.push(writable(&scratch));
    checks.push(catalog_check(view, catalog));
    if let (Some(key), Ok(catalog)) = (&args.model, catalog) {
        checks.push(space(key, catalog, args.scratch.path.as_ref(), &scratch, environment)?);
    }
    for check in &checks {
        if check.ok {
            output.text(&check.message)?;
        } else {
            eprintln!("{}", check.message);
        }
    }
    let ok = checks.iter().all(|check| check.ok);
    output.value(&serde_json::json!({"ok": ok, "checks": checks}))?;
    if !ok {
        return Err(Failure::Shown);
    }
    output.text("doctor checks passed")
}

fn good(check: &'static str, message: impl Into<String>) -> Check {
    Check { check, ok: true, message: message.into() }
}

fn bad(check: &'static str, message: impl Into<String>) -> Check {
    Check { check, ok: false, message: message.into() }
}

async fn publishing(environment: &Environment, checks: &mut Vec<Check>) {
    checks.push(match larql::find(environment) {
        Ok(path) => match larql::version(&path).await {
            Some(version) => good("larql", format!("found command: larql ({}), {version}", path.display())),
            None => good("larql", format!("found command: larql ({})", path.display())),
        },
        Err(_) => match environment.var(larql::VARIABLE).filter(|name| !name.is_empty()) {
            Some(name) => bad("larql", format!("missing command: larql ({} is '{name}', which is not a program)", larql::VARIABLE)),
            None => bad("larql", format!("missing command: larql (put it on PATH, or set {} to its path)", larql::VARIABLE)),
        },
    });
    let settings = match environment.hub_settings() {
        Ok(settings) => settings,
        Err(failure) => return checks.push(bad("token", failure.to_string())),
    };
    let has_token = settings.token.is_some();
    checks.push(match environment.var("HF_TOKEN").is_some_and(|token| !token.trim().is_empty()) {
        true => good("token", "HF_TOKEN is set"),
        false if has_token => good("token", "HF_TOKEN is not set; using the stored token"),
        false => bad("token", "HF_TOKEN is not set; publication will fail (set it to a token that may write)"),
    });
    let endpoint = settings.endpoint.clone();
    if settings.offline {
        return checks.push(bad("hub", format!("Hub not reachable: {endpoint}: HF_HUB_OFFLINE is set")));
    }
    if !has_token {
        return;
    }
    let asked = match hub::Hub::new(settings) {
        Ok(hub) => hub.whoami().await,
        Err(error) => Err(error),
    };
    match asked {
        Ok(me) => {
            checks.push(good("hub", format!("Hub reachable: {endpoint}")));
            checks.push(rights(&me));
        }
        Err(error) => checks.push(bad("hub", format!("Hub not reachable, or the token is refused: {endpoint}: {error}"))),
    }
}

fn writable(scratch: &Path) -> Check {
    let probe = std::fs::create_dir_all(scratch).and_then(|()| tempfile::Builder::new().prefix(".doctor-").tempfile_in(scratch));
    match probe {
        Ok(_) => good("scratch", format!("scratch root writable: {}", scratch.display())),
        Err(error) => bad("scratch", format!("scratch root is not writable: {} ({error})", scratch.display())),
    }
}

fn catalog_check(view: &View, catalog: Result<&Catalog, &Invalid>) -> Check {
    match (catalog, view) {
        (Ok(catalog), View::Manifest(path)) => good("catalog", format!("{} valid: {} entries", path.display(), catalog.entries.len())),
        (Ok(catalog), _) => {
            good("catalog", format!("catalog valid: {} entries from {} sources", catalog.entries.len(), catalog.sources.len()))
        }
        (Err(invalid), _) => {
            let findings: Vec<String> = invalid.findings.iter().map(ToString::to_string).collect();
            bad("catalog", format!("{}\n{invalid}", findings.join("\n")))
        }
    }
}

/// What the token may do, as far as the Hub tells.
fn rights(me: &hub::WhoAmI) -> Check {
    todo!()
}

fn space(key: &str, catalog: &Catalog, scratch_option: Option<&PathBuf>, scratch: &Path, environment: &Environment) -> Result<Check, Failure> {
    todo!()
}
