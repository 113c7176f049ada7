//! Special tokens, whether they are put around a text, and the chat template.
//!
//! Invariant: ids and flags are what llama.cpp's converter finds (`SpecialVocab`): first the names in
//! `tokenizer_config.json`, looked up among the added tokens, then the ids in `config.json`; the post-processor of
//! `tokenizer.json` wins over the flags of `tokenizer_config.json`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::SMALL_BYTES_MAX;
use super::bpe::TokenizerJson;
use crate::config_json::ConfigJson;
use crate::error::Error;
use crate::gguf::{MetaArray, MetaValue};
use crate::source::Files;

/// Kinds of special tokens and their keys in GGUF, in the order of the converter. `eot` and `eom` only come up when a
/// post-processor ends texts with another token than `eos_token`.
const KINDS: [(&str, &str); 8] = [
    ("bos", "bos_token_id"),
    ("eos", "eos_token_id"),
    ("unk", "unknown_token_id"),
    ("sep", "seperator_token_id"),
    ("pad", "padding_token_id"),
    ("mask", "mask_token_id"),
    ("eot", "eot_token_id"),
    ("eom", "eom_token_id"),
];

/// What is known of a tokenizer's special tokens.
#[derive(Default)]
pub(super) struct Special {
    /// Key after `tokenizer.ggml.`, and id.
    pub(super) ids: Vec<(&'static str, u32)>,
    /// Key after `tokenizer.ggml.`, and whether the token is put there.
    pub(super) added: Vec<(String, bool)>,
    /// Key after `tokenizer.`, and value.
    pub(super) templates: Vec<(String, MetaValue)>,
    /// `add_prefix_space` of `tokenizer_config.json`.
    pub(super) add_prefix_space: Option<bool>,
}

pub(super) fn read(
    files: &Files<'_>,
    config: &ConfigJson,
    json: Option<&TokenizerJson>,
    settings: Option<Map<String, Value>>,
    n_vocab: u32,
) -> Result<Special, Error> {
    let has_settings = settings.is_some();
    let settings = settings.unwrap_or_default();
    let mut around = Around::of(&settings);
    if let Some(json) = json {
        around.follow(&json.post_processor);
    }
    let mut special = Special {
        add_prefix_space: settings.get("add_prefix_space").and_then(Value::as_bool),
        templates: templates(files, &settings)?,
        ..Special::default()
    };
    for (kind, key) in KINDS {
        if matches!(kind, "eot" | "eom") && !around.names.contains_key(kind) {
            continue;
        }
        if let Some(is_added) = settings
            .get(&format!("add_{kind}_token"))
            .and_then(Value::as_bool)
        {
            around.added.entry(kind).or_insert(is_added);
        }
        let name = around.names.get(kind).filter(|_| has_settings);
        let named = name
            .and_then(|name| json?.added_tokens.iter().find(|t| t.content == *name))
            .map(|t| t.id);
        let id = named
            .filter(|&id| id < n_vocab)
            .or_else(|| config.token_id(&format!("{kind}_token_id")));
        if let Some(id) = id.filter(|&id| id < n_vocab) {
            special.ids.push((key, id));
        }
    }
    for kind in ["bos", "eos", "sep"] {
        if let Some(&is_added) = around.added.get(kind) {
            special.added.push((format!("add_{kind}_token"), is_added));
        }
    }
    Ok(special)
}

/// Names of the special tokens, and which of them are put around a text.
struct Around {
    names: BTreeMap<&'static str, String>,
    added: BTreeMap<&'static str, bool>,
}

impl Around {
    fn of(settings: &Map<String, Value>) -> Around {
        let mut names = BTreeMap::new();
        for kind in ["bos", "eos", "unk", "sep", "pad", "mask", "cls"] {
            let entry = settings.get(&format!("{kind}_token"));
            let content = entry.and_then(|e| e.as_str().or_else(|| e.get("content")?.as_str()));
            if let Some(content) = content {
                names.insert(kind, content.to_owned());
            }
        }
        for (kind, stand_in) in [("bos", "cls"), ("eos", "sep")] {
            if let (false, Some(name)) = (names.contains_key(kind), names.get(stand_in).cloned()) {
                names.insert(kind, name);
            }
        }
        Around {
            names,
            added: BTreeMap::new(),
        }
    }

    fn is(&self, kind: &str, name: &str) -> bool {
        self.names.get(kind).is_some_and(|n| n == name)
    }

