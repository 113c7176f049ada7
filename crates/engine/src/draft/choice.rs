//! Who guesses, as a command line names it, and opening what it names.
//!
//! Invariant: what was opened can guess for the model that it was opened for.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use quant::BlockType;
use vindex::Vindex;

use super::head::{Head, HeadError, HeadNumbers};
use super::{Assistant, Drafts};
use crate::local::Local;
use crate::model::Model;
use crate::threads::Pool;
use crate::tokenizer::Tokenizer;

/// Who guesses, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DraftChoice {
    /// `none`.
    #[default]
    None,
    /// `ngram`: the text itself.
    NGram,
    /// `mtp=PATH`: the head in an `mtp.safetensors`.
    Mtp(PathBuf),
    /// `model=PATH`: the model in a vindex.
    Model(PathBuf),
}

/// Why nobody can guess.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// The word names nobody.
    #[error("{0:?} guesses no tokens; use none, ngram, mtp=FILE or model=DIR")]
    Unknown(String),
    /// The head cannot be used with the model.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The other model cannot be used.
    #[error("the model in {} cannot guess: {reason}", dir.display())]
    Model {
        /// Where it is.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl FromStr for DraftChoice {
    type Err = DraftError;

    fn from_str(text: &str) -> Result<DraftChoice, DraftError> {
        match text.split_once('=') {
            None if text == "none" => Ok(DraftChoice::None),
            None if text == "ngram" => Ok(DraftChoice::NGram),
            Some(("mtp", path)) if !path.is_empty() => Ok(DraftChoice::Mtp(path.into())),
            Some(("model", path)) if !path.is_empty() => Ok(DraftChoice::Model(path.into())),
            _ => Err(DraftError::Unknown(text.to_owned())),
        }
    }
}

impl Drafts {
    /// Opens what the choice names, to guess for `model`. Another model computes on the threads of `pool`.
    ///
    /// # Errors
    /// [`DraftError`].
    pub fn open(
        choice: &DraftChoice,
        model: &Model,
        pool: &Arc<Pool>,
    ) -> Result<Drafts, DraftError> {
        match choice {
            DraftChoice::None => Ok(Drafts::None),
            DraftChoice::NGram => Ok(Drafts::NGram),
            DraftChoice::Mtp(path) => {
                let provenance = model.vindex().provenance();
                let source = provenance.and_then(|provenance| provenance.repo.clone());
                let numbers = HeadNumbers::of(model.config(), source);
                let head = Head::open(path, &numbers, block_type(model))?;
                Ok(Drafts::Head(Arc::new(head)))
            }
            DraftChoice::Model(dir) => {
                let assistant = Assistant::open(dir, model, pool);
                let assistant = assistant.map_err(|reason| DraftError::Model {
                    dir: dir.clone(),
                    reason,
                })?;
                Ok(Drafts::Model(assistant))
            }
        }
    }
}

/// How a head's matrices are kept: as the model's where those are not of few bits. A head reads little, and its errors add
/// to those of the model.
fn block_type(model: &Model) -> BlockType {
    match model.layers.first().map(|layer| layer.output.block_type) {
        Some(exact @ (BlockType::F32 | BlockType::F16 | BlockType::BF16)) => exact,
        _ => BlockType::Q8_0,
    }
}

impl Assistant {
    fn open(dir: &Path, model: &Model, pool: &Arc<Pool>) -> Result<Assistant, String> {
        let vindex = Arc::new(Vindex::open(dir).map_err(|e| e.to_string())?);
        let words = |vindex: &Vindex| Tokenizer::of(vindex).map_err(|e| e.to_string());
        let (own, of_model) = (words(&vindex)?, words(model.vindex())?);
        let n = model.config().vocab;
        if vindex.index().config.vocab != n {
            let got = vindex.index().config.vocab;
            return Err(format!("it has {got} tokens, the model {n}"));
        }
        let differs = (0..n).find(|&id| own.token_bytes(id) != of_model.token_bytes(id));
        if let Some(id) = differs {
            return Err(format!("its token {id} is another than the model's"));
        }
        let model = Model::open(Arc::clone(&vindex)).map_err(|e| e.to_string())?;
        let ffn = Local::new(vindex, Arc::clone(pool)).map_err(|e| e.to_string())?;
        Ok(Assistant {
            model: Arc::new(model),
            ffn: Arc::new(ffn),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_words_and_paths() {
        let parse = |text: &str| text.parse::<DraftChoice>();
        assert_eq!(parse("none"), Ok(DraftChoice::None));
        assert_eq!(parse("ngram"), Ok(DraftChoice::NGram));
        assert_eq!(parse("mtp=a=b"), Ok(DraftChoice::Mtp("a=b".into())));
        assert_eq!(parse("model=/m"), Ok(DraftChoice::Model("/m".into())));
        for wrong in ["", "mtp", "mtp=", "ngram=3", "eagle=x"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("ngram"), "{error}");
        }
    }
}
