//! Which of llama.cpp's pre-tokenizers cuts a text as `tokenizer.json` does, and what its names stand for.
//!
//! llama.cpp knows them by name and its converter tells them by hashing a text's tokens; here they are told by
//! their patterns, which are what the names stand for.

use serde_json::Value;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// The pattern that the step `ByteLevel` applies on its own.
const BYTE_LEVEL: &str = "ByteLevel";
/// The step `Digits` that cuts at every digit.
const EACH_DIGIT: &str = "Digits";

/// What a pre-tokenizer's name in GGUF stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreTokenizer {
    /// Each cuts what those before it left.
    pub steps: Vec<PreStep>,
    /// A piece that is a token is taken whole, without merging.
    pub takes_words: bool,
}

/// A step of a pre-tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreStep {
    /// Each match of a pattern is a piece, and so is what lies between.
    Pattern(&'static str),
    /// Each digit is a piece.
    EachDigit,
    /// The pattern that GPT-2's step has on its own.
    ByteLevel,
}

/// The steps that `tokenizer.ggml.pre` stands for, by llama.cpp's names; `None` for one that is not known here.
pub fn pre_tokenizer(name: &str) -> Option<PreTokenizer> {
    let alias = match name {
        "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            "llama-bpe"
        }
        "dbrx" => "smaug-bpe",
        "deepseek-r1-qwen" | "megrez" | "stablelm2" => "qwen2",
        "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es" | "jina-v2-de" | "a.x-4.0"
        | "mellum" => "gpt-2",
        "llama4" => "gpt-4o",
        other => other,
    };
    if alias == "default" {
        let steps = DEFAULT.map(PreStep::Pattern).to_vec();
        return Some(PreTokenizer {
            steps,
            takes_words: false,
        });
    }
    let (steps, takes_words, _) = KNOWN.iter().find(|(_, _, known)| *known == alias)?;
    let step = |&step: &&'static str| match step {
        BYTE_LEVEL => PreStep::ByteLevel,
        EACH_DIGIT => PreStep::EachDigit,
        pattern => PreStep::Pattern(pattern),
    };
    Some(PreTokenizer {
        steps: steps.iter().map(step).collect(),
        takes_words: *takes_words,
    })
}

/// What llama.cpp does without a name.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// Patterns in order; whether llama.cpp takes whole words of the vocabulary without merging; its name.
const KNOWN: [(&[&str], bool, &str); 9] = [
    (&[LLAMA3], true, "llama-bpe"),
    (&[LLAMA3], false, "smaug-bpe"),
    (&[QWEN2], false, "qwen2"),
    (&[QWEN35], false, "qwen35"),
    (&[GPT4O], false, "gpt-4o"),
    (&[TEKKEN], true, "tekken"),
    (
        &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3_WORDS],
        false,
        "deepseek-v3",
    ),
    (&[BYTE_LEVEL], false, "gpt-2"),
    (&[EACH_DIGIT, BYTE_LEVEL], false, "smollm"),
];

/// The name for a `pre_tokenizer`, or `default` with a warning.
pub(super) fn name(pre_tokenizer: &Value, ignore_merges: bool) -> (&'static str, Option<String>) {
    let known = patterns(pre_tokenizer).and_then(|patterns| {
        KNOWN
            .iter()
            .find(|(known, ignores, _)| *known == patterns.as_slice() && *ignores == ignore_merges)
    });
    match known {
        Some((_, _, name)) => (name, None),
        None => {
            let warning = "the pre-tokenizer's pattern in tokenizer.json is none of the known ones; \
                           tokenizer.ggml.pre is \"default\", and llama.cpp may cut some texts differently";
            ("default", Some(warning.to_owned()))
        }
    }
}

/// True when `step` is, or has, the step `ByteLevel`.
pub(super) fn has_byte_level(step: &Value) -> bool {
    let nested = ["decoders", "pretokenizers"]
        .iter()
        .find_map(|k| step.get(*k))
        .and_then(Value::as_array);
    step.get("type").and_then(Value::as_str) == Some("ByteLevel")
        || nested.is_some_and(|s| s.iter().any(has_byte_level))
}

/// The patterns of a pre-tokenizer's steps, `None` where a step is of a kind that no entry of the table has.
fn patterns(step: &Value) -> Option<Vec<&str>> {
    let flag = |key: &str, default: bool| step.get(key).and_then(Value::as_bool).unwrap_or(default);
    let text = |key: &str| step.get(key).and_then(Value::as_str);
    match text("type")? {
        "Sequence" => {
            let steps = step.get("pretokenizers")?.as_array()?;
            Some(
                steps
                    .iter()
                    .map(patterns)
                    .collect::<Option<Vec<_>>>()?
                    .concat(),
            )
        }
        "ByteLevel" if flag("add_prefix_space", true) => None,
        "ByteLevel" if flag("use_regex", true) => Some(vec![BYTE_LEVEL]),
        "ByteLevel" => Some(Vec::new()),
        "Digits" => flag("individual_digits", false).then(|| vec![EACH_DIGIT]),
        "Split" => {
            // Two ways to say that each match is a piece.
            let each_match = matches!(
                (text("behavior"), flag("invert", false)),
                (Some("Isolated"), false) | (Some("Removed"), true)
            );
            each_match.then_some(vec![step.get("pattern")?.get("Regex")?.as_str()?])
        }
        _ => None,
    }
}
