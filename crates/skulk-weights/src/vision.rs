//! The vision sidecar: which files of the source belong to it, and what a mirror of them would change.
//!
//! Invariant: nothing is changed anywhere here; every file is of one commit of the source, and only files of the kinds
//! that are mirrored are ever deleted from the sidecar's repository. Left out: the transfer (`run`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use hub::{File, Hub, RepoId, Snapshot};
use serde::Serialize;
use serde_json::Value;
use terminal::{Failure, size};

use crate::card::License;
use crate::card::sidecar::{ArtifactOf, VisionFile};
use crate::plan::VisionStep;

/// Endings of files that are mirrored, in subfolders too.
const KINDS: [&str; 5] = [".safetensors", ".json", ".txt", ".model", ".jinja"];
/// Beginnings of the names of licence files, which are mirrored and never deleted.
const LICENCES: [&str; 4] = ["LICENSE", "LICENCE", "NOTICE", "COPYING"];
const INDEX_SUFFIX: &str = ".safetensors.index.json";
const INDEX_BYTES_MAX: u64 = 256 << 20;
/// Parts of tensor names that belong to a vision tower or to what joins it to the language model.
const TOWERS: [&str; 6] = [
    "visual",
    "multi_modal_projector",
    "mm_projector",
    "image_newline",
    "view_seperator",
    "vit",
];

/// What was learnt about a step.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VisionInspection {
    pub(crate) source_commit: String,
    /// Every file of the mirror, in order of their paths.
    pub(crate) files: Vec<VisionFile>,
    /// Paths of those that the sidecar's repository lacks, or has otherwise.
    pub(crate) changed: Vec<String>,
    pub(crate) upload_bytes: u64,
    /// Paths that the sidecar's repository has and the mirror has not.
    pub(crate) deletions: Vec<String>,
    /// Weight files of the source that hold no vision tensor by its index.
    pub(crate) left_out: Vec<String>,
    pub(crate) target_exists: bool,
}

/// An inspected step, with what carrying it out needs.
pub(crate) struct Inspected {
    pub(crate) inspection: VisionInspection,
    pub(crate) snapshot: Snapshot,
    pub(crate) license: License,
    /// The card that is there.
    pub(crate) card: Option<String>,
}

/// Looks at both repositories.
pub(crate) async fn inspect(
    step: &VisionStep,
    force: bool,
    hub: &Hub,
) -> Result<Inspected, Failure> {
    let sidecar: RepoId = step
        .sidecar_repo
        .parse()
        .map_err(Failure::of::<hub::Error>("cannot publish"))?;
    let unseen = || Failure::of::<hub::Error>(format!("cannot see what {sidecar} holds"));
    let target = hub.head(&sidecar).await.map_err(unseen())?;
    let card = match &target {
        Some(target) => crate::run::card_of(target).await.map_err(unseen())?,
        None => None,
    };
    if !force {
        ArtifactOf::card(card.as_deref()).must_be("vision-sidecar", &step.sidecar_repo)?;
    }

    let name = &step.source_repo;
    let unread = || Failure::of::<hub::Error>(format!("cannot read the source {name}"));
    let source: RepoId = name.parse().map_err(unread())?;
    let info = hub.model_info(&source, None).await.map_err(unread())?;
    let Some(commit) = info.sha else {
        return Err(Failure::new(format!("the source {name} names no commit"))
            .hint("it is empty, or gated: accept its terms and use a token of that account"));
    };
    let snapshot = hub.snapshot_at(&source, &commit).await.map_err(unread())?;
    let without_vision = without_vision(&snapshot).await.map_err(unread())?;
    let (left_out, mirrored): (Vec<&File>, Vec<&File>) = snapshot
        .files()
        .iter()
        .filter(|file| is_mirrored(&file.path))
        .partition(|file| without_vision.contains(&file.path));
    if !mirrored
        .iter()
        .any(|file| file.path.ends_with(".safetensors"))
    {
        return Err(
            Failure::new(format!("no .safetensors weights found in {name}"))
                .hint("vision_source_repo names the repository that has the vision weights"),
        );
    }
    let held: BTreeMap<&str, &File> = target
        .iter()
        .flat_map(Snapshot::files)
        .map(|file| (file.path.as_str(), file))
        .collect();
    let changed: Vec<&File> = mirrored
        .iter()
        .copied()
        .filter(|file| {
            !held
                .get(file.path.as_str())
                .is_some_and(|held| is_same(held, file))
        })
        .collect();
    let wanted: BTreeSet<&str> = mirrored.iter().map(|file| file.path.as_str()).collect();
    let deletions = held
        .keys()
        .filter(|path| KINDS.iter().any(|kind| path.ends_with(kind)) && !is_licence(path))
        .filter(|path| !wanted.contains(**path))
        .map(|path| (*path).to_owned())
        .collect();
    let inspection = VisionInspection {
        source_commit: commit.to_string(),
        upload_bytes: changed.iter().map(|file| file.size_bytes).sum(),
        changed: changed.iter().map(|file| file.path.clone()).collect(),
        files: mirrored.iter().map(|file| VisionFile::of(file)).collect(),
        deletions,
        left_out: left_out.iter().map(|file| file.path.clone()).collect(),
        target_exists: target.is_some(),
    };
    Ok(Inspected {
        inspection,
        license: License::of(&info.card_data),
        snapshot,
        card,
    })
}

