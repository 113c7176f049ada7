//! The spelling of names: keys, namespaces, repositories, collections and output directories.
//!
//! Invariant: a name that passes here is safe as one word of a command line, as one path component (each half of a
//! repository name) and in a URL path once percent-encoded. Leaves out whether anything of that name exists.

/// `[a-z0-9][a-z0-9-]*`
pub(crate) fn is_key(text: &str) -> bool {
    starts_alphanumeric(text) && text.chars().all(|c| is_lower_alphanumeric(c) || c == '-')
}

/// `[a-z0-9][a-z0-9._-]*`
pub(crate) fn is_namespace(text: &str) -> bool {
    starts_alphanumeric(text)
        && text
            .chars()
            .all(|c| is_lower_alphanumeric(c) || matches!(c, '.' | '_' | '-'))
}

/// `owner/name` of ASCII letters, digits, `_`, `.` and `-`; neither half is an option or a relative path.
pub(crate) fn is_repo(text: &str) -> bool {
    is_pair(text, |c| c.is_ascii_alphanumeric())
}

/// `owner/name` as [`is_repo`], but letters and digits of any script: a model of somebody else's Hub.
pub(crate) fn is_source_model(text: &str) -> bool {
    is_pair(text, char::is_alphanumeric)
}

/// The base name of a `.vindex` directory: no separator of any platform, no hidden file, no option, no stray space.
pub(crate) fn is_output_name(text: &str) -> bool {
    let Some(stem) = text.strip_suffix(".vindex") else {
        return false;
    };
    !stem.is_empty()
        && text.len() <= 255
        && !stem.starts_with(['-', '.', ' '])
        && !stem.ends_with([' ', '.'])
        && !text.chars().any(|c| {
            is_invisible(c) || matches!(c, '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|')
        })
}

/// A character that shows nothing, or changes how the text around it shows: controls, joiners, directions.
pub(crate) fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The part before the slash.
pub(crate) fn owner(repo: &str) -> &str {
    repo.split_once('/').map_or(repo, |(owner, _)| owner)
}

/// `owner/name` inside a Hub URL or a bare id, for `catalog find` and for hints; an error says what was wrong with it.
///
/// Of a URL the first two path parts count (`/tree/main` and the like are dropped), queries and fragments do not.
pub(crate) fn model_id(text: &str) -> Result<String, String> {
    let trimmed = text.trim();
    let bare = trimmed
        .split(['?', '#'])
        .next()
        .unwrap_or("")
        .trim_end_matches('/');
    for marker in ["huggingface.co/", "hf.co/"] {
        if let Some(at) = bare.rfind(marker) {
            let mut parts = bare[at + marker.len()..]
                .split('/')
                .filter(|part| !part.is_empty());
            return match (parts.next(), parts.next()) {
                (Some("datasets" | "spaces" | "collections"), _) => {
                    Err(format!("'{trimmed}' is not the URL of a model"))
                }
                (Some(owner), Some(name)) => Ok(format!("{owner}/{name}")),
                _ => Err(format!("cannot parse model ID from URL '{trimmed}'")),
            };
        }
    }
    if bare.contains('/') && !bare.contains("://") {
        Ok(bare.to_owned())
    } else {
        Err(format!(
            "expected owner/repo or a huggingface.co URL, got '{trimmed}'"
        ))
    }
}

fn is_pair(text: &str, is_letter: impl Fn(char) -> bool) -> bool {
    let Some((owner, name)) = text.split_once('/') else {
        return false;
    };
    [owner, name].into_iter().all(|half| {
        !half.is_empty()
            && !half.starts_with('-')
            && !half.chars().all(|c| c == '.')
            && half
                .chars()
                .all(|c| is_letter(c) || matches!(c, '_' | '.' | '-'))
    })
}

fn starts_alphanumeric(text: &str) -> bool {
    text.starts_with(is_lower_alphanumeric)
}

fn is_lower_alphanumeric(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_held_to_their_patterns() {
        type Rule = fn(&str) -> bool;
        let rules: &[(Rule, &[&str], &[&str])] = &[
            (
                is_key,
                &["a", "0", "7b", "a--b", "a-"],
                &["", "-a", "A", "a_b", "a b", "a.b", "é", "١٢", "a\n"],
            ),
            (
                is_namespace,
                &["acme", "my.org_1-x"],
                &["", "-x", ".x", "a b", "Acme", "é"],
            ),
            (
                is_repo,
                &["acme/x", "A.c-m_e/M.o--d_e-l", "a/b."],
                &[
                    "", "a", "/x", "a/", "a/b/c", "a b/c", "a/é", "--help/x", "a/..", "../x",
                    "a/-b", "a:b/c",
                ],
            ),
            (
                is_source_model,
                &["owner/模型-é", "a/b"],
                &[
                    "a/b/c", "own er/x", "--help/x", "owner/", "a\\b", "模型", "a/b\n",
                ],
            ),
            (
                is_output_name,
                &["a.vindex", "gemma-3.1_b.vindex", "own name.vindex"],
                &[
                    ".vindex",
                    "a",
                    "a/b.vindex",
                    "../a.vindex",
                    "a\\b.vindex",
                    "-a.vindex",
                    "a.vindex ",
                    "a\n.vindex",
                    "a\u{202e}b.vindex",
                    "..vindex",
                    "a.vindex.bak",
                    "c:.vindex",
                ],
            ),
        ];
        for (index, (rule, good, bad)) in rules.iter().enumerate() {
            good.iter()
                .for_each(|text| assert!(rule(text), "rule {index} refuses {text:?}"));
            bad.iter()
                .for_each(|text| assert!(!rule(text), "rule {index} accepts {text:?}"));
        }
    }

    #[test]
    fn model_ids_come_out_of_urls() {
        for (text, expected) in [
            (" google/gemma-3-4b-it/ ", "google/gemma-3-4b-it"),
            (
                "https://huggingface.co/google/gemma/tree/main",
                "google/gemma",
            ),
            ("https://hf.co/google/gemma?library=x#y", "google/gemma"),
            ("huggingface.co/a/b", "a/b"),
        ] {
            assert_eq!(model_id(text).as_deref(), Ok(expected));
        }
        for text in [
            "gemma",
            "https://huggingface.co/google",
            "https://huggingface.co/datasets/a/b",
            "https://example.com/a/b",
            "",
        ] {
            assert!(model_id(text).is_err(), "{text:?}");
        }
    }
}
