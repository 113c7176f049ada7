//! Text to tokens and back, by the `tokenizer.json` that the vindex keeps whole, or by one made from GGUF's keys.
//!
//! A token is a few bytes, not a few characters: [`Tokenizer::token_bytes`] tells them, and every decoding here is the
//! same three steps over them: put the bytes together, drop the space that an encoder puts before a text, replace what
//! is no UTF-8. [`Decoder`] does it token by token and tells what no later token can change.
//!
//! Invariant: the texts of a [`Decoder`] put together are the text of [`Tokenizer::decode`].
//!
//! Left out: tokenizers whose tokens have no bytes of their own (WordPiece), which no vindex holds.

mod gguf;

use std::collections::{BTreeMap, HashSet};

use serde::Deserialize;
use serde_json::Value;
use vindex::{MetaValue, Vindex};

/// Why a vindex has no tokenizer that works.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The first part cannot be read.
    #[error("the tokenizer cannot be read")]
    Vindex(#[from] vindex::Error),
    /// There is none in it.
    #[error(
        "the vindex has no tokenizer (key {KEY}, or tokenizer.ggml.tokens), only ids can be run; extract from a \
         checkpoint that has one"
    )]
    Missing,
    /// It is there and not understood.
    #[error("the vindex's tokenizer: {0}")]
    Unsupported(String),
}

const KEY: &str = "tokenizer.huggingface.json";

/// A vocabulary with its rules. Shared by reference; nothing in it changes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// Token `id` has `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<usize>,
    special: HashSet<u32>,
    /// Spaces that encoding puts before a text and decoding drops.
    n_leading_spaces: usize,
    bos: Option<u32>,
    adds_bos: bool,
    eos: Vec<u32>,
    templates: BTreeMap<String, String>,
}

impl Tokenizer {
    /// The tokenizer of `vindex`, for the rows of its embedding matrix.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn of(vindex: &Vindex) -> Result<Tokenizer, TokenizerError> {
        let metadata = vindex.metadata()?;
        let value = |key: &str| metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        let adds_bos = match value("tokenizer.ggml.add_bos_token") {
            Some(&MetaValue::Bool(adds_bos)) => Some(adds_bos),
            _ => None,
        };
        let made;
        let (json, adds_bos) = match value(KEY) {
            Some(MetaValue::String(json)) => (json, adds_bos.unwrap_or(false)),
            _ => {
                let of_keys = gguf::tokenizer_json(&metadata).ok_or(TokenizerError::Missing)?;
                made = of_keys.map_err(TokenizerError::Unsupported)?;
                (&made.json, adds_bos.unwrap_or(made.adds_bos))
            }
        };
        let id_of = |kind: &str| match value(&format!("tokenizer.ggml.{kind}_token_id")) {
            Some(&MetaValue::U32(id)) => Some(id),
            _ => None,
        };
        let config = &vindex.index().config;
        let mut eos = config.eos.clone();
        if let (true, Some(id)) = (eos.is_empty(), id_of("eos")) {
            eos.push(id);
        }
        let prefix = "tokenizer.chat_template";
        let templates = metadata.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(prefix)?;
            let name = if name.is_empty() {
                "default"
            } else {
                name.strip_prefix('.')?
            };
            match value {
                MetaValue::String(text) => Some((name.to_owned(), text.clone())),
                _ => None,
            }
        });
        let mut tokenizer = Tokenizer::from_json(json, config.vocab as usize)?;
        tokenizer.templates = templates.collect();
        tokenizer.bos = config.bos.or_else(|| id_of("bos"));
        tokenizer.adds_bos = adds_bos;
        tokenizer.eos = eos;
        Ok(tokenizer)
    }

    /// A tokenizer with `n_vocab` ids and no special ids but its own.
    fn from_json(json: &str, n_vocab: usize) -> Result<Tokenizer, TokenizerError> {
        let bad = |e: &dyn std::fmt::Display| TokenizerError::Unsupported(e.to_string());
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| bad(&e))?;
        // A file may ask for texts to be cut or filled up to a length, which is for training.
        inner.with_truncation(None).map_err(|e| bad(&e))?;
        inner.with_padding(None);
        let Decoders { decoder } = serde_json::from_str(json).map_err(|e| bad(&e))?;
        let rules = Rules::of(&decoder).map_err(TokenizerError::Unsupported)?;
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(n_vocab));
        for id in 0..n_vocab as u32 {
            if let Some(token) = inner.id_to_token(id) {
                rules.append(&token, &mut bytes);
            }
            ends.push(bytes.len());
        }
        let added = inner.get_added_tokens_decoder();
        Ok(Tokenizer {
            special: added
                .iter()
                .filter(|(_, t)| t.special)
                .map(|(&id, _)| id)
                .collect(),
            inner,
            bytes,
            ends,
            n_leading_spaces: rules.n_leading_spaces,
            bos: None,
            adds_bos: false,
            eos: Vec::new(),
            templates: BTreeMap::new(),
        })
    }

    /// The tokens of a text. `add_special` puts around it what the model wants around a text, which is mostly the token
    /// that begins one; a chat template writes that itself, so that what it renders is encoded without. Names of special
    /// tokens in the text become these tokens.
    ///
    /// # Errors
    /// What the tokenizer says of a text that it has no token for.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special);
        let encoding = encoding.map_err(|e| TokenizerError::Unsupported(e.to_string()))?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, true, Some(bos)) = (add_special, self.adds_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The text of tokens from the beginning of a text on; ids beyond the vocabulary have none.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoder = Decoder::new(skip_special);
        let mut text: String = ids.iter().map(|&id| decoder.push(self, id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// What a token stands for; empty for an id beyond the vocabulary or without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        &self.bytes[id.checked_sub(1).map_or(0, |before| self.ends[before])..end]
    }

    /// How many ids there are: rows of the embedding matrix, of which some may have no token.
    pub fn n_vocab(&self) -> usize {
        self.ends.len()
    }

    /// The token of this name, a special one included.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// The name of a token, as `tokenizer.json` writes it.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// True for tokens that structure a text and are no part of it.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end a generation.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The model's chat templates by name; the usual one is called `default`, one for tools `tool_use`.
    pub fn templates(&self) -> &BTreeMap<String, String> {
        &self.templates
    }
}

/// Tokens to text, one token at a time.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Bytes of a character that is not complete; at most three.
    pending: Vec<u8>,
    skip_special: bool,
    /// The token before was at the beginning of the text: how many leading spaces are yet to be dropped.
    at_start: bool,
    n_dropped: usize,
}

