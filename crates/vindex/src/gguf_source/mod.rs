//! A model in GGUF as a source: its blocks are kept byte for byte, only put into the parts of a vindex.
//!
//! 1. `files.rs` finds the file, or the files of a split one, and proves their headers.
//! 2. `keys.rs` and `config.rs` read the model's numbers from the metadata, with llama.cpp's defaults.
//! 3. `place.rs` puts each tensor into its part, by the same table of families that checkpoints go through.
//!
//! Invariant: no value is changed and none is quantised again: a tensor of the vindex has the type and the bytes of the
//! tensor of its name. The metadata is that of the file, key for key; only what described its splits is left out.

mod config;
mod files;
mod keys;
mod kinds;
mod place;

use crate::checkpoint;
use crate::error::Error;
use crate::gguf::MetaValue;
use crate::plan::{LeftOut, Plan, safe_name};
use crate::recipe::Recipe;
use crate::source::{Files, Source};
use files::Model;
pub(crate) use files::{files_of, stem};
use keys::Keys;

/// True when the source has a model in GGUF and no safetensors checkpoint.
///
/// # Errors
/// [`Error::Source`] when the source cannot be listed.
pub fn is_gguf(source: &dyn Source) -> Result<bool, Error> {
    let files = Files::list(source)?;
    Ok(!checkpoint::has_safetensors(&files) && !files::models(&files).is_empty())
}

/// Plans a vindex of a model in GGUF. `file` names one of its files where the source has several models.
///
/// # Errors
/// [`Error::SeveralModels`] and [`Error::MissingFile`] when it is not clear which model is meant; [`Error::Checkpoint`]
/// when a header says something that cannot be; [`Error::Metadata`], [`Error::Unsupported`], [`Error::UnknownTensors`],
/// [`Error::MissingTensors`] and [`Error::Shape`] when it is no model of a known family.
pub fn plan_gguf(source: &dyn Source, file: Option<&str>) -> Result<Plan, Error> {
    let files = Files::list(source)?;
    let model = Model::find(&files, file)?;
    let keys = Keys::of(&model)?;
    let family = keys.family()?;
    let config = config::read(&keys, family, &model)?;
    let placed = place::place(&model, family, &config)?;

    let mut left_out = placed.left_out;
    let projectors = files.paths().filter(|path| files::is_beside_a_model(path));
    left_out.extend(projectors.map(|path| LeftOut {
        tensor: path.to_owned(),
        reason: "a file beside the model: a projector of its vision, or statistics".to_owned(),
    }));
    let stem = match safe_name(model.stem()) {
        empty if empty.is_empty() => "model".to_owned(),
        stem => stem,
    };
    let name = match keys.value("general.name") {
        Some(MetaValue::String(name)) if !name.is_empty() => name.clone(),
        _ => model.stem().to_owned(),
    };
    let is_of_files = |key: &str| key.starts_with("split.") || key == "general.alignment";
    let metadata = model.metadata().iter();
    let metadata = metadata.filter(|(key, _)| !is_of_files(key)).cloned();
    Ok(Plan {
        stem,
        name,
        recipe: Recipe::Kept,
        config,
        metadata: metadata.collect(),
        parts: placed.parts,
        left_out,
        warnings: Vec::new(),
        imatrix: None,
        origin: source.origin(),
        checkpoint: model.into_checkpoint(&files),
    })
}
