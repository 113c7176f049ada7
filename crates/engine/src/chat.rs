//! Conversations to prompts, by the template that the model was published with.
//!
//! Templates are written for Python's Jinja as `transformers` sets it up; this is that surrounding: its functions and
//! filters, its `{% generation %}` block, its way to write `True` and `None`. Source: `transformers`,
//! `utils/chat_template_utils.py`, whose results are recorded in `fixtures/chat`.
//!
//! Invariant: the same template and input give the same text; the clock is part of the input. A template is from
//! outside: what it may take is bounded, and it reaches no file.
//!
//! Left out: Python's `~` on values other than texts and whole numbers (it writes `true`, not `True`).

mod civil;
mod python;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value as Json};

use crate::tokenizer::Tokenizer;
use civil::Civil;

/// Instructions and 64-byte pieces of text that one rendering may take: seconds of work, 4 GB in theory, far above the
/// longest conversation that fits a context.
const FUEL: u64 = 64_000_000;
/// Name of the usual template in the environment.
const DEFAULT: &str = "default";
/// Name of the template for conversations with tools, which some models have beside the usual one.
const TOOL_USE: &str = "tool_use";

/// Why a conversation has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is not one.
    #[error("the model's chat template cannot be read")]
    Template(#[source] minijinja::Error),
    /// The template says that it does not take such a conversation.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the model's chat template fails on this conversation")]
    Failed(#[source] minijinja::Error),
}

/// A conversation to be written as a prompt.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with `role`, `content` and what else the template reads. `arguments` of tool calls are objects, not text.
    pub messages: &'a [Json],
    /// Functions that the model may call, each `{"type": "function", "function": {…}}`.
    pub tools: Option<&'a [Json]>,
    /// Texts that the answer is to rest on, each with `title` and `text`.
    pub documents: Option<&'a [Json]>,
    /// Ends the prompt with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further values that templates may ask for, such as `enable_thinking`.
    pub kwargs: &'a Map<String, Json>,
    /// The time for templates that write a date: seconds since 1970, UTC.
    pub now_seconds: i64,
}

/// A model's chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template of a vindex's model; `None` when it has none.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, ChatError> {
        let name = |id: Option<u32>| {
            id.and_then(|id| tokenizer.token_name(id))
                .unwrap_or_default()
        };
        let templates = tokenizer.templates();
        let (default, tool_use) = (templates.get(DEFAULT), templates.get(TOOL_USE));
        let Some(usual) = default.or(tool_use) else {
            return Ok(None);
        };
        let (bos, eos) = (
            name(tokenizer.bos()),
            name(tokenizer.eos().first().copied()),
        );
        let mut template = ChatTemplate::new(usual, &bos, &eos)?;
        if let Some(tool_use) = tool_use {
            template.add(TOOL_USE, tool_use)?;
            template.has_tool_use = true;
        }
        Ok(Some(template))
    }

    /// A template from its text; `bos` and `eos` are the tokens that it may write around a text.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(ChatError::Template)?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(|out, _, value| match value.as_str() {
            Some(text) => Ok(out.write_str(text)?),
            None => Ok(out.write_str(&python::text(value))?),
        });
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: &Value| python::text(value));
        environment.add_function("raise_exception", raise);
        environment.add_function(
            "strftime_now",
            |state: &minijinja::State<'_, '_>, format: &str| {
                let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or(0);
                Civil::at(now).format(format)
            },
        );
        let mut template = ChatTemplate {
            environment,
            has_tool_use: false,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
        };
        template.add(DEFAULT, source)?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), ChatError> {
        let source = without_generation(source);
        let added = self.environment.add_template_owned(name, source);
        added.map_err(ChatError::Template)
    }

    /// The prompt for a conversation. It has the special tokens by name, so that it is encoded without further ones.
    ///
    /// # Errors
    /// [`ChatError::Refused`] with the template's own words, [`ChatError::Failed`].
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, ChatError> {
        let list = |items: &[Json]| items.iter().map(python::value).collect::<Value>();
        let mut context: Vec<(&str, Value)> = vec![
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            (NOW, Value::from(conversation.now_seconds)),
        ];
        // What is asked for by name wins over what the model has by that name, and these over both.
        let kwargs = conversation.kwargs.iter();
        context.extend(kwargs.map(|(name, value)| (name.as_str(), python::value(value))));
        context.extend([
            ("messages", list(conversation.messages)),
            ("tools", Value::from(conversation.tools.map(list))),
            ("documents", Value::from(conversation.documents.map(list))),
            (
                "add_generation_prompt",
                Value::from(conversation.add_generation_prompt),
            ),
        ]);
        let with_tools = conversation.tools.is_some_and(|tools| !tools.is_empty());
        let name = if with_tools && self.has_tool_use {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(ChatError::Template)?;
        template.render(Value::from_pairs(context)).map_err(failure)
    }
}

/// Name under which the clock is handed to `strftime_now`.
const NOW: &str = "__now_seconds";

/// What a template says through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise(message: &str) -> Result<String, minijinja::Error> {
    let raised = Raised(message.to_owned());
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()).with_source(raised))
}

fn failure(error: minijinja::Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(this) = cause {
        if let Some(Raised(message)) = this.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        cause = this.source();
    }
    ChatError::Failed(error)
}

/// `{% generation %}` marks what the model wrote, for training. For a prompt it is a block that does nothing; another
/// such block stands for it, so that the spaces around it are treated as around every block.
fn without_generation(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + len];
        text.push_str(&rest[..start]);
        match tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => {
                text.push_str("{%");
                text.push_str(&tag.replacen("generation", "if true", 1));
            }
            "endgeneration" => {
                text.push_str("{%");
                text.push_str(&tag.replacen("endgeneration", "endif", 1));
            }
            // What follows may open inside this one, when it is text in a comment.
            _ => {
                text.push_str("{%");
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = &rest[start + len..];
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests;
