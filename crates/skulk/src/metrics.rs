//! `/metrics`, in Prometheus' text: under vLLM's names what vLLM tells too, so that its dashboards show this node, and
//! under `skulk_` what the split adds.
//!
//! Invariant: counting costs no lock on the engine's thread beyond a histogram's own, and memory does not grow with the
//! number of requests ([`Metrics::tidy`] is called now and then).

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::wire::{PeerStats, RemoteStats};
use engine::{DRAFT_DEPTH_MAX, Event, FinishReason};
use metrics::{Counter, Histogram, Key, Label, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusRecorder};

const META: Metadata<'_> = Metadata::new("skulk", Level::INFO, None);

const FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN: &str = "vllm:inter_token_latency_seconds";
const PER_OUTPUT_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
const END_TO_END: &str = "vllm:e2e_request_latency_seconds";
const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const KV_USAGE: &str = "vllm:kv_cache_usage_perc";
const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
const PREFIX_QUERIES: &str = "vllm:prefix_cache_queries_total";
const PREFIX_HITS: &str = "vllm:prefix_cache_hits_total";
const DRAFTS: &str = "vllm:spec_decode_num_drafts_total";
const DRAFTED: &str = "vllm:spec_decode_num_draft_tokens_total";
const ACCEPTED: &str = "vllm:spec_decode_num_accepted_tokens_total";
const ACCEPTED_AT: &str = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
const SUCCESS: &str = "vllm:request_success_total";
const FAILED: &str = "skulk_requests_failed_total";
const REFUSED: &str = "skulk_requests_refused_total";

/// What each name means, in the words of its `# HELP` line.
const COUNTERS: [(&str, &str); 11] = [
    (PROMPT_TOKENS, "Prompt tokens of requests that finished"),
    (GENERATION_TOKENS, "Tokens that were generated"),
    (
        PREFIX_QUERIES,
        "Prompt tokens that were looked for in the cache",
    ),
    (PREFIX_HITS, "Prompt tokens that were found in the cache"),
    (DRAFTS, "Steps of sequences for which tokens were guessed"),
    (DRAFTED, "Tokens that were guessed"),
    (ACCEPTED, "Guessed tokens that were right"),
    (
        ACCEPTED_AT,
        "Guessed tokens that were right, by their place among those of their step",
    ),
    (SUCCESS, "Requests that finished, by reason"),
    (FAILED, "Requests that ended with an error"),
    (REFUSED, "Requests that were refused, by status"),
];
const HISTOGRAMS: [(&str, &str, &[f64]); 4] = [
    (
        FIRST_TOKEN,
        "From a request to its first token",
        &FIRST_SECONDS,
    ),
    (INTER_TOKEN, "From one token to the next", &TOKEN_SECONDS),
    (
        PER_OUTPUT_TOKEN,
        "Mean time of a request's tokens after the first",
        &TOKEN_SECONDS,
    ),
    (
        END_TO_END,
        "From a request to its last token",
        &REQUEST_SECONDS,
    ),
];
const GAUGES: [(&str, &str); 3] = [
    (RUNNING, "Requests that are computed"),
    (WAITING, "Requests that wait to be computed"),
    (KV_USAGE, "Part of the cache that is in use, 0 to 1"),
];
/// vLLM's buckets, finer at the fast end: a small model on a CPU writes a token in a few milliseconds.
const FIRST_SECONDS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
];
const TOKEN_SECONDS: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0,
];
const REQUEST_SECONDS: [f64; 20] = [
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0,
    240.0, 480.0, 960.0,
];

/// What a scrape tells of the engine at that moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) n_running: usize,
    pub(crate) n_waiting: usize,
    /// 0 to 1.
    pub(crate) kv_usage: f64,
    /// What guessing tokens did, where somebody guesses.
    pub(crate) drafts: Option<DraftCounts>,
}

