//! What a publication will do, as a value.
//!
//! Invariant: making a plan asks nobody and touches nothing; the same entry and options give the same plan. A dry run
//! prints this value, a real run executes it. What only the network knows is in [`Inspection`], added by `inspect`.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use terminal::Failure;

use crate::entry::{Entry, Slice, Tier};
use crate::inspect::Inspection;
use crate::mtp::inspection::MtpInspection;
use crate::name;
use crate::vision::VisionInspection;

/// The variable that replaces or switches off the collection.
pub(crate) const COLLECTION_VARIABLE: &str = "SKULK_WEIGHTS_COLLECTION";

/// Which artifacts of an entry are published.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Artifact {
    /// The LARQL index.
    Vindex,
    /// The Multi-Token Prediction sidecar.
    Mtp,
    /// The vision sidecar.
    Vision,
    /// Every artifact that the entry configures.
    #[default]
    All,
}

/// The publication of one entry.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PublishPlan {
    pub(crate) model_key: String,
    pub(crate) tier: Tier,
    pub(crate) artifact: Artifact,
    pub(crate) source_model: String,
    pub(crate) quant: String,
    pub(crate) scratch: PathBuf,
    /// `scratch` joined with the entry's output name.
    pub(crate) output_path: PathBuf,
    pub(crate) target_repo: String,
    /// The slug of the collection that the vindex is filed into; `None` when filing is off.
    pub(crate) collection: Option<String>,
    /// As `larql publish --slices` takes it: `none` is the whole vindex.
    pub(crate) publish_slices: String,
    pub(crate) force: bool,
    pub(crate) vindex: Option<VindexStep>,
    pub(crate) mtp: Step<MtpStep>,
    pub(crate) vision: Step<VisionStep>,
    /// What the network knows of the vindex; `None` until it was asked.
    pub(crate) inspection: Option<Inspection>,
    /// What the network knows of the MTP sidecar; `None` until it was asked.
    pub(crate) mtp_inspection: Option<MtpInspection>,
    /// What the network knows of the vision sidecar; `None` until it was asked.
    pub(crate) vision_inspection: Option<VisionInspection>,
    /// Why a sidecar that nobody asked for by name could not be inspected; its step would fail.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
}

/// The two commands that make and publish a vindex, as words.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VindexStep {
    pub(crate) extract: Vec<String>,
    pub(crate) publish: Vec<String>,
}

/// A step for an artifact that an entry may or may not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step<T> {
    /// The artifact was not asked for.
    NotAsked,
    /// It was asked for, and the entry does not say where it comes from.
    NotConfigured,
    Planned(T),
}

/// How the MTP sidecar is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct MtpStep {
    pub(crate) source_repo: String,
    pub(crate) sidecar_repo: String,
    pub(crate) output_path: PathBuf,
    /// The title of the collection; `None` when filing is off.
    pub(crate) collection: Option<String>,
    /// Router biases that the source has in F32 stay F32.
    pub(crate) keep_f32: bool,
}

/// How the vision sidecar is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct VisionStep {
    pub(crate) source_repo: String,
    pub(crate) sidecar_repo: String,
    /// The title of the collection; `None` when filing is off.
    pub(crate) collection: Option<String>,
}

/// `SKULK_WEIGHTS_COLLECTION` is neither a slug nor a word that switches filing off.
#[derive(Debug, thiserror::Error)]
#[error("{COLLECTION_VARIABLE} is '{value}'; it must look like owner/slug or be 'none'")]
pub(crate) struct BadCollection {
    pub(crate) value: String,
}

/// What the operator may choose about a publication.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Choices {
    /// Replace what is there: an output, a sidecar.
    pub(crate) force: bool,
    /// Keep router biases in F32.
    pub(crate) keep_f32: bool,
}