/// Whether a file is of a kind that is mirrored.
pub(crate) fn is_mirrored(path: &str) -> bool {
    KINDS.iter().any(|kind| path.ends_with(kind)) || is_licence(path)
}

/// A licence at the root.
fn is_licence(path: &str) -> bool {
    let name = path.to_ascii_uppercase();
    !path.contains('/') && LICENCES.iter().any(|licence| name.starts_with(licence))
}

/// Whether two listings are of the same bytes.
pub(crate) fn is_same(a: &File, b: &File) -> bool {
    a.size_bytes == b.size_bytes
        && match (&a.sha256, &b.sha256) {
            (Some(a), Some(b)) => a == b,
            (None, None) => a.git_oid == b.git_oid,
            _ => false,
        }
}

/// Weight files in which an index puts no vision tensor, while it puts some in others. Without an index, or where no
/// name looks like one of a vision tower, all weights belong to the sidecar.
pub(crate) async fn without_vision(snapshot: &Snapshot) -> Result<BTreeSet<String>, hub::Error> {
    let mut without = BTreeSet::new();
    for file in snapshot.files() {
        let Some(stem) = file.path.strip_suffix(INDEX_SUFFIX) else {
            continue;
        };
        let text = snapshot.read_file(&file.path, INDEX_BYTES_MAX).await?;
        let index: Value = serde_json::from_slice(&text).unwrap_or_default();
        let folder = stem.rfind('/').map_or("", |at| &stem[..=at]);
        let mut shards: BTreeMap<String, bool> = BTreeMap::new();
        for (tensor, shard) in index
            .get("weight_map")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            if let Some(shard) = shard.as_str() {
                *shards.entry(format!("{folder}{shard}")).or_default() |= is_of_tower(tensor);
            }
        }
        if shards.values().any(|has_vision| *has_vision) {
            without.extend(
                shards
                    .into_iter()
                    .filter(|(_, has_vision)| !has_vision)
                    .map(|(shard, _)| shard),
            );
        }
    }
    Ok(without)
}

/// Whether a tensor's name is one of a vision tower.
pub(crate) fn is_of_tower(tensor: &str) -> bool {
    tensor
        .split('.')
        .any(|part| part.contains("vision") || TOWERS.contains(&part))
}

impl VisionFile {
    fn of(file: &File) -> VisionFile {
        VisionFile {
            path: file.path.clone(),
            size_bytes: file.size_bytes,
            sha256: file.sha256.clone(),
        }
    }
}

impl fmt::Display for VisionInspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: &dyn fmt::Display| {
            writeln!(f, "{:<22}{value}", format!("{label}:"))
        };
        line("vision source commit", &self.source_commit)?;
        let total: u64 = self.files.iter().map(|file| file.size_bytes).sum();
        line(
            "vision files",
            &format_args!("{}, {}", self.files.len(), size(total)),
        )?;
        if !self.left_out.is_empty() {
            line(
                "vision left out",
                &format_args!(
                    "{} weight files without vision tensors",
                    self.left_out.len()
                ),
            )?;
        }
        line(
            "vision upload",
            &format_args!(
                "{} changed files, {}",
                self.changed.len(),
                size(self.upload_bytes)
            ),
        )?;
        for path in &self.deletions {
            line("vision deletion", path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mirrored_and_what_a_tower_is() {
        for path in [
            "model.safetensors",
            "sub/a.json",
            "merges.txt",
            "tokenizer.model",
            "LICENSE",
            "notice.md",
            "chat_template.jinja",
        ] {
            assert!(is_mirrored(path), "{path}");
        }
        for path in [
            "README.md",
            ".gitattributes",
            "modeling.py",
            "pytorch_model.bin",
            "sub/LICENSE",
        ] {
            assert!(!is_mirrored(path), "{path}");
        }
        for name in [
            "vision_tower.encoder.a",
            "model.visual.blocks.0.a",
            "multi_modal_projector.linear_1.weight",
        ] {
            assert!(is_of_tower(name), "{name}");
        }
        assert!(!is_of_tower(
            "language_model.model.layers.0.mlp.up_proj.weight"
        ));
    }
}