/// What guessing tokens did since the node came up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DraftCounts {
    /// Steps of sequences.
    pub(crate) n: u64,
    /// Tokens that were guessed.
    pub(crate) n_tokens: u64,
    /// Of these, those that were right.
    pub(crate) n_accepted: u64,
    /// By their place.
    pub(crate) n_accepted_at: [u64; DRAFT_DEPTH_MAX],
}

/// The node's numbers.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    labels: Vec<Label>,
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    /// Stop, length, abort.
    success: [Counter; 3],
    failed: Counter,
    /// One scrape at a time, so that two do not mix.
    scrape: Mutex<()>,
}

impl Metrics {
    /// Numbers of the model that is served as `model`.
    ///
    /// # Errors
    /// None in practice: the buckets are not empty.
    pub(crate) fn new(model: &str) -> Result<Metrics, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, _, buckets) in HISTOGRAMS {
            builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)?;
        }
        let recorder = builder.build_recorder();
        for (name, help, _) in HISTOGRAMS {
            recorder.describe_histogram(name.into(), Some(Unit::Seconds), help.into());
        }
        for (name, help) in COUNTERS {
            recorder.describe_counter(name.into(), None, help.into());
        }
        for (name, help) in GAUGES {
            recorder.describe_gauge(name.into(), None, help.into());
        }
        let labels = vec![Label::new(
            "model_name",
            SharedString::from(model.to_owned()),
        )];
        let key = |name: &'static str| Key::from_parts(name, labels.clone());
        let counter = |name| recorder.register_counter(&key(name), &META);
        let histogram = |name| recorder.register_histogram(&key(name), &META);
        let success = ["stop", "length", "abort"].map(|reason| {
            let mut labels = labels.clone();
            labels.push(Label::new("finished_reason", reason));
            recorder.register_counter(&Key::from_parts(SUCCESS, labels), &META)
        });
        Ok(Metrics {
            first_token: histogram(FIRST_TOKEN),
            inter_token: histogram(INTER_TOKEN),
            per_output_token: histogram(PER_OUTPUT_TOKEN),
            end_to_end: histogram(END_TO_END),
            prompt_tokens: counter(PROMPT_TOKENS),
            generation_tokens: counter(GENERATION_TOKENS),
            prefix_queries: counter(PREFIX_QUERIES),
            prefix_hits: counter(PREFIX_HITS),
            success,
            failed: counter(FAILED),
            scrape: Mutex::default(),
            labels,
            recorder,
        })
    }

    /// A request that was refused before the engine saw it.
    pub(crate) fn refused(&self, status: u16) {
        let mut labels = self.labels.clone();
        labels.push(Label::new("status", status.to_string()));
        let counter = self
            .recorder
            .register_counter(&Key::from_parts(REFUSED, labels), &META);
        counter.increment(1);
    }

    /// Takes in what histograms have collected; called every few seconds, scraped or not.
    pub(crate) fn tidy(&self) {
        self.recorder.handle().run_upkeep();
    }

    /// The text of `/metrics`.
    pub(crate) fn render(&self, load: Load, remote: Option<&RemoteStats>) -> String {
        let _one = self.scrape.lock();
        for (name, value) in [
            (RUNNING, load.n_running as f64),
            (WAITING, load.n_waiting as f64),
            (KV_USAGE, load.kv_usage),
        ] {
            let key = Key::from_parts(name, self.labels.clone());
            self.recorder.register_gauge(&key, &META).set(value);
        }
        if let Some(drafts) = load.drafts {
            self.drafts(&drafts);
        }
        let mut text = self.recorder.handle().render();
        if let Some(remote) = remote {
            split(remote, &mut text);
        }
        text
    }
}

impl Metrics {
    fn drafts(&self, drafts: &DraftCounts) {
        for (name, value) in [
            (DRAFTS, drafts.n),
            (DRAFTED, drafts.n_tokens),
            (ACCEPTED, drafts.n_accepted),
        ] {
            let key = Key::from_parts(name, self.labels.clone());
            self.recorder.register_counter(&key, &META).absolute(value);
        }
        for (place, value) in drafts.n_accepted_at.into_iter().enumerate() {
            let mut labels = self.labels.clone();
            labels.push(Label::new("position", place.to_string()));
            let key = Key::from_parts(ACCEPTED_AT, labels);
            self.recorder.register_counter(&key, &META).absolute(value);
        }
    }
}

