//! `POST /v1/chat/completions`: the request.
//!
//! Invariant: as the room's: what is not honoured is refused by name, with the reason.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::sampling::{TOP_LOGPROBS_MAX, metadata};
use super::{ApiError, Common, Message, ResponseFormat, Tool, ToolChoice};
use crate::error::shorten;

/// A conversation to go on with.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// What completions have too. `max_tokens` is `max_completion_tokens` where that is given.
    pub common: Common,
    /// The conversation; not empty.
    pub messages: Vec<Message>,
    /// Functions the model may call.
    pub tools: Vec<Tool>,
    /// Whether they are called.
    pub tool_choice: ToolChoice,
    /// Several calls in one answer.
    pub parallel_tool_calls: bool,
    /// The form of the answer.
    pub format: ResponseFormat,
    /// Log-probabilities for each token, with so many alternatives.
    pub top_logprobs: Option<usize>,
    /// Variables for the chat template.
    pub template_arguments: Map<String, Value>,
    /// Variables that OpenAI has as fields of the request: honoured by a template that reads them, else refused.
    pub template_options: Vec<(&'static str, String)>,
}

impl ChatRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// 400 with the field's path.
    pub fn parse(body: Value) -> Result<ChatRequest, ApiError> {
        let mut fields = Fields::of(body, "")?;
        let mut common = Common::parse(&mut fields)?;
        common.max_tokens = max_tokens(common.max_tokens, &mut fields)?;
        let messages = Message::parse_all(&mut fields)?;
        let tools = Tool::parse_all(&mut fields)?;
        let tool_choice = ToolChoice::parse(&mut fields, &tools)?;
        let parallel = fields.boolean("parallel_tool_calls")?;
        let request = ChatRequest {
            common,
            messages,
            tool_choice,
            parallel_tool_calls: parallel.unwrap_or(true),
            format: ResponseFormat::parse(&mut fields)?,
            top_logprobs: logprobs(&mut fields)?,
            template_arguments: template_arguments(&mut fields)?,
            template_options: template_options(&mut fields)?,
            tools,
        };
        no_effect(&mut fields)?;
        refused(&mut fields)?;
        fields.end()?;
        Ok(request)
    }
}

