//! Large files to a Hub that keeps them in a Xet store: chunked, deduplicated and sent by `hf-xet`.
//!
//! Invariant: only the bytes go this way; the commit that names them is made in `commit`, as for every
//! other transfer. The sha256 that the Xet client computes must be the one announced.

use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::time::timeout;
use xet::error::XetError;
use xet::xet_session::{Sha256Policy, XetSessionBuilder};

use crate::commit::{Content, Upload};
use crate::lfs::Object;
use crate::wire::{About, Wire, too_slow};
use crate::{Error, RepoId};

const ANSWER_BYTES_MAX: usize = 1 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Grant {
    cas_url: String,
    access_token: String,
    exp: u64,
}

/// Uploads `objects`; returns the bytes that went over the wire after deduplication.
pub(crate) async fn upload(
    wire: &Wire,
    repo: &RepoId,
    objects: &[&Object<'_>],
    progress: &(dyn Fn(Upload) + Send + Sync),
) -> Result<u64, Error> {
    let what = format!("upload {} file(s) to {repo} by Xet", objects.len());
    let failed = |source: XetError| Error::Xet {
        what: what.clone(),
        source: Box::new(source),
    };
    let url = wire.model_url(repo, &["xet-write-token", "main"]);
    let about = About {
        repo: Some(repo),
        ..About::default()
    };
    let ask = wire.get(format!("ask {repo} for a Xet token"), url.clone(), about);
    let grant: Grant = wire.json(&ask, ANSWER_BYTES_MAX).await?;

    let wait = wire.settings().write_timeout;
    let silent = || Error::Xet {
        what: what.clone(),
        source: too_slow("no progress", wait),
    };
    let session = XetSessionBuilder::new()
        .with_cache_dir(wire.settings().home.join("xet"))
        .build()
        .map_err(failed)?;
    let commit = session
        .new_upload_commit()
        .map_err(failed)?
        .with_endpoint(grant.cas_url)
        .with_token_info(grant.access_token, grant.exp)
        .with_token_refresh_url(url.to_string(), wire.auth_headers())
        .build();
    let commit = timeout(wait, commit).await.map_err(|_| silent())?;
    let commit = commit.map_err(failed)?;
    let mut tasks = Vec::new();
    for object in objects {
        let task = async {
            match object.content {
                Content::File(path) => {
                    commit
                        .upload_from_path(path.clone(), Sha256Policy::Compute)
                        .await
                }
                Content::Bytes(bytes) => {
                    let name = Some(object.path.to_owned());
                    commit
                        .upload_bytes(bytes.clone(), Sha256Policy::Compute, name)
                        .await
                }
                Content::Remote(..) => unreachable!("Xet is not on offer for files elsewhere"),
            }
        };
        let task = timeout(wait, task).await.map_err(|_| silent())?;
        tasks.push((*object, task.map_err(failed)?.task_id()));
    }
    let mut finish = std::pin::pin!(commit.commit());
    let (mut n_seen, mut quiet_since) = (0, Instant::now());
    let report = loop {
        tokio::select! {
            report = &mut finish => break report.map_err(failed)?,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let n_bytes = commit.progress().total_bytes_completed;
        if n_bytes > n_seen {
            progress(Upload::Bytes(n_bytes - n_seen));
            (n_seen, quiet_since) = (n_bytes, Instant::now());
        }
        if quiet_since.elapsed() > wait {
            return Err(silent());
        }
    };
    let total: u64 = objects.iter().map(|object| object.size_bytes).sum();
    progress(Upload::Bytes(total.saturating_sub(n_seen)));
    for (object, task) in tasks {
        let got = report
            .uploads
            .get(&task)
            .and_then(|done| done.xet_info.sha256.clone());
        if got.as_deref() != Some(&*object.sha256) {
            let got = got.unwrap_or_else(|| "no hash".to_owned());
            return Err(object.changed(format!(
                "sha256 {} announced, {got} uploaded",
                object.sha256
            )));
        }
    }
    Ok(report.progress.total_transfer_bytes_completed)
}
