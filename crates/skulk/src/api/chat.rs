//! `POST /v1/chat/completions`: a conversation to a prompt and a manner of reading its answer, and the answer told.
//!
//! Invariant: everything that can be refused is refused before the first byte of a stream.

use std::sync::Arc;

use axum::response::Response;
use engine::{Conversation, Event, Grammar, Request};
use serde_json::{Map, Value, json};

use super::Place;
use super::answer::{ChatChoice, Head, Manner, usage};
use super::calls::{Reader, Spelling};
use super::node::{Node, Template};
use super::running::Running;
use super::stream::{self, Telling};
use crate::error::ApiError;
use crate::request::{ChatRequest, ResponseFormat, StreamOptions, Tool, ToolChoice};

/// Calls of one answer, at most.
const CALLS_MAX: usize = 16;

/// A conversation ready for the engine.
pub(super) struct Prepared {
    requests: Vec<Request>,
    manner: Manner,
    with_logprobs: bool,
    stream: Option<StreamOptions>,
}

/// Checks the rest of a request and makes the engine's of it. Renders, encodes and compiles: not for an async thread.
pub(super) fn prepare(node: &Node, request: ChatRequest) -> Result<Prepared, ApiError> {
    node.serves(&request.common.model)?;
    let template = node.template()?;
    let prompt = node.encode(&render(template, &request)?, false)?;
    let room = node.room(prompt.len(), "messages")?;
    let (grammar, manner) = manner(node, template, &request)?;
    let ChatRequest {
        common,
        top_logprobs,
        parallel_tool_calls,
        ..
    } = request;
    let mut stop = common.stop.clone();
    // Nothing after the first call is wanted, so nothing more is generated.
    if let (Some(end), false) = (manner.reader.end_of_call(), parallel_tool_calls) {
        stop.push(end.to_owned());
    }
    let mut requests = node.requests(&common, prompt, room, stop, top_logprobs, grammar)?;
    // The mark of a call may be a special token, which is no text unless asked for.
    let marks = manner.reader.marks();
    let is_special = |mark: &&str| {
        let id = node.tokenizer.token_id(mark);
        id.is_some_and(|id| node.tokenizer.is_special(id))
    };
    if marks.iter().any(is_special) {
        for request in &mut requests {
            request.show_special = true;
        }
    }
    Ok(Prepared {
        requests,
        manner,
        with_logprobs: top_logprobs.is_some(),
        stream: common.stream,
    })
}

/// Starts what was prepared; the answer, whole or as a stream.
pub(super) async fn answer(
    node: Arc<Node>,
    prepared: Prepared,
    place: Place,
) -> Result<Response, ApiError> {
    let head = node.head("chatcmpl-");
    let n = prepared.requests.len();
    let running = Running::start(&node.engine, &node.metrics, prepared.requests, place)?;
    let choice = |i| ChatChoice::new(i, prepared.manner.clone(), prepared.with_logprobs);
    let chat = Chat {
        node,
        head,
        choices: (0..n).map(choice).collect(),
    };
    match prepared.stream {
        Some(options) => Ok(stream::respond(running, chat, options)),
        None => chat.whole(running).await,
    }
}

/// An answer as it grows.
struct Chat {
    node: Arc<Node>,
    head: Head,
    choices: Vec<ChatChoice>,
}

impl Chat {
    async fn whole(mut self, mut running: Running) -> Result<Response, ApiError> {
        while let Some((i, event)) = running.next().await {
            self.take(i, event)?;
        }
        let mut body = self.head.body("chat.completion");
        let usage = self.usage();
        let choices: Vec<Value> = self.choices.into_iter().map(ChatChoice::whole).collect();
        body["choices"] = choices.into();
        body["usage"] = usage;
        Ok(super::json_response(200, &body))
    }

    fn take(&mut self, i: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        let choice = &mut self.choices[i];
        match event {
            Event::Token(token) => Ok(choice.token(&self.node.tokenizer, &token)),
            Event::Finished {
                reason,
                text,
                usage,
            } => Ok(choice.finished(reason, &text, usage)),
            Event::Failed(error) => Err(error.into()),
        }
    }
}

impl Telling for Chat {
    fn chunks(&mut self, i: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        let deltas = self.take(i, event)?;
        let choices = self.choices[i].chunks(deltas);
        Ok(choices
            .into_iter()
            .map(|choice| self.chunk(json!([choice])))
            .collect())
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut body = self.head.body("chat.completion.chunk");
        body["choices"] = choices;
        body
    }

