//! Reads one YAML document into a tree in which every node knows its line and column.
//!
//! Invariant: a tree is small. The text is at most [`TEXT_BYTES_MAX`], aliases are expanded to at most [`NODES_MAX`]
//! nodes and a mapping has at most [`FIELDS_MAX`] keys, so a hostile file makes us use neither much memory nor much time.
//!
//! Plain scalars are read by YAML 1.1, as the manifests in the field were written for it: an unquoted `yes` is a
//! boolean and `12:30` a number. Tags outside the core schema are refused; nothing is constructed from them.

use std::collections::HashMap;

use serde_saphyr::granit_parser::{Event, Marker, Parser, ScalarStyle, StrInput, Tag};

/// The largest text that is read, in bytes.
pub(crate) const TEXT_BYTES_MAX: u64 = 4 << 20;
/// The most nodes that a document may have once its aliases are expanded.
const NODES_MAX: usize = 200_000;
/// The most keys of one mapping; they are looked up one after the other.
const FIELDS_MAX: usize = 1000;
/// The deepest nesting of lists and mappings.
const DEPTH_MAX: usize = 100;

/// A place in a text, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// A node of the document with its place.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a node holds.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    String(String),
    /// A scalar that YAML 1.1 reads as something other than a string: its text and what it is, such as "a boolean".
    Other(String, &'static str),
    List(Vec<Node>),
    Mapping(Mapping),
}

/// A mapping in the order of the text. A repeated key keeps its last value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mapping {
    pub(crate) fields: Vec<Field>,
    /// Keys that occur more than once in the text, at the place of the later one.
    pub(crate) repeated: Vec<(String, Place)>,
}

/// A key of a mapping and its value.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) place: Place,
    pub(crate) value: Node,
}

/// Why a text is not a document of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) place: Place,
    pub(crate) message: String,
}

impl Node {
    /// What the node is, for a message: "a list", "a boolean".
    pub(crate) fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "null",
            Value::String(_) => "a string",
            Value::Other(_, kind) => kind,
            Value::List(_) => "a list",
            Value::Mapping(_) => "a mapping",
        }
    }
}

impl Mapping {
    /// The field of that name.
    pub(crate) fn get(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

/// Reads `text`. An empty text is a null node.
pub(crate) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader {
        parser: Parser::new_from_str(text),
        anchors: HashMap::new(),
        n_nodes: 0,
    };
    reader.document()
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    n_nodes: usize,
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> Result<Node, SyntaxError> {
        let mut root = None;
        loop {
            let (event, place) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::DocumentStart(..) if root.is_some() => {
                    return Err(SyntaxError {
                        place,
                        message: "a second document starts here; one file holds one document"
                            .into(),
                    });
                }
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                event => root = Some(self.node(event, place, 0)?),
            }
        }
        Ok(root.unwrap_or(Node {
            place: Place { line: 1, column: 1 },
            value: Value::Null,
        }))
    }

