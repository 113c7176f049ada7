//! The fields that chat and completions share: how tokens are chosen, how many, when it ends, how it is told.
//!
//! Invariant: the defaults are OpenAI's (temperature 1, top_p 1), not a model's.

use engine::Sampling;
use serde_json::Value;

use super::ApiError;
use super::fields::{Fields, number};

/// Answers to one prompt, at most.
pub(crate) const CHOICES_MAX: usize = 8;
/// Texts that end a generation, at most, and how long each may be.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;
/// Tokens that a bias may name.
const BIASES_MAX: usize = 4096;
/// Alternatives that are told for each token, at most.
pub(crate) const TOP_LOGPROBS_MAX: usize = 20;
/// OpenAI's bounds for metadata: pairs, bytes of a key, bytes of a value.
const METADATA_MAX: (usize, usize, usize) = (16, 64, 512);

/// What chat and completions share.
#[derive(Clone, Debug, PartialEq)]
pub struct Common {
    /// The model that is asked for.
    pub model: String,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most, where the request says so.
    pub max_tokens: Option<usize>,
    /// Answers to each prompt.
    pub n: usize,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// Goes on past the tokens that end a text.
    pub ignore_eos: bool,
    /// How to stream; `None` to answer whole.
    pub stream: Option<StreamOptions>,
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// One more chunk, with the usage and no choice, before the end.
    pub include_usage: bool,
}

impl Common {
    pub(crate) fn parse(fields: &mut Fields) -> Result<Common, ApiError> {
        let model = fields
            .string("model")?
            .ok_or_else(|| ApiError::missing("model"))?;
        let max_tokens = fields.count("max_tokens", 1..=usize::MAX)?;
        let common = Common {
            model,
            sampling: sampling(fields)?,
            max_tokens,
            n: fields.count("n", 1..=CHOICES_MAX)?.unwrap_or(1),
            stop: stop(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stream: stream(fields)?,
        };
        fields.string("user")?;
        Ok(common)
    }
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let top_k = match fields.integer("top_k", -1..=i64::from(u32::MAX))? {
        None | Some(-1) => 0,
        Some(k) => usize::try_from(k).unwrap_or(0),
    };
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_k,
        // Nothing reaches less than the most likely token alone, which is what 0 asks for.
        top_p: top_p.max(f32::MIN_POSITIVE),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=10.0)?
            .unwrap_or(1.0),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        logit_bias: logit_bias(fields)?,
        // A negative seed is a seed too; its bits are taken.
        seed: fields
            .integer("seed", i64::MIN..=i64::MAX)?
            .map(i64::cast_unsigned),
    })
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let biases = fields.object("logit_bias")?.unwrap_or_default();
    let path = fields.path("logit_bias");
    if biases.len() > BIASES_MAX {
        return Err(ApiError::value(
            path,
            format_args!("{} tokens; at most {BIASES_MAX} may be named", biases.len()),
        ));
    }
    let mut list = Vec::with_capacity(biases.len());
    for (token, bias) in &biases {
        let path = format!("{path}.{}", crate::error::shorten(token));
        let id = token
            .parse()
            .map_err(|_| ApiError::value(path.clone(), "the key is no token number"))?;
        list.push((id, number(&path, bias, -100.0..=100.0)?));
    }
    Ok(list)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let path = fields.path("stop");
    let items = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    if items.len() > STOPS_MAX {
        return Err(ApiError::value(
            path,
            format_args!(
                "{} texts; at most {STOPS_MAX} may end a generation",
                items.len()
            ),
        ));
    }
    let text = |item: Value| match item {
        Value::String(text) if text.is_empty() => Err(ApiError::value(
            path.clone(),
            "an empty text would end everything",
        )),
        Value::String(text) if text.len() > STOP_BYTES_MAX => Err(ApiError::value(
            path.clone(),
            format_args!("{} bytes; at most {STOP_BYTES_MAX} are taken", text.len()),
        )),
        Value::String(text) => Ok(text),
        other => Err(ApiError::type_of(
            path.clone(),
            "a string or an array of strings",
            &other,
        )),
    };
    items.into_iter().map(text).collect()
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let streams = fields.boolean("stream")?.unwrap_or(false);
    let path = fields.path("stream_options");
    let Some(options) = fields.take("stream_options") else {
        return Ok(streams.then(StreamOptions::default));
    };
    if !streams {
        return Err(ApiError::value(path, "it needs \"stream\": true"));
    }
    let mut options = Fields::of(options, path)?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    if options.boolean("include_obfuscation")? == Some(true) {
        return Err(ApiError::unsupported(
            options.path("include_obfuscation"),
            "no padding is sent",
        ));
    }
    options.end()?;
    Ok(Some(StreamOptions { include_usage }))
}

