//! Tool calls in what a model writes: told from its text while it comes, in the spelling its chat template teaches.
//!
//! ```text
//! Hermes   text <tool_call>{"name": "f", "arguments": {…}}</tool_call> …       Qwen, Hermes and their kin
//! Llama    {"name": "f", "parameters": {…}}                                    Llama 3.1 and later; `;` between several
//! Mistral  text [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]               or `[TOOL_CALLS]f[ARGS]{…}`
//! List     [{"name": "f", "arguments": {…}}, …]                                what our grammar makes of `required`
//! Named    {…}                                                                 and of a named function: its arguments
//! ```
//!
//! Invariant: nothing that was written is lost: what looks like a call and is none, or names no tool that was offered,
//! comes out as the text it is. A text comes out as soon as it can no longer be the beginning of a call.

use std::mem;

use serde_json::{Map, Value};

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    Hermes,
    Llama,
    Mistral,
}

const MISTRAL_MARK: &str = "[TOOL_CALLS]";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const HERMES_BEGIN: &str = "<tool_call>";
const HERMES_END: &str = "</tool_call>";
const LLAMA_MARK: &str = "<|python_tag|>";

impl Spelling {
    /// The spelling that a chat template shows; `None` when it takes no tools or teaches one that is not read here.
    pub(crate) fn of(template: &str) -> Option<Spelling> {
        let has = |text: &str| template.contains(text);
        if !has("tools") {
            None
        } else if has(HERMES_BEGIN) && !has("<function=") {
            Some(Spelling::Hermes)
        } else if has(MISTRAL_MARK) {
            Some(Spelling::Mistral)
        } else if has(LLAMA_MARK) || has(r#"{"name": function name, "parameters":"#) {
            Some(Spelling::Llama)
        } else {
            None
        }
    }

    /// Whether a call's id may have nine letters and digits only.
    pub(crate) const fn short_ids(self) -> bool {
        matches!(self, Spelling::Mistral)
    }
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    /// A call begins, with the JSON text of its arguments as far as it is known.
    Call {
        name: String,
        arguments: String,
    },
    /// More of the arguments of the last call.
    Arguments(String),
}

/// What an answer may be.
#[derive(Clone, Debug)]
enum Form {
    /// Text alone.
    Text,
    /// Text and calls.
    Spelled(Spelling),
    /// A JSON list of calls, kept by a grammar.
    List,
    /// The arguments of this function, kept by a grammar.
    Named { name: String, begun: bool },
}

/// Reads an answer.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    form: Form,
    /// Functions that may be called.
    names: Vec<String>,
    /// Calls that are passed on, at most; what comes after is dropped.
    calls_max: usize,
    n_calls: usize,
    /// What is not told yet: the possible beginning of a call, or a call that has begun.
    held: String,
    /// `held` is within a call.
    inside: bool,
}

impl Reader {
    fn new(form: Form, names: Vec<String>, calls_max: usize) -> Reader {
        Reader {
            form,
            names,
            calls_max,
            n_calls: 0,
            held: String::new(),
            inside: false,
        }
    }

    /// For answers of text alone.
    pub(crate) fn text() -> Reader {
        Reader::new(Form::Text, Vec::new(), 0)
    }

    /// For answers with calls in `spelling`, to the functions `names`.
    pub(crate) fn spelled(spelling: Spelling, names: Vec<String>, calls_max: usize) -> Reader {
        Reader::new(Form::Spelled(spelling), names, calls_max)
    }

    /// For a list of calls.
    pub(crate) fn list(names: Vec<String>, calls_max: usize) -> Reader {
        Reader::new(Form::List, names, calls_max)
    }

    /// For the arguments of the function `name`.
    pub(crate) fn named(name: String) -> Reader {
        Reader::new(Form::Named { name, begun: false }, Vec::new(), 1)
    }