    /// The next event that carries content, with the place where it starts.
    fn next(&mut self) -> Result<(Event<'a>, Place), SyntaxError> {
        loop {
            match self.parser.next_event() {
                None => return Ok((Event::StreamEnd, Place::default())),
                Some(Ok((Event::Comment(..) | Event::Anchor(..), _))) => {}
                Some(Ok((event, span))) => return Ok((event, place(&span.start))),
                Some(Err(error)) => {
                    let message = error.info().lines().next().unwrap_or("not YAML").to_owned();
                    return Err(SyntaxError {
                        place: place(error.marker()),
                        message,
                    });
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, place: Place, depth: usize) -> Result<Node, SyntaxError> {
        self.n_nodes += 1;
        if depth > DEPTH_MAX {
            return Err(SyntaxError {
                place,
                message: format!("nested deeper than {DEPTH_MAX} levels"),
            });
        }
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, tag) => (
                anchor,
                scalar(text.into_owned(), style, tag.as_deref(), place)?,
            ),
            Event::SequenceStart(_, anchor, tag) => {
                known_tag(tag.as_deref(), "seq", place)?;
                (anchor, self.list(depth)?)
            }
            Event::MappingStart(_, anchor, tag) => {
                known_tag(tag.as_deref(), "map", place)?;
                (anchor, self.mapping(depth)?)
            }
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id) else {
                    return Err(SyntaxError {
                        place,
                        message: "the alias refers to a node that is not complete yet".into(),
                    });
                };
                self.n_nodes += n_nodes(&node.value);
                if self.n_nodes > NODES_MAX {
                    return Err(too_many(place));
                }
                (0, node.value.clone())
            }
            _ => {
                return Err(SyntaxError {
                    place,
                    message: "expected a value".into(),
                });
            }
        };
        if anchor != 0 {
            self.n_nodes += n_nodes(&value);
        }
        if self.n_nodes > NODES_MAX {
            return Err(too_many(place));
        }
        let node = Node { place, value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, place) => items.push(self.node(event, place, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut mapping = Mapping::default();
        let mut merged = Vec::new();
        loop {
            let (event, place) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            if mapping.fields.len() + mapping.repeated.len() >= FIELDS_MAX {
                return Err(too_many_keys(place));
            }
            let is_merge =
                matches!(&event, Event::Scalar(text, ScalarStyle::Plain, _, _) if text == "<<");
            let key = self.node(event, place, depth + 1)?;
            let (event, value_place) = self.next()?;
            let value = self.node(event, value_place, depth + 1)?;
            if is_merge {
                merge_sources(value, &mut merged)?;
                continue;
            }
            let name = match key.value {
                Value::String(name) | Value::Other(name, _) => name,
                Value::Null => "null".to_owned(),
                Value::List(_) | Value::Mapping(_) => {
                    return Err(SyntaxError {
                        place,
                        message: "a key must be a name".into(),
                    });
                }
            };
            if let Some(index) = mapping.fields.iter().position(|field| field.name == name) {
                mapping.repeated.push((name.clone(), place));
                mapping.fields.remove(index);
            }
            mapping.fields.push(Field { name, place, value });
        }
        for field in merged {
            if mapping.fields.len() >= FIELDS_MAX {
                return Err(too_many_keys(field.place));
            }
            if mapping.get(&field.name).is_none() {
                mapping.fields.push(field);
            }
        }
        Ok(Value::Mapping(mapping))
    }
}

/// The fields that `<<: value` brings in; of two sources the first wins.
fn merge_sources(value: Node, merged: &mut Vec<Field>) -> Result<(), SyntaxError> {
    match value.value {
        Value::Mapping(mapping) => merged.extend(mapping.fields),
        Value::List(items) => {
            for item in items {
                match item.value {
                    Value::Mapping(mapping) => merged.extend(mapping.fields),
                    _ => {
                        return Err(SyntaxError {
                            place: item.place,
                            message: "<< merges mappings only".into(),
                        });
                    }
                }
            }
        }
        _ => {
            return Err(SyntaxError {
                place: value.place,
                message: "<< merges mappings only".into(),
            });
        }
    }
    Ok(())
}

fn scalar(
    text: String,
    style: ScalarStyle,
    tag: Option<&Tag>,
    place: Place,
) -> Result<Value, SyntaxError> {
    let Some(tag) = tag else {
        return Ok(if style == ScalarStyle::Plain {
            plain(text)
        } else {
            Value::String(text)
        });
    };
    match tag.core_suffix() {
        Some("str") => Ok(Value::String(text)),
        Some("null") => Ok(Value::Null),
        Some("bool") => Ok(Value::Other(text, "a boolean")),
        Some("int" | "float") => Ok(Value::Other(text, "a number")),
        Some("timestamp") => Ok(Value::Other(text, "a date")),
        _ if is_unspecific(tag) => Ok(Value::String(text)),
        _ => Err(unknown_tag(tag, place)),
    }
}

fn known_tag(tag: Option<&Tag>, expected: &str, place: Place) -> Result<(), SyntaxError> {
    match tag {
        Some(tag) if tag.core_suffix() != Some(expected) && !is_unspecific(tag) => {
            Err(unknown_tag(tag, place))
        }
        _ => Ok(()),
    }
}

/// Whether the tag is a lone `!`, which leaves the kind of the node as it is written.
fn is_unspecific(tag: &Tag) -> bool {
    tag.handle().is_empty() && tag.suffix() == "!" || tag.handle() == "!" && tag.suffix().is_empty()
}

fn too_many(place: Place) -> SyntaxError {
    SyntaxError {
        place,
        message: format!("more than {NODES_MAX} values, counting what aliases repeat"),
    }
}

fn too_many_keys(place: Place) -> SyntaxError {
    SyntaxError {
        place,
        message: format!("more than {FIELDS_MAX} keys in one mapping"),
    }
}

fn unknown_tag(tag: &Tag, place: Place) -> SyntaxError {
    SyntaxError {
        place,
        message: format!("unknown tag {}{}", tag.original_handle(), tag.suffix()),
    }
}

/// A plain scalar by the implicit types of YAML 1.1 (<https://yaml.org/type/>).
fn plain(text: String) -> Value {
    match text.as_str() {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "no" | "No" | "NO" | "true" | "True" | "TRUE" | "false"
        | "False" | "FALSE" | "on" | "On" | "ON" | "off" | "Off" | "OFF" => {
            return Value::Other(text, "a boolean");
        }
        _ => {}
    }
    if is_number(&text) {
        Value::Other(text, "a number")
    } else if is_date(&text) {
        Value::Other(text, "a date")
    } else {
        Value::String(text)
    }
}

/// Decimal, binary, octal, hexadecimal and base-60 integers; floats, whose exponent needs a point and a sign.
fn is_number(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    let all = |digits: &str, ok: fn(&char) -> bool| {
        !digits.is_empty() && digits.chars().all(|c| ok(&c) || c == '_')
    };
    if let Some(digits) = unsigned.strip_prefix("0b") {
        return all(digits, |c| matches!(c, '0' | '1'));
    }
    if let Some(digits) = unsigned.strip_prefix("0x") {
        return all(digits, char::is_ascii_hexdigit);
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return false;
    }
    let (whole, rest) = unsigned
        .split_once('.')
        .map_or((unsigned, None), |(whole, rest)| (whole, Some(rest)));
    let mut parts = whole.split(':');
    let first = parts.next().unwrap_or("");
    let sixties: Vec<&str> = parts.collect();
    let is_sixty =
        |part: &&str| is_digits(part, 1..=2) && (part.len() == 1 || part.starts_with(|c| c < '6'));
    if !sixties.iter().all(is_sixty) {
        return false;
    }
    match rest {
        None if first.len() > 1 && first.starts_with('0') => {
            sixties.is_empty() && all(first, |c| ('0'..='7').contains(c))
        }
        None if first == "0" => sixties.is_empty(),
        None => all(first, char::is_ascii_digit) && !first.starts_with('_'),
        Some(rest) => {
            let (fraction, exponent) = rest
                .split_once(['e', 'E'])
                .map_or((rest, None), |(f, e)| (f, Some(e)));
            let exponent_ok = exponent.is_none_or(|e| {
                e.strip_prefix(['-', '+'])
                    .is_some_and(|e| !e.is_empty() && e.chars().all(|c| c.is_ascii_digit()))
            });
            let fraction_ok = fraction.chars().all(|c| c.is_ascii_digit() || c == '_');
            let whole_ok = if first.is_empty() {
                unsigned == text && fraction.starts_with(|c: char| c.is_ascii_digit())
            } else {
                all(first, char::is_ascii_digit)
            };
            exponent_ok && fraction_ok && whole_ok
        }
    }
}

/// `YYYY-MM-DD`, alone or with a time of day after it: `HH:MM:SS`, a fraction and an offset.
fn is_date(text: &str) -> bool {
    let (date, time) = text
        .split_once(['T', 't', ' ', '\t'])
        .map_or((text, None), |(date, time)| (date, Some(time)));
    let parts: Vec<&str> = date.split('-').collect();
    let [year, month, day] = parts.as_slice() else {
        return false;
    };
    let n_digits = if time.is_some() { 1..=2 } else { 2..=2 };
    is_digits(year, 4..=4)
        && is_digits(month, n_digits.clone())
        && is_digits(day, n_digits)
        && time.is_none_or(|time| {
            // After a T comes the time at once; after a blank there may be more of them.
            let after_blank = text
                .as_bytes()
                .get(date.len())
                .is_some_and(|c| matches!(c, b' ' | b'\t'));
            is_time(if after_blank {
                time.trim_start_matches([' ', '\t'])
            } else {
                time
            })
        })
}

/// `H:MM:SS`, with a fraction of the second and an offset of hours, or of hours and minutes.
fn is_time(text: &str) -> bool {
    let at = text
        .find(|c: char| !c.is_ascii_digit() && !matches!(c, ':' | '.'))
        .unwrap_or(text.len());
    let (clock, offset) = text.split_at(at);
    let parts: Vec<&str> = clock.split(':').collect();
    let [hours, minutes, seconds] = parts.as_slice() else {
        return false;
    };
    let (seconds, fraction) = seconds.split_once('.').unwrap_or((seconds, ""));
    let offset = offset.trim_start_matches([' ', '\t']);
    let offset_ok = match offset.strip_prefix(['-', '+']) {
        None => offset.is_empty() || offset == "Z",
        Some(offset) => {
            let (hours, minutes) = offset.split_once(':').unwrap_or((offset, "00"));
            is_digits(hours, 1..=2) && is_digits(minutes, 2..=2)
        }
    };
    is_digits(hours, 1..=2)
        && is_digits(minutes, 2..=2)
        && is_digits(seconds, 2..=2)
        && is_digits(fraction, 0..=usize::MAX)
        && offset_ok
}

fn is_digits(text: &str, n: std::ops::RangeInclusive<usize>) -> bool {
    n.contains(&text.len()) && text.chars().all(|c| c.is_ascii_digit())
}

fn n_nodes(value: &Value) -> usize {
    match value {
        Value::List(items) => items.iter().map(|item| 1 + n_nodes(&item.value)).sum(),
        Value::Mapping(mapping) => mapping
            .fields
            .iter()
            .map(|field| 1 + n_nodes(&field.value.value))
            .sum(),
        _ => 0,
    }
}

fn place(marker: &Marker) -> Place {
    Place {
        line: marker.line(),
        column: marker.col() + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(text: &str) -> &'static str {
        plain(text.to_owned()).value_kind()
    }

    impl Value {
        fn value_kind(&self) -> &'static str {
            Node {
                place: Place::default(),
                value: self.clone(),
            }
            .kind()
        }
    }

