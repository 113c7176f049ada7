//! Refusals as the Hub words them: status, `X-Error-Code`, `X-Error-Message`, and the message as JSON.
//!
//! Invariant: what went wrong inside (paths, causes) goes to the log; clients see a text that helps them.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::Error;

/// An answer that says no.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    code: Option<&'static str>,
    message: String,
    /// The commit in which a file was looked for; clients remember that it is not there.
    commit: Option<String>,
    /// What the JSON holds besides the message.
    extra: Vec<(&'static str, Value)>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal {
            status,
            code: None,
            message: message.into(),
            commit: None,
            extra: Vec::new(),
        }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn too_large(what: &str, max_bytes: u64) -> Refusal {
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("{what} is larger than {max_bytes} bytes"),
        )
    }

    pub(crate) fn no_route(path: &str) -> Refusal {
        let path: String = path.chars().take(200).collect();
        Refusal::new(
            StatusCode::NOT_FOUND,
            format!("this registry does not serve {path}"),
        )
    }

    pub(crate) fn method_not_allowed() -> Refusal {
        Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "this registry does not serve that method here",
        )
    }

    pub(crate) fn bad_token() -> Refusal {
        Refusal::new(
            StatusCode::UNAUTHORIZED,
            "Invalid credentials in Authorization header",
        )
    }

    pub(crate) fn token_needed() -> Refusal {
        Refusal::new(StatusCode::UNAUTHORIZED, "Invalid username or password.")
    }

    pub(crate) fn gated(repo: &str) -> Refusal {
        let message = format!(
            "Access to {repo} is restricted. You must have access to it and be authenticated."
        );
        Refusal {
            code: Some("GatedRepo"),
            ..Refusal::new(StatusCode::UNAUTHORIZED, message)
        }
    }

    /// Something that is a bug of this server, or its disk.
    pub(crate) fn internal(cause: &dyn std::error::Error) -> Refusal {
        let causes =
            std::iter::successors(Some(cause), |cause| cause.source()).map(ToString::to_string);
        tracing::error!("internal error: {}", causes.collect::<Vec<_>>().join(": "));
        Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal error; the registry's log says more",
        )
    }

    /// The same, as told to someone who did not say who they are.
    pub(crate) fn unauthorized(mut self) -> Refusal {
        self.status = StatusCode::UNAUTHORIZED;
        self
    }

    pub(crate) fn with(mut self, key: &'static str, value: Value) -> Refusal {
        self.extra.push((key, value));
        self
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        let coded = |status, code| Refusal {
            code: Some(code),
            ..Refusal::new(status, error.to_string())
        };
        match &error {
            Error::Io { source, .. } => {
                let full = matches!(
                    source.kind(),
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
                );
                let mut refusal = Refusal::internal(&error);
                if full {
                    refusal.status = StatusCode::INSUFFICIENT_STORAGE;
                    refusal.message = "the registry's disk is full; nothing was stored".to_owned();
                }
                refusal
            }
            Error::Corrupt { .. } | Error::TokenRequired { .. } => Refusal::internal(&error),
            Error::NoRepo { .. } => coded(StatusCode::NOT_FOUND, "RepoNotFound"),
            Error::NoRevision { .. } => coded(StatusCode::NOT_FOUND, "RevisionNotFound"),
            Error::NoEntry { commit, .. } => Refusal {
                commit: Some(commit.clone()),
                ..coded(StatusCode::NOT_FOUND, "EntryNotFound")
            },
            Error::NoCollection { .. } => Refusal::new(StatusCode::NOT_FOUND, error.to_string()),
            Error::Exists { slug, .. } => {
                let refusal = Refusal::new(StatusCode::CONFLICT, error.to_string());
                match slug {
                    Some(slug) => refusal.with("slug", json!(slug)),
                    None => refusal,
                }
            }
            Error::ParentMoved { .. } => {
                Refusal::new(StatusCode::PRECONDITION_FAILED, error.to_string())
            }
            Error::Mismatch { .. } => {
                Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())
            }
            Error::MissingObject { .. } | Error::Invalid { .. } => {
                Refusal::bad_request(error.to_string())
            }
            Error::Forbidden { .. } => Refusal::new(StatusCode::FORBIDDEN, error.to_string()),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
        const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
        const REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
        let mut json = json!({"error": self.message});
        for (key, value) in self.extra {
            json[key] = value;
        }
        let mut response = (self.status, Json(json)).into_response();
        let headers = response.headers_mut();
        if let Some(code) = self.code {
            headers.insert(ERROR_CODE, HeaderValue::from_static(code));
        }
        let printable = |c: char| if matches!(c, ' '..='~') { c } else { '?' };
        let message: String = self.message.chars().take(1000).map(printable).collect();
        headers.extend(
            HeaderValue::try_from(message)
                .ok()
                .map(|message| (ERROR_MESSAGE, message)),
        );
        let commit = self
            .commit
            .and_then(|commit| HeaderValue::try_from(commit).ok());
        headers.extend(commit.map(|commit| (REPO_COMMIT, commit)));
        response
    }
}