    /// Reads off the post-processor what it puts around one text and between two.
    fn follow(&mut self, post_processor: &Value) {
        let one = std::slice::from_ref(post_processor);
        for step in post_processor
            .get("processors")
            .and_then(Value::as_array)
            .map_or(one, Vec::as_slice)
        {
            match step.get("type").and_then(Value::as_str) {
                Some("ByteLevel") => {
                    self.added.entry("bos").or_insert(false);
                    self.added.entry("eos").or_insert(false);
                }
                Some("RobertaProcessing") => {
                    for kind in ["bos", "eos", "sep"] {
                        self.added.insert(kind, true);
                    }
                }
                Some("TemplateProcessing") => self.follow_template(step),
                _ => {}
            }
        }
    }

    fn follow_template(&mut self, step: &Value) {
        let pieces = |key: &str| {
            step.get(key)
                .and_then(Value::as_array)
                .map(Vec::as_slice)
                .unwrap_or_default()
        };
        let special = |piece: &Value| {
            piece
                .get("SpecialToken")?
                .get("id")?
                .as_str()
                .map(str::to_owned)
        };
        let (single, pair) = (pieces("single"), pieces("pair"));
        let (mut first, mut last) = (None, None);
        if let [head, .., tail] = single {
            first = special(head);
            last = special(tail);
        }
        if let Some(first) = &first {
            self.names.entry("bos").or_insert_with(|| first.clone());
            self.names.entry("cls").or_insert_with(|| first.clone());
            self.added
                .insert("bos", self.is("bos", first) || self.is("cls", first));
        }
        if let Some(last) = &last {
            if !self.is("eos", last) {
                let spare = if self.names.contains_key("eot") {
                    "eom"
                } else {
                    "eot"
                };
                if let Some(eos) = self.names.insert("eos", last.clone()) {
                    self.names.insert(spare, eos);
                }
            }
            self.added.insert("eos", true);
        }
        let skip_first = usize::from(first.is_some() && pair.first().and_then(special) == first);
        let skip_last = usize::from(last.is_some() && pair.last().and_then(special) == last);
        let inner = pair
            .get(skip_first..pair.len().saturating_sub(skip_last))
            .unwrap_or_default();
        let is_text = |piece: &Value, id: &str| {
            piece.get("Sequence").and_then(|s| s.get("id")) == Some(&Value::from(id))
        };
        if let [a, middle @ .., b] = inner
            && is_text(a, "A")
            && is_text(b, "B")
            && !middle.is_empty()
        {
            let separates = |piece: &Value| {
                special(piece).is_some_and(|s| self.is("sep", &s) || self.is("eos", &s))
            };
            let is_added = (separates(&middle[0]) && last.is_none())
                || (middle.len() == 2 && separates(&middle[1]));
            self.added.insert("sep", is_added);
        }
    }
}

#[derive(Deserialize)]
struct ChatTemplateJson {
    #[serde(default)]
    chat_template: Value,
}

/// `chat_template` of `tokenizer_config.json`, else the file `chat_template.jinja` or `chat_template.json`. A list of
/// named templates gives one key each, the one called `default` the plain key.
fn templates(
    files: &Files<'_>,
    settings: &Map<String, Value>,
) -> Result<Vec<(String, MetaValue)>, Error> {
    let template = match settings.get("chat_template").filter(|t| !t.is_null()) {
        Some(template) => template.clone(),
        None => match files.text("chat_template.jinja", SMALL_BYTES_MAX)? {
            Some(text) => Value::String(text),
            None => files
                .json_if_any::<ChatTemplateJson>("chat_template.json", SMALL_BYTES_MAX)?
                .map_or(Value::Null, |f| f.chat_template),
        },
    };
    let named = match template {
        Value::String(text) => {
            return Ok(vec![("chat_template".to_owned(), MetaValue::String(text))]);
        }
        Value::Array(named) => named,
        _ => return Ok(Vec::new()),
    };
    let mut plain = None;
    let mut others = BTreeMap::new();
    for choice in &named {
        let field = |key: &str| choice.get(key).and_then(Value::as_str);
        let (Some(name), Some(text)) = (field("name").filter(|n| !n.is_empty()), field("template"))
        else {
            continue;
        };
        if name == "default" {
            plain = Some(text.to_owned());
        } else {
            let safe: String = name
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
                .collect();
            others.insert(safe, text.to_owned());
        }
    }
    let mut keys = Vec::new();
    if !others.is_empty() {
        let names = others.keys().cloned().collect();
        keys.push((
            "chat_templates".to_owned(),
            MetaValue::Array(MetaArray::Strings(names)),
        ));
    }
    keys.extend(
        others
            .into_iter()
            .map(|(name, text)| (format!("chat_template.{name}"), MetaValue::String(text))),
    );
    keys.extend(plain.map(|text| ("chat_template".to_owned(), MetaValue::String(text))));
    Ok(keys)
}
