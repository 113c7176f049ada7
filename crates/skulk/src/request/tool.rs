//! The tools a request offers, and which of them must be called.
//!
//! Invariant: names are plain and unique, and a named choice names one of them.

use serde_json::{Map, Value, json};

use super::ApiError;
use super::fields::Fields;
use crate::error::shorten;

/// OpenAI's bound.
const TOOLS_MAX: usize = 128;
/// OpenAI's bound for a function's name.
const NAME_BYTES_MAX: usize = 64;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON schema of its arguments; an object with no required field when the request has none.
    pub parameters: Map<String, Value>,
    /// The arguments must match the schema.
    pub strict: bool,
}

/// Whether tools are called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// No.
    None,
    /// As the model likes.
    #[default]
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl Tool {
    /// Reads `tools`.
    pub(crate) fn parse_all(fields: &mut Fields) -> Result<Vec<Tool>, ApiError> {
        let path = fields.path("tools");
        let Some(items) = fields.array("tools")? else {
            return Ok(Vec::new());
        };
        if items.len() > TOOLS_MAX {
            let why = format!("{} tools; at most {TOOLS_MAX} are taken", items.len());
            return Err(ApiError::value(path, why));
        }
        let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
        for (i, item) in items.into_iter().enumerate() {
            let tool = Tool::parse(item, format!("{path}[{i}]"))?;
            if tools.iter().any(|other| other.name == tool.name) {
                let why = format!("two tools are called '{}'", tool.name);
                return Err(ApiError::value(path, why));
            }
            tools.push(tool);
        }
        Ok(tools)
    }

    fn parse(item: Value, path: String) -> Result<Tool, ApiError> {
        let mut item = Fields::of(item, path)?;
        function_type(&mut item)?;
        let path = item.path("function");
        let mut function = Fields::of(item.require("function")?, path)?;
        item.end()?;
        let path = function.path("name");
        let name = function
            .string("name")?
            .ok_or_else(|| ApiError::missing(path.clone()))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            let why = format!(
                "'{}' is not 1 to {NAME_BYTES_MAX} letters, digits, '_', '-' and '.'",
                shorten(&name)
            );
            return Err(ApiError::value(path, why));
        }
        let tool = Tool {
            name,
            description: function.string("description")?,
            parameters: function
                .object("parameters")?
                .unwrap_or_else(|| Map::from_iter([("type".to_owned(), json!("object"))])),
            strict: function.boolean("strict")?.unwrap_or(false),
        };
        function.end()?;
        Ok(tool)
    }

    /// The tool as chat templates take it.
    pub fn to_template(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".to_owned(), self.name.clone().into());
        if let Some(description) = &self.description {
            function.insert("description".to_owned(), description.clone().into());
        }
        function.insert("parameters".to_owned(), self.parameters.clone().into());
        json!({"type": "function", "function": function})
    }
}

impl ToolChoice {
    /// Reads `tool_choice`, which is `auto` when there are tools and `none` when there are not.
    pub(crate) fn parse(fields: &mut Fields, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
        let path = fields.path("tool_choice");
        let choice = match fields.take("tool_choice") {
            None if tools.is_empty() => return Ok(ToolChoice::None),
            None => return Ok(ToolChoice::Auto),
            Some(Value::String(word)) => match word.as_str() {
                "none" => return Ok(ToolChoice::None),
                "auto" => ToolChoice::Auto,
                "required" => ToolChoice::Required,
                other => {
                    let why = format!(
                        "'{}' is none of 'none', 'auto', 'required' and a named function",
                        shorten(other)
                    );
                    return Err(ApiError::value(path, why));
                }
            },
            Some(value @ Value::Object(_)) => {
                let mut named = Fields::of(value, path.clone())?;
                function_type(&mut named)?;
                let function_path = named.path("function");
                let mut function = Fields::of(named.require("function")?, function_path)?;
                named.end()?;
                let name_path = function.path("name");
                let name = function
                    .string("name")?
                    .ok_or_else(|| ApiError::missing(name_path.clone()))?;
                function.end()?;
                if !tools.iter().any(|tool| tool.name == name) {
                    let why = format!("no tool is called '{}'", shorten(&name));
                    return Err(ApiError::value(name_path, why));
                }
                ToolChoice::Named(name)
            }
            Some(other) => {
                return Err(ApiError::type_of(path, "a string or an object", &other));
            }
        };
        if tools.is_empty() {
            return Err(ApiError::value(path, "there are no tools to choose from"));
        }
        Ok(choice)
    }
}

fn function_type(fields: &mut Fields) -> Result<(), ApiError> {
    let path = fields.path("type");
    match fields.string("type")?.as_deref() {
        Some("function") => Ok(()),
        Some(other) => Err(ApiError::unsupported(
            path,
            format_args!("only 'function' is known here, not '{}'", shorten(other)),
        )),
        None => Err(ApiError::missing(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<(Vec<Tool>, ToolChoice), ApiError> {
        let mut fields = Fields::of(body, "")?;
        let tools = Tool::parse_all(&mut fields)?;
        let choice = ToolChoice::parse(&mut fields, &tools)?;
        fields.end()?;
        Ok((tools, choice))
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "description": "d", "strict": true,
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}})
    }

    #[test]
    fn a_tool_reaches_the_template_without_what_is_for_the_server() {
        let (tools, choice) = parse(json!({"tools": [tool("f")]})).expect("valid");
        assert!(tools[0].strict);
        assert_eq!(choice, ToolChoice::Auto);
        assert_eq!(
            tools[0].to_template().to_string(),
            r#"{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object","properties":{"a":{"type":"integer"}}}}}"#
        );
    }

    #[test]
    fn choices() {
        let choice =
            |choice: Value| parse(json!({"tools": [tool("f"), tool("g")], "tool_choice": choice}));
        assert_eq!(choice(json!("none")).expect("valid").1, ToolChoice::None);
        assert_eq!(
            choice(json!("required")).expect("valid").1,
            ToolChoice::Required
        );
        let named = json!({"type": "function", "function": {"name": "g"}});
        assert_eq!(
            choice(named).expect("valid").1,
            ToolChoice::Named("g".to_owned())
        );
        let param = |value: Value| choice(value).expect_err("refused").param.expect("a param");
        assert_eq!(param(json!("any")), "tool_choice");
        assert_eq!(param(json!(1)), "tool_choice");
        assert_eq!(
            param(json!({"type": "function", "function": {"name": "h"}})),
            "tool_choice.function.name"
        );
        assert_eq!(param(json!({"type": "allowed_tools"})), "tool_choice.type");
        assert_eq!(parse(json!({})).expect("valid").1, ToolChoice::None);
        assert!(parse(json!({"tool_choice": "required"})).is_err());
    }

    #[test]
    fn tools_that_cannot_be_are_refused_where_they_stand() {
        let param = |tools: Value| {
            let error = parse(json!({ "tools": tools })).expect_err("refused");
            error.param.expect("a param")
        };
        assert_eq!(param(json!([{"type": "custom"}])), "tools[0].type");
        assert_eq!(param(json!([tool("f"), tool("f")])), "tools");
        assert_eq!(param(json!([tool("a b")])), "tools[0].function.name");
        let odd =
            json!([{"type": "function", "function": {"name": "f", "parameters": [], "x": 1}}]);
        assert_eq!(param(odd), "tools[0].function.parameters");
    }
}
