//! The sending half of a server's connection. Whoever has a frame hands it over and never waits: what the kernel does
//! not take at once is sent by a thread of the connection's own, which begins when it is first needed.
//!
//! Invariant: frames leave whole and in the order they were handed over, and a peer that takes none for the limit is
//! cut off. How much may wait is bounded twice: the bytes by the [`Held`] of each answer, which whoever made it accounts
//! for, and the frames by [`WAITING_MAX`].

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::socket::Socket;

/// A share of a bound, given back when dropped.
#[derive(Debug)]
pub(super) struct Held {
    of: Arc<AtomicU64>,
    n_bytes: u64,
}

impl Held {
    /// Takes a share, or nothing when `bound` would be passed. An empty bound grants one share of any size, so that a
    /// frame larger than the bound is possible and two are not.
    pub(super) fn take(of: &Arc<AtomicU64>, n_bytes: u64, bound: u64) -> Option<Held> {
        let grant = |held: u64| (held == 0 || held + n_bytes <= bound).then_some(held + n_bytes);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grant)
            .ok()?;
        Some(Held {
            of: Arc::clone(of),
            n_bytes,
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.fetch_sub(self.n_bytes, Ordering::Release);
    }
}

/// The sending half of a connection.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) socket: Arc<Socket>,
    /// Of the checksums of what is sent.
    pub(super) seed: u64,
    /// Requests taken from this connection whose answer has not been handed over.
    pub(super) n_in_flight: AtomicU32,
    is_closed: AtomicBool,
    bytes_sent: Arc<AtomicU64>,
    limit: Duration,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// The thread has a frame in hand: others queue behind it.
    is_sending: bool,
    has_thread: bool,
    /// Buffers of frames that left.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Waiting {
    frame: Vec<u8>,
    n_sent: usize,
    _held: Option<Held>,
}

/// Frames that wait for a peer to take those before them. An honest node has fewer requests in flight; one that asks
/// without listening would have its pongs and refusals, which no share accounts for, fill the memory.
pub(super) const WAITING_MAX: usize = 64;
/// Buffers kept for the next frames, and how large they may be.
const SPARES_MAX: usize = 4;
const SPARE_BYTES_MAX: usize = 1 << 20;

impl Outlet {
    pub(super) fn new(
        socket: Arc<Socket>,
        seed: u64,
        limit: Duration,
        bytes_sent: Arc<AtomicU64>,
    ) -> Outlet {
        Outlet {
            socket,
            seed,
            n_in_flight: AtomicU32::new(0),
            is_closed: AtomicBool::new(false),
            bytes_sent,
            limit,
            state: Mutex::default(),
            more: Condvar::new(),
        }
    }

    /// An empty buffer for a frame.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Sends a frame, now or as soon as those before it have left.
    pub(super) fn send(self: &Arc<Outlet>, frame: Vec<u8>, held: Option<Held>) {
        if self.is_closed() {
            return;
        }
        let mut waiting = Waiting {
            frame,
            n_sent: 0,
            _held: held,
        };
        let mut state = self.lock();
        if !state.is_sending && state.waiting.is_empty() {
            match self.send_now(&mut waiting) {
                Ok(()) => {
                    state.keep(waiting.frame);
                    return;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    drop(state);
                    return self.close();
                }
            }
        }
        if state.waiting.len() >= WAITING_MAX {
            drop(state);
            return self.close();
        }
        state.waiting.push_back(waiting);
        if state.has_thread {
            self.more.notify_one();
        } else {
            let outlet = Arc::clone(self);
            let thread = thread::Builder::new()
                .name("wire-out".into())
                .stack_size(64 << 10);
            state.has_thread = thread.spawn(move || outlet.run()).is_ok();
            if !state.has_thread {
                drop(state);
                self.close();
            }
        }
    }

    /// Ends the connection; whoever reads from it wakes up.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
        self.socket.shutdown();
        self.lock().waiting.clear();
        self.more.notify_one();
    }

    /// Whether nobody will receive what is sent.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    fn send_now(&self, waiting: &mut Waiting) -> io::Result<()> {
        while waiting.n_sent < waiting.frame.len() {
            let sent = self.socket.send_now(&waiting.frame[waiting.n_sent..])?;
            waiting.n_sent += sent;
            self.bytes_sent.fetch_add(sent as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The thread: sends what waits, until the connection ends.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if self.is_closed() {
                return;
            }
            let Some(waiting) = state.waiting.pop_front() else {
                state = self
                    .more
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.is_sending = true;
            drop(state);
            let until = Instant::now() + self.limit;
            let rest = &waiting.frame[waiting.n_sent..];
            if self.socket.send_all(rest, until).is_err() {
                return self.close();
            }
            self.bytes_sent
                .fetch_add(rest.len() as u64, Ordering::Relaxed);
            state = self.lock();
            state.is_sending = false;
            state.keep(waiting.frame);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, mut frame: Vec<u8>) {
        if self.spare.len() < SPARES_MAX && frame.capacity() <= SPARE_BYTES_MAX {
            frame.clear();
            self.spare.push(frame);
        }
    }
}