/// What the node saw of its weight servers. Writing to a `String` does not fail.
fn split(remote: &RemoteStats, text: &mut String) {
    let mut family =
        |name: &str, kind: &str, help: &str, label: &str, values: Vec<(String, f64)>| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (value_of, value) in values {
                // What Prometheus wants escaped in a label.
                let value_of = value_of.replace('\\', "\\\\").replace('"', "\\\"");
                let _ = writeln!(text, "{name}{{{label}=\"{value_of}\"}} {value}");
            }
            text.push('\n');
        };
    let peers = |value: fn(&PeerStats) -> f64| -> Vec<(String, f64)> {
        let peers = remote.peers.iter();
        peers
            .map(|peer| (peer.address.to_string(), value(peer)))
            .collect()
    };
    let up = peers(|peer| f64::from(u8::from(peer.is_up)));
    family(
        "skulk_ffn_up",
        "gauge",
        "Whether a weight server is used",
        "peer",
        up,
    );
    type Counted = (&'static str, &'static str, fn(&PeerStats) -> f64);
    let counters: [Counted; 8] = [
        (
            "round_trips",
            "Requests that a weight server answered",
            |peer| peer.round_trips as f64,
        ),
        (
            "sent_bytes",
            "Bytes of requests to a weight server",
            |peer| peer.bytes_sent as f64,
        ),
        (
            "received_bytes",
            "Bytes of answers of a weight server",
            |peer| peer.bytes_received as f64,
        ),
        (
            "wait_seconds",
            "Time that a weight server was waited for",
            |peer| peer.waited_seconds,
        ),
        (
            "served_seconds",
            "Time that requests spent at a weight server, by its clock",
            |peer| peer.served_seconds,
        ),
        (
            "busy",
            "Requests that a weight server refused as busy",
            |peer| peer.busy as f64,
        ),
        ("failures", "Times that a weight server was lost", |peer| {
            peer.failures as f64
        }),
        (
            "reconnects",
            "Times that a weight server came back",
            |peer| peer.reconnects as f64,
        ),
    ];
    for (name, help, value) in counters {
        family(
            &format!("skulk_ffn_{name}_total"),
            "counter",
            help,
            "peer",
            peers(value),
        );
    }
    let layers = |value: fn(&(u64, f64)) -> f64| -> Vec<(String, f64)> {
        let layers = remote.layers.iter().enumerate();
        layers
            .map(|(layer, seen)| (layer.to_string(), value(seen)))
            .collect()
    };
    let calls = layers(|seen| seen.0 as f64);
    family(
        "skulk_ffn_layer_calls_total",
        "counter",
        "Calls of a feed-forward layer",
        "layer",
        calls,
    );
    let wait = layers(|seen| seen.1);
    family(
        "skulk_ffn_layer_wait_seconds_total",
        "counter",
        "Time that calls of a feed-forward layer took",
        "layer",
        wait,
    );
}

/// Follows one request by its events.
#[derive(Debug)]
pub(crate) struct Watch {
    began: Instant,
    first: Option<Instant>,
    last: Instant,
    n_tokens: u64,
    ended: bool,
}

impl Watch {
    /// From now on.
    pub(crate) fn new() -> Watch {
        let began = Instant::now();
        Watch {
            began,
            first: None,
            last: began,
            n_tokens: 0,
            ended: false,
        }
    }

