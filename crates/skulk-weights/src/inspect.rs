//! What only the network knows about a plan: the source's commit and tensors, what the extraction would write, what the
//! target holds, whether the collection is there.
//!
//! Invariant: nothing is changed anywhere, and nothing here fails: what cannot be learnt becomes a warning that says
//! why, because a publication may go on without it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hub::{Hub, RepoId, Settings, Snapshot};
use serde::Serialize;
use terminal::size;
use vindex::{
    Census, Checkpoint, INDEX_FILE, Index, LocalDir, Plan, Recipe, Slice, Source as Files, VindexId,
};

use crate::card::License;
use crate::estimate::Estimate;
use crate::larql;
use crate::plan::PublishPlan;
use crate::space::free_bytes;

/// How long a Hub that does not answer is asked again.
const PATIENCE: Duration = Duration::from_secs(8);
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// What was learnt about a plan's source and target.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Inspection {
    pub(crate) source: Source,
    /// What `larql extract` would write, when it is ours; `None` when that cannot be told.
    pub(crate) extraction: Option<Extraction>,
    /// The most bytes that scratch holds at a time, when the source's sizes are known.
    pub(crate) disk_needed_bytes: Option<u64>,
    pub(crate) disk_free_bytes: Option<u64>,
    pub(crate) target: Target,
    /// Whether the collection is there; `None` when filing is off, or it cannot be told.
    pub(crate) collection_exists: Option<bool>,
    pub(crate) larql: Option<Larql>,
    pub(crate) warnings: Vec<String>,
}

/// The checkpoint.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Source {
    /// A directory here, which has no commit.
    pub(crate) is_local: bool,
    /// `None` when it cannot be told.
    pub(crate) commit: Option<String>,
    pub(crate) license: License,
    /// Length of its safetensors files, or of the tensors that its index tells of.
    pub(crate) size_bytes: Option<u64>,
    /// It holds no weights: the plan is made from its configuration and the names in its index.
    pub(crate) is_without_weights: bool,
    /// How many tensors of each type.
    pub(crate) dtypes: BTreeMap<String, usize>,
}

/// What an extraction writes.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Extraction {
    pub(crate) stem: String,
    pub(crate) n_parts: usize,
    pub(crate) size_bytes: u64,
    pub(crate) types: Census,
    /// What each slice holds, in bytes.
    pub(crate) slices: BTreeMap<&'static str, u64>,
    pub(crate) n_left_out: usize,
    pub(crate) estimate: Estimate,
}

/// The repository that is published to.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Target {
    /// `None` when it cannot be told.
    pub(crate) exists: Option<bool>,
    pub(crate) commit: Option<String>,
    /// The vindex that it holds now.
    pub(crate) vindex: Option<String>,
    /// Parts of that one that have no place in the new one.
    pub(crate) deletions: Vec<String>,
    /// The Hub does not accept our token: nothing can be published, so a real run ends here.
    pub(crate) refusal: Option<String>,
}

/// The program that would do the work.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Larql {
    pub(crate) path: PathBuf,
    pub(crate) version: Option<String>,
}