    fn usage(&self) -> Value {
        let each = || self.choices.iter().map(|choice| choice.usage);
        usage(each().take(1), each())
    }
}

/// The prompt.
fn render(template: &Template, request: &ChatRequest) -> Result<String, ApiError> {
    let knows_developer = template.reads("developer");
    let messages: Vec<Value> = request
        .messages
        .iter()
        .map(|message| message.to_template(knows_developer))
        .collect();
    // A model that is shown no tools calls none.
    let tools: Option<Vec<Value>> = (request.tool_choice != ToolChoice::None)
        .then(|| request.tools.iter().map(Tool::to_template).collect());
    let mut arguments = request.template_arguments.clone();
    for (name, value) in &request.template_options {
        if !template.reads(name) {
            let why = "this model's chat template does not read it";
            return Err(ApiError::unsupported(*name, why));
        }
        arguments.insert((*name).to_owned(), value.clone().into());
    }
    let conversation = Conversation {
        messages: &messages,
        tools: tools.as_deref(),
        documents: None,
        add_generation_prompt: true,
        kwargs: &arguments,
        now_seconds: i64::try_from(super::node::now_seconds()).unwrap_or(0),
    };
    template
        .chat
        .render(&conversation)
        .map_err(|error| ApiError::value("messages", super::node::causes(&error)))
}

/// What keeps the answer in its form, and how it is read.
fn manner(
    node: &Node,
    template: &Template,
    request: &ChatRequest,
) -> Result<(Option<Grammar>, Manner), ApiError> {
    let names = || request.tools.iter().map(|tool| tool.name.clone()).collect();
    let calls_max = if request.parallel_tool_calls {
        CALLS_MAX
    } else {
        1
    };
    let manner = |reader| Manner {
        reader,
        is_named: matches!(request.tool_choice, ToolChoice::Named(_)),
        short_ids: template.spelling.is_some_and(Spelling::short_ids),
    };
    let schema = match &request.format {
        ResponseFormat::Text => None,
        ResponseFormat::JsonObject => Some(json!({"type": "object"})),
        ResponseFormat::JsonSchema(schema) => Some(Value::Object(schema.clone())),
    };
    if request.tool_choice == ToolChoice::None {
        let grammar = match schema {
            None => None,
            Some(schema) => Some(node.schema("response_format", &schema)?),
        };
        return Ok((grammar, manner(Reader::text())));
    }
    if schema.is_some() {
        let why =
            "an answer is either kept to a format or may call tools; let 'tool_choice' be 'none'";
        return Err(ApiError::unsupported("response_format", why));
    }
    let Some(spelling) = template.spelling else {
        let why = "this model's chat template takes no tools, or writes calls in a way that is not read here";
        return Err(ApiError::unsupported("tools", why));
    };
    match &request.tool_choice {
        ToolChoice::Named(name) => {
            let tool = request.tools.iter().find(|tool| tool.name == *name);
            let schema = tool.map(|tool| Value::Object(tool.parameters.clone()));
            let grammar = node.schema("tools", &schema.unwrap_or_else(|| json!({})))?;
            Ok((Some(grammar), manner(Reader::named(name.clone()))))
        }
        ToolChoice::Required => {
            let grammar = node.schema("tools", &calls_schema(&request.tools, calls_max))?;
            Ok((Some(grammar), manner(Reader::list(names(), calls_max))))
        }
        ToolChoice::Auto | ToolChoice::None => {
            if let Some(tool) = request.tools.iter().position(|tool| tool.strict) {
                let path = format!("tools[{tool}].function.strict");
                let why = "arguments are kept to their schema when 'tool_choice' is 'required' or names the function";
                return Err(ApiError::unsupported(path, why));
            }
            Ok((None, manner(Reader::spelled(spelling, names(), calls_max))))
        }
    }
}

/// A list of calls, each with its function's own arguments.
fn calls_schema(tools: &[Tool], calls_max: usize) -> Value {
    let call = |tool: &Tool| {
        let properties = Map::from_iter([
            ("name".to_owned(), json!({"const": tool.name})),
            (
                "arguments".to_owned(),
                Value::Object(tool.parameters.clone()),
            ),
        ]);
        json!({
            "type": "object", "properties": properties, "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<Value> = tools.iter().map(call).collect();
    json!({"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": calls_max})
}
