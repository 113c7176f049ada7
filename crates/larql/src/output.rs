//! Where results and progress go: results to standard output, as lines or as one JSON object; progress to standard
//! error, as a bar on a terminal and as plain lines elsewhere.
//!
//! Invariant: with `--json`, standard output holds one JSON object and nothing else.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::Failure;

/// Between two plain lines that only tell how far it is.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// One line, or several, of text. With `--json` nothing.
    pub(crate) fn text(self, text: impl std::fmt::Display) -> Result<(), Failure> {
        if self.json {
            Ok(())
        } else {
            write(&format!("{text}\n"))
        }
    }

    /// With `--json`, the value on one line; without it nothing.
    pub(crate) fn value(self, value: &impl Serialize) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        let line = serde_json::to_string(value).map_err(|error| Failure::Output(error.into()))?;
        write(&format!("{line}\n"))
    }
}

/// Text as it stands.
pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Failure::Output)
}

/// A size for people, such as `1.20 GB`.
pub(crate) fn size(bytes: u64) -> DecimalBytes {
    DecimalBytes(bytes)
}

/// How far a long step is, in bytes.
#[derive(Debug)]
pub(crate) struct Meter {
    verb: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    last_line: Mutex<Instant>,
}

impl Meter {
    /// A meter of the step `verb`.
    pub(crate) fn new(verb: &'static str) -> Meter {
        let is_terminal = io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if is_terminal {
            let template = "{prefix} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} {wide_msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(verb);
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        Meter {
            verb,
            bar,
            is_terminal,
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// How much there is to do.
    pub(crate) fn set_total(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    /// So much more is done.
    pub(crate) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        if self.is_terminal {
            return;
        }
        let mut last_line = self
            .last_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last_line.elapsed() >= LINE_EVERY {
            *last_line = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            eprintln!("{}: {} of {}", self.verb, size(done), size(total));
        }
    }

    /// What is being done, or was done just now: beside the bar, or a line.
    pub(crate) fn item(&self, text: impl Into<String>) {
        if self.is_terminal {
            self.bar.set_message(text.into());
        } else {
            *self
                .last_line
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Instant::now();
            eprintln!("{}: {}", self.verb, text.into());
        }
    }

    /// Something that must be read, bar or not.
    pub(crate) fn warn(&self, text: impl std::fmt::Display) {
        self.bar.suspend(|| eprintln!("warning: {text}"));
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