impl Decoder {
    /// From the beginning of a text on.
    pub fn new(skip_special: bool) -> Decoder {
        Decoder {
            pending: Vec::new(),
            skip_special,
            at_start: true,
            n_dropped: 0,
        }
    }

    /// For tokens that go on after others, so that a space before the first belongs to the text.
    pub fn continuing(skip_special: bool) -> Decoder {
        Decoder {
            at_start: false,
            ..Decoder::new(skip_special)
        }
    }

    /// The text that is certain with this token. `tokenizer` is the same one at every call.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if self.skip_special && tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = tokenizer.token_bytes(id);
        while self.at_start && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) if self.n_dropped < tokenizer.n_leading_spaces => {
                    self.n_dropped += 1;
                    bytes = rest;
                }
                _ => self.at_start = false,
            }
        }
        self.pending.extend_from_slice(bytes);
        let (text, n_used) = certain(&self.pending);
        self.pending.drain(..n_used);
        text
    }

    /// What is left when there are no more tokens: a replacement character if a character is incomplete.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// The text of `bytes` up to a character that more bytes may complete, and how many bytes that is.
fn certain(bytes: &[u8]) -> (String, usize) {
    let mut text = String::new();
    let mut n_used = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        n_used += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let ends_here = n_used + invalid.len() == bytes.len();
        let may_go_on = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if ends_here && may_go_on {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        n_used += invalid.len();
    }
    (text, n_used)
}

#[derive(Deserialize)]
struct Decoders {
    #[serde(default)]
    decoder: Value,
}

/// What the `decoder` of a `tokenizer.json` does to the name of a token.
#[derive(Default)]
struct Rules {
    /// Characters stand for bytes, as in GPT-2.
    byte_level: bool,
    /// `<0x0A>` stands for a byte.
    byte_fallback: bool,
    replace: Vec<(String, String)>,
    n_leading_spaces: usize,
}

impl Rules {
    fn of(decoder: &Value) -> Result<Rules, String> {
        let mut rules = Rules::default();
        let one = std::slice::from_ref(decoder);
        let steps = decoder.get("decoders").and_then(Value::as_array);
        for step in steps.map_or(one, Vec::as_slice) {
            let text = |key: &str| step.get(key).and_then(Value::as_str);
            match text("type") {
                Some("ByteLevel") => rules.byte_level = true,
                Some("ByteFallback") => rules.byte_fallback = true,
                Some("Fuse") => {}
                Some("Replace") => {
                    let pattern = step.get("pattern").and_then(|p| p.get("String"));
                    let (Some(pattern), Some(content)) =
                        (pattern.and_then(Value::as_str), text("content"))
                    else {
                        return Err("its decoder replaces by a pattern, not a text".to_owned());
                    };
                    rules.replace.push((pattern.to_owned(), content.to_owned()));
                }
                Some("Strip") if text("content") == Some(" ") => {
                    let start = step.get("start").and_then(Value::as_u64);
                    rules.n_leading_spaces = start.unwrap_or(0) as usize;
                }
                Some("Metaspace") => {
                    let sign = text("replacement").unwrap_or("▁");
                    rules.replace.push((sign.to_owned(), " ".to_owned()));
                    rules.n_leading_spaces = usize::from(text("prepend_scheme") != Some("never"));
                }
                other => {
                    return Err(format!(
                        "its decoder has a step {other:?}, which is not known"
                    ));
                }
            }
        }
        Ok(rules)
    }

