//! What only the network knows about an MTP step: what the sidecar's repository holds, which heads the source has, and
//! therefore what is to be done.
//!
//! Invariant: nothing is changed anywhere. What this finds is what a dry run with `--inspect` prints and what a real
//! run executes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use hub::{Hub, RepoId};
use serde::Serialize;
use terminal::{Failure, size};

use crate::card::sidecar::ArtifactOf;
use crate::mtp::heads::{self, Heads, Names};
use crate::mtp::layout::{Kind, Layout, ROW_BYTES_MAX, SourceFacts};
use crate::mtp::source::{self, Opened};
use crate::plan::MtpStep;

/// Name of the sidecar in its repository.
pub(crate) const MTP_FILE: &str = "mtp.safetensors";

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    /// There is none yet.
    Publish,
    /// There is one, which `--force` replaces.
    Replace,
    /// There is one.
    Skip,
}

/// What was learnt about a step.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct MtpInspection {
    pub(crate) action: Action,
    /// `None` for a directory.
    pub(crate) source_commit: Option<String>,
    /// The commit of the source that the card of a sidecar that is there names.
    pub(crate) covers_commit: Option<String>,
    /// `None` where they were not looked for: the step is skipped.
    pub(crate) heads: Option<HeadsFound>,
    /// Tensors of heads that the source names and does not hold: nothing more is known of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) n_unreadable: Option<usize>,
    pub(crate) warnings: Vec<String>,
}

/// The heads of a source, and the file that they become.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct HeadsFound {
    pub(crate) layout: Kind,
    pub(crate) n_heads: Option<u64>,
    pub(crate) n_tensors: usize,
    pub(crate) types: BTreeMap<String, usize>,
    /// Bytes of tensors and scales, which are read from the source.
    pub(crate) read_bytes: u64,
    pub(crate) file_bytes: u64,
}

/// A step that was inspected as far as names tell.
pub(crate) struct Named {
    pub(crate) inspection: MtpInspection,
    pub(crate) opened: Opened,
    /// The sidecar's repository is there.
    pub(crate) target_exists: bool,
    /// `None` where the step is skipped.
    pub(crate) names: Option<Names>,
}

/// Looks at both repositories, and at the source's small files.
pub(crate) async fn names(step: &MtpStep, force: bool, hub: &Hub) -> Result<Named, Failure> {
    let repo: RepoId = step
        .sidecar_repo
        .parse()
        .map_err(Failure::of::<hub::Error>("cannot publish"))?;
    let target = hub
        .head(&repo)
        .await
        .map_err(Failure::of(format!("cannot see what {repo} holds")))?;
    let exists = match &target {
        Some(target) => target.file(MTP_FILE).is_ok(),
        None => false,
    };
    let opened = source::open(&step.source_repo, hub).await?;
    let action = match (exists, force) {
        (false, _) => Action::Publish,
        (true, true) => Action::Replace,
        (true, false) => Action::Skip,
    };
    let mut inspection = MtpInspection {
        action,
        source_commit: opened.commit.clone(),
        covers_commit: None,
        heads: None,
        n_unreadable: None,
        warnings: Vec::new(),
    };
    if let Some(target) = &target {
        let card = crate::run::card_of(target)
            .await
            .map_err(Failure::of(format!("cannot read the card of {repo}")))?;
        let made = ArtifactOf::card(card.as_deref());
        if !force {
            made.must_be("mtp-sidecar", &step.sidecar_repo)?;
        }
        if action == Action::Skip {
            let warning = difference(&made, step, opened.commit.as_deref());
            inspection.warnings.extend(warning);
        }
        if exists {
            inspection.covers_commit = made.source_commit;
        }
    }
    let names = match action {
        Action::Skip => None,
        _ => Some(blocking(&opened, |files| heads::names(&*files)).await?),
    };
    Ok(Named {
        inspection,
        opened,
        target_exists: target.is_some(),
        names,
    })
}

/// What a dry run can tell of a step.
pub(crate) async fn inspect(
    step: &MtpStep,
    force: bool,
    hub: &Hub,
) -> Result<MtpInspection, Failure> {
    let mut named = names(step, force, hub).await?;
    named.inspection.n_unreadable = named.names.as_ref().and_then(Names::n_unreadable);
    if named.inspection.n_unreadable.is_none() {
        named.layout(step).await?;
    }
    Ok(named.inspection)
}

