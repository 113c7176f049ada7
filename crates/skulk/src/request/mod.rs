//! What a client asks: bytes of a body to a request in which every field is checked.
//!
//! `fields` takes an object apart, `sampling` has what both routes share, `chat` and `completion` have the two routes,
//! `message`, `tool` and `format` their parts.
//!
//! Invariant: each field is honoured, or has no effect by its own definition (`user`), or is refused by name; none is
//! passed over. The table is in `docs/api.md`. What needs the model (its template, context, vocabulary) is asked later.

mod chat;
mod completion;
mod fields;
mod format;
mod message;
mod sampling;
mod tool;

use serde_json::Value;

pub use crate::error::ApiError;
pub use chat::ChatRequest;
pub use completion::{CompletionRequest, Prompt};
pub use format::ResponseFormat;
pub use message::{Message, Role, ToolCall};
pub use sampling::{Common, StreamOptions};
pub use tool::{Tool, ToolChoice};

/// Reads a body as JSON; objects and arrays may be 127 deep, which bounds the stack.
///
/// # Errors
/// 400 when the bytes are not UTF-8 or not one JSON value.
pub fn json(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::body(format!(
            "The request's body is not UTF-8: byte {} begins no character.",
            error.valid_up_to()
        ))
    })?;
    serde_json::from_str(text)
        .map_err(|error| ApiError::body(format!("The request's body is not JSON: {error}.")))
}

/// What must hold for any body, for the fuzzer and for a test of its corpus.
///
/// # Panics
/// When it does not.
#[cfg(any(fuzzing, test))]
pub fn fuzz(body: &[u8]) {
    let refused = |error: ApiError| {
        assert_eq!(error.status, 400);
        assert!(error.message.len() < 1000, "{}", error.message);
    };
    let value = match json(body) {
        Ok(value) => value,
        Err(error) => return refused(error),
    };
    let common = |common: &Common| {
        assert!((1..=8).contains(&common.n) && common.stop.len() <= 4);
        assert!((0.0..=2.0).contains(&common.sampling.temperature));
        assert!(common.sampling.top_p > 0.0 && common.sampling.top_p <= 1.0);
        assert!(
            common
                .sampling
                .logit_bias
                .iter()
                .all(|(_, bias)| bias.abs() <= 100.0)
        );
    };
    match ChatRequest::parse(value.clone()) {
        Ok(chat) => {
            common(&chat.common);
            assert!(!chat.messages.is_empty());
            assert!(chat.tool_choice == ToolChoice::None || !chat.tools.is_empty());
            assert!(chat.top_logprobs.is_none_or(|n| n <= 20));
        }
        Err(error) => refused(error),
    }
    match CompletionRequest::parse(value) {
        Ok(completion) => {
            common(&completion.common);
            assert!((1..=64).contains(&(completion.prompts.len() * completion.common.n)));
            assert!(!completion.prompts.contains(&Prompt::Tokens(Vec::new())));
        }
        Err(error) => refused(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_that_are_no_json_are_refused() {
        for body in [
            &b""[..],
            b"{",
            b"{\"a\": 1e999}",
            b"{} {}",
            b"\xff\xfe",
            b"{\"a\": \"\xc3\"}",
            b"{\"a\": \"\\ud800\"}",
        ] {
            let error = json(body).expect_err("refused");
            assert_eq!((error.status, error.code), (400, Some("invalid_json")));
        }
        let deep = "[".repeat(100_000);
        assert!(json(deep.as_bytes()).is_err());
    }

    #[test]
    fn what_the_fuzzer_found_holds() {
        let corpus =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/requests");
        let mut n = 0;
        for entry in std::fs::read_dir(corpus).expect("the corpus") {
            fuzz(&std::fs::read(entry.expect("an entry").path()).expect("a seed"));
            n += 1;
        }
        assert!(n >= 4);
    }

    /// Values with the names of our fields in them, so that checks behind the first one are met too.
    fn values() -> impl Strategy<Value = Value> {
        let names = prop::sample::select(vec![
            "model",
            "messages",
            "role",
            "content",
            "type",
            "text",
            "tools",
            "function",
            "name",
            "parameters",
            "prompt",
            "tool_choice",
            "response_format",
            "json_schema",
            "schema",
            "n",
            "stop",
            "logprobs",
            "top_logprobs",
            "seed",
            "logit_bias",
            "stream",
            "stream_options",
            "include_usage",
            "max_tokens",
            "temperature",
            "tool_calls",
            "arguments",
            "echo",
            "chat_template_kwargs",
            "other",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z{}\"é]{0,6}".prop_map(Value::from),
            prop::sample::select(vec![
                "user",
                "assistant",
                "tool",
                "function",
                "text",
                "json_schema",
                "auto"
            ])
            .prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((names.clone(), inner), 0..8).prop_map(|pairs| {
                    Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
                }),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_bytes_are_a_request_or_a_refusal(body in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&body);
        }

        #[test]
        fn any_json_is_a_request_or_a_refusal_with_a_status(value in values()) {
            fuzz(value.to_string().as_bytes());
        }

        #[test]
        fn a_request_with_any_other_field_is_refused_by_name(name in "[a-z_]{1,20}", value in values()) {
            let mut body = serde_json::json!({"model": "m", "prompt": "a"});
            prop_assume!(body.get(&name).is_none() && !value.is_null());
            body[&name] = value;
            match CompletionRequest::parse(body) {
                Err(error) => prop_assert!(error.param.is_some_and(|param| param.starts_with(&name))),
                Ok(_) => prop_assert!(completion::FIELDS.contains(&name.as_str()), "{} was taken", name),
            }
        }
    }
}
