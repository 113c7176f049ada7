//! `doctor`: whether this machine can do its work.
//!
//! Invariant: every check runs, whatever the others found. Without `--publish` nothing is asked of the network and
//! larql is not mentioned.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use terminal::{Failure, Output};

use crate::catalog::{Catalog, Invalid, View};
use crate::cli::Doctor;
use crate::environment::Environment;
use crate::plan::{Artifact, Choices, PublishPlan};
use crate::space::free_bytes;
use crate::{inspect, larql, name, publish};

/// How long the Hub is asked before it counts as not reachable.
const PATIENCE: Duration = Duration::from_secs(5);

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
    let mut checks = Vec::new();
    let plan = match (&args.model, catalog) {
        (Some(key), Ok(catalog)) => {
            let planned = publish::entry(catalog, key).and_then(|entry| {
                publish::plan(
                    entry,
                    Artifact::All,
                    args.scratch.path.as_deref(),
                    Choices::default(),
                    environment,
                )
            });
            planned
                .map_err(|failure| checks.push(bad("model", failure.to_string())))
                .ok()
        }
        _ => None,
    };
    if args.publish {
        environment.block_on(publishing(plan.as_ref(), environment, &mut checks))?;
    }
    checks.push(writable(&environment.scratch(args.scratch.path.as_deref())));
    if let Some(plan) = &plan {
        checks.push(environment.block_on(space(plan, environment))?);
    }
    checks.push(catalog_check(view, catalog));
    for check in &checks {
        if check.ok {
            output.text(&check.message)?;
        } else {
            terminal::tell(&check.message);
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
    Check {
        check,
        ok: true,
        message: message.into(),
    }
}

fn bad(check: &'static str, message: impl Into<String>) -> Check {
    Check {
        check,
        ok: false,
        message: message.into(),
    }
}

/// larql, the token, the Hub and the token's rights; with the entry's plan also the right to write to its target.
async fn publishing(
    plan: Option<&PublishPlan>,
    environment: &Environment,
    checks: &mut Vec<Check>,
) {
    checks.push(larql_check(environment).await);
    let mut settings = match environment.hub_settings() {
        Ok(settings) => settings,
        Err(failure) => return checks.push(bad("token", failure.to_string())),
    };
    let has_token = settings.token.is_some();
    checks.push(
        match environment
            .var("HF_TOKEN")
            .is_some_and(|token| !token.trim().is_empty())
        {
            true => good("token", "HF_TOKEN is set"),
            false if has_token => good("token", "HF_TOKEN is not set; using the stored token"),
            false => bad(
                "token",
                "HF_TOKEN is not set; publication will fail (set it to a token that may write)",
            ),
        },
    );
    settings.give_up_after = PATIENCE;
    let endpoint = settings.endpoint.clone();
    let asked = match hub::Hub::new(settings) {
        Ok(hub) => hub.whoami().await,
        Err(error) => Err(error),
    };
    match asked {
        Ok(me) => {
            checks.push(good("hub", format!("Hub reachable: {endpoint}")));
            checks.push(rights(&me, plan.map(|plan| name::owner(&plan.target_repo))));
        }
        Err(hub::Error::Unauthorized { .. }) if !has_token => {
            checks.push(good("hub", format!("Hub reachable: {endpoint}")))
        }
        Err(error @ (hub::Error::Unauthorized { .. } | hub::Error::Forbidden { .. })) => {
            checks.push(good("hub", format!("Hub reachable: {endpoint}")));
            checks.push(bad("rights", format!("token is refused: {error}")));
        }
        Err(error) => checks.push(bad(
            "hub",
            format!("Hub not reachable: {endpoint}: {error}"),
        )),
    }
}

async fn larql_check(environment: &Environment) -> Check {
    match larql::find(environment) {
        Ok(path) => match larql::version(&path).await {
            Some(version) => good(
                "larql",
                format!("found command: larql ({}), {version}", path.display()),
            ),
            None => good(
                "larql",
                format!("found command: larql ({})", path.display()),
            ),
        },
        Err(_) => match environment
            .var(larql::VARIABLE)
            .filter(|name| !name.is_empty())
        {
            Some(name) => bad(
                "larql",
                format!(
                    "missing command: larql ({} is '{name}', which is not a program)",
                    larql::VARIABLE
                ),
            ),
            None => bad(
                "larql",
                format!(
                    "missing command: larql (put it on PATH, or set {} to its path)",
                    larql::VARIABLE
                ),
            ),
        },
    }
}

/// What the token may do, as far as the Hub tells; `owner` is that of the target repository.
fn rights(me: &hub::WhoAmI, owner: Option<&str>) -> Check {
    let who = &me.name;
    match owner.map(|owner| (owner, me.can_write(owner))) {
        Some((owner, hub::Right::Yes)) => {
            good("rights", format!("token of {who} may write to {owner}"))
        }
        Some((owner, hub::Right::No)) => bad(
            "rights",
            format!("token of {who} may not write to {owner} (use one with write access there)"),
        ),
        Some((owner, hub::Right::Unknown)) => good(
            "rights",
            format!("token of {who}; the Hub does not say whether it may write to {owner}"),
        ),
        None => match &me.role {
            Some(hub::Role::Read) => bad(
                "rights",
                format!("token of {who} may only read (make one that may write)"),
            ),
            Some(hub::Role::Write) => good("rights", format!("token of {who} may write")),
            Some(hub::Role::FineGrained) if me.writable.is_empty() => bad(
                "rights",
                format!(
                    "token of {who} may write nowhere (grant it write access to your repositories)"
                ),
            ),
            Some(hub::Role::FineGrained) => good(
                "rights",
                format!("token of {who} may write to {}", me.writable.join(", ")),
            ),
            Some(hub::Role::Other(role)) => {
                good("rights", format!("token of {who} with the role {role}"))
            }
            None => good(
                "rights",
                format!("token of {who}; the Hub does not say what it may do"),
            ),
        },
    }
}

fn writable(scratch: &Path) -> Check {
    let probe = std::fs::create_dir_all(scratch).and_then(|()| {
        tempfile::Builder::new()
            .prefix(".doctor-")
            .tempfile_in(scratch)
    });
    match probe {
        Ok(_) => good(
            "scratch",
            format!("scratch root writable: {}", scratch.display()),
        ),
        Err(error) => bad(
            "scratch",
            format!(
                "scratch root is not writable: {} ({error})",
                scratch.display()
            ),
        ),
    }
}

fn catalog_check(view: &View, catalog: Result<&Catalog, &Invalid>) -> Check {
    match (catalog, view) {
        (Ok(catalog), View::Manifest(path)) => good(
            "catalog",
            format!(
                "{} valid: {} entries",
                path.display(),
                catalog.entries.len()
            ),
        ),
        (Ok(catalog), _) => good(
            "catalog",
            format!(
                "catalog valid: {} entries from {} sources",
                catalog.entries.len(),
                catalog.sources.len()
            ),
        ),
        (Err(invalid), _) => {
            let findings: Vec<String> = invalid.findings.iter().map(ToString::to_string).collect();
            bad("catalog", format!("{}\n{invalid}", findings.join("\n")))
        }
    }
}

/// Holds the free space against what the inspected plan needs.
async fn space(plan: &PublishPlan, environment: &Environment) -> Check {
    let at = plan.scratch.display();
    let Some(free_bytes) = free_bytes(&plan.scratch) else {
        return good("space", format!("free space unknown: {at}"));
    };
    let free = gigabytes(free_bytes);
    let hub = match environment.hub_settings().map(hub::Hub::new) {
        Ok(Ok(hub)) => hub,
        Ok(Err(error)) => {
            return bad(
                "space",
                format!(
                    "free space: {free} at {at}; the Hub cannot be asked what is needed: {error}"
                ),
            );
        }
        Err(failure) => return bad("space", failure.to_string()),
    };
    match inspect::inspect(plan, &hub, None).await.disk_needed_bytes {
        None => good(
            "space",
            format!(
                "free space: {free} at {at}; what {} needs is unknown",
                plan.model_key
            ),
        ),
        Some(needed) if needed > free_bytes => bad(
            "space",
            format!(
                "not enough space: {free} free at {at}, {} needed for {}",
                gigabytes(needed),
                plan.model_key
            ),
        ),
        Some(needed) => good(
            "space",
            format!(
                "free space: {free} at {at}, {} needed for {}",
                gigabytes(needed),
                plan.model_key
            ),
        ),
    }
}

fn gigabytes(n_bytes: u64) -> String {
    format!("{:.1} GB", n_bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_without_the_right_is_a_failure_that_names_the_owner() {
        let me = hub::WhoAmI {
            name: "ann".to_owned(),
            role: Some(hub::Role::Write),
            orgs: Vec::new(),
            writable: Vec::new(),
            writes_everywhere: false,
        };
        let check = rights(&me, Some("acme"));
        assert!(!check.ok);
        assert_eq!(
            check.message,
            "token of ann may not write to acme (use one with write access there)"
        );
    }
}
