//! An object of a request, taken apart field by field.
//!
//! Invariant: [`Fields::end`] refuses whatever was not taken, by its path. `null` is the same as absent, as in OpenAI's
//! clients. A key that is there twice counts once, the last time.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::ApiError;
use crate::error::shorten;

/// The fields that were not taken yet.
pub(crate) struct Fields {
    fields: Map<String, Value>,
    path: String,
}

impl Fields {
    /// The fields of `value`, which is at `path` in the request; the request itself is at the empty path.
    pub(crate) fn of(value: Value, path: impl Into<String>) -> Result<Fields, ApiError> {
        let path = path.into();
        match value {
            Value::Object(fields) => Ok(Fields { fields, path }),
            other if path.is_empty() => {
                let mut error = ApiError::type_of("the request", "an object", &other);
                error.param = None;
                Err(error)
            }
            other => Err(ApiError::type_of(path, "an object", &other)),
        }
    }

    /// Where the field `name` is in the request.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() {
            shorten(name)
        } else {
            format!("{}.{}", self.path, shorten(name))
        }
    }

    /// The field, if it is there and not null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields
            .shift_remove(name)
            .filter(|value| !value.is_null())
    }

    pub(crate) fn require(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name)
            .ok_or_else(|| ApiError::missing(self.path(name)))
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::type_of(self.path(name), "a string", &other)),
        }
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::type_of(self.path(name), "a boolean", &other)),
        }
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let Value::Number(number) = &value else {
            return Err(ApiError::type_of(self.path(name), "an integer", &value));
        };
        match number.as_i64() {
            Some(integer) if range.contains(&integer) => Ok(Some(integer)),
            // A whole number beyond 64 bits is outside any range here.
            None if number.is_f64() => {
                Err(ApiError::type_of(self.path(name), "an integer", &value))
            }
            _ => Err(ApiError::value(
                self.path(name),
                format_args!(
                    "{number} is not within {} and {}",
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    /// A count, at least `min`.
    pub(crate) fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ApiError> {
        let bound = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let range = bound(*range.start())..=bound(*range.end());
        let value = self.integer(name, range)?;
        Ok(value.and_then(|value| usize::try_from(value).ok()))
    }

    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        number(&path, &value, range).map(Some)
    }

    pub(crate) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(ApiError::type_of(self.path(name), "an array", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(other) => Err(ApiError::type_of(self.path(name), "an object", &other)),
        }
    }

    /// Refuses a field that OpenAI has and this server does not honour.
    pub(crate) fn refuse(&mut self, name: &str, why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            None => Ok(()),
            Some(_) => Err(ApiError::unsupported(self.path(name), why)),
        }
    }

    /// Refuses what was not taken.
    pub(crate) fn end(self) -> Result<(), ApiError> {
        let left = self.fields.iter().find(|(_, value)| !value.is_null());
        // A field that is null asks for nothing, known or not; only its name could be wrong.
        match left.or_else(|| self.fields.iter().next()) {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::unknown(self.path(name))),
        }
    }
}

/// A finite number within `range`.
pub(crate) fn number(
    path: &str,
    value: &Value,
    range: RangeInclusive<f32>,
) -> Result<f32, ApiError> {
    let Some(number) = value.as_f64() else {
        return Err(ApiError::type_of(path, "a number", value));
    };
    let (min, max) = (f64::from(*range.start()), f64::from(*range.end()));
    if !(min..=max).contains(&number) {
        return Err(ApiError::value(
            path,
            format_args!("{number} is not within {min} and {max}"),
        ));
    }
    Ok(number as f32)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::of(value, "").expect("an object")
    }

    #[test]
    fn null_is_absent_and_the_rest_is_refused_by_name() {
        let mut all = fields(json!({"a": null, "b": 1, "c": null}));
        assert_eq!(all.take("a"), None);
        assert_eq!(all.integer("b", 0..=3), Ok(Some(1)));
        let error = all.end().expect_err("c is unknown");
        assert_eq!(error.param.as_deref(), Some("c"));
        assert_eq!(error.code, Some("unknown_parameter"));
    }

    #[test]
    fn numbers_are_held_to_type_and_range() {
        let code = |result: Result<Option<i64>, ApiError>| result.err().and_then(|e| e.code);
        assert_eq!(
            code(fields(json!({"n": 1.5})).integer("n", 0..=3)),
            Some("invalid_type")
        );
        assert_eq!(
            code(fields(json!({"n": true})).integer("n", 0..=3)),
            Some("invalid_type")
        );
        assert_eq!(
            code(fields(json!({"n": 4})).integer("n", 0..=3)),
            Some("invalid_value")
        );
        assert_eq!(
            code(fields(json!({"n": 18_446_744_073_709_551_615_u64})).integer("n", 0..=3)),
            Some("invalid_value")
        );
        assert_eq!(
            fields(json!({"t": 1})).number("t", 0.0..=2.0),
            Ok(Some(1.0))
        );
        assert!(fields(json!({"t": 2.1})).number("t", 0.0..=2.0).is_err());
        assert!(fields(json!({"t": "1"})).number("t", 0.0..=2.0).is_err());
    }

    #[test]
    fn a_path_says_where() {
        let inner = Fields::of(json!({}), "messages[2]").expect("an object");
        assert_eq!(inner.path("content"), "messages[2].content");
        assert!(Fields::of(json!([]), "").is_err_and(|error| error.param.is_none()));
    }
}
