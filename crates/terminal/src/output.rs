//! Writes what a command has to tell to standard output, as lines or as JSON.
//!
//! Invariant: with `--json`, standard output holds JSON and nothing else; the question of a command goes to standard error then.
//! Nobody has to read: a reader that went away, as after `| head`, ends the telling and not the work, so the exit status
//! always says whether the work was done.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};

use crate::Failure;

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether they are JSON.
    pub json: bool,
}

impl Output {
    /// One line, or several, of text. With `--json` nothing: the value is told by [`Output::value`].
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn text(self, text: impl std::fmt::Display) -> Result<(), Failure> {
        if self.json {
            Ok(())
        } else {
            write(&format!("{text}\n"))
        }
    }

    /// With `--json`, the value on one line; without it nothing.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn value(self, value: &impl Serialize) -> Result<(), Failure> {
        if self.json {
            write(&format!("{}\n", json_line(value)))
        } else {
            Ok(())
        }
    }

    /// The value on one line, with or without `--json`.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn json_line(self, value: &impl Serialize) -> Result<(), Failure> {
        write(&format!("{}\n", json_line(value)))
    }
}

/// Text as it stands, whatever the form of results.
///
/// # Errors
/// When standard output cannot be written.
pub fn write(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// A line on standard error, for whoever watches; there is nothing else to do when it cannot be written.
pub fn tell(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// One line of JSON: `", "` and `": "` between, everything but ASCII escaped.
pub fn json_line(value: &impl Serialize) -> String {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, OneLine);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("{{\"error\": {:?}}}", error.to_string()),
    }
}

struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for c in fragment.chars() {
            if c.is_ascii() && c != '\u{7f}' {
                writer.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"\\/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::json_line;

    #[test]
    fn a_line_is_ascii_with_spaces_after_its_separators() {
        let value = serde_json::json!({"a": ["é", "𝄞\n\"\\"], "b": null});
        assert_eq!(
            json_line(&value),
            r#"{"a": ["\u00e9", "\ud834\udd1e\n\"\\"], "b": null}"#
        );
    }
}