    /// Puts the bytes of the token called `name` to `bytes`.
    fn append(&self, name: &str, bytes: &mut Vec<u8>) {
        if self.byte_level {
            // A token with a character that stands for no byte was added as it is.
            match name.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(mapped) => bytes.extend(mapped),
                None => bytes.extend(name.as_bytes()),
            }
            return;
        }
        let mut name = name.to_owned();
        for (pattern, content) in &self.replace {
            name = name.replace(pattern, content);
        }
        match fallback_byte(&name).filter(|_| self.byte_fallback) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(name.as_bytes()),
        }
    }
}

/// The byte that a character stands for in GPT-2's alphabet: printable characters of Latin-1 stand for their own code,
/// the other codes have, in order, the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let is_own = |code: u32| matches!(code, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code if is_own(code) => u8::try_from(code).ok(),
        code => {
            let nth = code.checked_sub(0x100)? as usize;
            (0..=0xFF_u8).filter(|&b| !is_own(u32::from(b))).nth(nth)
        }
    }
}

/// The byte of `<0x0A>`.
fn fallback_byte(name: &str) -> Option<u8> {
    let hex = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::path::Path;

    fn fixture(path: &str) -> String {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
        std::fs::read_to_string(fixtures.join(path)).unwrap()
    }

    fn tokenizer(family: &str) -> Tokenizer {
        Tokenizer::from_json(&fixture(&format!("models/{family}/tokenizer.json")), 512).unwrap()
    }

    /// One family of each kind of decoder.
    const KINDS: [&str; 3] = ["llama", "gemma2", "qwen3"];

    #[test]
    fn texts_decode_as_the_tokenizers_library_decodes_them() {
        for family in KINDS {
            let tokenizer = tokenizer(family);
            for text in ["a b", " a", "  a\n", "é 你好 🚀", "<s>x", "", "\t\r\n", "▁"] {
                for add_special in [false, true] {
                    for skip in [false, true] {
                        let ids = tokenizer.encode(text, add_special).unwrap();
                        let expected = tokenizer.inner.decode(&ids, skip).unwrap();
                        assert_eq!(tokenizer.decode(&ids, skip), expected, "{family}: {text:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn tokens_that_are_no_text_become_replacement_characters_as_soon_as_they_are_certain() {
        let tokenizer = tokenizer("llama");
        let byte = |b: u8| tokenizer.token_id(&format!("<0x{b:02X}>")).unwrap();
        let mut decoder = Decoder::continuing(true);
        // Two thirds of 你, then a letter.
        assert_eq!(decoder.push(&tokenizer, byte(0xE4)), "");
        assert_eq!(decoder.push(&tokenizer, byte(0xBD)), "");
        assert_eq!(decoder.push(&tokenizer, byte(b'a')), "\u{FFFD}a");
        assert_eq!(decoder.push(&tokenizer, byte(0xFF)), "\u{FFFD}");
        assert_eq!(decoder.push(&tokenizer, byte(0xF0)), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    #[test]
    fn a_space_before_the_first_token_belongs_to_a_text_that_goes_on() {
        let tokenizer = tokenizer("llama");
        let ids = tokenizer.encode("a", false).unwrap();
        let text = |mut decoder: Decoder| -> String {
            ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect()
        };
        assert_eq!(text(Decoder::new(true)), "a");
        assert_eq!(text(Decoder::continuing(true)), " a");
    }

    proptest::proptest! {
        #[test]
        fn decoding_one_by_one_is_decoding_at_once(ids in proptest::collection::vec(0u32..520, 0..40)) {
            for family in KINDS {
                let tokenizer = tokenizer(family);
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
                let whole = String::from_utf8_lossy(&bytes).into_owned();
                let mut decoder = Decoder::continuing(false);
                let mut text: String = ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect();
                proptest::prop_assert!(whole.starts_with(&text));
                text += &decoder.finish();
                proptest::prop_assert_eq!(text, whole);
            }
        }
    }

    #[test]
    fn every_byte_has_its_character() {
        let mut bytes: Vec<u8> = ('\0'..'\u{200}').filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn decoders_that_are_not_known_are_refused() {
        let json = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,
            "decoder":{"type":"WordPiece","prefix":"","cleanup":true},
            "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
        let error = Tokenizer::from_json(json, 1).err().unwrap().to_string();
        assert!(error.contains("WordPiece"), "{error}");
        assert!(Tokenizer::from_json("{", 1).is_err());
    }
}
