//! Carries out the vindex step of a plan: extract, card, publish, file into the collection, clean up.
//!
//! Each step is recorded in the journal when it is done, so a run that was killed or failed is gone on from by the same
//! command, which does only what is missing. Invariant: nothing is published that was not extracted in full, by this
//! plan; an output directory that no journal of this plan accounts for is never touched without `--force`; the local
//! vindex is deleted only after the repository holds it.

use std::fs;
use std::path::Path;

use hub::{CommitRequest, Hub, RepoId, Snapshot};
use terminal::{Failure, Output, tell};
use vindex::{INDEX_FILE, Slice, Vindex, VindexId};

use super::done::Done;
use super::{Published, card_addition, card_of, filing, remove};

use crate::card::{self, Contents, Facts};
use crate::inspect::{self, Inspection};
use crate::journal::{self, Journal, Work};
use crate::larql;
use crate::plan::{Artifact, PublishPlan, VindexStep};

const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Inspects the vindex step, prints what that adds, and carries it out.
pub(super) async fn publish(
    plan: &PublishPlan,
    words: &VindexStep,
    hub: &Hub,
    larql: &Path,
    done: Option<&mut Done>,
    output: Output,
) -> Result<Published, Failure> {
    if let Some(done) = &done
        && !plan.force
        && let Some(published) = done.find(plan, hub).await
    {
        return Ok(Published {
            skipped: true,
            ..published.clone()
        });
    }
    let repo: RepoId = plan
        .target_repo
        .parse()
        .map_err(|error: hub::Error| Failure::new("cannot publish").cause(error))?;
    let inspection = inspect::inspect(plan, hub, Some(larql)).await;
    output.text(inspection.to_string().trim_end())?;
    if let Some(refusal) = inspection.target.refusal {
        return Err(Failure::new(format!("cannot publish to {repo}: {refusal}"))
            .hint("nothing was extracted"));
    }

    let mut journal = Journal::open(plan)?;
    let mut step = start(plan, &mut journal, inspection.source.commit.as_deref())?;
    if step < journal::Step::Extracted {
        extract(plan, words, &inspection, larql, output).await?;
        journal.done(journal::Step::Extracted)?;
        step = journal::Step::Extracted;
    }
    if step < journal::Step::Published {
        publish_vindex(plan, words, &inspection, larql, hub, &repo, output).await?;
        journal.done(journal::Step::Published)?;
    }
    remove(&plan.output_path)?;
    let collection = match &plan.collection {
        Some(slug) => Some(filing::file(hub, slug, &repo).await?),
        None => None,
    };
    journal.remove()?;

    let mut published = Published::new(Artifact::Vindex, hub, &repo);
    published.collection = collection;
    if let Ok(Some(target)) = hub.head(&repo).await {
        published.commit = Some(target.commit().to_string());
        published.vindex = remote_vindex(&target)
            .await
            .ok()
            .flatten()
            .map(|id| id.to_string());
    }
    if let Some(done) = done {
        done.add(
            Work::of(plan, inspection.source.commit.as_deref()),
            &published,
        )?;
    }
    Ok(published)
}

/// Where to go on: from what the journal knows of this plan, or from the beginning.
fn start(
    plan: &PublishPlan,
    journal: &mut Journal,
    commit: Option<&str>,
) -> Result<journal::Step, Failure> {
    let work = Work::of(plan, commit);
    let out = &plan.output_path;
    let exists = fs::symlink_metadata(out).is_ok();
    let known = journal.step_of(&work).filter(|_| !plan.force);
    match known {
        Some(journal::Step::Published) => Ok(journal::Step::Published),
        Some(_) if !exists => {
            journal.begin(&work)?;
            Ok(journal::Step::Begun)
        }
        Some(journal::Step::Begun) if out.join(vindex::JOURNAL_FILE).exists() => {
            Ok(journal::Step::Begun)
        }
        // Its index is written last: the extraction was finished and only its record is missing.
        Some(journal::Step::Begun) if Vindex::open(out).is_ok() => Ok(journal::Step::Extracted),
        Some(journal::Step::Begun) => {
            // The beginning of another larql's work, which nobody can go on from.
            remove(out)?;
            Ok(journal::Step::Begun)
        }
        Some(journal::Step::Extracted) => Ok(journal::Step::Extracted),
        None if exists && !plan.force => {
            let other = match journal.work() {
                Some(begun) => {
                    format!("\n  it was begun for: {begun}\n  this run is for:  {work}")
                }
                None => String::new(),
            };
            Err(Failure::new(format!(
                "output path already exists: {}{other}",
                out.display()
            ))
            .hint("remove it, or rerun with --force to replace it"))
        }
        None => {
            if exists {
                remove(out)?;
            }
            journal.begin(&work)?;
            Ok(journal::Step::Begun)
        }
    }
}

