//! The one shape in which the API refuses: a status, and OpenAI's `{"error": {message, type, param, code}}`.
//!
//! Invariant: a message says which field and what to do, and repeats no more of the request than a field's name or a
//! bounded piece of a value. Turning this into an HTTP answer is in `api`.

use std::fmt;

use engine::EngineError;
use serde_json::{Value, json};

/// A refusal, or a failure, as a client gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// For a person.
    pub message: String,
    /// The field, as a path: `messages[2].content`.
    pub param: Option<String>,
    /// For a program.
    pub code: Option<&'static str>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: u16, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    fn about(mut self, param: impl Into<String>, code: &'static str) -> ApiError {
        self.param = Some(param.into());
        self.code = Some(code);
        self
    }

    /// 400: a body that is no request at all.
    pub fn body(message: impl Into<String>) -> ApiError {
        let mut error = ApiError::new(400, INVALID, message);
        error.code = Some("invalid_json");
        error
    }

    /// 400: a field that has to be there.
    pub fn missing(param: impl Into<String>) -> ApiError {
        let param = param.into();
        ApiError::new(
            400,
            INVALID,
            format!("Missing required parameter: '{param}'."),
        )
        .about(param, "missing_required_parameter")
    }

    /// 400: a field of another type than `expected`, which reads like `a string`.
    pub fn type_of(param: impl Into<String>, expected: &str, got: &Value) -> ApiError {
        let param = param.into();
        let got = match got {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(number) if number.is_f64() => "a decimal",
            Value::Number(_) => "an integer",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        let message =
            format!("Invalid type for '{param}': expected {expected}, but got {got} instead.");
        ApiError::new(400, INVALID, message).about(param, "invalid_type")
    }

    /// 400: a value that cannot be.
    pub fn value(param: impl Into<String>, why: impl fmt::Display) -> ApiError {
        let param = param.into();
        ApiError::new(400, INVALID, format!("Invalid value for '{param}': {why}."))
            .about(param, "invalid_value")
    }

    /// 400: a field that OpenAI has and this server does not honour.
    pub fn unsupported(param: impl Into<String>, why: impl fmt::Display) -> ApiError {
        let param = param.into();
        ApiError::new(
            400,
            INVALID,
            format!("Unsupported parameter: '{param}': {why}."),
        )
        .about(param, "unsupported_parameter")
    }

    /// 400: a field that nobody knows.
    pub fn unknown(param: impl Into<String>) -> ApiError {
        let param = param.into();
        ApiError::new(400, INVALID, format!("Unknown parameter: '{param}'."))
            .about(param, "unknown_parameter")
    }

    /// 401: no key, or none of ours.
    pub fn key(message: &str) -> ApiError {
        let mut error = ApiError::new(401, INVALID, message);
        error.code = Some("invalid_api_key");
        error
    }

    /// 404: another model than the one that is served.
    pub fn model(asked: &str, served: &str) -> ApiError {
        let asked = shorten(asked);
        let message =
            format!("The model '{asked}' does not exist here; this node serves '{served}'.");
        ApiError::new(404, INVALID, message).about("model", "model_not_found")
    }

    /// 404: no such path.
    pub fn route(method: &str, path: &str) -> ApiError {
        let message = format!(
            "There is no {method} {} here; see docs/api.md.",
            shorten(path)
        );
        let mut error = ApiError::new(404, INVALID, message);
        error.code = Some("unknown_url");
        error
    }

    /// 405: another method.
    pub fn method(method: &str, path: &str) -> ApiError {
        let message = format!("{} does not take {method}.", shorten(path));
        let mut error = ApiError::new(405, INVALID, message);
        error.code = Some("method_not_allowed");
        error
    }

    /// 408: a body that did not come in time.
    pub fn late() -> ApiError {
        let message = "The request's body did not arrive in time.";
        let mut error = ApiError::new(408, INVALID, message);
        error.code = Some("request_timeout");
        error
    }

    /// 400: a prompt that leaves no room for an answer.
    pub fn context_length(param: &str, got: usize, max: usize) -> ApiError {
        let message = format!(
            "This model's maximum context length is {max} tokens with the answer; your prompt has {got}. Please shorten it."
        );
        ApiError::new(400, INVALID, message).about(param, "context_length_exceeded")
    }

    /// 413: a body over the limit.
    pub fn too_large(bytes_max: usize) -> ApiError {
        let message = format!("The request's body is larger than {bytes_max} bytes.");
        let mut error = ApiError::new(413, INVALID, message);
        error.code = Some("request_too_large");
        error
    }

    /// 429: as many requests as may wait are waiting.
    pub fn busy() -> ApiError {
        let message = "This node has as many requests as it takes; try again in a moment.";
        let mut error = ApiError::new(429, "rate_limit_error", message);
        error.code = Some("busy");
        error
    }

    /// 503: the node is going away.
    pub fn stopping() -> ApiError {
        let message = "This node is shutting down; ask another one.";
        let mut error = ApiError::new(503, "server_error", message);
        error.code = Some("stopping");
        error
    }

    /// 500: what should not happen.
    pub fn internal(what: impl fmt::Display) -> ApiError {
        let mut error = ApiError::new(500, "server_error", format!("This node failed: {what}."));
        error.code = Some("internal_error");
        error
    }

    /// The body of the answer, and the data of an error in the middle of a stream.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> ApiError {
        match &error {
            EngineError::Busy { .. } => ApiError::busy(),
            EngineError::PromptTooLong { got, max } => {
                ApiError::context_length("prompt", *got, *max)
            }
            EngineError::Invalid(why) => {
                let mut error = ApiError::new(400, INVALID, why.clone());
                error.code = Some("invalid_value");
                error
            }
            EngineError::Ffn(cause) => {
                let message = format!("The feed-forward weights could not be reached: {cause}.");
                let mut error = ApiError::new(503, "server_error", message);
                error.code = Some("weights_unreachable");
                error
            }
            EngineError::Deadline { .. } => {
                let mut error = ApiError::new(504, "server_error", format!("{error}."));
                error.code = Some("deadline_exceeded");
                error
            }
            EngineError::Cancelled => {
                let mut error = ApiError::new(499, "server_error", format!("{error}."));
                error.code = Some("cancelled");
                error
            }
            EngineError::Internal(what) => ApiError::internal(what),
            EngineError::Stopping => ApiError::stopping(),
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// The first characters of what a client sent, for a message.
pub(crate) fn shorten(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_the_four_fields_of_openai() {
        let error = ApiError::type_of("temperature", "a number", &json!("hot"));
        assert_eq!(
            error.to_json(),
            json!({"error": {
                "message": "Invalid type for 'temperature': expected a number, but got a string instead.",
                "type": "invalid_request_error", "param": "temperature", "code": "invalid_type",
            }})
        );
        assert_eq!(error.status, 400);
    }

    #[test]
    fn what_the_engine_refuses_has_its_own_status() {
        let status = |error: EngineError| ApiError::from(error).status;
        assert_eq!(status(EngineError::Busy { n_waiting: 3 }), 429);
        assert_eq!(status(EngineError::Stopping), 503);
        assert_eq!(status(EngineError::Invalid("no".to_owned())), 400);
        let long = ApiError::from(EngineError::PromptTooLong { got: 9, max: 8 });
        assert_eq!(
            (long.status, long.code),
            (400, Some("context_length_exceeded"))
        );
    }

    #[test]
    fn a_message_repeats_only_the_beginning() {
        let error = ApiError::model(&"é".repeat(10_000), "kjv");
        assert!(error.message.len() < 400, "{}", error.message.len());
    }
}
