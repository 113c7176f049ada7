//! From a checkpoint's tokenizer files to the metadata keys `tokenizer.*` of GGUF.
//!
//! Three forms are known: SentencePiece (`tokenizer.model`), byte-level BPE and scored BPE with byte fallback (both
//! in `tokenizer.json`). Invariant: what is written makes llama.cpp cut texts as the original does, or there is a
//! warning or an error. The keys are those of llama.cpp's converter, plus `tokenizer.json` as a whole.

mod bpe;
mod pre;
mod sentencepiece;
mod special;

pub use pre::{PreStep, PreTokenizer, pre_tokenizer};
use serde_json::{Map, Value};

use crate::config_json::ConfigJson;
use crate::error::Error;
use crate::families::Family;
use crate::gguf::{MetaArray, MetaValue};
use crate::source::Files;

/// Largest `tokenizer.json`; the largest of today's have 35 MB.
const TOKENIZER_JSON_BYTES_MAX: u64 = 128 << 20;
/// Largest of the smaller files.
const SMALL_BYTES_MAX: u64 = 16 << 20;

/// What GGUF says of a tokenizer.
pub(crate) struct Tokenizer {
    /// Keys `tokenizer.*` in writing order.
    pub(crate) metadata: Vec<(String, MetaValue)>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) warnings: Vec<String>,
}

/// Every token of a vocabulary; the three have one length, the embedding matrix's.
struct Vocabulary {
    /// `tokenizer.ggml.model`.
    model: &'static str,
    /// `tokenizer.ggml.pre`; None where the model says it all.
    pre: Option<&'static str>,
    tokens: Vec<String>,
    /// Only where the model merges by score.
    scores: Option<Vec<f32>>,
    types: Vec<TokenType>,
    /// Only where the model merges by rank; each `left right`.
    merges: Option<Vec<String>>,
    /// A space is put before a text; `None` leaves it to the reader's default.
    add_space_prefix: Option<bool>,
    warnings: Vec<String>,
}

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// Reads the tokenizer of a checkpoint whose embedding matrix has `n_vocab` rows.
///
/// # Errors
/// [`Error::MissingFile`] when there is no tokenizer, [`Error::Tokenizer`] when there is one that GGUF cannot say.
pub(crate) fn read(
    files: &Files<'_>,
    config: &ConfigJson,
    family: &Family,
    n_vocab: u32,
) -> Result<Tokenizer, Error> {
    let json = files.text("tokenizer.json", TOKENIZER_JSON_BYTES_MAX)?;
    let settings: Option<Map<String, Value>> =
        files.json_if_any("tokenizer_config.json", SMALL_BYTES_MAX)?;
    let parsed = json.as_deref().map(bpe::parse).transpose()?;
    let n_rows = n_vocab as usize;
    let sentencepiece = match family.writes.gemma4_tokenizer {
        true => None,
        false => files.read("tokenizer.model", SMALL_BYTES_MAX)?,
    };
    let vocabulary = match (sentencepiece, json.as_deref().zip(parsed.as_ref())) {
        (None, Some((text, parsed))) if family.writes.gemma4_tokenizer => {
            bpe::gemma4(text, parsed, settings.as_ref(), n_rows)?
        }
        (Some(model), _) => {
            let added = files
                .json_if_any("added_tokens.json", SMALL_BYTES_MAX)?
                .unwrap_or_default();
            sentencepiece::vocabulary(&model, &added, settings.as_ref(), n_rows)?
        }
        (None, Some((text, parsed))) => bpe::vocabulary(text, parsed, n_rows)?,
        (None, None) => {
            return Err(Error::MissingFile {
                file: "tokenizer.json".to_owned(),
                wanted_by: "the vindex's tokenizer (or tokenizer.model)".to_owned(),
            });
        }
    };
    let special = special::read(files, config, parsed.as_ref(), settings, n_vocab)?;

    let mut metadata = Vec::new();
    let mut put = |key: &str, value: MetaValue| metadata.push((format!("tokenizer.{key}"), value));
    let mut add_space_prefix = vocabulary.add_space_prefix;
    if family.writes.no_space_prefix && vocabulary.model == "llama" {
        add_space_prefix = Some(false);
    }
    if family.writes.llama_keys
        && let Some(prefix) = special.add_prefix_space
    {
        add_space_prefix = Some(prefix);
    }
    put("ggml.model", MetaValue::String(vocabulary.model.to_owned()));
    if let Some(pre) = vocabulary.pre {
        put("ggml.pre", MetaValue::String(pre.to_owned()));
    }
    put(
        "ggml.tokens",
        MetaValue::Array(MetaArray::Strings(vocabulary.tokens)),
    );
    if let Some(scores) = vocabulary.scores {
        put("ggml.scores", MetaValue::Array(MetaArray::F32s(scores)));
    }
    let types = vocabulary.types.iter().map(|&t| t as i32).collect();
    put("ggml.token_type", MetaValue::Array(MetaArray::I32s(types)));
    if let Some(merges) = vocabulary.merges {
        put("ggml.merges", MetaValue::Array(MetaArray::Strings(merges)));
    }
    for (key, id) in &special.ids {
        put(&format!("ggml.{key}"), MetaValue::U32(*id));
    }
    for (key, is_added) in special.added {
        put(&format!("ggml.{key}"), MetaValue::Bool(is_added));
    }
    if let Some(prefix) = add_space_prefix {
        put("ggml.add_space_prefix", MetaValue::Bool(prefix));
    }
    for (key, value) in special.templates {
        put(&key, value);
    }
    if let Some(json) = json {
        put("huggingface.json", MetaValue::String(json));
    }
    let id_of = |key: &str| {
        special
            .ids
            .iter()
            .find(|(k, _)| *k == key)
            .map(|(_, id)| *id)
    };
    Ok(Tokenizer {
        bos: id_of("bos_token_id"),
        eos: id_of("eos_token_id"),
        metadata,
        warnings: vocabulary.warnings,
    })
}

/// Tokens that some checkpoints forget to mark as control tokens; llama.cpp's converter has the same list.
fn looks_special(token: &str) -> bool {
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || (token.starts_with("<|") && token.ends_with("|>"))
        || (token.starts_with("<｜") && token.ends_with("｜>"))
        || (token.starts_with("<unused") && token.ends_with('>'))
}

/// Text and type of a token that was added to a vocabulary; llama.cpp wants spaces, not `▁`, in those that a user
/// may write.
fn added_token(content: &str, is_special: bool) -> (String, TokenType) {
    if is_special || looks_special(content) {
        (content.to_owned(), TokenType::Control)
    } else {
        (content.replace('▁', " "), TokenType::UserDefined)
    }
}

/// What stands for row `id` of the embedding matrix where the tokenizer has nothing.
fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}
