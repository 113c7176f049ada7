//! Requests that wait for the weights. Whoever brings a request while nobody computes computes it at once, on its own
//! thread, so that a lone request costs no wake-up; requests that come meanwhile are merged: all of one layer in one
//! pass over the weights. A thread that would have to go on for others leaves them to one that does nothing else.
//!
//! Invariant: at most one pass runs at a time, every request taken is answered exactly once, and the order within a
//! layer is that of arrival.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::frame::{Header, Kind, append, payload_bytes};
use super::outlet::{Held, Outlet};
use super::refusal::Refusal;
use super::rows::{self, RowType};
use super::server_stats::Counters;
use crate::ffn::{Batch, FeedForward, FfnError, Visit};

/// A request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) outlet: Arc<Outlet>,
    pub(super) id: u64,
    pub(super) layer: u32,
    pub(super) row_type: RowType,
    pub(super) buffers: Buffers,
    pub(super) arrived: Instant,
    /// Goes with the answer.
    pub(super) held: Option<Held>,
}

/// The memory of a request, used again by later ones.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// `(n_rows, hidden)`, row-major.
    pub(super) rows: Vec<f32>,
    pub(super) visits: Vec<Visit>,
}

/// Requests that wait, and whoever computes them.
pub(super) struct Queue {
    ffn: Arc<dyn FeedForward>,
    hidden: usize,
    /// Rows, and visits, of one pass, unless one request alone has more.
    rows_max: usize,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// The relief's call, and the news that nothing is left.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    is_running: bool,
    wants_relief: bool,
    is_stopped: bool,
    spare: Vec<Buffers>,
    pass: Pass,
}

/// The memory of a pass.
#[derive(Debug, Default)]
struct Pass {
    jobs: Vec<Job>,
    rows: Vec<f32>,
    visits: Vec<Visit>,
    /// `(n_visits, hidden)`, row-major.
    out: Vec<f32>,
}

/// Memory of requests that is kept: so many, none larger than this in numbers.
const SPARES_MAX: usize = 32;
const SPARE_NUMBERS_MAX: usize = 1 << 18;

