//! A `tokenizer.json` made from GGUF's keys, for vindexes of files that keep none.
//!
//! Invariant: texts are cut as llama.cpp cuts them by the same keys. Three kinds are known: pieces with scores
//! (SentencePiece, `llama`), byte-level pairs (`gpt2`) and pairs of characters with byte fallback (`gemma4`). Left out:
//! tokenizers of other kinds, and pre-tokenizers whose patterns are not known, which are refused by name.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};
use vindex::{MetaArray, MetaValue, PreStep};

/// Longest token that pairs are looked for in; longer ones are made by no merge of today's models.
const TOKEN_BYTES_MAX: usize = 1024;

/// What was made of the keys.
pub(super) struct Made {
    pub(super) json: String,
    /// The token that begins a text is put there where no key says whether.
    pub(super) adds_bos: bool,
}

/// `tokenizer.ggml.token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Makes it from a vindex's metadata; `None` when there are no tokens.
pub(super) fn tokenizer_json(metadata: &[(String, MetaValue)]) -> Option<Result<Made, String>> {
    let keys = Keys(metadata);
    let tokens = keys.texts("tokens")?;
    Some(match keys.text("model") {
        Some("llama") => Ok(scored(&keys, tokens)),
        Some("gpt2") => byte_level(&keys, tokens),
        Some("gemma4") => characters(&keys, tokens),
        other => Err(format!(
            "tokenizer.ggml.model is {}; llama, gpt2 and gemma4 are known",
            other.unwrap_or("absent")
        )),
    })
}

struct Keys<'a>(&'a [(String, MetaValue)]);

impl<'a> Keys<'a> {
    fn value(&self, key: &str) -> Option<&'a MetaValue> {
        let of_tokens = |k: &str| k.strip_prefix("tokenizer.ggml.") == Some(key);
        self.0.iter().find(|(k, _)| of_tokens(k)).map(|(_, v)| v)
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        match self.value(key) {
            Some(MetaValue::String(text)) => Some(text),
            _ => None,
        }
    }

    fn texts(&self, key: &str) -> Option<&'a [String]> {
        match self.value(key) {
            Some(MetaValue::Array(MetaArray::Strings(texts))) => Some(texts),
            _ => None,
        }
    }

    fn bool(&self, key: &str) -> Option<bool> {
        match self.value(key) {
            Some(MetaValue::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// The type of each token; what is not there is a normal one.
    fn types(&self) -> Vec<i64> {
        match self.value("token_type") {
            Some(MetaValue::Array(MetaArray::I32s(types))) => {
                types.iter().map(|&t| t.into()).collect()
            }
            Some(MetaValue::Array(MetaArray::U32s(types))) => {
                types.iter().map(|&t| t.into()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Pairs that are merged, those first that come first.
    fn merges(&self, vocab: &BTreeMap<&str, usize>) -> Result<Vec<[&'a str; 2]>, String> {
        // Without them every text would fall apart into characters.
        let lines = self.texts("merges");
        let lines = lines.ok_or("tokenizer.ggml.merges is no list of texts")?;
        let pairs = lines.iter().filter_map(|line| {
            // The first character may be a space that belongs to the token.
            let first = line.chars().next()?.len_utf8();
            let at = first + line.get(first..)?.find(' ')?;
            Some([&line[..at], &line[at + 1..]])
        });
        let is_known = |pair: &[&str; 2]| {
            let [left, right] = pair;
            let joined = vocab.contains_key([*left, *right].concat().as_str());
            joined && vocab.contains_key(left) && vocab.contains_key(right)
        };
        Ok(pairs.filter(is_known).collect())
    }
}

/// Names of the tokens with their numbers; of two of one name the first. Unused ones stand for rows without a token.
fn vocabulary<'a>(tokens: &'a [String], types: &[i64]) -> BTreeMap<&'a str, usize> {
    let mut vocab = BTreeMap::new();
    for (id, token) in tokens.iter().enumerate() {
        if types.get(id) != Some(&UNUSED) {
            vocab.entry(token.as_str()).or_insert(id);
        }
    }
    vocab
}

/// Tokens that are found in a text before it is cut.
fn added(tokens: &[String], types: &[i64]) -> Value {
    let kinds = tokens.iter().zip(types).enumerate();
    let of_texts = kinds
        .filter(|(_, (token, kind))| [CONTROL, USER_DEFINED].contains(kind) && !token.is_empty());
    let entries = of_texts.map(|(id, (token, kind))| {
        json!({
            "id": id, "content": token, "special": *kind == CONTROL, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        })
    });
    Value::Array(entries.collect())
}

fn whole(
    added: Value,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
) -> String {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model,
    })
    .to_string()
}

/// Pieces with scores: of all neighbours that make a token those are merged first whose token has the highest score. As
/// pairs that is a list in the order of scores of every way to make a token of two.
fn scored(keys: &Keys<'_>, tokens: &[String]) -> Made {
    let types = keys.types();
    let vocab = vocabulary(tokens, &types);
    let scores = match keys.value("scores") {
        Some(MetaValue::Array(MetaArray::F32s(scores))) => scores.as_slice(),
        _ => &[],
    };
    let kind_of = |id: usize| types.get(id).copied().unwrap_or(1);
    // Looked up more often than anything else here.
    let is_piece = |id: usize| ![UNKNOWN, CONTROL, BYTE].contains(&kind_of(id));
    let pieces: HashMap<&str, usize> = vocab
        .iter()
        .filter(|&(_, &id)| is_piece(id))
        .map(|(token, id)| (*token, *id))
        .collect();
    let mut merges: Vec<(f32, usize, usize, [&str; 2])> = Vec::new();
    for (&token, &id) in pieces.iter().filter(|(t, _)| t.len() <= TOKEN_BYTES_MAX) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                let score = scores.get(id).copied().unwrap_or(0.0);
                merges.push((score, id, at, [left, right]));
            }
        }
    }
    merges.sort_unstable_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0);
        by_score.then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, _, _, pair)| pair).collect();
    let unknown = tokens
        .iter()
        .zip(&types)
        .find(|(_, kind)| **kind == UNKNOWN);
    let puts_space = keys.bool("add_space_prefix").unwrap_or(true);
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = characters_decoders();
    if puts_space {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown.map(|(token, _)| token), "fuse_unk": true,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": true,
        "ignore_merges": false, "vocab": vocab, "merges": merges,
    });
    Made {
        json: whole(
            added(tokens, &types),
            json!({"type": "Sequence", "normalizers": normalizers}),
            Value::Null,
            json!({"type": "Sequence", "decoders": decoders}),
            model,
        ),
        adds_bos: true,
    }
}

