//! The model card: the YAML block at the top of README.md.
//!
//! Invariant: a card that `check` passes without errors gives a mapping in `front_matter`. The rules are those of the
//! Hub that clients rely on (license, base_model, tags, language, and the like); left out: its lists of known values.

use serde_json::{Map, Value};

/// Front matter longer than this is refused.
const MAX_BYTES: usize = 256 << 10;

/// What `validate-yaml` answers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    pub(crate) errors: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

/// Checks a whole README.md as the Hub does before it takes one.
pub(crate) fn check(markdown: &str) -> Findings {
    let mut findings = Findings::default();
    let Some(yaml) = block(markdown) else {
        findings
            .warnings
            .push("empty or missing yaml metadata in repo card".to_owned());
        return findings;
    };
    match parse(yaml) {
        Err(why) => findings.errors.push(why),
        Ok(card) if card.is_empty() => {
            findings
                .warnings
                .push("empty or missing yaml metadata in repo card".to_owned());
        }
        Ok(card) => findings.errors = card_errors(&card),
    }
    findings
}

/// The front matter as JSON; `None` where there is none, or none that can be read.
pub(crate) fn front_matter(markdown: &str) -> Option<Map<String, Value>> {
    parse(block(markdown)?).ok().filter(|card| !card.is_empty())
}

/// The tags that the Hub derives from a card and the names of the files.
pub(crate) fn tags<'a>(
    card: Option<&Map<String, Value>>,
    files: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let mut tags: Vec<String> = Vec::new();
    let mut add = |tag: String| {
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    };
    let (mut safetensors, mut gguf) = (false, false);
    for file in files {
        safetensors |= file.ends_with(".safetensors");
        gguf |= file.ends_with(".gguf");
    }
    if safetensors {
        add("safetensors".to_owned());
    }
    if gguf {
        add("gguf".to_owned());
    }
    let Some(card) = card else { return tags };
    let texts = |key: &str| texts(card.get(key));
    texts("library_name").for_each(|text| add(text.to_owned()));
    texts("tags").for_each(|text| add(text.to_owned()));
    texts("pipeline_tag").for_each(|text| add(text.to_owned()));
    texts("language").for_each(|text| add(text.to_owned()));
    texts("datasets").for_each(|text| add(format!("dataset:{text}")));
    texts("base_model").for_each(|text| add(format!("base_model:{text}")));
    if let Some(relation) = card.get("base_model_relation").and_then(Value::as_str) {
        texts("base_model").for_each(|text| add(format!("base_model:{relation}:{text}")));
    }
    texts("license").for_each(|text| add(format!("license:{text}")));
    tags
}

/// The text between the first line `---` and the next one.
fn block(markdown: &str) -> Option<&str> {
    let markdown = markdown.strip_prefix('\u{feff}').unwrap_or(markdown);
    let rest = markdown.strip_prefix("---")?;
    let rest = rest
        .strip_prefix("\r\n")
        .or_else(|| rest.strip_prefix('\n'))?;
    let mut end = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some(&rest[..end]);
        }
        end += line.len();
    }
    None
}

fn parse(yaml: &str) -> Result<Map<String, Value>, String> {
    if yaml.len() > MAX_BYTES {
        return Err(format!(
            "the yaml metadata is longer than {MAX_BYTES} bytes"
        ));
    }
    if yaml.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_saphyr::from_str::<Value>(yaml) {
        Ok(Value::Object(card)) => Ok(card),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err("the yaml metadata must be a mapping of keys to values".to_owned()),
        Err(e) => Err(format!("the yaml metadata cannot be read: {e}")),
    }
}