impl Named {
    /// Reads the headers of the shards with heads and places the tensors; `None` where the step is skipped.
    pub(crate) async fn layout(&mut self, step: &MtpStep) -> Result<Option<Layout>, Failure> {
        let Some(names) = self.names.take() else {
            return Ok(None);
        };
        let facts = SourceFacts::new(
            &step.source_repo,
            self.opened.commit.as_deref(),
            &names.config,
        );
        let keep_f32 = step.keep_f32;
        let read = move |files: Arc<dyn vindex::Source>| Heads::read(&*files, &names, keep_f32);
        let heads = blocking(&self.opened, read).await.map_err(|failure| {
            failure.hint(format!("nothing was published from {}", step.source_repo))
        })?;
        let Some(heads) = heads else {
            return Err(Failure::new(format!(
                "no MTP head tensors found in {}",
                step.source_repo
            ))
            .hint("mtp_source_repo names the original checkpoint: conversions often leave the heads out"));
        };
        let layout = Layout::new(heads, facts);
        layout.bound_rows(ROW_BYTES_MAX)?;
        self.inspection.heads = Some(HeadsFound {
            layout: layout.kind,
            n_heads: layout.n_heads,
            n_tensors: layout.tensors.len(),
            types: layout.source_types(),
            read_bytes: layout.read_bytes(),
            file_bytes: layout.file_bytes,
        });
        Ok(Some(layout))
    }
}

/// Why a sidecar that is there may not be what would be published now.
fn difference(made: &ArtifactOf, step: &MtpStep, commit: Option<&str>) -> Option<String> {
    let (source, sidecar) = (&step.source_repo, &step.sidecar_repo);
    let what = match (&made.source_repo, &made.source_commit) {
        (Some(repo), _) if repo != source => format!("was made from {repo}, not from {source}"),
        (_, None) => format!("does not say which commit of {source} it was made from"),
        (_, Some(made)) => match commit {
            Some(commit) if commit != made => {
                format!("was made from {source} at {made}, which is at {commit} now")
            }
            _ => return None,
        },
    };
    Some(format!("{sidecar} {what}; --force replaces it"))
}

/// Runs `work` on a thread that may wait for the Hub.
async fn blocking<T: Send + 'static>(
    opened: &Opened,
    work: impl FnOnce(Arc<dyn vindex::Source>) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let files = Arc::clone(&opened.files);
    tokio::task::spawn_blocking(move || work(files))
        .await
        .map_err(Failure::of("cannot read the source"))?
}

impl fmt::Display for MtpInspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: &dyn fmt::Display| {
            writeln!(f, "{:<20}{value}", format!("{label}:"))
        };
        match &self.source_commit {
            Some(commit) => line("mtp source commit", commit)?,
            None => line("mtp source commit", &"none (a directory here)")?,
        }
        if let Some(heads) = &self.heads {
            let n_heads = heads
                .n_heads
                .map_or("heads".to_owned(), |n| format!("{n} head(s)"));
            line(
                "mtp heads",
                &format_args!(
                    "{n_heads} of layout {}, {} tensors",
                    heads.layout.name(),
                    heads.n_tensors
                ),
            )?;
            let types: Vec<String> = heads
                .types
                .iter()
                .map(|(dtype, n)| format!("{n} {dtype}"))
                .collect();
            line("mtp source types", &types.join(", "))?;
            line(
                "mtp sizes",
                &format_args!(
                    "{} to fetch, {} to publish",
                    size(heads.read_bytes),
                    size(heads.file_bytes)
                ),
            )?;
        }
        if let Some(n) = self.n_unreadable {
            line(
                "mtp heads",
                &format_args!(
                    "{n} tensors by name; types and sizes are unread, as it has no weights"
                ),
            )?;
        }
        let action = match self.action {
            Action::Publish => "publish",
            Action::Replace => "replace what is there",
            Action::Skip => "skip: it is already published",
        };
        line("mtp action", &action)?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}
