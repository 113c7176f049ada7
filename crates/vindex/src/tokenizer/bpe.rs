//! `tokenizer.json`: byte-pair encoding, either over bytes (GPT-2's kind) or over characters with byte fallback
//! (SentencePiece's kind, when `tokenizer.model` is not shipped).
//!
//! Invariant: the second kind is accepted only where merging by score gives the order that merging by rank has,
//! which is proven on the merges themselves.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{TokenType, Vocabulary, added_token, filler, pre};
use crate::error::Error;

const FILE: &str = "tokenizer.json";
/// Score of tokens that no merge makes.
const UNMERGED_SCORE: f32 = -1_000_000.0;
/// Score of every token of Gemma 4, which merges by rank; the converter's number.
const GEMMA4_SCORE: f32 = -1_000.0;
/// Longest token whose every division in two is looked up.
const TOKEN_BYTES_MAX: usize = 1024;

/// What stands around the model in `tokenizer.json`, and of which type that is.
#[derive(Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    pub(super) post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    r#type: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct WithModel {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// `"a b"` in older files, `["a", "b"]` since spaces may be part of a token.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair([String; 2]),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Line(line) => line.split_once(' '),
            Merge::Pair([left, right]) => Some((left, right)),
        }
    }

    /// One line; a space inside a token becomes `Ġ`, as llama.cpp's converter writes it.
    fn line(&self) -> String {
        match self {
            Merge::Line(line) => line.clone(),
            Merge::Pair([left, right]) => {
                format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ"))
            }
        }
    }
}

/// Parses all but the model, which may have half a million entries that nobody needs beside `tokenizer.model`.
pub(super) fn parse(text: &str) -> Result<TokenizerJson, Error> {
    serde_json::from_str(text)
        .map_err(|e| bad(format!("it is not a tokenizer: {e}; download it again")))
}

fn model(text: &str, kind: &Kind) -> Result<Model, Error> {
    match kind.r#type.as_deref() {
        None | Some("BPE") => serde_json::from_str::<WithModel>(text)
            .map(|whole| whole.model)
            .map_err(|e| bad(format!("it is not a BPE tokenizer: {e}; download it again"))),
        Some(other) => Err(bad(format!(
            "its model is of type {:?}; BPE is read, or a SentencePiece file tokenizer.model",
            other.chars().take(40).collect::<String>()
        ))),
    }
}

/// The vocabulary with one token for each of `n_vocab` rows of the embedding matrix.
pub(super) fn vocabulary(
    text: &str,
    json: &TokenizerJson,
    n_vocab: usize,
) -> Result<Vocabulary, Error> {
    let model = model(text, &json.model)?;
    let (tokens, types) = rows(&model, json, n_vocab)?;
    if model.byte_fallback {
        scored(json, &model, tokens, types)
    } else if pre::has_byte_level(&json.decoder) {
        let (pre, warning) = pre::name(&json.pre_tokenizer, model.ignore_merges);
        Ok(Vocabulary {
            model: "gpt2",
            pre: Some(pre),
            tokens,
            scores: None,
            types,
            merges: Some(model.merges.iter().map(Merge::line).collect()),
            add_space_prefix: None,
            warnings: warning.into_iter().collect(),
        })
    } else {
        Err(bad(
            "its BPE is neither over bytes (ByteLevel) nor with byte fallback; such a tokenizer cannot be extracted".to_owned(),
        ))
    }
}

/// Gemma 4's: BPE over characters with byte fallback that llama.cpp merges by rank. It shows the tokens that are written
/// around thoughts and calls of tools, so that a chat can be read, and takes for control tokens those that
/// `tokenizer_config.json` names.
pub(super) fn gemma4(
    text: &str,
    json: &TokenizerJson,
    settings: Option<&Map<String, Value>>,
    n_vocab: usize,
) -> Result<Vocabulary, Error> {
    const SHOWN: [&str; 7] = [
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        "<|\"|>",
    ];
    let model = model(text, &json.model)?;
    if !model.byte_fallback {
        return Err(bad(
            "its BPE has no byte fallback, which Gemma's has".to_owned()
        ));
    }
    let named = named_tokens(settings);
    let (mut tokens, mut types) = rows(&model, json, n_vocab)?;
    for (token, kind) in tokens.iter_mut().zip(&mut types) {
        *kind = match token.as_str() {
            _ if *kind == TokenType::Unused => *kind,
            shown if SHOWN.contains(&shown) => TokenType::UserDefined,
            byte if is_byte(byte) => TokenType::Byte,
            named_one if named.contains(named_one) => TokenType::Control,
            _ => TokenType::Normal,
        };
    }
    for added in &json.added_tokens {
        // Tokens beside the vocabulary proper are written by users, unless they are named.
        if let (Some(row), false) = (
            types.get_mut(added.id as usize),
            model.vocab.contains_key(&added.content),
        ) && *row == TokenType::Normal
        {
            *row = TokenType::UserDefined;
        }
        tokens[added.id as usize].clone_from(&added.content);
    }
    Ok(Vocabulary {
        model: "gemma4",
        pre: None,
        scores: Some(vec![GEMMA4_SCORE; tokens.len()]),
        tokens,
        types,
        merges: Some(model.merges.iter().map(Merge::line).collect()),
        add_space_prefix: Some(false),
        warnings: Vec::new(),
    })
}

