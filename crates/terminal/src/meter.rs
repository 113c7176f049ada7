//! How far a long step is: a bar on a terminal, plain lines elsewhere, on standard error.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::tell;

/// Between two plain lines that only tell how far it is.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A size for people, such as `1.20 GB`.
pub fn size(bytes: u64) -> DecimalBytes {
    DecimalBytes(bytes)
}

/// How far a long step is, in bytes.
#[derive(Debug)]
pub struct Meter {
    verb: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    last_line: Mutex<Instant>,
}

impl Meter {
    /// A meter of the step `verb`.
    pub fn new(verb: &'static str) -> Meter {
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
    pub fn set_total(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    /// So much more is done.
    pub fn add(&self, bytes: u64) {
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
            tell(format_args!(
                "{}: {} of {}",
                self.verb,
                size(done),
                size(total)
            ));
        }
    }

    /// What is being done, or was done just now: beside the bar, or a line.
    pub fn item(&self, text: impl Into<String>) {
        if self.is_terminal {
            self.bar.set_message(text.into());
        } else {
            *self
                .last_line
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Instant::now();
            tell(format_args!("{}: {}", self.verb, text.into()));
        }
    }

    /// Something that must be read, bar or not.
    pub fn warn(&self, text: impl std::fmt::Display) {
        self.bar.suspend(|| tell(format_args!("warning: {text}")));
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