/// `metadata`: labels for stored answers. None are stored, so it is only held to OpenAI's form.
pub(crate) fn metadata(fields: &mut Fields) -> Result<(), ApiError> {
    let metadata = fields.object("metadata")?.unwrap_or_default();
    let path = fields.path("metadata");
    let (pairs_max, key_max, value_max) = METADATA_MAX;
    if metadata.len() > pairs_max {
        return Err(ApiError::value(
            path,
            format_args!("more than {pairs_max} pairs"),
        ));
    }
    for (key, value) in &metadata {
        match value {
            Value::String(text) if key.len() <= key_max && text.len() <= value_max => {}
            Value::String(_) => {
                let why = format!("a key may have {key_max} bytes and a value {value_max}");
                return Err(ApiError::value(path, why));
            }
            other => {
                let path = format!("{path}.{}", crate::error::shorten(key));
                return Err(ApiError::type_of(path, "a string", other));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn common(mut body: Value) -> Result<Common, ApiError> {
        body["model"] = json!("m");
        let mut fields = Fields::of(body, "")?;
        let common = Common::parse(&mut fields)?;
        fields.end()?;
        Ok(common)
    }

    fn refused(body: Value) -> (Option<String>, Option<&'static str>) {
        let error = common(body).expect_err("refused");
        (error.param, error.code)
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let common = common(json!({})).expect("valid");
        assert_eq!(common.sampling.temperature, 1.0);
        assert_eq!(common.sampling.top_p, 1.0);
        assert_eq!(
            (common.n, common.max_tokens, common.stream),
            (1, None, None)
        );
    }

    #[test]
    fn every_field_arrives() {
        let common = common(json!({
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
            "presence_penalty": -1, "frequency_penalty": 0.25, "logit_bias": {"7": -100, "8": 1.5}, "seed": -1,
            "max_tokens": 12, "n": 2, "stop": ["a", "b"], "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true}, "user": "someone",
        }))
        .expect("valid");
        let expected = Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: -1.0,
            frequency_penalty: 0.25,
            logit_bias: vec![(7, -100.0), (8, 1.5)],
            seed: Some(u64::MAX),
        };
        assert_eq!(common.sampling, expected);
        assert_eq!(
            (common.n, common.max_tokens, common.ignore_eos),
            (2, Some(12), true)
        );
        assert_eq!(common.stop, ["a", "b"]);
        assert_eq!(
            common.stream,
            Some(StreamOptions {
                include_usage: true
            })
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let param = |body: Value| refused(body).0.expect("a param");
        assert_eq!(param(json!({"temperature": 2.5})), "temperature");
        assert_eq!(param(json!({"n": 0})), "n");
        assert_eq!(param(json!({"n": 9})), "n");
        assert_eq!(param(json!({"max_tokens": 0})), "max_tokens");
        assert_eq!(param(json!({"stop": ["a", "b", "c", "d", "e"]})), "stop");
        assert_eq!(param(json!({"stop": ""})), "stop");
        assert_eq!(param(json!({"stop": [1]})), "stop");
        assert_eq!(param(json!({"logit_bias": {"x": 1}})), "logit_bias.x");
        assert_eq!(param(json!({"logit_bias": {"1": 101}})), "logit_bias.1");
        assert_eq!(param(json!({"logit_bias": {"-1": 1}})), "logit_bias.-1");
        assert_eq!(param(json!({"stream_options": {}})), "stream_options");
        assert_eq!(
            param(json!({"stream": true, "stream_options": {"include_obfuscation": true}})),
            "stream_options.include_obfuscation"
        );
        assert_eq!(
            param(json!({"stream": true, "stream_options": {"x": 1}})),
            "stream_options.x"
        );
        assert_eq!(param(json!({"top_k": -2})), "top_k");
        assert_eq!(
            refused(json!({"stream": "yes"})),
            (Some("stream".into()), Some("invalid_type"))
        );
    }

    #[test]
    fn top_p_of_nothing_is_the_most_likely_token() {
        let common = common(json!({"top_p": 0, "top_k": -1})).expect("valid");
        assert!(common.sampling.top_p > 0.0);
        assert_eq!(common.sampling.top_k, 0);
    }
}