fn card_errors(card: &Map<String, Value>) -> Vec<String> {
    let mut errors = Vec::new();
    let text_or_list = ["license", "base_model", "language", "datasets"];
    let text_only = [
        "library_name",
        "pipeline_tag",
        "license_name",
        "license_link",
        "base_model_relation",
        "model_name",
    ];
    for (key, value) in card {
        let key = key.as_str();
        if text_or_list.contains(&key) && !is_text(value) && !is_list_of_texts(value) {
            errors.push(format!("\"{key}\" must be a string or a list of strings"));
        } else if text_only.contains(&key) && !is_text(value) {
            errors.push(format!("\"{key}\" must be a string"));
        } else if key == "tags" && !is_list_of_texts(value) {
            errors.push("\"tags\" must be a list of strings".to_owned());
        }
    }
    for text in texts(card.get("base_model")).filter(|text| !is_hub_id(text)) {
        errors.push(format!("\"base_model\" with value \"{text}\" is not valid. Use a model id from https://hf.co/models."));
    }
    if let Some(relation) = card.get("base_model_relation").and_then(Value::as_str) {
        let known = ["adapter", "merge", "quantized", "finetune"];
        if !known.contains(&relation) {
            errors.push(format!(
                "\"base_model_relation\" must be one of [{}]",
                known.join(", ")
            ));
        }
    }
    errors
}

fn is_text(value: &Value) -> bool {
    value.as_str().is_some_and(|text| !text.is_empty())
}

fn is_list_of_texts(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|list| list.iter().all(is_text))
}

/// `name` or `owner/name` in the alphabet of the Hub.
fn is_hub_id(text: &str) -> bool {
    text.split('/').count() <= 2
        && text
            .split('/')
            .all(|part| crate::names::check_name("model id", part).is_ok())
}

/// A text, or each text of a list.
fn texts(value: Option<&Value>) -> impl Iterator<Item = &str> {
    let list = match value {
        Some(Value::Array(list)) => list.as_slice(),
        Some(value) => std::slice::from_ref(value),
        None => &[],
    };
    list.iter().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_is_found_and_typed() {
        let card = front_matter("---\nlicense: mit\ntags: [a, b]\nbase_model: x/y\nbase_model_relation: quantized\n---\n# T").unwrap();
        assert_eq!(card["license"], "mit");
        let tags = tags(Some(&card), ["m.gguf"].into_iter());
        assert_eq!(
            tags,
            [
                "gguf",
                "a",
                "b",
                "base_model:x/y",
                "base_model:quantized:x/y",
                "license:mit"
            ]
        );
        assert!(front_matter("# no card").is_none());
        assert!(front_matter("---\nnever: closed\n").is_none());
        assert_eq!(
            front_matter("---\r\nlicense: mit\r\n---\r\n").unwrap()["license"],
            "mit"
        );
    }

    #[test]
    fn findings() {
        let errors = |text: &str| check(text).errors;
        assert!(errors("---\nlicense: apache-2.0\nbase_model: [a/b, c]\n---\n").is_empty());
        assert_eq!(
            errors("---\nlicense: 3\n---\n"),
            ["\"license\" must be a string or a list of strings"]
        );
        assert_eq!(
            errors("---\n- a\n---\n"),
            ["the yaml metadata must be a mapping of keys to values"]
        );
        assert!(errors("---\na: [1\n---\n")[0].starts_with("the yaml metadata cannot be read"));
        assert!(
            errors("---\nbase_model: https://x/y\n---\n")[0]
                .starts_with("\"base_model\" with value")
        );
        assert!(
            errors("---\nbase_model: a/b\nbase_model_relation: extract\n---\n")[0]
                .contains("must be one of")
        );
        assert_eq!(
            errors("---\ntags: a\n---\n"),
            ["\"tags\" must be a list of strings"]
        );
        assert_eq!(check("hello").warnings.len(), 1);
        let bomb = format!("---\na: &a [x, x, x, x, x, x, x, x, x]\n{}---\n", (0..30).map(|i| {
            let last = if i == 0 { "a".to_owned() } else { format!("b{}", i - 1) };
            format!("b{i}: &b{i} [*{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}]\n")
        }).collect::<String>());
        assert!(!check(&bomb).errors.is_empty());
    }
}
