//! `response_format`: text, any JSON object, or JSON of a schema.
//!
//! Invariant: a format other than text is kept by a grammar while tokens are chosen, `strict` or not.

use serde_json::{Map, Value};

use super::ApiError;
use super::fields::Fields;
use crate::error::shorten;

/// The form of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ResponseFormat {
    /// Any text.
    #[default]
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that a schema allows.
    JsonSchema(Map<String, Value>),
}

impl ResponseFormat {
    /// Reads `response_format`.
    pub(crate) fn parse(fields: &mut Fields) -> Result<ResponseFormat, ApiError> {
        let path = fields.path("response_format");
        let Some(value) = fields.take("response_format") else {
            return Ok(ResponseFormat::Text);
        };
        let mut format = Fields::of(value, path)?;
        let path = format.path("type");
        let parsed = match format.string("type")?.as_deref() {
            Some("text") => ResponseFormat::Text,
            Some("json_object") => ResponseFormat::JsonObject,
            Some("json_schema") => schema(&mut format)?,
            Some(other) => {
                let why = format!(
                    "'{}' is none of 'text', 'json_object' and 'json_schema'",
                    shorten(other)
                );
                return Err(ApiError::value(path, why));
            }
            None => return Err(ApiError::missing(path)),
        };
        format.end()?;
        Ok(parsed)
    }
}

fn schema(format: &mut Fields) -> Result<ResponseFormat, ApiError> {
    let path = format.path("json_schema");
    let mut fields = Fields::of(format.require("json_schema")?, path)?;
    let path = fields.path("name");
    let name = fields
        .string("name")?
        .ok_or_else(|| ApiError::missing(path.clone()))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        let why = format!(
            "'{}' is not 1 to 64 letters, digits, '_' and '-'",
            shorten(&name)
        );
        return Err(ApiError::value(path, why));
    }
    // What it is for is told to the model by the messages; here it is a note of the client.
    fields.string("description")?;
    fields.boolean("strict")?;
    let schema = fields.object("schema")?;
    fields.end()?;
    Ok(match schema {
        Some(schema) => ResponseFormat::JsonSchema(schema),
        None => ResponseFormat::JsonObject,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(format: Value) -> Result<ResponseFormat, ApiError> {
        let mut fields = Fields::of(json!({ "response_format": format }), "")?;
        ResponseFormat::parse(&mut fields)
    }

    #[test]
    fn formats() {
        assert_eq!(parse(json!(null)), Ok(ResponseFormat::Text));
        assert_eq!(parse(json!({"type": "text"})), Ok(ResponseFormat::Text));
        assert_eq!(
            parse(json!({"type": "json_object"})),
            Ok(ResponseFormat::JsonObject)
        );
        let schema = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "object"}}});
        assert!(matches!(parse(schema), Ok(ResponseFormat::JsonSchema(_))));
    }

    #[test]
    fn formats_that_cannot_be() {
        let param = |format: Value| parse(format).expect_err("refused").param.expect("a param");
        assert_eq!(param(json!({"type": "grammar"})), "response_format.type");
        assert_eq!(param(json!({})), "response_format.type");
        assert_eq!(
            param(json!({"type": "text", "json_schema": {}})),
            "response_format.json_schema"
        );
        assert_eq!(
            param(json!({"type": "json_schema"})),
            "response_format.json_schema"
        );
        assert_eq!(
            param(json!({"type": "json_schema", "json_schema": {"schema": {}}})),
            "response_format.json_schema.name"
        );
        assert_eq!(
            param(json!({"type": "json_schema", "json_schema": {"name": "n", "schema": true}})),
            "response_format.json_schema.schema"
        );
    }
}
