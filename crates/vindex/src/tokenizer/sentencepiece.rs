//! `tokenizer.model`: a SentencePiece model, of which GGUF keeps pieces, scores and types.
//!
//! Invariant: token ids are those of the file; tokens added elsewhere (`added_tokens.json`,
//! `tokenizer_config.json`) take the rows they name, as in llama.cpp's converter.

use std::collections::BTreeMap;

use prost::Message;
use serde_json::{Map, Value};

use super::{TokenType, Vocabulary, added_token, filler};
use crate::error::Error;

const FILE: &str = "tokenizer.model";
/// Score of rows that no file names.
const FILLER_SCORE: f32 = -10_000.0;
/// Score of tokens added beside the model.
const ADDED_SCORE: f32 = -1_000.0;

/// The fields of SentencePiece's `ModelProto` that GGUF keeps.
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    /// 1 is a unigram model (the default), 2 is BPE.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
}

pub(super) fn vocabulary(
    bytes: &[u8],
    added: &BTreeMap<String, u64>,
    settings: Option<&Map<String, Value>>,
    n_vocab: usize,
) -> Result<Vocabulary, Error> {
    let model = Model::decode(bytes).map_err(|e| {
        bad(format!(
            "it is not a SentencePiece model: {e}; download it again"
        ))
    })?;
    if model.pieces.is_empty() {
        return Err(bad(
            "it is not a SentencePiece model: it has no pieces; download it again".to_owned(),
        ));
    }
    let mut warnings = Vec::new();
    if model.trainer.as_ref().and_then(|t| t.model_type) != Some(2) {
        warnings.push(format!(
            "{FILE} is not a BPE model; llama.cpp will merge its pieces by score, not by likelihood"
        ));
    }
    if model.pieces.len() > n_vocab {
        warnings.push(format!(
            "{FILE} has {} pieces, the embedding matrix {n_vocab} rows: the rest is left out",
            model.pieces.len()
        ));
    }
    let mut tokens: Vec<String> = (0..n_vocab).map(filler).collect();
    let mut scores = vec![FILLER_SCORE; n_vocab];
    let mut types = vec![TokenType::Unused; n_vocab];
    for (id, piece) in model.pieces.into_iter().take(n_vocab).enumerate() {
        types[id] = match piece.kind {
            Some(2) => TokenType::Unknown,
            Some(3) => TokenType::Control,
            Some(5) => TokenType::Unused,
            Some(6) => TokenType::Byte,
            _ => TokenType::Normal,
        };
        tokens[id] = piece.text.unwrap_or_default();
        scores[id] = piece.score.unwrap_or(0.0);
    }
    let mut place = |id: Option<usize>, text: String, kind: TokenType| {
        if let Some(id) = id.filter(|&id| id < n_vocab) {
            tokens[id] = text;
            scores[id] = ADDED_SCORE;
            types[id] = kind;
        }
    };
    for (content, &id) in added {
        place(
            usize::try_from(id).ok(),
            content.clone(),
            TokenType::UserDefined,
        );
    }
    let decoder = settings
        .and_then(|s| s.get("added_tokens_decoder"))
        .and_then(Value::as_object);
    for (id, token) in decoder.into_iter().flatten() {
        let Some(content) = token.get("content").and_then(Value::as_str) else {
            continue;
        };
        let is_special = token
            .get("special")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let (text, kind) = added_token(content, is_special);
        place(id.parse().ok(), text, kind);
    }
    Ok(Vocabulary {
        model: "llama",
        pre: Some("default"),
        tokens,
        scores: Some(scores),
        types,
        merges: None,
        add_space_prefix: None,
        warnings,
    })
}

fn bad(reason: String) -> Error {
    Error::Tokenizer {
        file: FILE.to_owned(),
        reason,
    }
}
