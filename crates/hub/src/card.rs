//! A model card: YAML front matter between two `---` lines, then Markdown.
//!
//! Invariant: the front matter ends at the next line `---`, whatever is in it. Whether the Hub accepts it is
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

/// The front matter of a card as a JSON object; `None` when it has none.
///
/// # Errors
/// When the YAML is broken or no mapping.
pub fn front_matter(markdown: &str) -> Result<Option<Value>, CardError> {
    let Some(yaml) = yaml(markdown) else {
        return Ok(None);
    };
    let value: Value = serde_saphyr::from_str(yaml).map_err(|e| CardError::Yaml(e.to_string()))?;
    match value {
        Value::Object(_) => Ok(Some(value)),
        Value::Null => Ok(Some(Value::Object(serde_json::Map::new()))),
        _ => Err(CardError::NotAMapping),
    }
}

/// The front matter without its `---` lines.
fn yaml(markdown: &str) -> Option<&str> {
    let text = markdown.strip_prefix('\u{feff}').unwrap_or(markdown);
    let (first, text) = text.split_once('\n')?;
    if first.trim_end() != "---" {
        return None;
    }
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some(&text[..end]);
        }
        end += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_is_what_stands_between_the_lines() {
        let card = "---\nlicense: mit\ntags: [a, b]\n---\n# Title\n---\nrest\n";
        assert_eq!(
            front_matter(card).unwrap().unwrap(),
            serde_json::json!({"license": "mit", "tags": ["a", "b"]})
        );
        for without in ["# only text\n", "---\nnever closed\n", "---"] {
            assert_eq!(front_matter(without).unwrap(), None, "{without}");
        }
        assert!(front_matter("---\n- a\n---\n").is_err());
        assert!(front_matter("---\na: [\n---\n").is_err());
    }
}