impl Queue {
    pub(super) fn new(
        ffn: Arc<dyn FeedForward>,
        hidden: usize,
        rows_max: usize,
        counters: Arc<Counters>,
    ) -> Queue {
        Queue {
            ffn,
            hidden,
            rows_max,
            counters,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Memory for the next request.
    pub(super) fn buffers(&self) -> Buffers {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Takes a request. It is answered before this returns when nobody computes, and soon by somebody else otherwise,
    /// or when `more` of the same is about to come: whoever brings it had better receive that meanwhile.
    pub(super) fn submit(&self, job: Job, more: bool) {
        let mut state = self.lock();
        if state.is_stopped {
            return;
        }
        state.jobs.push_back(job);
        self.counters
            .queued
            .store(state.jobs.len() as u64, Ordering::Relaxed);
        if state.is_running {
            return;
        }
        state.is_running = true;
        if !more {
            state = self.pass(state);
        }
        if state.jobs.is_empty() {
            state.is_running = false;
            self.changed.notify_all();
        } else {
            state.wants_relief = true;
            self.changed.notify_all();
        }
    }

    /// The relief: computes what others left, until [`Queue::stop`].
    pub(super) fn relieve(&self) {
        let mut state = self.lock();
        loop {
            while !state.wants_relief {
                if state.is_stopped {
                    return;
                }
                state = self.wait(state);
            }
            state.wants_relief = false;
            while !state.jobs.is_empty() {
                state = self.pass(state);
            }
            state.is_running = false;
            self.changed.notify_all();
        }
    }

    /// Waits until nothing is queued and nothing computed, or until `until`. Whether nothing is.
    pub(super) fn idle(&self, until: Instant) -> bool {
        let mut state = self.lock();
        while state.is_running {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    /// Drops what waits and takes nothing more; the relief ends.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.is_stopped = true;
        state.jobs.clear();
        self.changed.notify_all();
    }

    /// Takes the oldest request and all of the same layer that fit, computes and answers them.
    fn pass<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut pass = std::mem::take(&mut state.pass);
        let Some(layer) = state.jobs.front().map(|job| job.layer) else {
            return state;
        };
        let (mut n_rows, mut n_visits, mut at) = (0, 0, 0);
        while at < state.jobs.len() {
            let job = &state.jobs[at];
            if job.outlet.is_closed() {
                state.jobs.remove(at);
                continue;
            }
            let rows = job.buffers.rows.len() / self.hidden;
            let visits = job.buffers.visits.len();
            let fits = n_rows + rows <= self.rows_max && n_visits + visits <= self.rows_max;
            if job.layer == layer && (fits || pass.jobs.is_empty()) {
                (n_rows, n_visits) = (n_rows + rows, n_visits + visits);
                pass.jobs.extend(state.jobs.remove(at));
            } else {
                at += 1;
            }
        }
        self.counters
            .queued
            .store(state.jobs.len() as u64, Ordering::Relaxed);
        drop(state);

        if !pass.jobs.is_empty() {
            self.compute(layer, &mut pass);
        }

        let mut state = self.lock();
        for job in pass.jobs.drain(..) {
            let mut buffers = job.buffers;
            if state.spare.len() < SPARES_MAX && buffers.rows.capacity() <= SPARE_NUMBERS_MAX {
                buffers.rows.clear();
                buffers.visits.clear();
                state.spare.push(buffers);
            }
        }
        state.pass = pass;
        state
    }

    /// One pass over a layer's weights for all jobs; when that fails, one for each, so that only whoever is at fault is
    /// refused.
    fn compute(&self, layer: u32, pass: &mut Pass) {
        let Pass {
            jobs,
            rows,
            visits,
            out,
        } = pass;
        self.counters.passes.fetch_add(1, Ordering::Relaxed);
        if let [job] = jobs.as_mut_slice() {
            let done = self.forward(layer, &job.buffers.rows, &job.buffers.visits, out);
            return self.answer(job, done.map(|()| out.as_slice()));
        }
        self.counters
            .merged
            .fetch_add(jobs.len() as u64, Ordering::Relaxed);
        rows.clear();
        visits.clear();
        for job in jobs.iter() {
            let base = (rows.len() / self.hidden) as u32;
            rows.extend_from_slice(&job.buffers.rows);
            visits.extend(job.buffers.visits.iter().map(|visit| Visit {
                row: base + visit.row,
                expert: visit.expert,
            }));
        }
        match self.forward(layer, rows, visits, out) {
            Ok(()) => {
                let mut rest = out.as_slice();
                for job in jobs.iter_mut() {
                    let (rows, after) = rest.split_at(job.buffers.visits.len() * self.hidden);
                    rest = after;
                    self.answer(job, Ok(rows));
                }
            }
            Err(_) => {
                for job in jobs.iter_mut() {
                    let done = self.forward(layer, &job.buffers.rows, &job.buffers.visits, out);
                    self.answer(job, done.map(|()| out.as_slice()));
                }
            }
        }
    }

    fn forward(
        &self,
        layer: u32,
        rows: &[f32],
        visits: &[Visit],
        out: &mut Vec<f32>,
    ) -> Result<(), FfnError> {
        out.resize(visits.len() * self.hidden, 0.0);
        self.counters
            .rows
            .fetch_add((rows.len() / self.hidden) as u64, Ordering::Relaxed);
        self.counters
            .visits
            .fetch_add(visits.len() as u64, Ordering::Relaxed);
        // A panic is a bug in the kernels; it must not end the server with everybody else's requests in hand.
        let computed = catch_unwind(AssertUnwindSafe(|| {
            self.ffn.forward(layer, Batch { rows, visits }, out)
        }));
        computed.unwrap_or_else(|_| Err(FfnError::Invalid("the computation panicked".into())))
    }

    fn answer(&self, job: &mut Job, rows: Result<&[f32], FfnError>) {
        let mut frame = job.outlet.buffer();
        let spent = job.arrived.elapsed();
        match rows {
            Ok(rows) => {
                let mut header = Header {
                    row_type: Some(job.row_type),
                    id: job.id,
                    layer: job.layer,
                    n_visits: job.buffers.visits.len() as u32,
                    micros: spent.as_micros().try_into().unwrap_or(u32::MAX),
                    ..Header::new(Kind::Rows)
                };
                header.n_payload_bytes = payload_bytes(&header, self.hidden as u32);
                let seed = job.outlet.seed;
                let written = append(&mut frame, &header, seed, |bytes| {
                    rows::encode(rows, job.row_type, bytes)
                });
                if let Err(rows::NotFinite) = written {
                    let text = format!(
                        "layer {}: a result does not fit {} on the wire",
                        job.layer, job.row_type
                    );
                    self.counters.refuse(Refusal::Range);
                    Refusal::Range.append(&mut frame, job.id, &text, seed);
                }
            }
            Err(error) => {
                self.counters.refuse(Refusal::Failed);
                Refusal::Failed.append(&mut frame, job.id, &error.to_string(), job.outlet.seed);
            }
        }
        self.counters.frames_sent.fetch_add(1, Ordering::Relaxed);
        self.counters.latency.observe(spent);
        job.outlet.n_in_flight.fetch_sub(1, Ordering::Relaxed);
        job.outlet.send(frame, job.held.take());
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
