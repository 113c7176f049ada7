//! The weight servers that a node knows: which are up and hold what, their idle connections, and bringing back those
//! that went down.
//!
//! Invariant: a connection is in one call's hands or idle, never both; one that failed, or whose peer went down since,
//! is closed and not used again. So a late answer of one attempt can't become part of another.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::address::Address;
use super::hello::{self, HelloError, Session, Welcome};
use super::inlet::Inlet;
use super::refusal::Refusal;
use super::remote::RemoteOptions;
use super::socket::Socket;

/// How long a call waits in one go: clocks are looked at this often.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// An agreed connection to a server.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Socket,
    pub(super) inlet: Inlet,
    pub(super) session: Session,
    pub(super) max_in_flight: usize,
    /// Frames to send; the first `n_sent` bytes have left.
    pub(super) out: Vec<u8>,
    pub(super) n_sent: usize,
    pub(super) next_id: u64,
    /// How often the peer had gone down when this connection was made.
    generation: u64,
}

/// All peers of a node.
#[derive(Debug)]
pub(super) struct Peers {
    pub(super) options: RemoteOptions,
    pub(super) addresses: Vec<Address>,
    pub(super) counters: Vec<PeerCounters>,
    states: Mutex<Vec<PeerState>>,
    /// A peer came up, or the node ends.
    changed: Condvar,
    is_closed: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct PeerCounters {
    pub(super) round_trips: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) waited_micros: AtomicU64,
    pub(super) served_micros: AtomicU64,
    pub(super) busy: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) reconnects: AtomicU64,
}

/// What is known of one peer.
#[derive(Debug)]
pub(super) struct PeerState {
    /// What it said last; a peer that went down may come back with other ranges.
    pub(super) welcome: Option<Welcome>,
    pub(super) is_up: bool,
    pub(super) down_since: Instant,
    /// Why it is down.
    pub(super) reason: String,
    idle: Vec<Connection>,
    n_leased: usize,
    generation: u64,
    /// How often it failed lately; it is preferred again only after a while.
    n_strikes: u32,
    trusted_from: Instant,
    busy_until: Instant,
    latency_micros: f64,
    used: Instant,
}

/// The most idle connections kept to one peer.
const IDLE_MAX: usize = 32;
/// Failures are forgotten after this long without one.
const FORGIVEN: Duration = Duration::from_secs(60);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a peer that is busy is left alone when others hold the same.
const BUSY: Duration = Duration::from_millis(20);

impl PeerState {
    /// Whether it is up and holds these experts of this layer.
    pub(super) fn holds(&self, layer: u32, experts: &Range<u32>) -> bool {
        self.is_up && self.held(layer, experts)
    }

    /// Whether it held them when it was up last.
    pub(super) fn held(&self, layer: u32, experts: &Range<u32>) -> bool {
        self.welcome.as_ref().is_some_and(|welcome| {
            welcome.layers.contains(&layer)
                && welcome.experts.start <= experts.start
                && experts.end <= welcome.experts.end
        })
    }

