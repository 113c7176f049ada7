//! Why a command ended without doing its work: what failed, on what, and what to do now.
//!
//! Invariant: no token gets here; the errors of the libraries hold none. Only `main` prints a failure.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

/// A command's failure.
#[derive(Debug)]
pub(crate) enum Failure {
    /// One thing went wrong.
    One {
        message: String,
        hint: Option<String>,
        cause: Option<Box<dyn Error + Send + Sync>>,
    },
    /// Standard output cannot be written.
    Output(io::Error),
}

impl Failure {
    /// A failure of which `message` says what failed and on what.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure::One {
            message: message.into(),
            hint: None,
            cause: None,
        }
    }

    /// Adds what to do now.
    pub(crate) fn hint(self, text: impl Into<String>) -> Failure {
        match self {
            Failure::One { message, cause, .. } => Failure::One {
                message,
                hint: Some(text.into()),
                cause,
            },
            output => output,
        }
    }

    /// Adds the error behind it.
    pub(crate) fn cause(self, error: impl Error + Send + Sync + 'static) -> Failure {
        match self {
            Failure::One { message, hint, .. } => Failure::One {
                message,
                hint,
                cause: Some(Box::new(error)),
            },
            output => output,
        }
    }

    /// For `map_err`: a file operation that failed.
    pub(crate) fn io<'a>(what: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> Failure + 'a {
        move |error| Failure::new(format!("cannot {what} {}", path.display())).cause(error)
    }

    /// For `map_err`: a library's error, below what was being done.
    pub(crate) fn of<E: Error + Send + Sync + 'static>(
        message: impl Into<String>,
    ) -> impl FnOnce(E) -> Failure {
        let message = message.into();
        move |error| Failure::new(message).cause(error)
    }

    /// What `--json` tells of a failure.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match self {
            Failure::One {
                message,
                hint,
                cause,
            } => {
                let causes: Vec<String> = chain(cause.as_deref())
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                serde_json::json!({"error": message, "causes": causes, "hint": hint})
            }
            Failure::Output(error) => serde_json::json!({"error": error.to_string()}),
        }
    }
}

/// The errors behind a failure, the outermost first.
fn chain<'a>(first: Option<&'a (dyn Error + Send + Sync + 'static)>) -> Vec<&'a (dyn Error + 'a)> {
    let mut all: Vec<&dyn Error> = Vec::new();
    let mut next = first.map(|error| error as &dyn Error);
    while let Some(error) = next {
        all.push(error);
        next = error.source();
    }
    all
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
            Failure::Output(error) => write!(f, "error: cannot write the output: {error}"),
        }
    }
}
