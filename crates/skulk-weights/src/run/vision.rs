//! Carries out the vision step of a plan: look, stream what has changed from one repository to the other in one commit
//! with the card, file.
//!
//! Invariant: the bytes are those of the source's commit that the card names: each file's hash is the source's listing's,
//! and is computed again on the way. Nothing is kept on this disk.

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Upload};
use terminal::{Failure, Meter, Output};

use super::{Published, card_addition, filing};
use crate::card;
use crate::card::sidecar::{SidecarContents, SidecarFacts};
use crate::plan::{Artifact, PublishPlan, VisionStep};
use crate::vision::{self, Inspected, is_same};

/// Largest file that is not an LFS object at the source, and so is held in memory.
const SMALL_BYTES_MAX: u64 = 16 << 20;

/// Mirrors the vision files, or finds that they are there, and files the repository.
pub(super) async fn publish(
    plan: &PublishPlan,
    step: &VisionStep,
    hub: &Hub,
    output: Output,
) -> Result<Published, Failure> {
    let repo: RepoId = step
        .sidecar_repo
        .parse()
        .map_err(Failure::of::<hub::Error>("cannot publish"))?;
    let inspected = vision::inspect(step, plan.force, hub).await?;
    output.text(inspected.inspection.to_string().trim_end())?;
    let failed = |error: hub::Error| {
        Failure::new(format!("cannot publish to {repo}"))
            .cause(error)
            .hint("the repository holds what it held; the same command tries again")
    };
    hub.create_repo(&repo, false).await.map_err(failed)?;
    let request = request(plan, step, &inspected).await?;
    let meter = Meter::new("vision upload");
    let report = hub
        .commit(&repo, &request, &|upload| match upload {
            Upload::Started { bytes_total, .. } => meter.set_total(bytes_total),
            Upload::Bytes(n_bytes) => meter.add(n_bytes),
            Upload::Hashed(_) | Upload::Committing => {}
        })
        .await
        .map_err(failed)?;
    drop(meter);

    let head = hub.head(&repo).await.map_err(failed)?;
    for file in inspected.snapshot.files() {
        let is_wanted = inspected
            .inspection
            .files
            .iter()
            .any(|wanted| wanted.path == file.path);
        let held = head.as_ref().and_then(|head| head.file(&file.path).ok());
        // One Hub may keep as an LFS object what the other keeps in git: then only the sizes can be compared.
        let is_there = held.is_some_and(|held| {
            is_same(held, file)
                || (held.sha256.is_some() != file.sha256.is_some()
                    && held.size_bytes == file.size_bytes)
        });
        if is_wanted && !is_there {
            return Err(Failure::new(format!(
                "{repo} does not hold {} as it was committed",
                file.path
            ))
            .hint("another publication may have replaced it; run the same command again"));
        }
    }
    let mut published = Published::new(Artifact::Vision, hub, &repo);
    published.skipped = report.commit.is_none();
    published.commit = head.map(|head| head.commit().to_string());
    published.fetched_bytes = Some(inspected.inspection.upload_bytes);
    if let Some(title) = &step.collection {
        published.collection = Some(filing::file_by_title(hub, title, &repo).await?);
    }
    Ok(published)
}

/// The commit: changed files, the card, deletions.
async fn request(
    plan: &PublishPlan,
    step: &VisionStep,
    inspected: &Inspected,
) -> Result<CommitRequest, Failure> {
    let Inspected {
        inspection,
        snapshot,
        license,
        card,
    } = inspected;
    let facts = SidecarFacts {
        repo: &step.sidecar_repo,
        source_repo: &step.source_repo,
        source_commit: Some(&inspection.source_commit),
        target_model: &plan.source_model,
        license,
        catalog_key: &plan.model_key,
        contents: SidecarContents::Vision {
            files: &inspection.files,
        },
    };
    let time = card
        .as_ref()
        .and_then(|old| card::same_but_time(|time| facts.render(time), old))
        .unwrap_or_else(card::now);
    let mut additions = vec![card_addition(facts.render(&time))];
    for path in &inspection.changed {
        let failed =
            || Failure::of::<hub::Error>(format!("cannot read {path} of {}", step.source_repo));
        let file = snapshot.file(path).map_err(failed())?;
        let content = match &file.sha256 {
            Some(_) => Content::Remote(snapshot.clone(), path.clone()),
            None => {
                let bytes = snapshot
                    .read_checked(path, SMALL_BYTES_MAX)
                    .await
                    .map_err(failed())?;
                Content::Bytes(bytes.to_vec())
            }
        };
        additions.push(Addition {
            path: path.clone(),
            content,
            sha256: file.sha256.clone(),
            size_bytes: file.size_bytes,
        });
    }
    Ok(CommitRequest {
        summary: format!(
            "Mirror vision encoder from {}@{}",
            step.source_repo, inspection.source_commit
        ),
        additions,
        deletions: inspection.deletions.clone(),
    })
}
