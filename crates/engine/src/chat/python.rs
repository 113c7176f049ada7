//! Values as Python writes them: `str()` for what a template prints, `json.dumps` for what it filters.
//!
//! Invariant: the order of an object's keys is kept, as Python keeps it.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;

/// Widest step of indentation, in spaces.
const MAX_INDENT: usize = 100;

/// A JSON value for a template.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), value(v)))),
        Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, n) => Value::from(n.unwrap_or(f64::NAN)),
        },
    }
}

/// `str(value)`; nothing for what is not defined.
pub(super) fn text(value: &Value) -> String {
    if let Some(text) = value.as_str() {
        return text.to_owned();
    }
    if value.is_undefined() {
        return String::new();
    }
    let mut out = String::new();
    repr(value, &mut out);
    out
}

fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            out.push('[');
            for (i, item) in items.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&item, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, (key, item)) in entries(value).into_iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&key, out);
                out.push_str(": ");
                repr(&item, out);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn entries(map: &Value) -> Vec<(Value, Value)> {
    let keys = map.try_iter().into_iter().flatten();
    keys.map(|key| (key.clone(), map.get_item(&key).unwrap_or_default()))
        .collect()
}

/// A text in quotes: single ones, unless only these occur in it.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 || u32::from(c) == 0x7F => {
                out.push_str(&format!("\\x{:02x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(x) => float(x),
        Err(_) => value.to_string(),
    }
}

/// The shortest digits that read as `x`; exponents from 16 on and below -4, with a sign and two digits.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return (if x > 0.0 { "inf" } else { "-inf" }).to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{x}");
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// How `json.dumps` was asked to write.
struct Style {
    ensure_ascii: bool,
    /// One step of indentation; `None` writes one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of `transformers`, which
/// does not escape for HTML.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let argument = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let given = named.get::<Option<Value>>(name)?.or(positional);
        Ok(given.filter(|v| !v.is_none()))
    };
    let is_true = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let indent = match argument(indent, "indent")? {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(step) => step.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(MAX_INDENT)),
        }),
    };
    let (item_separator, key_separator) = match argument(separators, "separators")? {
        Some(both) => (
            text(&both.get_item_by_index(0)?),
            text(&both.get_item_by_index(1)?),
        ),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: is_true(argument(ensure_ascii, "ensure_ascii")?),
        indent,
        item_separator,
        key_separator,
        sort_keys: is_true(argument(None, "sort_keys")?),
    };
    named.assert_all_used()?;
    let mut out = String::new();
    json(value, &style, 0, &mut out)?;
    Ok(Value::from(out))
}

fn json(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::String => json_text(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Number => {
            let written = number(value);
            out.push_str(match written.as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                written => written,
            });
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            surrounded(('[', ']'), &items, style, depth, out, |item, out| {
                json(item, style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut items = entries(value);
            if style.sort_keys {
                items.sort_by_key(|(key, _)| text(key));
            }
            surrounded(('{', '}'), &items, style, depth, out, |(key, item), out| {
                json_text(&text(key), style, out);
                out.push_str(&style.key_separator);
                json(item, style, depth + 1, out)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("a value of kind {kind} cannot be written as JSON"),
            ));
        }
    }
    Ok(())
}

fn surrounded<T>(
    (open, close): (char, char),
    items: &[T],
    style: &Style,
    depth: usize,
    out: &mut String,
    mut write: impl FnMut(&T, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(step) = &style.indent {
            out.push('\n');
            out.push_str(&step.repeat(depth));
        }
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        out.push_str(if i == 0 { "" } else { &style.item_separator });
        line(out, depth + 1);
        write(item, out)?;
    }
    if !items.is_empty() {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn json_text(text: &str, style: &Style, out: &mut String) {
    let escaped = Json::from(text).to_string();
    if !style.ensure_ascii {
        out.push_str(&escaped);
        return;
    }
    let mut units = [0; 2];
    for c in escaped.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    #[test]
    fn values_are_written_as_str_writes_them() {
        let value =
            value(&json!({"a": [true, null, 1.0, 1e16, 1e-5, 0.0001, -3, "x'y\n"], "b": {}}));
        assert_eq!(
            text(&value),
            r#"{'a': [True, None, 1.0, 1e+16, 1e-05, 0.0001, -3, "x'y\n"], 'b': {}}"#
        );
        assert_eq!(text(&Value::UNDEFINED), "");
        assert_eq!(text(&Value::from("a'b")), "a'b");
    }

    #[test]
    fn json_is_written_as_dumps_writes_it() {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        let v = value(&json!({"b": [1, 2.5, "é<&'\u{1F680}\"\n"], "a": {}, "n": null}));
        let written = |source: &str| {
            environment
                .render_str(source, Value::from_pairs([("v", v.clone())]))
                .unwrap()
        };
        assert_eq!(
            written("{{ v|tojson }}"),
            r#"{"b": [1, 2.5, "é<&'🚀\"\n"], "a": {}, "n": null}"#
        );
        assert_eq!(
            written("{{ v|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"),
            r#"{"a":{},"b":[1,2.5,"\u00e9<&'\ud83d\ude80\"\n"],"n":null}"#
        );
        assert_eq!(
            written("{{ v.b[:2]|tojson(indent=2) }}|{{ []|tojson(indent=2) }}"),
            "[\n  1,\n  2.5\n]|[]"
        );
        assert!(environment.render_str("{{ nothing|tojson }}", ()).is_err());
    }
}