    /// A text that ends the first call, so that nothing need be generated after it.
    pub(crate) fn end_of_call(&self) -> Option<&'static str> {
        match self.form {
            Form::Spelled(Spelling::Hermes) => Some(HERMES_END),
            _ => None,
        }
    }

    /// What begins and ends calls, as far as it is not JSON.
    pub(crate) fn marks(&self) -> &'static [&'static str] {
        match self.form {
            Form::Spelled(Spelling::Hermes) => &[HERMES_BEGIN, HERMES_END],
            Form::Spelled(Spelling::Llama) => &[LLAMA_MARK],
            Form::Spelled(Spelling::Mistral) => &[MISTRAL_MARK, MISTRAL_ARGUMENTS],
            _ => &[],
        }
    }

    /// Calls that were told.
    pub(crate) fn n_calls(&self) -> usize {
        self.n_calls
    }

    /// What is certain with more text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        if text.is_empty() {
            return Vec::new();
        }
        match &mut self.form {
            Form::Text => vec![Piece::Text(text.to_owned())],
            Form::Named { name, begun } if !*begun => {
                *begun = true;
                self.n_calls = 1;
                vec![Piece::Call {
                    name: name.clone(),
                    arguments: text.to_owned(),
                }]
            }
            Form::Named { .. } => vec![Piece::Arguments(text.to_owned())],
            Form::List => {
                self.held.push_str(text);
                // A call ends with a brace; before one there is nothing to be read.
                if text.contains('}') {
                    self.complete()
                } else {
                    Vec::new()
                }
            }
            &mut Form::Spelled(spelling) => {
                self.held.push_str(text);
                match spelling {
                    Spelling::Hermes => self.hermes(),
                    Spelling::Llama => self.llama(),
                    Spelling::Mistral => self.mistral(),
                }
            }
        }
    }

    /// What is certain when no more text comes.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let held = mem::take(&mut self.held);
        let inside = mem::take(&mut self.inside);
        let calls = match self.form {
            _ if held.is_empty() => return Vec::new(),
            // What is left after calls is the list's end, or a call that a limit cut short.
            Form::List if self.n_calls > 0 => return Vec::new(),
            Form::Text | Form::Named { .. } | Form::List => None,
            Form::Spelled(Spelling::Hermes) if inside => {
                json_calls(held.trim_start_matches(HERMES_BEGIN))
            }
            Form::Spelled(Spelling::Hermes) => None,
            Form::Spelled(Spelling::Llama) => {
                let text = held.trim_start();
                llama_calls(text.strip_prefix(LLAMA_MARK).unwrap_or(text))
            }
            Form::Spelled(Spelling::Mistral) if inside => {
                mistral_calls(held.trim_start_matches(MISTRAL_MARK))
            }
            Form::Spelled(Spelling::Mistral) => None,
        };
        self.tell(calls, held)
    }

    /// Calls when they are calls to what was offered, else the text.
    fn tell(&mut self, calls: Option<Vec<Call>>, text: String) -> Vec<Piece> {
        let known = |call: &Call| self.names.contains(&call.name);
        let Some(calls) = calls.filter(|calls| !calls.is_empty() && calls.iter().all(known)) else {
            // White space around calls is no text.
            let blank = self.n_calls > 0 && text.trim().is_empty();
            return if blank {
                Vec::new()
            } else {
                vec![Piece::Text(text)]
            };
        };
        let room = self.calls_max - self.n_calls.min(self.calls_max);
        let calls: Vec<Piece> = calls
            .into_iter()
            .take(room)
            .map(|call| Piece::Call {
                name: call.name,
                arguments: Value::Object(call.arguments).to_string(),
            })
            .collect();
        self.n_calls += calls.len();
        calls
    }

    fn hermes(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        loop {
            if self.inside {
                let Some(end) = self.held.find(HERMES_END) else {
                    return pieces;
                };
                let rest = self.held.split_off(end + HERMES_END.len());
                let whole = mem::replace(&mut self.held, rest);
                self.inside = false;
                let body = &whole[HERMES_BEGIN.len()..end];
                let calls = json_calls(body);
                pieces.extend(self.tell(calls, whole));
            } else if let Some(begin) = self.held.find(HERMES_BEGIN) {
                let rest = self.held.split_off(begin);
                let before = mem::replace(&mut self.held, rest);
                self.inside = true;
                pieces.extend(before_call(&before));
            } else {
                pieces.extend(self.release(HERMES_BEGIN));
                return pieces;
            }
        }
    }

    /// Calls of a list that are complete.
    fn complete(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        loop {
            let between = |c: char| c.is_ascii_whitespace() || matches!(c, '[' | ',');
            let rest = self.held.trim_start_matches(between);
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let call = match values.next() {
                Some(Ok(value)) => json_call(value).map(|call| vec![call]),
                _ => return pieces,
            };
            let (whole, rest) = rest.split_at(values.byte_offset());
            let (whole, rest) = (whole.to_owned(), rest.to_owned());
            pieces.extend(self.tell(call, whole));
            self.held = rest;
        }
    }

    fn mistral(&mut self) -> Vec<Piece> {
        if self.inside {
            return Vec::new();
        }
        let Some(begin) = self.held.find(MISTRAL_MARK) else {
            return self.release(MISTRAL_MARK).into_iter().collect();
        };
        let rest = self.held.split_off(begin);
        let before = mem::replace(&mut self.held, rest);
        self.inside = true;
        before_call(&before).into_iter().collect()
    }

    /// An answer that does not begin like a call is text to its end.
    fn llama(&mut self) -> Vec<Piece> {
        let text = self.held.trim_start();
        let may_be = text.is_empty()
            || text.starts_with('{')
            || text.starts_with(LLAMA_MARK)
            || LLAMA_MARK.starts_with(text);
        if may_be && !self.inside {
            return Vec::new();
        }
        self.inside = true;
        vec![Piece::Text(mem::take(&mut self.held))]
    }

    /// What of the held text can no longer belong to a call: all but white space and the beginning of `mark` at its end.
    fn release(&mut self, mark: &str) -> Option<Piece> {
        let keep = (1..mark.len())
            .rev()
            .find(|&n| self.held.ends_with(&mark[..n]))
            .unwrap_or(0);
        let end = self.held[..self.held.len() - keep].trim_end().len();
        let rest = self.held.split_off(end);
        let text = mem::replace(&mut self.held, rest);
        if text.is_empty() {
            None
        } else {
            Some(Piece::Text(text))
        }
    }
}