impl PublishPlan {
    /// The plan for `entry`. `scratch` is the directory for intermediate files, `collection` as [`collection`] gives it.
    pub(crate) fn new(
        entry: &Entry,
        artifact: Artifact,
        scratch: &Path,
        collection: Option<String>,
        Choices { force, keep_f32 }: Choices,
    ) -> PublishPlan {
        let output_path = scratch.join(&entry.output_name);
        let output = output_path.display().to_string();
        let publish_slices = match entry.slices.as_slice() {
            [Slice::Full] => "none".to_owned(),
            slices => slices
                .iter()
                .map(|slice| slice.name())
                .collect::<Vec<_>>()
                .join(","),
        };
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let asked = |wanted| artifact == Artifact::All || artifact == wanted;
        let vindex = asked(Artifact::Vindex).then(|| VindexStep {
            extract: words(&[
                "larql",
                "extract",
                &entry.source_model,
                "-o",
                &output,
                "--quant",
                &entry.quant,
            ]),
            publish: words(&[
                "larql",
                "publish",
                &output,
                "--repo",
                &entry.hf_repo,
                "--slices",
                &publish_slices,
            ]),
        });
        let filed = |title: &str| collection.is_some().then(|| title.to_owned());
        let mtp = Step::new(asked(Artifact::Mtp), entry.mtp.as_ref(), |sidecar| {
            MtpStep {
                source_repo: sidecar.source_repo.clone(),
                sidecar_repo: sidecar.sidecar_repo.clone(),
                output_path: scratch.join(format!(
                    "{}-mtp.safetensors",
                    sidecar.sidecar_repo.replace('/', "--")
                )),
                collection: filed("MTP Sidecars"),
                keep_f32,
            }
        });
        let vision = Step::new(asked(Artifact::Vision), entry.vision.as_ref(), |sidecar| {
            VisionStep {
                source_repo: sidecar.source_repo.clone(),
                sidecar_repo: sidecar.sidecar_repo.clone(),
                collection: filed("Vision Sidecars"),
            }
        });
        PublishPlan {
            model_key: entry.key.clone(),
            tier: entry.tier,
            artifact,
            source_model: entry.source_model.clone(),
            quant: entry.quant.clone(),
            scratch: scratch.to_owned(),
            output_path,
            target_repo: entry.hf_repo.clone(),
            collection,
            publish_slices,
            force,
            vindex,
            mtp,
            vision,
            inspection: None,
            mtp_inspection: None,
            vision_inspection: None,
            warnings: Vec::new(),
        }
    }

    /// What was found, or a warning where all artifacts are planned and this is one of them.
    pub(crate) fn asked<T>(&mut self, found: Result<T, Failure>) -> Result<Option<T>, Failure> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(failure @ Failure::One { .. }) if self.artifact == Artifact::All => {
                self.warnings.push(failure.to_string());
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }
}

impl<T> Step<T> {
    /// Whether it will be carried out.
    pub(crate) fn is_planned(&self) -> bool {
        matches!(self, Step::Planned(_))
    }

    fn new<S>(asked: bool, configured: Option<S>, plan: impl FnOnce(S) -> T) -> Step<T> {
        match configured {
            _ if !asked => Step::NotAsked,
            None => Step::NotConfigured,
            Some(sidecar) => Step::Planned(plan(sidecar)),
        }
    }
}

/// The collection of a publication: `variable` (the value of [`COLLECTION_VARIABLE`]) before the entry's own.
pub(crate) fn collection(
    entry: &Entry,
    variable: Option<&str>,
) -> Result<Option<String>, BadCollection> {
    let value = variable.unwrap_or("").trim();
    if value.is_empty() {
        return Ok(entry.hf_collection.clone());
    }
    match value.to_lowercase().as_str() {
        "none" | "0" | "false" | "no" | "off" | "disabled" => Ok(None),
        _ if name::is_repo(value) => Ok(Some(value.to_owned())),
        _ => Err(BadCollection {
            value: value.to_owned(),
        }),
    }
}