/// Contents of the keys that name one special token (`bos_token`, `image_token` …) or list some.
fn named_tokens(settings: Option<&Map<String, Value>>) -> HashSet<&str> {
    fn content(v: &Value) -> Option<&str> {
        v.as_str().or_else(|| v.get("content")?.as_str())
    }
    let mut named = HashSet::new();
    for (key, value) in settings.into_iter().flatten() {
        match value {
            Value::Array(list) if key.ends_with("special_tokens") => {
                named.extend(list.iter().filter_map(content));
            }
            Value::Object(map) if key.ends_with("special_tokens") => {
                named.extend(map.values().filter_map(content));
            }
            one if key.ends_with("_token") => named.extend(content(one)),
            _ => {}
        }
    }
    named
}

/// Text and type of each of `n_vocab` tokens.
fn rows(
    model: &Model,
    json: &TokenizerJson,
    n_vocab: usize,
) -> Result<(Vec<String>, Vec<TokenType>), Error> {
    let mut rows: Vec<Option<(&str, TokenType)>> = vec![None; n_vocab];
    for (token, &id) in &model.vocab {
        let row = rows
            .get_mut(id as usize)
            .ok_or_else(|| beyond(token, id, n_vocab))?;
        if let Some((other, _)) = row.replace((token, TokenType::Normal)) {
            return Err(bad(format!(
                "tokens {token:?} and {other:?} have the same id {id}; download it again"
            )));
        }
    }
    let mut added: HashMap<u32, (String, TokenType)> = HashMap::new();
    for token in &json.added_tokens {
        if token.id as usize >= n_vocab {
            return Err(beyond(&token.content, token.id, n_vocab));
        }
        added.insert(token.id, added_token(&token.content, token.special));
    }
    let mut tokens = Vec::with_capacity(n_vocab);
    let mut types = Vec::with_capacity(n_vocab);
    for (id, row) in rows.iter().enumerate() {
        let (token, kind) = match (added.remove(&(id as u32)), row) {
            (Some(added), _) => added,
            (None, Some((token, kind))) => ((*token).to_owned(), *kind),
            (None, None) => (filler(id), TokenType::Unused),
        };
        tokens.push(token);
        types.push(kind);
    }
    Ok((tokens, types))
}

/// Merging by rank as merging by score: llama.cpp joins the pair whose result has the highest score, so a token's
/// score is minus the rank of the merges that make it. This is the same procedure when all merges of one token
/// follow each other, and when every two tokens whose join is a token may be merged.
fn scored(
    json: &TokenizerJson,
    model: &Model,
    tokens: Vec<String>,
    mut types: Vec<TokenType>,
) -> Result<Vocabulary, Error> {
    let vocab = &model.vocab;
    let refuse = |what: &str| {
        Err(bad(format!(
            "{what}, so that GGUF's scores cannot say its order; the checkpoint needs its tokenizer.model"
        )))
    };
    let added: HashSet<&str> = json
        .added_tokens
        .iter()
        .map(|t| t.content.as_str())
        .collect();
    let mut scores: Vec<f32> = vec![UNMERGED_SCORE; tokens.len()];
    let mut made = HashSet::new();
    let mut pairs = HashSet::new();
    let mut last = None;
    for merge in &model.merges {
        let Some((left, right)) = merge.pair() else {
            return refuse("it has a merge that is not of two tokens");
        };
        let joined = [left, right].concat();
        let (Some(&id), true, true) = (
            vocab.get(&joined),
            vocab.contains_key(left),
            vocab.contains_key(right),
        ) else {
            return refuse("it has a merge of unknown tokens");
        };
        if last != Some(id) {
            if !made.insert(id) {
                return refuse("the merges of one token do not follow each other");
            }
            scores[id as usize] = -(made.len() as f32);
            last = Some(id);
        }
        pairs.insert((left, right));
    }
    for token in vocab.keys().filter(|t| !added.contains(t.as_str())) {
        if token.len() > TOKEN_BYTES_MAX {
            return refuse("it has a token that is longer than any word");
        }
        if is_byte(token) {
            types[vocab[token] as usize] = TokenType::Byte;
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            let both_known = vocab.contains_key(left) && vocab.contains_key(right);
            if both_known && !pairs.contains(&(left, right)) {
                return refuse("it has tokens that its merges do not make");
            }
        }
    }
    Ok(Vocabulary {
        model: "llama",
        pre: Some("default"),
        tokens,
        scores: Some(scores),
        types,
        merges: None,
        add_space_prefix: Some(
            prepends_space(&json.normalizer) || prepends_space(&json.pre_tokenizer),
        ),
        warnings: Vec::new(),
    })
}

/// `<0x0A>` and the like, which stand for one byte.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|h| h.len() == 2 && h.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// True when a normaliser or pre-tokenizer puts `▁` before a text.
fn prepends_space(step: &Value) -> bool {
    let steps = ["normalizers", "pretokenizers"]
        .iter()
        .find_map(|k| step.get(*k))
        .and_then(Value::as_array);
    if let Some(steps) = steps {
        return steps.iter().any(prepends_space);
    }
    let text = |key: &str| step.get(key).and_then(Value::as_str);
    match text("type") {
        Some("Prepend") => text("prepend") == Some("▁"),
        Some("Metaspace") => match text("prepend_scheme") {
            Some(scheme) => scheme != "never",
            None => step
                .get("add_prefix_space")
                .and_then(Value::as_bool)
                .unwrap_or(true),
        },
        _ => false,
    }
}

fn beyond(token: &str, id: u32, n_vocab: usize) -> Error {
    bad(format!(
        "token {token:?} has id {id}, the embedding matrix has {n_vocab} rows; they do not belong together"
    ))
}

fn bad(reason: String) -> Error {
    Error::Tokenizer {
        file: FILE.to_owned(),
        reason,
    }
}