/// The text before a call, without the white space between.
fn before_call(text: &str) -> Option<Piece> {
    let text = text.trim_end();
    if text.is_empty() {
        None
    } else {
        Some(Piece::Text(text.to_owned()))
    }
}

struct Call {
    name: String,
    arguments: Map<String, Value>,
}

/// One call, or a list of them.
fn json_calls(text: &str) -> Option<Vec<Call>> {
    match serde_json::from_str(text).ok()? {
        Value::Array(items) => items.into_iter().map(json_call).collect(),
        one => Some(vec![json_call(one)?]),
    }
}

fn json_call(value: Value) -> Option<Call> {
    let Value::Object(mut fields) = value else {
        return None;
    };
    let Some(Value::String(name)) = fields.remove("name") else {
        return None;
    };
    let arguments = fields
        .remove("arguments")
        .or_else(|| fields.remove("parameters"));
    match arguments {
        Some(Value::Object(arguments)) => Some(Call { name, arguments }),
        // A function without arguments may be called without any.
        None | Some(Value::Null) => Some(Call {
            name,
            arguments: Map::new(),
        }),
        // Some models write the object as a string of JSON.
        Some(Value::String(text)) => Some(Call {
            name,
            arguments: serde_json::from_str(&text).ok()?,
        }),
        Some(_) => None,
    }
}

/// Objects with `;` or nothing but white space between them.
fn llama_calls(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        calls.push(json_call(values.next()?.ok()?)?);
        rest = rest[values.byte_offset()..].trim_start();
        rest = rest.strip_prefix(';').unwrap_or(rest).trim_start();
    }
    Some(calls)
}

