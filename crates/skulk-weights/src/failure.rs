//! Why a command ended without doing its work: what failed, on what, and what to do now.
//!
//! Invariant: no variant holds a token. Only `main` prints a failure and turns it into an exit status.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

use crate::catalog::Invalid;

/// A command's failure.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The catalog cannot be used; each finding is to be shown.
    Catalog(Invalid),
    /// One thing went wrong.
    One {
        message: String,
        hint: Option<String>,
        cause: Option<Box<dyn Error + Send + Sync>>,
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
            other => other,
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
            other => other,
        }
    }

    /// A file operation that failed.
    pub(crate) fn io(what: &str, path: &Path, error: io::Error) -> Failure {
        Failure::new(format!("{what} {}", path.display())).cause(error)
    }
}

impl Failure {
    /// What `--json` tells of a failure.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match self {
            Failure::Catalog(invalid) => {
                serde_json::json!({"valid": false, "error": invalid.to_string(), "findings": invalid.findings})
            }
            Failure::One {
                message,
                hint,
                cause,
            } => {
                serde_json::json!({"error": message, "hint": hint, "cause": cause.as_ref().map(ToString::to_string)})
            }
            Failure::Interrupted => serde_json::json!({"error": self.to_string()}),
            Failure::Shown | Failure::Output(_) => serde_json::Value::Null,
        }
    }
}

impl From<Invalid> for Failure {
    fn from(invalid: Invalid) -> Failure {
        Failure::Catalog(invalid)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Catalog(invalid) => {
                for finding in &invalid.findings {
                    writeln!(f, "{finding}")?;
                }
                write!(f, "error: {invalid}")
            }
            Failure::One {
                message,
                hint,
                cause,
            } => {
                write!(f, "error: {message}")?;
                let mut cause: Option<&dyn Error> =
                    cause.as_ref().map(|cause| cause.as_ref() as &dyn Error);
                while let Some(error) = cause {
                    write!(f, "\n  cause: {error}")?;
                    cause = error.source();
                }
                match hint {
                    Some(hint) => write!(f, "\n  hint: {hint}"),
                    None => Ok(()),
                }
            }
            Failure::Shown => Ok(()),
            Failure::Interrupted => {
                f.write_str("interrupted: what is done stays; the same command goes on after it")
            }
            Failure::Output(error) => write!(f, "error: cannot write the output: {error}"),
        }
    }
}
