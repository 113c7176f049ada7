//! Answers that follow a grammar: which tokens may come next, by `llguidance`.
//!
//! A [`GrammarFactory`] belongs to a tokenizer and makes a [`Grammar`] of a JSON schema, an expression or a grammar in
//! Lark's language; the grammar goes with a request and follows its tokens.
//!
//! Invariant: a token that a grammar lets pass leaves it able to end some day, so that a generation under a grammar is a
//! beginning of a text of that grammar, and all of one when it ends before its limit. Compiling and each step have
//! bounds of work and memory; who exceeds one gets an error.
//!
//! Left out: what a schema asks for that the library cannot follow is an error, not ignored.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use crate::tokenizer::Tokenizer;

/// Longest text of a grammar, in bytes.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// States that a grammar's lexer may have, of 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 50_000;

/// Patterns in a schema that may ask for all of them at once: eight take 10 ms in the worst case, twenty take seconds.
const MAX_COMBINED_PATTERNS: usize = 8;
/// Names by pattern in one object.
const MAX_PATTERN_PROPERTIES: usize = 16;

/// Key of a schema under which the library is told how to read it.
const OPTIONS: &str = "x-guidance";

/// A line break and an indentation, or a few spaces: what a model may write between two signs of JSON. Some models
/// would write spaces to the end of their context where they may.
const WHITESPACE: &str = r"(\n[ \t]{0,40}|[ \t]{1,2})";

fn options() -> Value {
    serde_json::json!({"whitespace_pattern": WHITESPACE})
}

/// Why there is no grammar.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GrammarError {
    /// The tokenizer lacks what a grammar needs.
    #[error("grammars cannot be used with this model: {0}")]
    Tokenizer(String),
    /// The schema or grammar is not understood, or too large.
    #[error("{0}")]
    Invalid(String),
}

/// Makes grammars for one tokenizer. Costs a trie of the vocabulary, so that one serves all requests.
pub struct GrammarFactory {
    parsers: ParserFactory,
}

impl GrammarFactory {
    /// For texts in the tokens of `tokenizer`.
    ///
    /// # Errors
    /// [`GrammarError::Tokenizer`].
    pub fn new(tokenizer: &Tokenizer) -> Result<GrammarFactory, GrammarError> {
        let n_vocab = tokenizer.n_vocab() as u32;
        let eos: Vec<u32> = tokenizer
            .eos()
            .iter()
            .copied()
            .filter(|&id| id < n_vocab)
            .collect();
        let Some(&first) = eos.first() else {
            return Err(GrammarError::Tokenizer(
                "it has no token that ends a text".to_owned(),
            ));
        };
        let words: Vec<Vec<u8>> = (0..n_vocab)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                let is_control = tokenizer.is_special(id) || eos.contains(&id);
                let marker = is_control.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
                marker.into_iter().chain(bytes.iter().copied()).collect()
            })
            .collect();
        let info = TokRxInfo::new(n_vocab, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos);
        let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut parsers = ParserFactory::new_simple(&environment)
            .map_err(|e| GrammarError::Tokenizer(e.to_string()))?;
        parsers.quiet();
        let limits = parsers.limits_mut();
        // The state of a parser is of no use to whoever sent the schema.
        limits.verbose_errors = false;
        limits.max_lexer_states = MAX_LEXER_STATES;
        Ok(GrammarFactory { parsers })
    }

    /// A JSON value that `schema` describes, with a line break and indentation or two spaces at most between its signs.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`].
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, GrammarError> {
        within(schema.to_string().len())?;
        let mut patterns = Patterns::default();
        patterns.count(schema);
        patterns.check()?;
        let mut schema = schema.clone();
        match &mut schema {
            // `true` is JSON Schema's way to say anything.
            Value::Bool(true) => schema = serde_json::json!({ OPTIONS: options() }),
            Value::Object(keys) if keys.contains_key(OPTIONS) => {
                let reason = format!("the schema has {OPTIONS}, which is not taken from requests");
                return Err(GrammarError::Invalid(reason));
            }
            Value::Object(keys) => {
                keys.insert(OPTIONS.to_owned(), options());
            }
            _ => {
                let reason = "the schema is neither an object nor true";
                return Err(GrammarError::Invalid(reason.to_owned()));
            }
        }
        self.compile(TopLevelGrammar::from_json_schema(schema))
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`].
    pub fn json_object(&self) -> Result<Grammar, GrammarError> {
        self.json_schema(&serde_json::json!({"type": "object"}))
    }

    /// A text that the regular expression matches as a whole; `regex` crate's language without anchors and look-around.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`].
    pub fn regex(&self, expression: &str) -> Result<Grammar, GrammarError> {
        within(expression.len())?;
        self.compile(TopLevelGrammar::from_regex(expression))
    }

    /// A text of this grammar, in `llguidance`'s variant of Lark; `%json {…}` is a JSON schema inside it.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`].
    pub fn lark(&self, grammar: &str) -> Result<Grammar, GrammarError> {
        within(grammar.len())?;
        self.compile(TopLevelGrammar::from_lark(grammar.to_owned()))
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Grammar, GrammarError> {
        // The library's compiler asserts some of what it believes about its input.
        let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.parsers.create_parser(grammar)
        }));
        let parser = match parser {
            Ok(parser) => parser.map_err(|e| invalid(&e)),
            Err(_) => Err(GrammarError::Invalid(
                "the grammar cannot be compiled".to_owned(),
            )),
        }?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(warning) = matcher.grammar_warnings().into_iter().next() {
            return Err(GrammarError::Invalid(warning));
        }
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Invalid(error)),
            None => Ok(Grammar { matcher }),
        }
    }
}

