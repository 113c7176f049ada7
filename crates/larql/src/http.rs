//! What a weight server shows over HTTP: `/health`, `/ready` and `/metrics`.
//!
//! Invariant: connections, headers and answers are bounded in number, time and size, and nothing that is asked here
//! changes anything. Beyond this machine metrics are for those who know a token; whether it lives is for all.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use engine::wire::{Histogram, Server, ServerStats};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use vindex::Vindex;

const CONNECTIONS_MAX: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A scraper keeps its connection; one that lives longer is closed and made anew.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
const BUFFER_BYTES: usize = 16 << 10;

/// What there is to show.
#[derive(Debug)]
pub(crate) struct Shown {
    server: Server,
    is_draining: AtomicBool,
    token: Option<String>,
    /// Value of the labels of `skulk_weights_info`.
    vindex: String,
    held_bytes: u64,
}

impl Shown {
    pub(crate) fn new(server: Server, vindex: &Vindex, token: Option<String>) -> Shown {
        Shown {
            server,
            is_draining: AtomicBool::new(false),
            token,
            vindex: vindex.id().to_string(),
            held_bytes: vindex.share().size_bytes(vindex.index()),
        }
    }

    /// From now on it is not ready.
    pub(crate) fn set_draining(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }
}

/// Answers for as long as the process lives.
pub(crate) async fn serve(listener: TcpListener, shown: Arc<Shown>) {
    let router = Router::new()
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shown);
    // The oldest first. It makes room for the next: whoever means well is answered in a moment.
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Most often too many open files: others must end first.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(
                TokioIo::new(stream),
                TowerToHyperService::new(router.clone()),
            );
        open.retain(|connection| !connection.is_finished());
        if open.len() >= CONNECTIONS_MAX
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        let task = tokio::spawn(async move {
            // However it ends, there is nobody to tell.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        });
        open.push_back(task.abort_handle());
    }
}