fn max_tokens(max_tokens: Option<usize>, fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let newer = fields.count("max_completion_tokens", 1..=usize::MAX)?;
    match (max_tokens, newer) {
        (Some(one), Some(other)) if one != other => Err(ApiError::value(
            "max_tokens",
            "it says another number than 'max_completion_tokens', which replaces it",
        )),
        (one, other) => Ok(other.or(one)),
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    match fields.count("top_logprobs", 0..=TOP_LOGPROBS_MAX)? {
        Some(n) if n > 0 && !wanted => Err(ApiError::value(
            "top_logprobs",
            "it needs \"logprobs\": true",
        )),
        n => Ok(wanted.then(|| n.unwrap_or(0))),
    }
}

fn template_arguments(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let arguments = fields.object("chat_template_kwargs")?.unwrap_or_default();
    for name in arguments.keys() {
        // These come from the rest of the request.
        let reserved = [
            "messages",
            "tools",
            "add_generation_prompt",
            "bos_token",
            "eos_token",
            "chat_template",
        ];
        if reserved.contains(&name.as_str()) {
            let path = format!("chat_template_kwargs.{}", shorten(name));
            return Err(ApiError::value(path, "the request itself says this"));
        }
    }
    Ok(arguments)
}

fn template_options(fields: &mut Fields) -> Result<Vec<(&'static str, String)>, ApiError> {
    let levels: [(&'static str, &[&str]); 2] = [
        (
            "reasoning_effort",
            &["none", "minimal", "low", "medium", "high", "xhigh", "max"],
        ),
        ("verbosity", &["low", "medium", "high"]),
    ];
    let mut options = Vec::new();
    for (name, known) in levels {
        let Some(level) = fields.string(name)? else {
            continue;
        };
        if !known.contains(&level.as_str()) {
            let why = format!("'{}' is none of {}", shorten(&level), known.join(", "));
            return Err(ApiError::value(name, why));
        }
        options.push((name, level));
    }
    Ok(options)
}

/// Fields that by their own definition do not change an answer here; their values are still checked.
fn no_effect(fields: &mut Fields) -> Result<(), ApiError> {
    metadata(fields)?;
    fields.string("safety_identifier")?;
    fields.string("prompt_cache_key")?;
    let only =
        |fields: &mut Fields, name: &str, known: &[&str], why: &str| match fields.string(name)? {
            Some(word) if !known.contains(&word.as_str()) => {
                Err(ApiError::unsupported(fields.path(name), why))
            }
            _ => Ok(()),
        };
    only(
        fields,
        "service_tier",
        &["auto", "default"],
        "there is one tier here",
    )?;
    only(
        fields,
        "prompt_cache_retention",
        &["in_memory"],
        "prompts are kept in memory while there is room",
    )?;
    if fields.boolean("store")? == Some(true) {
        return Err(ApiError::unsupported("store", "nothing is stored here"));
    }
    match fields.array("modalities")? {
        Some(kinds) if kinds.iter().any(|kind| kind != "text") => Err(ApiError::unsupported(
            "modalities",
            "this model writes text",
        )),
        _ => Ok(()),
    }
}

fn refused(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, why) in [
        ("audio", "this model writes text"),
        ("function_call", "it is deprecated; use 'tool_choice'"),
        ("functions", "it is deprecated; use 'tools'"),
        ("moderation", "nothing is moderated here"),
        ("prediction", "predicted outputs are not used here"),
        (
            "prompt_cache_options",
            "every prefix is cached without being told",
        ),
        ("web_search_options", "this node searches nothing"),
    ] {
        fields.refuse(name, why)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(more: Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        ChatRequest::parse(body)
    }

    fn refused(more: Value) -> (String, &'static str) {
        let error = parse(more).expect_err("refused");
        (
            error.param.unwrap_or_default(),
            error.code.unwrap_or_default(),
        )
    }

    #[test]
    fn the_smallest_request() {
        let request = parse(json!({})).expect("valid");
        assert_eq!(request.messages.len(), 1);
        assert_eq!(request.tool_choice, ToolChoice::None);
        assert_eq!(request.top_logprobs, None);
        assert!(request.parallel_tool_calls);
        assert_eq!(
            ChatRequest::parse(json!({"model": "m"}))
                .expect_err("no messages")
                .code,
            Some("missing_required_parameter")
        );
        assert_eq!(
            ChatRequest::parse(json!({"messages": []}))
                .expect_err("no model")
                .param
                .as_deref(),
            Some("model")
        );
    }

    #[test]
    fn either_name_of_the_token_limit() {
        let max = |more: Value| parse(more).map(|request| request.common.max_tokens);
        assert_eq!(max(json!({"max_tokens": 3})), Ok(Some(3)));
        assert_eq!(max(json!({"max_completion_tokens": 4})), Ok(Some(4)));
        assert_eq!(
            max(json!({"max_tokens": 4, "max_completion_tokens": 4})),
            Ok(Some(4))
        );
        assert!(max(json!({"max_tokens": 3, "max_completion_tokens": 4})).is_err());
    }

    #[test]
    fn logprobs_are_asked_for_in_two_fields() {
        let top = |more: Value| parse(more).map(|request| request.top_logprobs);
        assert_eq!(top(json!({"logprobs": true})), Ok(Some(0)));
        assert_eq!(
            top(json!({"logprobs": true, "top_logprobs": 5})),
            Ok(Some(5))
        );
        assert_eq!(top(json!({"logprobs": false, "top_logprobs": 0})), Ok(None));
        assert!(top(json!({"top_logprobs": 5})).is_err());
        assert!(top(json!({"logprobs": true, "top_logprobs": 21})).is_err());
        assert!(top(json!({"logprobs": 2})).is_err());
    }

    #[test]
    fn what_has_no_effect_is_taken_in_its_own_form_only() {
        parse(
            json!({"user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
            "safety_identifier": "s", "prompt_cache_key": "k", "modalities": ["text"],
            "prompt_cache_retention": "in_memory"}),
        )
        .expect("valid");
        assert_eq!(
            refused(json!({"store": true})),
            ("store".into(), "unsupported_parameter")
        );
        assert_eq!(refused(json!({"service_tier": "flex"})).0, "service_tier");
        assert_eq!(refused(json!({"modalities": ["audio"]})).0, "modalities");
        assert_eq!(refused(json!({"metadata": {"a": 1}})).0, "metadata.a");
    }

    #[test]
    fn what_is_not_honoured_is_refused() {
        for name in [
            "audio",
            "function_call",
            "functions",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "web_search_options",
        ] {
            assert_eq!(
                refused(json!({name: {}})),
                (name.to_owned(), "unsupported_parameter")
            );
            parse(json!({name: null})).expect("null asks for nothing");
        }
        for name in [
            "best_of",
            "echo",
            "suffix",
            "min_tokens",
            "guided_json",
            "messages2",
        ] {
            assert_eq!(
                refused(json!({name: 1})),
                (name.to_owned(), "unknown_parameter")
            );
        }
    }

    #[test]
    fn variables_of_the_template() {
        let request = parse(
            json!({"chat_template_kwargs": {"enable_thinking": false}, "reasoning_effort": "low"}),
        )
        .expect("valid");
        assert_eq!(request.template_arguments["enable_thinking"], false);
        assert_eq!(
            request.template_options,
            [("reasoning_effort", "low".to_owned())]
        );
        assert_eq!(
            refused(json!({"chat_template_kwargs": {"messages": []}})).0,
            "chat_template_kwargs.messages"
        );
        assert_eq!(
            refused(json!({"reasoning_effort": "huge"})).0,
            "reasoning_effort"
        );
    }
}
