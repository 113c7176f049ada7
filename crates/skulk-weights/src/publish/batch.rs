//! `publish --tier`: the entries of a tier, one after another, and a table of what became of each.
//!
//! Invariant: every entry is accounted for in the table, those that were not begun too. What a batch has published is
//! recorded until all of it is: the same command repeats only what failed.

use std::fmt;

use serde::Serialize;
use terminal::{Failure, Output, tell};

use super::{Done, Published, dry_run, one, plan_of};
use crate::catalog::Catalog;
use crate::cli::Publish;
use crate::entry::{Entry, Tier};
use crate::environment::Environment;
use crate::plan::Artifact;

/// What became of an entry.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
    result: Outcome,
    published: Vec<Published>,
    error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Published,
    /// All of it was there already.
    Skipped,
    /// The entry does not have the artifact.
    NotConfigured,
    Failed,
    /// An entry before it failed.
    NotBegun,
}

/// Publishes the entries of `tier` (`None`: all).
pub(super) fn publish(
    args: &Publish,
    tier: Option<Tier>,
    catalog: &Catalog,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let entries = catalog
        .entries
        .iter()
        .filter(|entry| tier.is_none_or(|tier| entry.tier == tier));
    let entries: Vec<&Entry> = entries.collect();
    if args.dry_run {
        return entries.iter().try_for_each(|entry| {
            dry_run(
                plan_of(entry, args, environment)?,
                args.inspect,
                environment,
                output,
            )
        });
    }
    let name = format!(
        "tier-{}-{}",
        tier.map_or("all", Tier::name),
        args.artifact.name()
    );
    let scratch = environment.scratch(args.scratch.path.as_deref());
    let mut done = None;
    let mut rows: Vec<Row> = Vec::new();
    let mut is_over = false;
    for entry in entries {
        let mut row = Row {
            key: entry.key.clone(),
            result: Outcome::NotBegun,
            published: Vec::new(),
            error: None,
        };
        if is_over {
            rows.push(row);
            continue;
        }
        if !has(entry, args.artifact) {
            row.result = Outcome::NotConfigured;
            rows.push(row);
            continue;
        }
        tell(format_args!("== {}", entry.key));
        let ended = plan_of(entry, args, environment).and_then(|plan| {
            one(
                entry,
                plan,
                environment,
                output,
                &mut done,
                Some((&*scratch, &*name)),
            )
        });
        match ended {
            Ok(published) => {
                let is_skipped = published.iter().all(|published| published.skipped);
                row.result = if is_skipped {
                    Outcome::Skipped
                } else {
                    Outcome::Published
                };
                row.published = published;
            }
            Err(Failure::Interrupted) => return Err(Failure::Interrupted),
            Err(failure) => {
                tell(&failure);
                row.result = Outcome::Failed;
                row.error = Some(
                    failure.to_json()["error"]
                        .as_str()
                        .unwrap_or("failed")
                        .to_owned(),
                );
                is_over = !args.continue_on_error;
            }
        }
        rows.push(row);
    }
    let n_failed = rows
        .iter()
        .filter(|row| row.result == Outcome::Failed)
        .count();
    let n_left = rows
        .iter()
        .filter(|row| row.result == Outcome::NotBegun)
        .count();
    let width = rows
        .iter()
        .map(|row| row.key.len())
        .max()
        .unwrap_or(0)
        .max("key".len());
    output.text(format_args!("{:width$}  result", "key"))?;
    rows.iter()
        .try_for_each(|row| output.text(format_args!("{:width$}  {row}", row.key)))?;
    output.value(&serde_json::json!({"entries": rows, "failed": n_failed, "not_begun": n_left}))?;
    if n_failed == 0 {
        return done.map_or(Ok(()), Done::remove);
    }
    let n = rows.len();
    Err(Failure::new(format!(
        "{n_failed} of {n} entries failed, {n_left} were not begun"
    ))
    .hint("the same command does only what is missing"))
}

/// Whether the entry has anything of the artifact.
fn has(entry: &Entry, artifact: Artifact) -> bool {
    match artifact {
        Artifact::Mtp => entry.mtp.is_some(),
        Artifact::Vision => entry.vision.is_some(),
        Artifact::Vindex | Artifact::All => true,
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.result {
            Outcome::Published => "published",
            Outcome::Skipped => "already published",
            Outcome::NotConfigured => "not configured",
            Outcome::Failed => "failed",
            Outcome::NotBegun => "not begun",
        })?;
        match &self.error {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        }
    }
}