/// A list of objects, or names each with its arguments.
fn mistral_calls(text: &str) -> Option<Vec<Call>> {
    if let Some(calls) = json_calls(text) {
        return Some(calls);
    }
    let mut calls = Vec::new();
    for one in text.split(MISTRAL_MARK) {
        let begin = one.find('{')?;
        let name = one[..begin].trim();
        let name = name.strip_suffix(MISTRAL_ARGUMENTS).unwrap_or(name).trim();
        calls.push(Call {
            name: name.to_owned(),
            arguments: serde_json::from_str(&one[begin..]).ok()?,
        });
    }
    Some(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        vec!["f".to_owned(), "g".to_owned()]
    }

    /// The answer read in pieces of `n` characters, with neighbouring texts joined.
    fn read(mut reader: Reader, text: &str, n: usize) -> Vec<Piece> {
        let chars: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for chunk in chars.chunks(n) {
            pieces.extend(reader.push(&chunk.iter().collect::<String>()));
        }
        pieces.extend(reader.finish());
        let mut joined: Vec<Piece> = Vec::new();
        for piece in pieces {
            match (joined.last_mut(), piece) {
                (Some(Piece::Text(last)), Piece::Text(more)) => last.push_str(&more),
                (Some(Piece::Call { arguments, .. }), Piece::Arguments(more)) => {
                    arguments.push_str(&more);
                }
                (_, piece) => joined.push(piece),
            }
        }
        joined
    }

    fn check(reader: &Reader, text: &str, expected: &[Piece]) {
        for n in [1, 2, 3, 7, 1000] {
            assert_eq!(read(reader.clone(), text, n), expected, "{text:?} by {n}");
        }
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> Piece {
        Piece::Call {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    #[test]
    fn hermes() {
        let reader = Reader::spelled(Spelling::Hermes, names(), 8);
        check(
            &reader,
            "no call <tool at all\n",
            &[text("no call <tool at all\n")],
        );
        check(
            &reader,
            "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>",
            &[text("Let me see."), call("f", r#"{"a":1}"#)],
        );
        let two = "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{\"x\":[\"</b>\"]}}</tool_call>\n";
        check(
            &reader,
            two,
            &[call("f", "{}"), call("g", r#"{"x":["</b>"]}"#)],
        );
        let one = Reader::spelled(Spelling::Hermes, names(), 1);
        check(&one, two, &[call("f", "{}")]);
        // The end of the text ends a call too.
        check(
            &reader,
            "<tool_call>{\"name\":\"f\",\"arguments\":{}}",
            &[call("f", "{}")],
        );
    }

    #[test]
    fn what_is_no_call_stays_text() {
        let reader = Reader::spelled(Spelling::Hermes, names(), 8);
        for whole in [
            "<tool_call>{\"name\": \"h\", \"arguments\": {}}</tool_call>",
            "<tool_call>nonsense</tool_call> and more",
            "<tool_call>{\"name\": \"f\"",
            "a < b, <tool_",
        ] {
            check(&reader, whole, &[text(whole)]);
        }
        let llama = Reader::spelled(Spelling::Llama, names(), 8);
        for whole in [
            "{\"answer\": 1}",
            "{\"name\": \"f\"",
            " text {\"name\": \"f\"}",
        ] {
            check(&llama, whole, &[text(whole)]);
        }
    }

    #[test]
    fn llama() {
        let reader = Reader::spelled(Spelling::Llama, names(), 8);
        check(
            &reader,
            "\n{\"name\": \"f\", \"parameters\": {\"a\": \"b\"}}",
            &[call("f", r#"{"a":"b"}"#)],
        );
        check(
            &reader,
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}",
            &[call("f", "{}"), call("g", "{}")],
        );
        check(&reader, "It is {sunny}.", &[text("It is {sunny}.")]);
    }

    #[test]
    fn mistral() {
        let reader = Reader::spelled(Spelling::Mistral, names(), 8);
        check(
            &reader,
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            &[call("f", r#"{"a":1}"#), call("g", "{}")],
        );
        check(
            &reader,
            "Well, [TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g{}",
            &[text("Well,"), call("f", r#"{"a":1}"#), call("g", "{}")],
        );
        check(&reader, "[TOOL] x", &[text("[TOOL] x")]);
    }

    #[test]
    fn what_a_grammar_keeps() {
        check(
            &Reader::list(names(), 8),
            "[{\"name\":\"f\",\"arguments\":{\"a\":1}}]",
            &[call("f", r#"{"a":1}"#)],
        );
        check(
            &Reader::named("g".to_owned()),
            "{\"a\": 1}",
            &[call("g", "{\"a\": 1}")],
        );
    }

    #[test]
    fn a_template_shows_its_spelling() {
        assert_eq!(Spelling::of("{% for m in messages %}"), None);
        assert_eq!(
            Spelling::of("{% if tools %} within <tool_call></tool_call>"),
            Some(Spelling::Hermes)
        );
        assert_eq!(Spelling::of("{% if tools %} <tool_call><function=x>"), None);
        assert_eq!(
            Spelling::of("{{ tools }}[TOOL_CALLS]"),
            Some(Spelling::Mistral)
        );
        assert_eq!(
            Spelling::of("{{ tools }} {\"name\": function name, \"parameters\": x}"),
            Some(Spelling::Llama)
        );
        assert_eq!(Spelling::of("{{ tools }} something else"), None);
    }
}