/// What a schema asks of a text by patterns. That a text follows several at once costs the library time and memory
/// that grow with the product of them and that it does not bound.
#[derive(Default)]
struct Patterns {
    n: usize,
    /// Some schema is put together of others, so that all patterns may have to hold at once.
    combine: bool,
    /// Names of properties that one object describes by patterns; each is compared with each.
    n_of_names: usize,
}

impl Patterns {
    fn count(&mut self, schema: &Value) {
        match schema {
            Value::Array(items) => items.iter().for_each(|item| self.count(item)),
            Value::Object(keys) => {
                let n = ["pattern", "format"]
                    .iter()
                    .filter(|&&key| keys.get(key).is_some_and(Value::is_string))
                    .count();
                self.n += n;
                self.combine |= n > 1 || keys.get("allOf").is_some_and(Value::is_array);
                let joins = ["$ref", "anyOf", "oneOf"]
                    .iter()
                    .any(|&key| keys.contains_key(key));
                self.combine |= n > 0 && joins;
                if let Some(Value::Object(names)) = keys.get("patternProperties") {
                    self.n_of_names = self.n_of_names.max(names.len());
                }
                keys.values().for_each(|value| self.count(value));
            }
            _ => {}
        }
    }

    fn check(&self) -> Result<(), GrammarError> {
        if self.combine && self.n > MAX_COMBINED_PATTERNS {
            return Err(GrammarError::Invalid(format!(
                "the schema combines schemas and has {} patterns and formats; {MAX_COMBINED_PATTERNS} are followed then",
                self.n
            )));
        }
        if self.n_of_names > MAX_PATTERN_PROPERTIES {
            return Err(GrammarError::Invalid(format!(
                "an object of the schema has {} patternProperties; {MAX_PATTERN_PROPERTIES} are followed",
                self.n_of_names
            )));
        }
        Ok(())
    }
}

fn within(n_bytes: usize) -> Result<(), GrammarError> {
    if n_bytes > MAX_SOURCE_BYTES {
        return Err(GrammarError::Invalid(format!(
            "the grammar has {n_bytes} bytes; {MAX_SOURCE_BYTES} are read"
        )));
    }
    Ok(())
}

fn invalid(error: &dyn fmt::Display) -> GrammarError {
    GrammarError::Invalid(error.to_string())
}

/// A grammar and how far a text has followed it. A copy goes on independently.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// Sets the logits, (vocabulary), of tokens that may not come next to minus infinity. Tokens that end a text may
    /// come where the grammar may end.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`] when a step exceeds its bound.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), GrammarError> {
        let allowed = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| invalid(&e))?;
        // 32 tokens to a word, the lowest bit first; beyond the last word nothing is allowed.
        let words = allowed
            .as_slice()
            .iter()
            .copied()
            .chain(std::iter::repeat(0));
        for (logits, word) in logits.chunks_mut(32).zip(words) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    /// Goes on with a token.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`] when it is none of those that may come next.
    pub fn accept(&mut self, id: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(id).map_err(|e| invalid(&e))
    }

    /// The text is one of the grammar, and nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// The text is one of the grammar; more may follow.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }
}