    /// Counts an event.
    pub(crate) fn see(&mut self, event: &Event, metrics: &Metrics) {
        let now = Instant::now();
        match event {
            Event::Token(_) => {
                self.n_tokens += 1;
                metrics.generation_tokens.increment(1);
                if self.first.is_none() {
                    self.first = Some(now);
                    metrics.first_token.record(now - self.began);
                } else {
                    metrics.inter_token.record(now - self.last);
                }
                self.last = now;
            }
            Event::Finished { reason, usage, .. } => {
                self.ended = true;
                metrics.prompt_tokens.increment(usage.prompt_tokens as u64);
                metrics.prefix_queries.increment(usage.prompt_tokens as u64);
                metrics.prefix_hits.increment(usage.cached_tokens as u64);
                metrics.end_to_end.record(now - self.began);
                if let Some(first) = self.first.filter(|_| self.n_tokens > 1) {
                    let each =
                        (self.last - first) / u32::try_from(self.n_tokens - 1).unwrap_or(u32::MAX);
                    metrics.per_output_token.record(each);
                }
                metrics.success[match reason {
                    FinishReason::Stop => 0,
                    FinishReason::Length => 1,
                }]
                .increment(1);
            }
            // A client that went away was counted when it did.
            Event::Failed(_) if self.ended => {}
            Event::Failed(_) => {
                self.ended = true;
                metrics.failed.increment(1);
            }
        }
    }

    /// The client went away, or needs no more.
    pub(crate) fn cancelled(&mut self, metrics: &Metrics) {
        if !std::mem::replace(&mut self.ended, true) {
            metrics.success[2].increment(1);
        }
    }
}

/// Between two calls of [`Metrics::tidy`].
pub(crate) const TIDY_EVERY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use engine::{Token, Usage};

    use super::*;

    #[test]
    fn a_request_is_told_under_the_names_of_vllm() {
        let metrics = Metrics::new("kjv").expect("buckets are not empty");
        let mut watch = Watch::new();
        let token = Event::Token(Token {
            id: 1,
            text: "a".to_owned(),
            logprob: None,
            top: Vec::new(),
        });
        for _ in 0..3 {
            watch.see(&token, &metrics);
        }
        let usage = Usage {
            prompt_tokens: 7,
            cached_tokens: 4,
            completion_tokens: 3,
            accepted_tokens: 1,
            rejected_tokens: 1,
        };
        let finished = Event::Finished {
            reason: FinishReason::Length,
            text: String::new(),
            usage,
        };
        watch.see(&finished, &metrics);
        watch.cancelled(&metrics);
        metrics.refused(401);
        let load = Load {
            n_running: 2,
            n_waiting: 1,
            kv_usage: 0.25,
            drafts: Some(DraftCounts {
                n: 2,
                n_tokens: 5,
                n_accepted: 3,
                n_accepted_at: [2, 1, 0, 0, 0, 0, 0, 0],
            }),
        };
        let text = metrics.render(load, None);
        for line in [
            "# TYPE vllm:time_to_first_token_seconds histogram",
            "vllm:time_to_first_token_seconds_count{model_name=\"kjv\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"kjv\"} 2",
            "vllm:e2e_request_latency_seconds_count{model_name=\"kjv\"} 1",
            "vllm:num_requests_running{model_name=\"kjv\"} 2",
            "vllm:num_requests_waiting{model_name=\"kjv\"} 1",
            "vllm:kv_cache_usage_perc{model_name=\"kjv\"} 0.25",
            "vllm:prompt_tokens_total{model_name=\"kjv\"} 7",
            "vllm:generation_tokens_total{model_name=\"kjv\"} 3",
            "vllm:prefix_cache_hits_total{model_name=\"kjv\"} 4",
            "vllm:request_success_total{model_name=\"kjv\",finished_reason=\"length\"} 1",
            "vllm:request_success_total{model_name=\"kjv\",finished_reason=\"abort\"} 0",
            "vllm:spec_decode_num_draft_tokens_total{model_name=\"kjv\"} 5",
            "vllm:spec_decode_num_accepted_tokens_total{model_name=\"kjv\"} 3",
            "vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"kjv\",position=\"1\"} 1",
            "skulk_requests_refused_total{model_name=\"kjv\",status=\"401\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n---\n{text}");
        }
    }
}
