//! A model card: YAML front matter between two `---` lines, then Markdown.
//!
//! Invariant: [`split`] loses no byte of the body. Whether the Hub accepts the front matter is
//! [`crate::Hub::validate_card`]'s question.

use serde_json::Value;

/// Why a card's front matter cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The YAML is broken.
    #[error("the card's front matter is no valid YAML: {0}")]
    Yaml(String),
    /// The YAML is a list or a single value.
    #[error("the card's front matter is no mapping of keys to values")]
    NotAMapping,
}

/// Front matter (without its `---` lines) and body of a card; `None` when it has no front matter.
#[must_use]
pub fn split(markdown: &str) -> Option<(&str, &str)> {
    let text = markdown.strip_prefix('\u{feff}').unwrap_or(markdown);
    let first_end = text.find('\n')? + 1;
    if text[..first_end].trim_end() != "---" {
        return None;
    }
    let mut at = first_end;
    for line in text[first_end..].split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some((&text[first_end..at], &text[at + line.len()..]));
        }
        at += line.len();
    }
    None
}

/// The front matter of a card as a JSON object; `None` when it has none.
///
/// # Errors
/// When the YAML is broken or no mapping.
pub fn front_matter(markdown: &str) -> Result<Option<Value>, CardError> {
    let Some((yaml, _)) = split(markdown) else {
        return Ok(None);
    };
    let value: Value = serde_saphyr::from_str(yaml).map_err(|e| CardError::Yaml(e.to_string()))?;
    match value {
        Value::Object(_) => Ok(Some(value)),
        Value::Null => Ok(Some(Value::Object(serde_json::Map::new()))),
        _ => Err(CardError::NotAMapping),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_splits_into_front_matter_and_body() {
        let card = "---\nlicense: mit\ntags: [a, b]\n---\n# Title\n---\nrest\n";
        assert_eq!(
            split(card),
            Some(("license: mit\ntags: [a, b]\n", "# Title\n---\nrest\n"))
        );
        let value = front_matter(card).unwrap().unwrap();
        assert_eq!(value["tags"][1], "b");
        assert_eq!(split("# only text\n"), None);
        assert_eq!(split("---\nnever closed\n"), None);
        assert!(front_matter("---\n- a\n---\n").is_err());
        assert!(front_matter("---\na: [\n---\n").is_err());
    }
}
