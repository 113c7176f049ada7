//! Why a command ended without doing its work: what failed, on what, and what to do now.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

/// A command's failure.
#[derive(Debug)]
pub enum Failure {
    /// One thing went wrong.
    One {
        /// What failed, on what.
        message: String,
        /// What to do now.
        hint: Option<String>,
        /// The error behind it.
        cause: Option<Box<dyn Error + Send + Sync>>,
    },
    /// Several things went wrong.
    Several {
        /// One line for each, and what they amount to; written as it stands.
        text: String,
        /// What `--json` tells of them.
        value: Value,
    },
    /// The command has already shown what failed.
    Shown,
    /// The operator interrupted it.
    Interrupted,
    /// Standard output or error cannot be written.
    Output(io::Error),
}

impl Failure {
    /// A failure of which `message` says what failed and on what.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure::One {
            message: message.into(),
            hint: None,
            cause: None,
        }
    }

    /// Adds what to do now.
    #[must_use]
    pub fn hint(mut self, text: impl Into<String>) -> Failure {
        if let Failure::One { hint, .. } = &mut self {
            *hint = Some(text.into());
        }
        self
    }

    /// Adds the error behind it.
    #[must_use]
    pub fn cause(mut self, error: impl Error + Send + Sync + 'static) -> Failure {
        if let Failure::One { cause, .. } = &mut self {
            *cause = Some(Box::new(error));
        }
        self
    }

    /// A file operation that failed; `what` is such as `cannot read`.
    pub fn io(what: &str, path: &Path, error: io::Error) -> Failure {
        Failure::new(format!("{what} {}", path.display())).cause(error)
    }

    /// For `map_err`: a library's error, below what was being done.
    pub fn of<E: Error + Send + Sync + 'static>(
        message: impl Into<String>,
    ) -> impl FnOnce(E) -> Failure {
        let message = message.into();
        move |error| Failure::new(message).cause(error)
    }

    /// What `--json` tells of a failure.
    pub fn to_json(&self) -> Value {
        match self {
            Failure::One {
                message,
                hint,
                cause,
            } => {
                let causes: Vec<String> =
                    chain(cause.as_deref()).map(ToString::to_string).collect();
                json!({"error": message, "causes": causes, "hint": hint})
            }
            Failure::Several { value, .. } => value.clone(),
            Failure::Interrupted => json!({"error": self.to_string()}),
            Failure::Shown | Failure::Output(_) => Value::Null,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::One {
                message,
                hint,
                cause,
            } => {
                write!(f, "error: {message}")?;
                for error in chain(cause.as_deref()) {
                    write!(f, "\n  cause: {error}")?;
                }
                match hint {
                    Some(hint) => write!(f, "\n  hint: {hint}"),
                    None => Ok(()),
                }
            }
            Failure::Several { text, .. } => f.write_str(text),
            Failure::Shown => Ok(()),
            Failure::Interrupted => {
                f.write_str("interrupted: what is done stays; the same command goes on after it")
            }
            Failure::Output(error) => write!(f, "error: cannot write the output: {error}"),
        }
    }
}

/// The errors behind a failure, the outermost first.
fn chain<'a>(
    first: Option<&'a (dyn Error + Send + Sync + 'static)>,
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let first = first.map(|error| error as &(dyn Error + 'static));
    std::iter::successors(first, |error| (**error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reads_from_what_to_why_to_what_now() {
        let cause = io::Error::other(fmt::Error);
        let failure = Failure::io("cannot read", Path::new("a/b"), cause).hint("look at a/b");
        let text = failure.to_string();
        let inner = fmt::Error.to_string();
        assert!(
            text.starts_with("error: cannot read a/b\n  cause: "),
            "{text}"
        );
        assert!(
            text.contains(&inner) && text.ends_with("\n  hint: look at a/b"),
            "{text}"
        );
        let value = failure.to_json();
        assert_eq!(value["error"], "cannot read a/b");
        assert_eq!(value["hint"], "look at a/b");
        assert_eq!(value["causes"][0], inner);
    }
}
