//! `POST /v1/completions`: the request.
//!
//! Invariant: prompts are texts or tokens, and prompts times answers stay within [`CHOICES_MAX`].

use serde_json::Value;

use super::fields::Fields;
use super::sampling::TOP_LOGPROBS_MAX;
use super::{ApiError, Common};

/// Prompts times answers, at most.
const CHOICES_MAX: usize = 64;
/// OpenAI's default for completions.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Every field that may be there.
#[cfg(test)]
pub(crate) const FIELDS: &[&str] = &[
    "model",
    "prompt",
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
];

/// Texts to go on with.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// What chat has too; `max_tokens` is there.
    pub common: Common,
    /// Not empty.
    pub prompts: Vec<Prompt>,
    /// The answer begins with the prompt.
    pub echo: bool,
    /// Log-probabilities for each token, with so many alternatives.
    pub top_logprobs: Option<usize>,
}

/// A text to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As tokens; taken as they are.
    Tokens(Vec<u32>),
}

impl CompletionRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// 400 with the field's path.
    pub fn parse(body: Value) -> Result<CompletionRequest, ApiError> {
        let mut fields = Fields::of(body, "")?;
        let mut common = Common::parse(&mut fields)?;
        common.max_tokens.get_or_insert(MAX_TOKENS_DEFAULT);
        let prompts = prompts(&mut fields)?;
        if prompts.len() * common.n > CHOICES_MAX {
            let why = format!(
                "{} prompts with {} answers each; at most {CHOICES_MAX} answers are given",
                prompts.len(),
                common.n
            );
            return Err(ApiError::value("prompt", why));
        }
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let top_logprobs = fields.count("logprobs", 0..=TOP_LOGPROBS_MAX)?;
        if echo && top_logprobs.is_some() {
            let why = "log-probabilities of the prompt are not told; leave 'logprobs' out";
            return Err(ApiError::unsupported("echo", why));
        }
        let best_of = fields.count("best_of", 1..=usize::MAX)?;
        if best_of.is_some_and(|best_of| best_of != common.n) {
            let why = "every answer that is generated is given; leave it out or let it be 'n'";
            return Err(ApiError::unsupported("best_of", why));
        }
        fields.refuse("suffix", "text is continued here, not filled in")?;
        fields.end()?;
        Ok(CompletionRequest {
            common,
            prompts,
            echo,
            top_logprobs,
        })
    }
}

fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let path = "prompt";
    let items = match fields.require(path)? {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        other => return Err(ApiError::type_of(path, "a string or an array", &other)),
    };
    match items.first() {
        None => Err(ApiError::value(path, "the array is empty")),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(tokens(path, &items)?)]),
        Some(_) if items.len() > CHOICES_MAX => Err(ApiError::value(
            path,
            format_args!("{} prompts; at most {CHOICES_MAX} are taken", items.len()),
        )),
        Some(_) => {
            let one = |(i, item)| {
                let path = format!("{path}[{i}]");
                match item {
                    Value::String(text) => Ok(Prompt::Text(text)),
                    Value::Array(items) if items.is_empty() => {
                        Err(ApiError::value(path, "there is no token"))
                    }
                    Value::Array(items) => Ok(Prompt::Tokens(tokens(&path, &items)?)),
                    other => Err(ApiError::type_of(
                        path,
                        "a string or an array of tokens",
                        &other,
                    )),
                }
            };
            items.into_iter().enumerate().map(one).collect()
        }
    }
}

fn tokens(path: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let one = |(i, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| ApiError::type_of(format!("{path}[{i}]"), "a token's number", item))
    };
    items.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(more: Value) -> Result<CompletionRequest, ApiError> {
        let mut body = json!({"model": "m", "prompt": "a"});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        CompletionRequest::parse(body)
    }

    #[test]
    fn the_four_forms_of_a_prompt() {
        let prompts =
            |prompt: Value| parse(json!({ "prompt": prompt })).map(|request| request.prompts);
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(json!("a")), Ok(vec![text("a")]));
        assert_eq!(prompts(json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(
            prompts(json!([[1], [2, 3]])),
            Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])])
        );
        for bad in [
            json!([]),
            json!([[]]),
            json!([1, "a"]),
            json!([1, -1]),
            json!({}),
            json!(null),
            json!([null]),
        ] {
            assert!(prompts(bad.clone()).is_err(), "{bad}");
        }
        assert!(prompts(json!(vec!["a"; 65])).is_err());
        assert!(parse(json!({"prompt": vec!["a"; 33], "n": 2})).is_err());
    }

    #[test]
    fn echo_and_logprobs_exclude_each_other() {
        assert!(parse(json!({"echo": true})).expect("valid").echo);
        assert_eq!(
            parse(json!({"logprobs": 3})).expect("valid").top_logprobs,
            Some(3)
        );
        let error = parse(json!({"echo": true, "logprobs": 0})).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some("echo"));
    }

    #[test]
    fn defaults_and_refusals() {
        let request = parse(json!({"best_of": 1})).expect("valid");
        assert_eq!(request.common.max_tokens, Some(16));
        for (name, value) in [
            ("best_of", json!(2)),
            ("suffix", json!("x")),
            ("messages", json!([])),
            ("logprobs", json!(true)),
            ("max_completion_tokens", json!(1)),
            ("response_format", json!({})),
        ] {
            let error = parse(json!({name: value})).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }
}
