//! One message of a conversation.
//!
//! Invariant: a message that was read is text alone, with the arguments of tool calls as objects, so that any chat
//! template can render it. Images, audio and files are refused: the models here read text.

use serde_json::{Map, Value, json};

use super::ApiError;
use super::fields::Fields;

/// Messages of a conversation, at most; the context ends far earlier.
const MESSAGES_MAX: usize = 4096;
/// Calls of one message, at most.
const CALLS_MAX: usize = 128;

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The rules of the conversation.
    System,
    /// The same, as newer models of OpenAI call it.
    Developer,
    /// A person.
    User,
    /// The model.
    Assistant,
    /// A tool's answer.
    Tool,
}

impl Role {
    /// As requests and templates name it.
    pub const fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// A message.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What; several text parts stand one after another with nothing between.
    pub content: String,
    /// Which person or tool, for the templates that say so.
    pub name: Option<String>,
    /// What the assistant called.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool answers.
    pub tool_call_id: Option<String>,
    /// What the assistant thought, for the templates that keep it.
    pub reasoning: Option<String>,
}

/// A tool call of an assistant's message.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// What the answer refers to.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments, an object.
    pub arguments: Map<String, Value>,
}

impl Message {
    /// Reads the messages of a request.
    pub(crate) fn parse_all(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
        let path = fields.path("messages");
        let messages = fields
            .array("messages")?
            .ok_or_else(|| ApiError::missing(path.clone()))?;
        if messages.is_empty() {
            return Err(ApiError::value(path, "there is no message"));
        }
        if messages.len() > MESSAGES_MAX {
            let why = format!(
                "{} messages; at most {MESSAGES_MAX} are taken",
                messages.len()
            );
            return Err(ApiError::value(path, why));
        }
        let one = |(i, message)| Message::parse(message, format!("messages[{i}]"));
        messages.into_iter().enumerate().map(one).collect()
    }

    fn parse(message: Value, path: String) -> Result<Message, ApiError> {
        let mut fields = Fields::of(message, path)?;
        let path = fields.path("role");
        let role = match fields.string("role")?.as_deref() {
            Some("system") => Role::System,
            Some("developer") => Role::Developer,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("tool") => Role::Tool,
            Some("function") => {
                let why = "the role 'function' is deprecated; use 'tool' with a tool_call_id";
                return Err(ApiError::unsupported(path, why));
            }
            Some(other) => {
                let other = crate::error::shorten(other);
                let why =
                    format!("'{other}' is none of system, developer, user, assistant and tool");
                return Err(ApiError::value(path, why));
            }
            None => return Err(ApiError::missing(path)),
        };
        let content = content(&mut fields)?;
        let mut message = Message {
            role,
            content: String::new(),
            name: fields.string("name")?,
            tool_calls: Vec::new(),
            tool_call_id: None,
            reasoning: None,
        };
        match role {
            Role::Assistant => {
                message.tool_calls = tool_calls(&mut fields)?;
                message.reasoning = fields.string("reasoning_content")?;
                fields.refuse("audio", "this model writes text")?;
                fields.refuse("function_call", "it is deprecated; use tool_calls")?;
                fields.refuse("refusal", "a refusal is not shown to the model; leave the message out or say it in content")?;
                annotations(&mut fields)?;
                if content.is_none() && message.tool_calls.is_empty() {
                    return Err(ApiError::missing(fields.path("content")));
                }
            }
            Role::Tool => {
                let path = fields.path("tool_call_id");
                let id = fields.string("tool_call_id")?;
                message.tool_call_id = Some(id.ok_or_else(|| ApiError::missing(path))?);
            }
            Role::System | Role::Developer | Role::User => {}
        }
        match content {
            Some(content) => message.content = content,
            None if role == Role::Assistant => {}
            None => return Err(ApiError::missing(fields.path("content"))),
        }
        fields.end()?;
        Ok(message)
    }

    /// The message as chat templates take it. A template that knows no developer gets a system message.
    pub fn to_template(&self, knows_developer: bool) -> Value {
        let role = match self.role {
            Role::Developer if !knows_developer => Role::System,
            role => role,
        };
        let mut message = Map::new();
        message.insert("role".to_owned(), role.name().into());
        message.insert("content".to_owned(), self.content.clone().into());
        let mut put = |key: &str, value: Option<&String>| {
            if let Some(value) = value {
                message.insert(key.to_owned(), value.clone().into());
            }
        };
        put("name", self.name.as_ref());
        put("tool_call_id", self.tool_call_id.as_ref());
        put("reasoning_content", self.reasoning.as_ref());
        if !self.tool_calls.is_empty() {
            let call = |call: &ToolCall| {
                let function = json!({"name": call.name, "arguments": call.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            };
            let calls: Vec<Value> = self.tool_calls.iter().map(call).collect();
            message.insert("tool_calls".to_owned(), calls.into());
        }
        Value::Object(message)
    }
}

/// A string, or text parts.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = fields.path("content");
    let parts = match fields.take("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            return Err(ApiError::type_of(
                path,
                "a string or an array of text parts",
                &other,
            ));
        }
    };
    let mut content = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of(part, format!("{path}[{i}]"))?;
        let kind_path = part.path("type");
        match part.string("type")?.as_deref() {
            Some("text") => {}
            Some(kind @ ("image_url" | "input_audio" | "file" | "refusal")) => {
                let why = format!("this model reads text, not parts of type '{kind}'");
                return Err(ApiError::unsupported(kind_path, why));
            }
            Some(_) => return Err(ApiError::value(kind_path, "the type of a part is 'text'")),
            None => return Err(ApiError::missing(kind_path)),
        }
        let text_path = part.path("text");
        let text = part.string("text")?;
        content.push_str(&text.ok_or_else(|| ApiError::missing(text_path))?);
        part.refuse(
            "prompt_cache_breakpoint",
            "every prefix is cached without being told",
        )?;
        part.end()?;
    }
    Ok(Some(content))
}

