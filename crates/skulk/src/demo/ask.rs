//! One streamed completion, as any client of the API would ask for it.
//!
//! Invariant: times are from the moment the request was sent.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::Value;
use terminal::Failure;

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) text: String,
    pub(super) prompt_tokens: u64,
    pub(super) tokens: u64,
    /// Until the first text.
    pub(super) first: Duration,
    /// Until the last.
    pub(super) last: Duration,
}

/// Asks `url` for a streamed completion and shows each text as it comes.
pub(super) async fn ask(
    url: &str,
    body: &Value,
    within: Duration,
    show: impl Fn(&str) -> Result<(), Failure>,
) -> Result<Asked, Failure> {
    let mut body = body.clone();
    body["stream_options"] = serde_json::json!({"include_usage": true});
    let client = client(within)?;
    let began = Instant::now();
    let sent = client
        .post(format!("{url}/v1/completions"))
        .header("content-type", "application/json")
        .body(body.to_string())
        .send()
        .await;
    let response = sent.map_err(failed)?;
    if !response.status().is_success() {
        let (status, text) = (response.status(), response.text().await.unwrap_or_default());
        return Err(Failure::new(format!("the node answered {status}: {text}")));
    }
    let mut asked = Asked::default();
    let mut stream = response.bytes_stream();
    let mut held = Vec::new();
    while let Some(chunk) = stream.next().await {
        held.extend_from_slice(&chunk.map_err(failed)?);
        while let Some(end) = held.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.trim_end().strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return Ok(asked);
            }
            let data: Value =
                serde_json::from_str(data).map_err(Failure::of("a chunk is no JSON"))?;
            if let Some(error) = data.get("error") {
                return Err(Failure::new(format!("the answer broke off: {error}")));
            }
            if let Some(text) = data["choices"][0]["text"].as_str() {
                asked.last = began.elapsed();
                if asked.text.is_empty() {
                    asked.first = asked.last;
                }
                asked.text.push_str(text);
                show(text)?;
            }
            if let Some(usage) = data.get("usage").filter(|usage| !usage.is_null()) {
                asked.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or_default();
                asked.tokens = usage["completion_tokens"].as_u64().unwrap_or_default();
            }
        }
    }
    Err(Failure::new("the answer broke off before its end"))
}

/// The text at `url`.
pub(super) async fn get(url: &str, within: Duration) -> Result<String, Failure> {
    let response = client(within)?.get(url).send().await.map_err(failed)?;
    response.text().await.map_err(failed)
}

/// The sum of a metric over its labels.
pub(super) fn metric(text: &str, name: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labels) => labels.rsplit_once('}')?.1,
            None => rest,
        };
        value.trim().parse::<f64>().ok()
    });
    values.sum()
}

fn client(within: Duration) -> Result<reqwest::Client, Failure> {
    reqwest::Client::builder()
        .timeout(within)
        .no_proxy()
        .build()
        .map_err(failed)
}

fn failed(error: reqwest::Error) -> Failure {
    Failure::new("the node did not answer as it should").cause(error)
}

#[cfg(test)]
mod tests {
    use super::metric;

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let text = "# HELP a_total x\na_total{peer=\"h:1\"} 2\na_total{peer=\"h:2\"} 0.5\na_total_more 7\nb 3\n";
        assert_eq!(metric(text, "a_total"), 2.5);
        assert_eq!(metric(text, "b"), 3.0);
        assert_eq!(metric(text, "c"), 0.0);
    }
}
