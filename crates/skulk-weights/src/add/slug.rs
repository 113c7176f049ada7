//! The names that a new entry gets, from the name of its model.
//!
//! Invariant: only whole words are taken out of a name (`Foo-items` keeps its `items`), never the first one, and what
//! comes out is a valid key and a valid repository name.

/// Words that say how a checkpoint was packed, not which model it is.
const PACKING: [&str; 4] = ["4bit", "8bit", "mlx", "optiq"];
/// Words that say that a model was tuned for instructions.
const TUNED: [&str; 2] = ["instruct", "it"];
/// What every entry of `catalog add` is.
const ENDING: &str = "full-q4-k";

/// The short key: without packing and tuning.
pub(super) fn key(model: &str) -> String {
    joined(words(model, &[&PACKING, &TUNED]))
}

/// The stem of the output and of the repository: without packing, `instruct` as `it`.
pub(super) fn artifact(model: &str) -> String {
    let first = last(model).split('-').next();
    let words = words(model, &[&PACKING]).map(|word| match word {
        word if Some(word) != first && word.eq_ignore_ascii_case("instruct") => "it",
        word => word,
    });
    joined(words)
}

/// The stem of a sidecar's repository: the whole name.
pub(super) fn base(model: &str) -> String {
    squeezed(&last(model).to_lowercase(), |c| c == '_')
}

/// The words between dashes that are in none of `lists`; the first always counts.
fn words<'a>(model: &'a str, lists: &[&'a [&'a str]]) -> impl Iterator<Item = &'a str> {
    let lists = lists.to_vec();
    let counts = move |word: &str| !lists.iter().any(|list| is_one_of(word, list));
    last(model)
        .split('-')
        .enumerate()
        .filter(move |(index, word)| *index == 0 || counts(word))
        .map(|(_, word)| word)
}

fn joined<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.collect();
    let stem = squeezed(&words.join("-").to_lowercase(), |_| false);
    match stem.as_str() {
        "" => ENDING.to_owned(),
        stem => format!("{stem}-{ENDING}"),
    }
}

fn last(model: &str) -> &str {
    model.rsplit('/').next().unwrap_or(model)
}

fn is_one_of(word: &str, words: &[&str]) -> bool {
    words.iter().any(|other| word.eq_ignore_ascii_case(other))
}

/// `text` with one dash for every run of anything but ASCII letters, digits and what `keeps` keeps.
fn squeezed(text: &str, keeps: impl Fn(char) -> bool) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || keeps(c) {
            out.push(c);
        } else if !out.is_empty() && !out.ends_with('-') {
            out.push('-');
        }
    }
    out.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_whole_words_only() {
        for (model, expected_key, expected_artifact) in [
            ("mlx-community/Foo-7B-4bit", "foo-7b", "foo-7b"),
            ("acme/Bar_2.5-Instruct", "bar-2-5", "bar-2-5-it"),
            (
                "mlx-community/Zed3.5-9B-OptiQ-4bit",
                "zed3-5-9b",
                "zed3-5-9b",
            ),
            ("google/gemma-3-4b-it", "gemma-3-4b", "gemma-3-4b-it"),
            ("acme/Foo-items", "foo-items", "foo-items"),
            (
                "acme/Llama-Italian-3B",
                "llama-italian-3b",
                "llama-italian-3b",
            ),
            ("acme/Foo+Bar", "foo-bar", "foo-bar"),
            ("acme/It-7B", "it-7b", "it-7b"),
        ] {
            assert_eq!(key(model), format!("{expected_key}-full-q4-k"));
            assert_eq!(artifact(model), format!("{expected_artifact}-full-q4-k"));
        }
        assert_eq!(base("Qwen/Qwen3.5-9B_x"), "qwen3-5-9b_x");
        assert_eq!(base("acme/Base-MTP"), "base-mtp");
    }
}