/// Asks the Hub about the source and the target of `plan`, and looks at this machine.
pub(crate) async fn inspect(plan: &PublishPlan, hub: &Hub, larql: Option<&Path>) -> Inspection {
    let settings = hub.settings();
    let settings = Settings {
        give_up_after: settings.give_up_after.min(PATIENCE),
        ..settings.clone()
    };
    let hub = &Hub::new(settings).unwrap_or_else(|_| hub.clone());
    let (source, target, collection, larql) = tokio::join!(
        source(plan, hub),
        target(plan, hub),
        collection(plan, hub),
        program(larql)
    );
    let mut inspection = Inspection {
        disk_free_bytes: free_bytes(&plan.scratch),
        larql,
        ..Inspection::default()
    };
    let SourceFound {
        source,
        extraction,
        disk_needed_bytes,
        warnings,
    } = source;
    inspection.warnings.extend(warnings);
    (inspection.source, inspection.disk_needed_bytes) = (source, disk_needed_bytes);
    match target {
        Ok((target, parts)) => {
            inspection.target = target;
            if let Some(extraction) = &extraction {
                inspection.target.deletions = parts
                    .into_iter()
                    .filter(|part| !extraction.writes(part))
                    .collect();
            }
        }
        Err(error) => {
            let text = warning("what the target repository holds is unknown", &*error);
            if let Some(hub::Error::Unauthorized { .. }) = error.downcast_ref() {
                inspection.target.refusal = Some(text.clone());
            }
            inspection.warnings.push(text);
        }
    }
    inspection.extraction = extraction;
    match collection {
        Ok(exists) => inspection.collection_exists = exists,
        Err(error) => inspection.warnings.push(warning(
            "whether the collection is there is unknown",
            &error,
        )),
    }
    if let (Some(needed), Some(free)) = (inspection.disk_needed_bytes, inspection.disk_free_bytes)
        && needed > free
    {
        inspection.warnings.push(format!(
            "scratch has {free} bytes free and the extraction needs {needed}"
        ));
    }
    inspection
}

type Unknown = Box<dyn Error + Send + Sync>;