async fn ready(State(shown): State<Arc<Shown>>) -> (StatusCode, &'static str) {
    match shown.is_draining() {
        false => (StatusCode::OK, "ready\n"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}

async fn metrics(State(shown): State<Arc<Shown>>, headers: HeaderMap) -> Response {
    if let Some(token) = &shown.token {
        let given = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let given = given
            .and_then(|value| value.strip_prefix(b"Bearer "))
            .unwrap_or_default();
        if !bool::from(given.ct_eq(token.as_bytes())) {
            let refusal = [(WWW_AUTHENTICATE, "Bearer")];
            return (StatusCode::UNAUTHORIZED, refusal, "metrics want a token\n").into_response();
        }
    }
    let kind = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, text(&shown, &shown.server.stats())).into_response()
}

/// Prometheus' text format, version 0.0.4.
fn text(shown: &Shown, stats: &ServerStats) -> String {
    let mut out = String::new();
    info(&mut out, &shown.vindex);
    gauge(
        &mut out,
        "skulk_weights_held_bytes",
        "Weights and metadata that are mapped",
        shown.held_bytes,
    );
    gauge(
        &mut out,
        "skulk_weights_ready",
        "Whether requests are taken",
        u64::from(!shown.is_draining()),
    );
    gauge(
        &mut out,
        "skulk_weights_connections",
        "Open connections",
        stats.connections,
    );
    gauge(
        &mut out,
        "skulk_weights_requests_waiting",
        "Requests that wait for the weights",
        stats.queued,
    );
    gauge(
        &mut out,
        "skulk_weights_request_bytes",
        "Requests and answers in memory",
        stats.bytes_held,
    );
    counter(
        &mut out,
        "skulk_weights_greeted_total",
        "Connections that were agreed on",
        stats.greeted,
    );
    counter(
        &mut out,
        "skulk_weights_requests_total",
        "Requests received",
        stats.frames_received,
    );
    counter(
        &mut out,
        "skulk_weights_answers_total",
        "Answers sent, refusals included",
        stats.frames_sent,
    );
    counter(
        &mut out,
        "skulk_weights_received_bytes_total",
        "Bytes received",
        stats.bytes_received,
    );
    counter(
        &mut out,
        "skulk_weights_sent_bytes_total",
        "Bytes sent",
        stats.bytes_sent,
    );
    counter(
        &mut out,
        "skulk_weights_rows_total",
        "Rows that entered a layer",
        stats.rows,
    );
    counter(
        &mut out,
        "skulk_weights_visits_total",
        "Rows that came out of an expert",
        stats.visits,
    );
    counter(
        &mut out,
        "skulk_weights_passes_total",
        "Passes over the weights of a layer",
        stats.passes,
    );
    counter(
        &mut out,
        "skulk_weights_merged_total",
        "Requests that shared a pass with others",
        stats.merged,
    );
    head(
        &mut out,
        "skulk_weights_refused_total",
        "Requests and connections refused",
        "counter",
    );
    for (refusal, n) in &stats.refused {
        let reason = label(&format!("{refusal:?}"));
        let _ = writeln!(
            out,
            "skulk_weights_refused_total{{reason=\"{reason}\"}} {n}"
        );
    }
    histogram(
        &mut out,
        "skulk_weights_request_seconds",
        "From a request's last byte to its answer",
        &stats.latency,
    );
    if let Some(bytes) = resident_bytes() {
        gauge(
            &mut out,
            "process_resident_memory_bytes",
            "Resident memory, mapped weights included",
            bytes,
        );
    }
    out
}

fn info(out: &mut String, vindex: &str) {
    head(out, "skulk_weights_info", "What is served", "gauge");
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(
        out,
        "skulk_weights_info{{vindex=\"{vindex}\",version=\"{version}\"}} 1"
    );
}

fn gauge(out: &mut String, name: &str, help: &str, value: u64) {
    head(out, name, help, "gauge");
    let _ = writeln!(out, "{name} {value}");
}

fn counter(out: &mut String, name: &str, help: &str, value: u64) {
    head(out, name, help, "counter");
    let _ = writeln!(out, "{name} {value}");
}

fn histogram(out: &mut String, name: &str, help: &str, histogram: &Histogram) {
    head(out, name, help, "histogram");
    let mut n = 0;
    let last = histogram.counts.len().saturating_sub(1);
    for (i, count) in histogram.counts.iter().enumerate() {
        n += count;
        // The last entry also has all that took longer.
        if i < last {
            let bound = Histogram::bound_seconds(i);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {n}");
        }
    }
    let sum_seconds = histogram.sum_micros as f64 * 1e-6;
    let _ = writeln!(
        out,
        "{name}_bucket{{le=\"+Inf\"}} {n}\n{name}_sum {sum_seconds}\n{name}_count {n}"
    );
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// `BadFrame` as `bad_frame`.
fn label(name: &str) -> String {
    let mut label = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !label.is_empty() {
            label.push('_');
        }
        label.push(c.to_ascii_lowercase());
    }
    label
}

/// What of this process is in memory; only Linux tells it so.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use engine::wire::{Identity, Secret, ServerLimits, ServerOptions};
    use engine::{Batch, FeedForward, FfnError};
    use vindex::VindexId;

    use super::*;

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let mut out = String::new();
        let seen = Histogram {
            counts: vec![1, 0, 2, 4],
            sum_micros: 31,
        };
        histogram(&mut out, "x_seconds", "How long", &seen);
        insta::assert_snapshot!(out, @r#"
        # HELP x_seconds How long
        # TYPE x_seconds histogram
        x_seconds_bucket{le="0.000001"} 1
        x_seconds_bucket{le="0.000002"} 1
        x_seconds_bucket{le="0.000004"} 3
        x_seconds_bucket{le="+Inf"} 7
        x_seconds_sum 0.000031
        x_seconds_count 7
        "#);
        assert_eq!(label("BadFrame"), "bad_frame");
    }

    struct Nothing;

    impl FeedForward for Nothing {
        fn forward(&self, _: u32, _: Batch<'_>, _: &mut [f32]) -> Result<(), FfnError> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_server_that_drains_lives_and_is_not_ready() {
        let model = Identity {
            id: VindexId::of(b""),
            hidden: 1,
            n_layers: 1,
            n_experts: 1,
            n_beside: 0,
        };
        let options = ServerOptions {
            model,
            layers: 0..1,
            experts: 0..1,
            secret: Secret::default(),
            limits: ServerLimits::default(),
        };
        let shown = Arc::new(Shown {
            server: Server::new(Arc::new(Nothing), options).unwrap(),
            is_draining: AtomicBool::new(false),
            token: None,
            vindex: model.id.to_string(),
            held_bytes: 7,
        });
        let text = |shown: &Shown| text(shown, &shown.server.stats());
        assert_eq!(ready(State(Arc::clone(&shown))).await.0, StatusCode::OK);
        assert!(text(&shown).contains("\nskulk_weights_ready 1\n"));
        shown.set_draining();
        assert_eq!(
            ready(State(Arc::clone(&shown))).await.0,
            StatusCode::SERVICE_UNAVAILABLE
        );
        assert!(text(&shown).contains("\nskulk_weights_ready 0\n"));
        // Every value stands below what it means and of which kind it is.
        let text = text(&shown);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap_or(name);
            assert!(
                text.contains(&format!("# HELP {family} "))
                    && text.contains(&format!("# TYPE {family} ")),
                "{line}"
            );
        }
    }
}