    #[test]
    fn plain_scalars_follow_yaml_1_1() {
        for (text, expected) in [
            ("yes", "a boolean"),
            ("Off", "a boolean"),
            ("yEs", "a string"),
            ("12", "a number"),
            ("-3", "a number"),
            ("0x1f", "a number"),
            ("0b10", "a number"),
            ("017", "a number"),
            ("08", "a string"),
            ("12:30", "a number"),
            ("12:70", "a string"),
            ("1e3", "a string"),
            ("1.5e+3", "a number"),
            ("1.5e3", "a string"),
            (".5", "a number"),
            ("-.5", "a string"),
            ("0:30", "a string"),
            ("0:30.5", "a number"),
            ("6:+8", "a string"),
            (".", "a string"),
            ("..", "a string"),
            ("1_000", "a number"),
            (".inf", "a number"),
            ("2024-01-01", "a date"),
            ("2024-1-1", "a string"),
            ("2024-01-01 10:00:00", "a date"),
            ("2024-1-1T1:00:00.5 -05:30", "a date"),
            ("2024-01-01T1:2:3", "a string"),
            ("2024-01-01T10:00:00x", "a string"),
            ("7b", "a string"),
            ("~", "null"),
            ("", "null"),
            ("q4k", "a string"),
            ("-lead", "a string"),
            ("gemma-3.1", "a string"),
            ("-", "a string"),
        ] {
            assert_eq!(kind(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_local_key_wins_over_a_merged_one_and_places_are_kept() {
        let root = parse("a: &a {x: 1, y: one}\nb:\n  <<: *a\n  y: two\n").unwrap();
        let Value::Mapping(root) = root.value else {
            panic!()
        };
        let Value::Mapping(b) = &root.get("b").unwrap().value.value else {
            panic!()
        };
        let y = b.get("y").unwrap();
        assert!(matches!(&y.value.value, Value::String(text) if text == "two"));
        assert_eq!(y.place, Place { line: 4, column: 3 });
        assert!(b.get("x").is_some());
    }

    #[test]
    fn what_is_not_one_plain_document_is_refused_with_its_place() {
        for (text, line, words) in [
            ("models: [unclosed\n", 1, "unclosed"),
            ("models:\n\t- key: a\n", 2, ""),
            ("a: 1\n---\nb: 2\n", 2, "second document"),
            ("a: !python/object x\n", 1, "unknown tag"),
            ("a: &x [*x]\n", 1, "not complete"),
            ("a: *nope\n", 1, ""),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.place.line, line, "{text:?}: {error:?}");
            assert!(error.message.contains(words), "{text:?}: {error:?}");
        }
    }

    #[test]
    fn a_lone_exclamation_mark_leaves_a_list_a_list() {
        let Value::Mapping(root) = parse("a: !\n- x\nb: ! 12\n").unwrap().value else {
            panic!()
        };
        assert!(
            matches!(&root.get("a").unwrap().value.value, Value::List(items) if items.len() == 1)
        );
        assert!(matches!(&root.get("b").unwrap().value.value, Value::String(text) if text == "12"));
    }

    #[test]
    fn a_mapping_of_very_many_keys_is_refused() {
        let keys: String = (0..=FIELDS_MAX).map(|i| format!("k{i}: 1\n")).collect();
        let repeated = "k: 1\n".repeat(2 * FIELDS_MAX);
        let sources: String = (0..FIELDS_MAX).map(|i| format!("a{i}: 1, ")).collect();
        let merged = format!("x: &x {{{sources}}}\ny: {{<<: *x, b: 1}}\n");
        for text in [keys, repeated, merged] {
            assert!(
                parse(&text)
                    .unwrap_err()
                    .message
                    .contains("keys in one mapping")
            );
        }
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            let item = format!("*a{}", i - 1);
            text += &format!("a{i}: &a{i} [{}]\n", vec![item; 10].join(", "));
        }
        assert!(parse(&text).unwrap_err().message.contains("more than"));
    }
}