fn tool_calls(fields: &mut Fields) -> Result<Vec<ToolCall>, ApiError> {
    let path = fields.path("tool_calls");
    let calls = fields.array("tool_calls")?.unwrap_or_default();
    if calls.len() > CALLS_MAX {
        let why = format!("{} calls; at most {CALLS_MAX} are taken", calls.len());
        return Err(ApiError::value(path, why));
    }
    let one = |(i, call)| {
        let mut call = Fields::of(call, format!("{path}[{i}]"))?;
        let text = |fields: &mut Fields, name: &str| {
            let path = fields.path(name);
            let text = fields.string(name)?;
            text.ok_or_else(|| ApiError::missing(path))
        };
        let id = text(&mut call, "id")?;
        let kind = text(&mut call, "type")?;
        if kind != "function" {
            return Err(ApiError::unsupported(
                call.path("type"),
                "only functions are called here",
            ));
        }
        let function_path = call.path("function");
        let mut function = Fields::of(call.require("function")?, function_path)?;
        let name = text(&mut function, "name")?;
        let arguments = text(&mut function, "arguments")?;
        let arguments = match serde_json::from_str(&arguments) {
            Ok(Value::Object(arguments)) => arguments,
            _ => {
                let path = function.path("arguments");
                return Err(ApiError::value(path, "it is not the text of a JSON object"));
            }
        };
        function.end()?;
        call.end()?;
        Ok(ToolCall {
            id,
            name,
            arguments,
        })
    };
    calls.into_iter().enumerate().map(one).collect()
}

/// Clients send back the message they were given, with its empty list of annotations.
fn annotations(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.array("annotations")? {
        Some(list) if !list.is_empty() => Err(ApiError::unsupported(
            fields.path("annotations"),
            "citations are not shown to the model",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(messages: Value) -> Result<Vec<Message>, ApiError> {
        let mut fields = Fields::of(json!({ "messages": messages }), "").expect("an object");
        Message::parse_all(&mut fields)
    }

    fn param(messages: Value) -> String {
        let error = parse(messages).expect_err("refused");
        error.param.expect("a param")
    }

    #[test]
    fn text_parts_are_one_text() {
        let messages = parse(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]))
        .expect("valid");
        assert_eq!(messages[1].content, "ab");
        assert_eq!(messages[0].to_template(false)["role"], "system");
        assert_eq!(messages[0].to_template(true)["role"], "developer");
    }

    #[test]
    fn a_tool_call_and_its_answer_reach_the_template() {
        let messages = parse(json!([
            {"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
        ]))
        .expect("valid");
        assert_eq!(
            messages[0].to_template(false).to_string(),
            r#"{"role":"assistant","content":"","tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":{"b":1,"a":2}}}]}"#
        );
        assert_eq!(messages[1].to_template(false)["tool_call_id"], "c1");
    }

    #[test]
    fn what_cannot_be_read_is_refused_where_it_stands() {
        assert_eq!(param(json!([])), "messages");
        assert_eq!(param(json!([{"role": "user"}])), "messages[0].content");
        assert_eq!(param(json!([{"content": "a"}])), "messages[0].role");
        assert_eq!(
            param(json!([{"role": "robot", "content": "a"}])),
            "messages[0].role"
        );
        assert_eq!(
            param(json!([{"role": "user", "content": "a", "x": 1}])),
            "messages[0].x"
        );
        assert_eq!(param(json!([{"role": "assistant"}])), "messages[0].content");
        assert_eq!(
            param(json!([{"role": "tool", "content": "a"}])),
            "messages[0].tool_call_id"
        );
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        assert_eq!(param(image), "messages[0].content[0].type");
        let call = json!([{"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]"}},
        ]}]);
        assert_eq!(param(call), "messages[0].tool_calls[0].function.arguments");
        // Only the assistant calls.
        let user = json!([{"role": "user", "content": "a", "tool_calls": []}]);
        assert_eq!(param(user), "messages[0].tool_calls");
    }
}