impl fmt::Display for PublishPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model key: {}", self.model_key)?;
        writeln!(f, "tier: {}", self.tier.name())?;
        writeln!(f, "artifact: {}", self.artifact.name())?;
        writeln!(f, "source model: {}", self.source_model)?;
        writeln!(f, "output path: {}", self.output_path.display())?;
        writeln!(f, "target repo: hf://{}", self.target_repo)?;
        match &self.collection {
            Some(slug) => writeln!(
                f,
                "vindex collection: https://huggingface.co/collections/{slug}"
            )?,
            None => writeln!(f, "collection: disabled")?,
        }
        writeln!(f, "publish slices: {}", self.publish_slices)?;
        writeln!(f, "force overwrite: {}", u8::from(self.force))?;
        if let Some(step) = &self.vindex {
            writeln!(f, "extract command: {}", shell(&step.extract))?;
            writeln!(f, "publish command: {}", shell(&step.publish))?;
        }
        match &self.mtp {
            Step::NotAsked => {}
            Step::NotConfigured => writeln!(f, "mtp step: not configured for this entry")?,
            Step::Planned(step) => {
                writeln!(f, "mtp source repo:  hf://{}", step.source_repo)?;
                writeln!(
                    f,
                    "mtp sidecar repo: hf://{}/mtp.safetensors",
                    step.sidecar_repo
                )?;
                match step.keep_f32 {
                    false => writeln!(f, "mtp precision:    bf16 (unquantized)")?,
                    true => writeln!(f, "mtp precision:    bf16 (unquantized), router biases f32")?,
                }
                writeln!(f, "mtp output path:  {}", step.output_path.display())?;
                if let Some(title) = &step.collection {
                    writeln!(f, "mtp collection:   {title}")?;
                }
            }
        }
        match &self.vision {
            Step::NotAsked => {}
            Step::NotConfigured => writeln!(f, "vision step: not configured for this entry")?,
            Step::Planned(step) => {
                writeln!(f, "vision source repo:  hf://{}", step.source_repo)?;
                writeln!(f, "vision sidecar repo: hf://{}", step.sidecar_repo)?;
                writeln!(
                    f,
                    "vision step:         mirror weights + configs (no quantization)"
                )?;
                if let Some(title) = &step.collection {
                    writeln!(f, "vision collection:   {title}")?;
                }
            }
        }
        if let Some(inspection) = &self.inspection {
            write!(f, "{inspection}")?;
        }
        if let Some(inspection) = &self.mtp_inspection {
            write!(f, "{inspection}")?;
        }
        if let Some(inspection) = &self.vision_inspection {
            write!(f, "{inspection}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "a sidecar cannot be planned: {warning}")?;
        }
        Ok(())
    }
}

impl Artifact {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Artifact::Vindex => "vindex",
            Artifact::Mtp => "mtp",
            Artifact::Vision => "vision",
            Artifact::All => "all",
        }
    }
}

/// The words as a shell would have to be given them.
pub(crate) fn shell(words: &[String]) -> String {
    let quote = |word: &String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
        if !word.is_empty() && word.chars().all(is_plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\"'\"'"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(hf_collection: Option<&str>) -> Entry {
        Entry {
            key: "acme/m".into(),
            source_model: "o/m".into(),
            quant: "q4k".into(),
            tier: Tier::Smoke,
            slices: vec![Slice::Full],
            output_name: "m.vindex".into(),
            hf_repo: "acme/m".into(),
            hf_collection: hf_collection.map(str::to_owned),
            mtp: None,
            assistant_model_repo: None,
            vision: None,
        }
    }

    #[test]
    fn the_variable_replaces_or_switches_off_the_collection() {
        let entry = entry(Some("acme/own"));
        let resolve = |variable| collection(&entry, variable).map_err(|error| error.to_string());
        assert_eq!(resolve(None), Ok(Some("acme/own".into())));
        assert_eq!(resolve(Some("  ")), Ok(Some("acme/own".into())));
        assert_eq!(resolve(Some(" acme/other ")), Ok(Some("acme/other".into())));
        for word in ["none", "0", "False", "NO", "off", "Disabled"] {
            assert_eq!(resolve(Some(word)), Ok(None), "{word}");
        }
        for bad in ["slug", "https://huggingface.co/collections/a/b", "nope!/x"] {
            assert!(
                resolve(Some(bad)).is_err_and(|error| error.contains(COLLECTION_VARIABLE)),
                "{bad}"
            );
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        let words = ["a b", "it's", "", "$x", "plain-1.0/x:y"].map(str::to_owned);
        assert_eq!(shell(&words), r#"'a b' 'it'"'"'s' '' '$x' plain-1.0/x:y"#);
    }
}
