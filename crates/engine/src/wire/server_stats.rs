//! What a server has done, in numbers.
//!
//! Invariant: counters only grow (gauges say so), and are read without stopping anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::refusal::Refusal;

/// What a weight server has done since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Bytes of frames received, of agreed connections.
    pub bytes_received: u64,
    /// Bytes of frames sent.
    pub bytes_sent: u64,
    /// Requests received.
    pub frames_received: u64,
    /// Answers sent, refusals included.
    pub frames_sent: u64,
    /// Rows that entered a layer.
    pub rows: u64,
    /// Rows that came out: one for each visit of an expert.
    pub visits: u64,
    /// Passes over the weights of a layer.
    pub passes: u64,
    /// Requests that shared their pass with others.
    pub merged: u64,
    /// Gauge: requests that wait for the weights.
    pub queued: u64,
    /// Gauge: bytes of requests and answers in memory.
    pub bytes_held: u64,
    /// Gauge: connections, with those that have not proved themselves yet.
    pub connections: u64,
    /// Connections that were agreed on.
    pub greeted: u64,
    /// Refusals, by reason.
    pub refused: Vec<(Refusal, u64)>,
    /// From a request's last byte to its answer.
    pub latency: Histogram,
}

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// How many took at most 2^i microseconds and more than the entry before; the last also has all that took longer.
    pub counts: Vec<u64>,
    /// All of them together, in microseconds.
    pub sum_micros: u64,
}

impl Histogram {
    /// Upper bound of entry `i`, in seconds.
    pub fn bound_seconds(i: usize) -> f64 {
        (1u64 << i) as f64 * 1e-6
    }
}

/// Entries of a histogram: up to 2^24 microseconds, 17 seconds.
const N_BOUNDS: usize = 25;

#[derive(Debug, Default)]
pub(super) struct Latency {
    counts: [AtomicU64; N_BOUNDS],
    sum_micros: AtomicU64,
}

impl Latency {
    pub(super) fn observe(&self, spent: Duration) {
        let micros = spent.as_micros().min(u128::from(u64::MAX)) as u64;
        let i = micros.max(1).next_power_of_two().trailing_zeros() as usize;
        self.counts[i.min(N_BOUNDS - 1)].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn read(&self) -> Histogram {
        Histogram {
            counts: self
                .counts
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .collect(),
            sum_micros: self.sum_micros.load(Ordering::Relaxed),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: Arc<AtomicU64>,
    pub(super) frames_received: AtomicU64,
    pub(super) frames_sent: AtomicU64,
    pub(super) rows: AtomicU64,
    pub(super) visits: AtomicU64,
    pub(super) passes: AtomicU64,
    pub(super) merged: AtomicU64,
    pub(super) queued: AtomicU64,
    pub(super) bytes_held: Arc<AtomicU64>,
    pub(super) connections: AtomicU64,
    pub(super) greeted: AtomicU64,
    pub(super) refused: [AtomicU64; Refusal::ALL.len()],
    pub(super) latency: Latency,
}

impl Counters {
    pub(super) fn refuse(&self, refusal: Refusal) {
        self.refused[refusal as usize - 1].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> ServerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerStats {
            bytes_received: read(&self.bytes_received),
            bytes_sent: read(&self.bytes_sent),
            frames_received: read(&self.frames_received),
            frames_sent: read(&self.frames_sent),
            rows: read(&self.rows),
            visits: read(&self.visits),
            passes: read(&self.passes),
            merged: read(&self.merged),
            queued: read(&self.queued),
            bytes_held: read(&self.bytes_held),
            connections: read(&self.connections),
            greeted: read(&self.greeted),
            refused: Refusal::ALL
                .into_iter()
                .zip(self.refused.iter().map(read))
                .collect(),
            latency: self.latency.read(),
        }
    }
}