fn warning(what: &str, error: &(dyn Error + 'static)) -> String {
    let mut text = format!("{what}: {error}");
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

#[derive(Default)]
struct SourceFound {
    source: Source,
    extraction: Option<Extraction>,
    disk_needed_bytes: Option<u64>,
    warnings: Vec<String>,
}

async fn source(plan: &PublishPlan, hub: &Hub) -> SourceFound {
    let mut found = SourceFound::default();
    let recipe = plan.quant.parse::<Recipe>();
    let local = Path::new(&plan.source_model);
    let read = if local.is_dir() {
        found.source.is_local = true;
        let local = local.to_owned();
        tokio::task::spawn_blocking(move || read(&LocalDir::open(&local)?, recipe?, false)).await
    } else {
        match snapshot(plan, hub, &mut found).await {
            Ok(snapshot) => {
                tokio::task::spawn_blocking(move || read(&snapshot, recipe?, true)).await
            }
            Err(text) => {
                found.warnings.push(text);
                return found;
            }
        }
    };
    match read {
        Ok(Ok(read)) => {
            (found.source.size_bytes, found.source.dtypes) = (read.size_bytes, read.dtypes);
            found.source.is_without_weights = read.is_without_weights;
            found.extraction = read.extraction;
            found.disk_needed_bytes = read.disk_needed_bytes;
            found.warnings.extend(read.warnings);
        }
        Ok(Err(error)) => found
            .warnings
            .push(warning("what would be extracted is unknown", &*error)),
        Err(error) => found
            .warnings
            .push(warning("what would be extracted is unknown", &error)),
    }
    found
}

/// The source at its commit, with what its card says.
async fn snapshot(
    plan: &PublishPlan,
    hub: &Hub,
    found: &mut SourceFound,
) -> Result<Snapshot, String> {
    let unknown = |error| warning("the source's commit and license are unknown", &error);
    let repo: RepoId = plan.source_model.parse().map_err(unknown)?;
    let info = hub.model_info(&repo, None).await.map_err(unknown)?;
    found.source.license = License::of(&info.card_data);
    let commit = info.sha.ok_or_else(|| format!("{repo} names no commit"))?;
    found.source.commit = Some(commit.to_string());
    let unlisted = |error| warning("what would be extracted is unknown", &error);
    hub.snapshot_at(&repo, &commit).await.map_err(unlisted)
}

#[derive(Default)]
struct Read {
    size_bytes: Option<u64>,
    is_without_weights: bool,
    dtypes: BTreeMap<String, usize>,
    extraction: Option<Extraction>,
    disk_needed_bytes: Option<u64>,
    warnings: Vec<String>,
}

/// Headers, configuration and tokenizer, read by blocking calls; `is_far` when the weights would have to be fetched.
fn read(source: &dyn Files, recipe: Recipe, is_far: bool) -> Result<Read, Unknown> {
    let mut read = Read::default();
    let files = source.files()?;
    let has = |ending: &str| files.iter().any(|file| file.path.ends_with(ending));
    read.is_without_weights =
        has("model.safetensors.index.json") && !has(".safetensors") && !has(".gguf");
    let plan = if read.is_without_weights {
        vindex::forecast(source, recipe).map(|forecast| {
            read.size_bytes = forecast.source_bytes;
            forecast.plan
        })
    } else {
        let weights = files.iter().filter(|f| f.path.ends_with(".safetensors"));
        read.size_bytes = Some(weights.map(|file| file.size_bytes).sum());
        for (_, tensor) in Checkpoint::open(source)?.tensors() {
            *read.dtypes.entry(tensor.dtype.to_string()).or_default() += 1;
        }
        vindex::plan(source, recipe)
    };
    match plan {
        Ok(plan) => {
            let fetch_bytes = read.size_bytes.filter(|_| is_far);
            let extraction = Extraction::of(&plan, fetch_bytes);
            // Part 1 holds the tokenizer as it is and as GGUF arrays; the headers are small beside it.
            let tokenizer: u64 = files
                .iter()
                .filter(|f| f.path.starts_with("tokenizer"))
                .map(|f| f.size_bytes)
                .sum();
            read.disk_needed_bytes = Some(extraction.size_bytes + 2 * tokenizer);
            read.extraction = Some(extraction);
            read.warnings = plan.warnings;
        }
        Err(error) => read
            .warnings
            .push(warning("what would be extracted is unknown", &error)),
    }
    Ok(read)
}

impl Extraction {
    fn of(plan: &Plan, fetch_bytes: Option<u64>) -> Extraction {
        let types = plan.census();
        let held_bytes = |slice: Slice| {
            let parts = plan.parts.iter().filter(|p| slice.holds(p.component));
            let tensors = parts.flat_map(|part| &part.tensors);
            tensors.fold(0_u64, |sum, t| sum.saturating_add(t.size_bytes()))
        };
        let size_bytes = types.values().map(|kind| kind.size_bytes).sum();
        Extraction {
            stem: plan.stem.clone(),
            n_parts: plan.parts.len(),
            size_bytes,
            slices: Slice::ALL
                .map(|slice| (slice.name(), held_bytes(slice)))
                .into(),
            n_left_out: plan.left_out.len(),
            estimate: Estimate::of(&types, fetch_bytes, size_bytes),
            types,
        }
    }

    /// Whether it writes a part of this name.
    fn writes(&self, part: &str) -> bool {
        (1..=self.n_parts)
            .any(|number| part == format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.n_parts))
    }
}

/// The target, and the parts of the vindex that it holds now.
async fn target(plan: &PublishPlan, hub: &Hub) -> Result<(Target, Vec<String>), Unknown> {
    let repo: RepoId = plan.target_repo.parse()?;
    let commit = match hub.model_info(&repo, None).await {
        Ok(info) => info.sha,
        Err(hub::Error::RepoNotFound { .. }) => {
            return Ok((
                Target {
                    exists: Some(false),
                    ..Target::default()
                },
                Vec::new(),
            ));
        }
        Err(error) => return Err(error.into()),
    };
    let mut target = Target {
        exists: Some(true),
        commit: commit.as_ref().map(ToString::to_string),
        ..Target::default()
    };
    let Some(commit) = commit else {
        return Ok((target, Vec::new()));
    };
    let snapshot = hub.snapshot_at(&repo, &commit).await?;
    if snapshot.file(INDEX_FILE).is_err() {
        return Ok((target, Vec::new()));
    }
    let text = snapshot.read_file(INDEX_FILE, INDEX_BYTES_MAX).await?;
    let Ok(index) = Index::from_json(&text) else {
        return Ok((target, Vec::new()));
    };
    target.vindex = Some(VindexId::of(&text).to_string());
    let there = index
        .parts
        .into_iter()
        .map(|part| part.file)
        .filter(|part| snapshot.file(part).is_ok());
    Ok((target, there.collect()))
}

async fn collection(plan: &PublishPlan, hub: &Hub) -> Result<Option<bool>, hub::Error> {
    let Some(slug) = &plan.collection else {
        return Ok(None);
    };
    match hub.collection(slug).await {
        Ok(_) => Ok(Some(true)),
        Err(error) if error.answer().is_some_and(|answer| answer.status == 404) => Ok(Some(false)),
        Err(error) => Err(error),
    }
}

async fn program(path: Option<&Path>) -> Option<Larql> {
    let path = path?.to_owned();
    let version = larql::version(&path).await;
    Some(Larql { path, version })
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: &dyn fmt::Display| {
            writeln!(f, "{:<20}{value}", format!("{label}:"))
        };
        match (&self.source.commit, self.source.is_local) {
            (Some(commit), _) => line("source commit", commit)?,
            (None, true) => line("source commit", &"none (a directory here)")?,
            (None, false) => line("source commit", &"unknown")?,
        }
        if let Some(size_bytes) = self.source.size_bytes {
            line("source size", &size(size_bytes))?;
        }
        if !self.source.dtypes.is_empty() {
            let dtypes: Vec<String> = self
                .source
                .dtypes
                .iter()
                .map(|(dtype, n)| format!("{n} {dtype}"))
                .collect();
            line("source tensors", &dtypes.join(", "))?;
        }
        if self.source.is_without_weights {
            line(
                "source tensors",
                &"unread: it has no weights; the plan is from their names and the configuration",
            )?;
        }
        if let Some(extraction) = &self.extraction {
            let total = format!(
                "{} in {} parts",
                size(extraction.size_bytes),
                extraction.n_parts
            );
            line("vindex size", &total)?;
            for (name, kind) in &extraction.types {
                line(
                    "vindex tensors",
                    &format_args!("{:>5} {name}, {}", kind.n_tensors, size(kind.size_bytes)),
                )?;
            }
            let slices: Vec<String> = extraction
                .slices
                .iter()
                .map(|(name, bytes)| format!("{name} {}", size(*bytes)))
                .collect();
            line("memory to serve", &slices.join(", "))?;
            line(
                "memory to extract",
                &format_args!("at most {}", size(extraction.estimate.memory_bytes_max)),
            )?;
            line("time estimate", &extraction.estimate.time())?;
            if extraction.n_left_out > 0 {
                line(
                    "left out",
                    &format_args!("{} tensors of the source", extraction.n_left_out),
                )?;
            }
        }
        match (self.disk_needed_bytes, self.disk_free_bytes) {
            (Some(needed), Some(free)) => line(
                "scratch space",
                &format_args!("{} needed, {} free", size(needed), size(free)),
            )?,
            (None, Some(free)) => line("scratch space", &format_args!("{} free", size(free)))?,
            _ => {}
        }
        match self.target.exists {
            Some(false) => line("target state", &"does not exist, to be created")?,
            Some(true) => match (&self.target.vindex, &self.target.commit) {
                (Some(vindex), _) => line("target state", &format_args!("holds vindex {vindex}"))?,
                (None, Some(commit)) => line(
                    "target state",
                    &format_args!("holds no vindex of ours, at commit {commit}"),
                )?,
                (None, None) => line("target state", &"empty")?,
            },
            None => line("target state", &"unknown")?,
        }
        for part in &self.target.deletions {
            line("target deletion", part)?;
        }
        match self.collection_exists {
            Some(true) => line("collection state", &"exists")?,
            Some(false) => line(
                "collection state",
                &"does not exist; filing will fail (make it, or correct its name)",
            )?,
            None => {}
        }
        if let Some(larql) = &self.larql {
            let version = larql.version.as_deref().unwrap_or("version unknown");
            line(
                "larql",
                &format_args!("{} ({version})", larql.path.display()),
            )?;
        }
        for text in &self.warnings {
            line("warning", text)?;
        }
        Ok(())
    }
}