fn characters_decoders() -> Vec<Value> {
    vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ]
}

/// Pairs of characters with byte fallback; lines are cut from each other first.
fn characters(keys: &Keys<'_>, tokens: &[String]) -> Result<Made, String> {
    let types = keys.types();
    let vocab = vocabulary(tokens, &types);
    let unknown = tokens
        .iter()
        .zip(&types)
        .find(|(_, kind)| **kind == UNKNOWN);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown.map(|(token, _)| token), "fuse_unk": true,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": true,
        "ignore_merges": false, "merges": keys.merges(&vocab)?, "vocab": vocab,
    });
    Ok(Made {
        json: whole(
            added(tokens, &types),
            json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
            split("[^\\n]+|[\\n]+"),
            json!({"type": "Sequence", "decoders": characters_decoders()}),
            model,
        ),
        adds_bos: true,
    })
}

/// Byte-level pairs, after the text was cut by the patterns that `tokenizer.ggml.pre` stands for.
fn byte_level(keys: &Keys<'_>, tokens: &[String]) -> Result<Made, String> {
    let name = keys.text("pre").unwrap_or("default");
    let Some(pre) = vindex::pre_tokenizer(name) else {
        return Err(format!(
            "tokenizer.ggml.pre is {name}, whose patterns are not known here"
        ));
    };
    let types = keys.types();
    let vocab = vocabulary(tokens, &types);
    let bytes = |cuts: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": cuts});
    let mut steps: Vec<Value> = pre
        .steps
        .iter()
        .map(|step| match step {
            PreStep::Pattern(pattern) => split(pattern),
            PreStep::EachDigit => json!({"type": "Digits", "individual_digits": true}),
            PreStep::ByteLevel => bytes(true),
        })
        .collect();
    if !pre.steps.contains(&PreStep::ByteLevel) {
        steps.push(bytes(false));
    }
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "byte_fallback": false, "ignore_merges": pre.takes_words,
        "merges": keys.merges(&vocab)?, "vocab": vocab,
    });
    Ok(Made {
        json: whole(
            added(tokens, &types),
            Value::Null,
            json!({"type": "Sequence", "pretokenizers": steps}),
            bytes(true),
            model,
        ),
        adds_bos: pre.takes_words,
    })
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Tokenizer;
    use super::*;

    /// The keys of a fixture, and what its own `tokenizer.json` makes.
    fn both(checkpoint: &str) -> (Tokenizer, Tokenizer, Vec<(String, MetaValue)>) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let source = vindex::LocalDir::open(&root.join(checkpoint)).unwrap();
        let plan = vindex::plan(&source, vindex::Recipe::F32).unwrap();
        let n_vocab = plan.config.vocab as usize;
        let (own, keys): (Vec<_>, Vec<_>) = plan
            .metadata
            .into_iter()
            .partition(|(key, _)| key == super::super::KEY);
        let MetaValue::String(own) = &own[0].1 else {
            panic!("a text")
        };
        let made = tokenizer_json(&keys).unwrap().unwrap();
        (
            Tokenizer::from_json(&made.json, n_vocab).unwrap(),
            Tokenizer::from_json(own, n_vocab).unwrap(),
            keys,
        )
    }

    #[test]
    fn pairs_without_merges_are_refused() {
        let (_, _, mut keys) = both("fixtures/models/llama3");
        keys.retain(|(key, _)| key != "tokenizer.ggml.merges");
        let error = tokenizer_json(&keys).unwrap().err().unwrap();
        assert!(error.contains("tokenizer.ggml.merges"), "{error}");
    }

    #[test]
    fn texts_are_cut_as_by_the_tokenizer_that_the_keys_are_from() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let heldout = std::fs::read_to_string(root.join("models/kjv/heldout.txt")).unwrap();
        let long: String = heldout.chars().take(20_000).collect();
        let texts = [
            "a b",
            " a",
            "",
            "  two  spaces\n\n\nand lines\r\n\ttabs ",
            "I'll say: it's 12345.67 (or 3%)!",
            "é 你好 🚀 ▁ naïve Ångström",
            "<s>x</s> <|im_start|>user\nhi<|im_end|> <start_of_turn>",
            "\u{0}\u{7f}\u{200b}",
            &long,
        ];
        for checkpoint in [
            "fixtures/models/llama",
            "fixtures/models/llama3",
            "fixtures/models/gemma2",
            "fixtures/models/gemma3",
            "fixtures/models/qwen3",
            "models/kjv",
        ] {
            let (made, own, _) = both(checkpoint);
            for text in texts {
                let ids = made.encode(text, false).unwrap();
                assert_eq!(
                    ids,
                    own.encode(text, false).unwrap(),
                    "{checkpoint}: {text:?}"
                );
                for skip in [false, true] {
                    assert_eq!(
                        made.decode(&ids, skip),
                        own.decode(&ids, skip),
                        "{checkpoint}"
                    );
                }
            }
            for id in 0..own.n_vocab() as u32 {
                assert_eq!(
                    made.token_bytes(id),
                    own.token_bytes(id),
                    "{checkpoint}: {id}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let (_, _, keys) = both("fixtures/models/qwen3");
        let told = |key: &str, value: &str| {
            let mut keys = keys.clone();
            for (k, v) in &mut keys {
                if k == key {
                    *v = MetaValue::String(value.to_owned());
                }
            }
            tokenizer_json(&keys).unwrap().err().unwrap()
        };
        assert_eq!(
            told("tokenizer.ggml.pre", "bailingmoe"),
            "tokenizer.ggml.pre is bailingmoe, whose patterns are not known here"
        );
        assert_eq!(
            told("tokenizer.ggml.model", "t5"),
            "tokenizer.ggml.model is t5; llama, gpt2 and gemma4 are known"
        );
        assert!(tokenizer_json(&[]).is_none());
    }
}