async fn extract(
    plan: &PublishPlan,
    words: &VindexStep,
    inspection: &Inspection,
    larql: &Path,
    output: Output,
) -> Result<(), Failure> {
    let mut words = words.extract[1..].to_vec();
    if let Some(commit) = &inspection.source.commit {
        words.extend(["--revision".to_owned(), commit.clone()]);
    }
    larql::run(larql, &words, output.json).await.map_err(|failure| {
        failure.hint("nothing was published; see what larql wrote above. What is finished is kept: the same command goes on after it")
    })?;
    if plan.output_path.join(INDEX_FILE).is_file() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "larql extract ended well and left no {INDEX_FILE} in {}",
        plan.output_path.display()
    ))
    .hint(format!(
        "nothing was published; check that {} is a larql",
        larql.display()
    )))
}

/// Runs `larql publish` with the card, and adds the card when larql has left none.
async fn publish_vindex(
    plan: &PublishPlan,
    words: &VindexStep,
    inspection: &Inspection,
    larql: &Path,
    hub: &Hub,
    repo: &RepoId,
    output: Output,
) -> Result<(), Failure> {
    let vindex = match Vindex::open(&plan.output_path) {
        Ok(vindex) => Some(vindex),
        Err(error) => {
            tell(format_args!(
                "warning: what larql wrote is no vindex of ours, so the card says nothing about its contents: {error}"
            ));
            None
        }
    };
    let slice = plan
        .publish_slices
        .split(',')
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(Slice::Full);
    let facts = Facts {
        repo: &plan.target_repo,
        source_model: &plan.source_model,
        source_commit: inspection.source.commit.as_deref(),
        license: &inspection.source.license,
        quant: &plan.quant,
        catalog_key: &plan.model_key,
        contents: vindex.as_ref().map(|vindex| Contents {
            id: vindex.id(),
            index: vindex.index(),
            slice,
        }),
    };
    let asking = |error: hub::Error| {
        Failure::new(format!("cannot see what {repo} holds"))
            .cause(error)
            .hint("the extracted vindex is kept; run the same command again")
    };
    let old = match hub.head(repo).await.map_err(asking)? {
        Some(target) => card_of(&target).await.map_err(asking)?,
        None => None,
    };
    let time = old
        .and_then(|old| card::same_but_time(|time| card::render(&facts, time), &old))
        .unwrap_or_else(card::now);
    let card = card::render(&facts, &time);
    let path = journal::beside(plan, "card.md");
    fs::write(&path, &card).map_err(|error| Failure::io("cannot write the card", &path, error))?;

    let mut words = words.publish[1..].to_vec();
    words.extend(["--card".to_owned(), path.display().to_string()]);
    let published = larql::run(larql, &words, output.json).await;
    remove(&path)?;
    published.map_err(|failure| {
        failure.hint("see what larql wrote above. The extracted vindex is kept: the same command publishes it without extracting again, and with --force extracts it anew")
    })?;

    let target = hub.head(repo).await.map_err(asking)?;
    if let (Some(vindex), Some(target)) = (&vindex, &target)
        && remote_vindex(target).await.map_err(asking)? != Some(vindex.id())
    {
        return Err(Failure::new(format!(
            "larql publish ended well, and {repo} does not hold the vindex {}",
            vindex.id()
        ))
        .hint("check which larql ran; the extracted vindex is kept"));
    }
    let there = match &target {
        Some(target) => card_of(target).await.map_err(asking)?,
        None => None,
    };
    if there.as_deref() != Some(card.as_str()) {
        tell("warning: larql did not publish the card, so it is added in a commit of its own");
        add_card(hub, repo, card).await.map_err(|error| {
            Failure::new(format!("the vindex is in {repo} and its card is not"))
                .cause(error)
                .hint("run the same command again to add it")
        })?;
    }
    Ok(())
}

async fn add_card(hub: &Hub, repo: &RepoId, card: String) -> Result<(), hub::Error> {
    hub.create_repo(repo, false).await?;
    let request = CommitRequest {
        summary: "Add the model card".to_owned(),
        additions: vec![card_addition(card)],
        deletions: Vec::new(),
    };
    hub.commit(repo, &request, &|_| {}).await?;
    Ok(())
}

/// The identity of what a repository holds; `None` when it has no index.
async fn remote_vindex(target: &Snapshot) -> Result<Option<VindexId>, hub::Error> {
    match target.read_file(INDEX_FILE, INDEX_BYTES_MAX).await {
        Ok(bytes) => Ok(Some(VindexId::of(&bytes))),
        Err(hub::Error::EntryNotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