    /// Less is better: peers that do not fail, that are not busy, then those with fewest calls, then the fastest. What
    /// is known of speed fades, so that a slow answer of long ago is tried again.
    pub(super) fn rank(&self, now: Instant) -> (bool, bool, usize, u64) {
        let unused = now.saturating_duration_since(self.used).as_secs_f64();
        let latency = self.latency_micros * (-unused).exp2();
        (
            now < self.trusted_from,
            now < self.busy_until,
            self.n_leased,
            latency as u64,
        )
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum NoConnection {
    /// The peer takes no more; it is not down.
    Full,
    /// It has been marked down.
    Lost,
}

impl Peers {
    pub(super) fn new(options: RemoteOptions, addresses: Vec<Address>) -> Peers {
        let now = Instant::now();
        let states = addresses.iter().map(|_| PeerState {
            welcome: None,
            is_up: false,
            down_since: now,
            reason: "not asked yet".into(),
            idle: Vec::new(),
            n_leased: 0,
            generation: 0,
            n_strikes: 0,
            trusted_from: now,
            busy_until: now,
            latency_micros: 0.0,
            used: now,
        });
        Peers {
            states: Mutex::new(states.collect()),
            counters: addresses.iter().map(|_| PeerCounters::default()).collect(),
            changed: Condvar::new(),
            is_closed: AtomicBool::new(false),
            options,
            addresses,
        }
    }

    pub(super) fn states(&self) -> MutexGuard<'_, Vec<PeerState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to this peer: an idle one, or another.
    pub(super) fn lease(
        self: &Arc<Peers>,
        peer: usize,
        until: Instant,
    ) -> Result<Connection, NoConnection> {
        let generation = {
            let mut states = self.states();
            let state = &mut states[peer];
            if !state.is_up {
                return Err(NoConnection::Lost);
            }
            state.n_leased += 1;
            if let Some(connection) = state.idle.pop() {
                return Ok(connection);
            }
            if Instant::now() < state.busy_until {
                // One connection more would not make it less busy.
                state.n_leased -= 1;
                return Err(NoConnection::Full);
            }
            state.generation
        };
        let until = until.min(Instant::now() + self.options.hello);
        match self.dial(peer, until) {
            Ok((mut connection, welcome)) => {
                connection.generation = generation;
                let is_known = self.states()[peer].welcome.as_ref() == Some(&welcome);
                if !is_known {
                    let reason = "it holds other weights than before".to_owned();
                    self.discard(peer, connection, Some(reason));
                    return Err(NoConnection::Lost);
                }
                Ok(connection)
            }
            Err(error) => {
                self.states()[peer].n_leased -= 1;
                if matches!(error, HelloError::Refused(Refusal::Full, _)) {
                    self.busy(peer);
                    return Err(NoConnection::Full);
                }
                self.lose(peer, generation, error.to_string());
                Err(NoConnection::Lost)
            }
        }
    }

    /// Takes back a connection on which nothing is in flight.
    pub(super) fn give_back(&self, peer: usize, connection: Connection, spent: Duration) {
        let mut states = self.states();
        let state = &mut states[peer];
        state.n_leased -= 1;
        let micros = spent.as_secs_f64() * 1e6;
        state.latency_micros += (micros - state.latency_micros) / 8.0;
        state.used = Instant::now();
        if state.is_up && connection.generation == state.generation && state.idle.len() < IDLE_MAX {
            state.idle.push(connection);
        }
    }

    /// Closes a connection; with a `reason`, its peer goes down.
    pub(super) fn discard(
        self: &Arc<Peers>,
        peer: usize,
        connection: Connection,
        reason: Option<String>,
    ) {
        self.states()[peer].n_leased -= 1;
        if let Some(reason) = reason {
            self.lose(peer, connection.generation, reason);
        }
    }

    /// Counts the time in which requests were in flight to a peer.
    pub(super) fn waited(&self, peer: usize, spent: Duration) {
        self.counters[peer]
            .waited_micros
            .fetch_add(spent.as_micros() as u64, Ordering::Relaxed);
    }

    /// Asks others first for a while.
    pub(super) fn busy(&self, peer: usize) {
        self.counters[peer].busy.fetch_add(1, Ordering::Relaxed);
        self.states()[peer].busy_until = Instant::now() + BUSY;
    }

    /// Marks a peer down that failed on a connection of this generation, and begins to bring it back.
    pub(super) fn lose(self: &Arc<Peers>, peer: usize, generation: u64, reason: String) {
        {
            let mut states = self.states();
            let state = &mut states[peer];
            if state.generation != generation || !state.is_up {
                return;
            }
            tracing::warn!("weight server {} is down: {reason}", self.addresses[peer]);
            let now = Instant::now();
            if now.saturating_duration_since(state.down_since) > FORGIVEN {
                state.n_strikes = 0;
            }
            state.n_strikes += 1;
            state.is_up = false;
            state.down_since = now;
            state.reason = reason;
            state.generation += 1;
            state.idle.clear();
        }
        self.counters[peer].failures.fetch_add(1, Ordering::Relaxed);
        self.revive(peer);
    }

    /// Marks the peer of this connection down; the connection is used to its end.
    pub(super) fn lose_by(self: &Arc<Peers>, peer: usize, connection: &Connection, reason: String) {
        self.lose(peer, connection.generation, reason);
    }

    /// Begins to bring back a peer that is down.
    pub(super) fn revive(self: &Arc<Peers>, peer: usize) {
        let peers = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("wire-revive".into())
            .stack_size(256 << 10);
        // A process that can't have a small thread any more has worse to report than this.
        if let Err(error) = thread.spawn(move || peers.bring_back(peer)) {
            tracing::error!("no thread to reach {} again: {error}", self.addresses[peer]);
        }
    }

    fn bring_back(self: Arc<Peers>, peer: usize) {
        let n_strikes = self.states()[peer].n_strikes;
        // One failure is usually a restart; more in a row, a peer that greets well and answers badly.
        let mut pause = PAUSE_FIRST * 2u32.pow(n_strikes.saturating_sub(1).min(7));
        if n_strikes > 1 && self.sleep(pause.min(PAUSE_MAX)) {
            return;
        }
        loop {
            let dialed = self.dial(peer, Instant::now() + self.options.hello);
            if self.is_closed.load(Ordering::Relaxed) {
                return;
            }
            match dialed {
                Ok((connection, welcome)) => {
                    self.counters[peer]
                        .reconnects
                        .fetch_add(1, Ordering::Relaxed);
                    tracing::info!("weight server {} is up", self.addresses[peer]);
                    return self.came_up(peer, connection, welcome);
                }
                Err(error) => self.states()[peer].reason = error.to_string(),
            }
            if self.sleep(pause) {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Makes a peer's first connection known.
    pub(super) fn came_up(&self, peer: usize, mut connection: Connection, welcome: Welcome) {
        let mut states = self.states();
        let state = &mut states[peer];
        let now = Instant::now();
        connection.generation = state.generation;
        state.is_up = true;
        state.welcome = Some(welcome);
        state.latency_micros = 0.0;
        state.used = now;
        if state.n_strikes > 0 {
            let doubt = Duration::from_millis(100) * 2u32.pow(state.n_strikes.min(8));
            state.trusted_from = now + doubt;
        }
        state.idle.push(connection);
        self.changed.notify_all();
    }

    /// A connection and what the server said of itself.
    pub(super) fn dial(
        &self,
        peer: usize,
        until: Instant,
    ) -> Result<(Connection, Welcome), HelloError> {
        let socket = Socket::connect(&self.addresses[peer], until)?;
        let mut inlet = Inlet::new();
        let RemoteOptions { secret, model, .. } = &self.options;
        let (session, welcome) = hello::greet(&socket, &mut inlet, secret, model, until)?;
        socket.set_recv_limit(TICK)?;
        inlet.widen();
        let connection = Connection {
            socket,
            inlet,
            session,
            max_in_flight: welcome.max_in_flight as usize,
            out: Vec::new(),
            n_sent: 0,
            next_id: 1,
            generation: 0,
        };
        Ok((connection, welcome))
    }

    /// Waits until a peer comes up, or for `limit`.
    pub(super) fn wait_for_change(&self, limit: Duration) {
        // Whichever it was, the caller looks again.
        let _ = self.changed.wait_timeout(self.states(), limit);
    }

    /// Ends the threads that bring peers back.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
        let mut states = self.states();
        for state in states.iter_mut() {
            state.idle.clear();
        }
        self.changed.notify_all();
    }

    /// Waits; whether the node ended.
    fn sleep(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut states = self.states();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.is_closed.load(Ordering::Relaxed) {
                return true;
            }
            if left.is_zero() {
                return false;
            }
            states = match self.changed.wait_timeout(states, left) {
                Ok((states, _)) => states,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}
