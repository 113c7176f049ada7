//! `publish`: from arguments to a plan, and the cheap refusals before any work.
//!
//! Invariant: below the dry run nothing asks again whether this is one; the same plan value is printed or executed.

mod batch;

use std::path::{Path, PathBuf};

use terminal::{Failure, Output};

use crate::catalog::Catalog;
use crate::cli::Publish;
use crate::entry::Entry;
use crate::environment::Environment;
use crate::larql;
use crate::mtp::inspection;
use crate::plan::{self, Artifact, Choices, PublishPlan, Step};
use crate::run::{self, Done, Published};
use crate::{inspect, vision};

/// Publishes one entry, or those of a tier, unless it is a dry run.
pub(crate) fn publish(
    args: &Publish,
    catalog: &Catalog,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    if let Some(tier) = args.tier {
        return batch::publish(args, tier.tier(), catalog, environment, output);
    }
    let entry = entry(catalog, args.model.as_deref().unwrap_or_default())?;
    let plan = plan_of(entry, args, environment)?;
    if args.dry_run {
        return dry_run(plan, args.inspect, environment, output);
    }
    let has_several =
        plan.vindex.is_some() && [plan.mtp.is_planned(), plan.vision.is_planned()].contains(&true);
    let scratch = plan.scratch.clone();
    let mut done = None;
    let record = has_several.then_some((&*scratch, &*entry.key));
    let published = one(entry, plan, environment, output, &mut done, record)?;
    if let Some(done) = done {
        done.remove()?;
    }
    output.value(&serde_json::json!({"published": published}))
}

/// Carries out the plan of one entry, after the cheap refusals. `done` is the record of what was published before, opened
/// here as `record` (scratch directory and name) when it is not open yet.
fn one(
    entry: &Entry,
    plan: PublishPlan,
    environment: &Environment,
    output: Output,
    done: &mut Option<Done>,
    record: Option<(&Path, &str)>,
) -> Result<Vec<Published>, Failure> {
    output.text(plan.to_string().trim_end())?;
    let settings = environment.hub_settings()?;
    if settings.token.is_none() {
        return Err(Failure::new("HF_TOKEN is required for non-dry-run publishing")
            .hint("set HF_TOKEN to a token that may write, or store one with `hf auth login`; --dry-run needs none"));
    }
    refuse_unconfigured(entry, &plan)?;
    let larql = match plan.vindex {
        Some(_) => larql::find(environment)?,
        None => PathBuf::new(),
    };
    let hub =
        hub::Hub::new(settings).map_err(|error| Failure::new("cannot use the Hub").cause(error))?;
    if let (None, Some((scratch, name))) = (&done, record) {
        *done = Some(Done::open(scratch, name)?);
    }
    environment.block_on(run::publish(run::Request {
        plan,
        hub,
        larql,
        done: done.as_mut(),
        output,
    }))?
}

/// The entry of that key, or a message with the key that was probably meant.
pub(crate) fn entry<'a>(catalog: &'a Catalog, key: &str) -> Result<&'a Entry, Failure> {
    catalog.get(key).ok_or_else(|| {
        Failure::new(format!("catalog key not found: {key}")).hint(catalog.missing_key_hint(key))
    })
}

/// The uninspected plan.
pub(crate) fn plan(
    entry: &Entry,
    artifact: Artifact,
    scratch: Option<&Path>,
    choices: Choices,
    environment: &Environment,
) -> Result<PublishPlan, Failure> {
    let scratch = environment.scratch(scratch);
    let collection = plan::collection(entry, environment.var(plan::COLLECTION_VARIABLE).as_deref())
        .map_err(|error| {
            Failure::new(error.to_string()).hint("unset it to use the entry's own collection")
        })?;
    Ok(PublishPlan::new(
        entry, artifact, &scratch, collection, choices,
    ))
}

/// The plan that the options ask for.
fn plan_of(
    entry: &Entry,
    args: &Publish,
    environment: &Environment,
) -> Result<PublishPlan, Failure> {
    let choices = Choices {
        force: args.force,
        keep_f32: args.keep_f32,
    };
    plan(
        entry,
        args.artifact,
        args.scratch.path.as_deref(),
        choices,
        environment,
    )
}

fn dry_run(
    mut plan: PublishPlan,
    inspect: bool,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    if inspect {
        let hub = hub::Hub::new(environment.hub_settings()?)
            .map_err(|error| Failure::new("cannot use the Hub").cause(error))?;
        let larql = larql::find(environment).ok();
        environment.block_on(add_inspections(&mut plan, &hub, larql.as_deref()))??;
    }
    output.value(&plan)?;
    output.text(format_args!("{plan}dry run complete"))
}

/// Adds what the network knows to each step.
async fn add_inspections(
    plan: &mut PublishPlan,
    hub: &hub::Hub,
    larql: Option<&Path>,
) -> Result<(), Failure> {
    if plan.vindex.is_some() {
        plan.inspection = Some(inspect::inspect(plan, hub, larql).await);
    }
    if let Step::Planned(step) = plan.mtp.clone() {
        let inspected = inspection::inspect(&step, plan.force, hub).await;
        plan.mtp_inspection = plan.asked(inspected)?;
    }
    if let Step::Planned(step) = plan.vision.clone() {
        let inspected = vision::inspect(&step, plan.force, hub).await;
        plan.vision_inspection = plan.asked(inspected.map(|found| found.inspection))?;
    }
    Ok(())
}

/// Refuses an artifact that was asked for by name and that the entry does not configure.
fn refuse_unconfigured(entry: &Entry, plan: &PublishPlan) -> Result<(), Failure> {
    let missing = match plan.artifact {
        Artifact::Mtp if plan.mtp == Step::NotConfigured => {
            ("MTP", "mtp_source_repo and mtp_sidecar_repo")
        }
        Artifact::Vision if plan.vision == Step::NotConfigured => {
            ("vision", "vision_source_repo and vision_sidecar_repo")
        }
        _ => return Ok(()),
    };
    let (what, fields) = missing;
    Err(Failure::new(format!(
        "no {what} sidecar configured for {}; add {fields} to the catalog entry",
        entry.key
    )))
}
