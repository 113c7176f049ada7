//! One layer's rows, from as many servers as hold its experts, with as many attempts as the deadline allows.
//!
//! Visits whose rows are missing lie in a pool. [`Call::route`] takes them out, to the best peer that holds each expert,
//! as pieces of a frame's size; legs (a connection each) take pieces, send them and receive rows; when a leg fails, its
//! visits are back in the pool. A call is one thread: it waits for all its legs at once.
//!
//! Invariant: a row of `out` is written only by the answer to the piece that asked for it, on the connection where it
//! was asked; a piece is in one place: queue, flight, or answered.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::frame::{Header, Kind};
use super::hello::transport;
use super::leg::{Leg, Piece, within};
use super::peers::{Connection, NoConnection, Peers, TICK};
use super::refusal::Refusal;
use super::rows;
use super::socket::{Socket, Wanted, wait};
use crate::ffn::{Batch, FfnError, Visit};

/// Rows that a frame may always have, so that a decoding batch is one pass over the weights.
const PIECE_ROWS: usize = 16;
/// Bytes of rows above which more rows go into a frame of their own: the next is on its way while this is computed.
const PIECE_BYTES: usize = 256 << 10;
/// How long a server that is busy is left alone by a call that can ask nobody else.
const PAUSE: Duration = Duration::from_millis(2);
/// No peer.
const NOBODY: u32 = u32::MAX;

/// The memory of a call, used again by later ones.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Visits without a row and without a piece, ascending.
    pool: Vec<u32>,
    /// Visits of pieces, each a range of this.
    order: Vec<u32>,
    queue: VecDeque<Piece>,
    legs: Vec<Leg>,
    /// Lists of flights of legs that were.
    spare: Vec<Vec<(u64, Piece)>>,
    /// Peer for each expert, while routing.
    owners: Vec<u32>,
    /// Peers, best first, while routing.
    ranked: Vec<u32>,
    /// Peers that said that they can't do this.
    shunned: Vec<u32>,
}

pub(super) struct Call<'a> {
    peers: &'a Arc<Peers>,
    layer: u32,
    batch: Batch<'a>,
    out: &'a mut [f32],
    memory: &'a mut Memory,
    hidden: usize,
    until: Instant,
    n_missing: usize,
    last_asked: usize,
    last_refusal: Option<String>,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        peers: &'a Arc<Peers>,
        layer: u32,
        batch: Batch<'a>,
        out: &'a mut [f32],
        memory: &'a mut Memory,
    ) -> Call<'a> {
        memory.pool.clear();
        memory.pool.extend(0..batch.visits.len() as u32);
        memory.order.clear();
        memory.queue.clear();
        memory.shunned.clear();
        Call {
            layer,
            batch,
            out,
            memory,
            hidden: peers.options.model.hidden as usize,
            until: Instant::now() + peers.options.deadline,
            n_missing: batch.visits.len(),
            last_asked: 0,
            last_refusal: None,
            peers,
        }
    }

    pub(super) fn run(mut self) -> Result<(), FfnError> {
        let done = self.work();
        for mut leg in self.memory.legs.drain(..) {
            // A connection with an answer under way is of no use to anybody.
            if leg.flights.is_empty() && leg.connection.out.is_empty() {
                self.memory.spare.push(mem::take(&mut leg.flights));
                self.peers
                    .give_back(leg.peer, leg.connection, leg.moved - leg.began);
            } else {
                self.peers.waited(leg.peer, leg.began.elapsed());
                let reason = match &done {
                    Err(FfnError::Deadline { .. }) => Some("no answer in time".into()),
                    _ => None,
                };
                self.peers.discard(leg.peer, leg.connection, reason);
            }
        }
        done
    }

    fn work(&mut self) -> Result<(), FfnError> {
        while self.n_missing > 0 {
            if !self.memory.pool.is_empty() {
                self.route()?;
            }
            self.send()?;
            self.receive()?;
            self.judge_time()?;
        }
        Ok(())
    }

    /// Finds a peer and a leg for the visits in the pool. Those that nobody who is up holds stay there.
    fn route(&mut self) -> Result<(), FfnError> {
        let Memory {
            pool,
            order,
            queue,
            legs,
            spare,
            owners,
            ranked,
            shunned,
        } = &mut *self.memory;
        if queue.is_empty() && legs.iter().all(|leg| leg.flights.is_empty()) {
            // No piece refers to it: a call that is told to wait again and again does not grow.
            order.clear();
        }
        let now = Instant::now();
        owners.clear();
        owners.resize(self.peers.options.model.n_experts as usize, NOBODY);
        let (max_visits, max_rows);
        {
            let states = self.peers.states();
            ranked.clear();
            let layer = self.layer;
            let serves = |peer: &u32| {
                let state = &states[*peer as usize];
                let has_layer = state
                    .welcome
                    .as_ref()
                    .is_some_and(|welcome| welcome.layers.contains(&layer));
                state.is_up && has_layer && !shunned.contains(peer)
            };
            ranked.extend((0..states.len() as u32).filter(serves));
            ranked.sort_by_key(|peer| states[*peer as usize].rank(now));
            let welcomes = || {
                ranked
                    .iter()
                    .filter_map(|peer| states[*peer as usize].welcome.as_ref())
            };
            for (peer, welcome) in ranked.iter().zip(welcomes()) {
                for owner in
                    &mut owners[welcome.experts.start as usize..welcome.experts.end as usize]
                {
                    if *owner == NOBODY {
                        *owner = *peer;
                    }
                }
            }
            let row_bytes = self.hidden * self.peers.options.wire.n_bytes();
            let allowed = welcomes().map(|welcome| welcome.max_rows as usize);
            max_visits = allowed.min().unwrap_or(1);
            max_rows = max_visits.min(PIECE_ROWS.max(PIECE_BYTES / row_bytes));
        }
        let visits = self.batch.visits;
        let model = &self.peers.options.model;
        let orphan = pool
            .iter()
            .map(|visit| model.holder(visits[*visit as usize].expert))
            .find(|expert| owners[*expert as usize] == NOBODY);

        // Pieces: of one owner each, as many rows and visits as a frame takes.
        let first_piece = queue.len();
        for &owner in ranked.iter() {
            let mut piece = Piece::at(order.len());
            let mut row_before = NOBODY;
            for &visit in pool.iter() {
                let Visit { row, expert } = visits[visit as usize];
                let expert = model.holder(expert);
                if owners[expert as usize] != owner {
                    continue;
                }
                let n_rows = piece.n_rows + usize::from(row != row_before);
                if piece.visits.len() == max_visits || n_rows > max_rows {
                    queue.push_back(piece);
                    piece = Piece::at(order.len());
                    row_before = NOBODY;
                }
                piece.n_rows += usize::from(row != row_before);
                row_before = row;
                piece.add(expert);
                order.push(visit);
            }
            if !piece.visits.is_empty() {
                queue.push_back(piece);
            }
        }
        pool.retain(|visit| {
            owners[model.holder(visits[*visit as usize].expert) as usize] == NOBODY
        });

        // Legs: one for each owner, and for each replica while there are pieces for it too.
        let mut n_spare = queue.len() - first_piece;
        for &ranked in ranked.iter() {
            let peer = ranked as usize;
            let is_owner = owners.contains(&ranked);
            let Some(experts) = self.peers.states()[peer]
                .welcome
                .as_ref()
                .map(|welcome| welcome.experts.clone())
            else {
                continue;
            };
            let takes = |piece: &Piece| within(&piece.experts, &experts);
            if legs.iter().any(|leg| leg.peer == peer && !leg.is_leaving)
                || !queue.iter().any(takes)
            {
                continue;
            }
            if !is_owner && n_spare == 0 {
                continue;
            }
            n_spare = n_spare.saturating_sub(1);
            match self.peers.lease(peer, self.until) {
                Ok(connection) => legs.push(Leg {
                    peer,
                    connection,
                    flights: spare.pop().unwrap_or_default(),
                    experts,
                    began: Instant::now(),
                    moved: Instant::now(),
                    is_leaving: false,
                    paused_until: None,
                }),
                Err(NoConnection::Full | NoConnection::Lost) => {}
            }
        }
        self.memory.reclaim();
        match orphan {
            Some(expert) => self.wait_or_give_up(expert),
            None => Ok(()),
        }
    }

    /// Nobody who is up holds `expert`: an error, unless somebody who went down a short while ago did.
    fn wait_or_give_up(&self, expert: u32) -> Result<(), FfnError> {
        let states = self.peers.states();
        let now = Instant::now();
        let mut reasons = Vec::new();
        let mut may_return = false;
        for (peer, state) in states.iter().enumerate() {
            if self.memory.shunned.contains(&(peer as u32)) {
                continue;
            }
            let down = now.saturating_duration_since(state.down_since);
            let held = state.welcome.is_none() || state.held(self.layer, &(expert..expert + 1));
            // Whoever is down may come back with other ranges.
            may_return |= (held || !state.is_up) && down < self.peers.options.deadline;
            if !held {
                continue;
            }
            reasons.push(format!(
                "{}: {}, down for {:.1} s",
                self.peers.addresses[peer],
                state.reason,
                down.as_secs_f64()
            ));
        }
        if may_return && now < self.until {
            return Ok(());
        }
        reasons.extend(self.last_refusal.clone());
        let reason = match reasons.is_empty() {
            true => "none that is known ever did".to_owned(),
            false => reasons.join("; "),
        };
        Err(FfnError::NoPeer {
            layer: self.layer,
            expert,
            reason,
        })
    }

    /// Gives pieces to legs that have room, and to the kernel what it takes of them.
    fn send(&mut self) -> Result<(), FfnError> {
        let now = Instant::now();
        // In rounds of one piece for each leg, so that replicas share a large batch.
        loop {
            let mut is_given = false;
            let mut i = 0;
            while i < self.memory.legs.len() {
                let leg = &mut self.memory.legs[i];
                leg.paused_until = leg.paused_until.filter(|until| *until > now);
                let queue = &mut self.memory.queue;
                let at = queue.iter().position(|piece| leg.takes(piece));
                if let Some(piece) = at
                    .filter(|_| leg.has_room())
                    .and_then(|at| queue.remove(at))
                {
                    is_given = true;
                    let more = leg.flights.len() + 1 < leg.connection.max_in_flight
                        && queue.iter().any(|piece| leg.takes(piece));
                    if leg.flights.is_empty() {
                        (leg.began, leg.moved) = (now, now);
                    }
                    let (batch, options) = (&self.batch, &self.peers.options);
                    leg.ask(piece, more, self.layer, batch, &self.memory.order, options)?;
                    self.last_asked = leg.peer;
                }
                match leg.push(self.peers) {
                    Ok(()) => i += 1,
                    Err(error) => self.fail(i, transport(&error)),
                }
            }
            if !is_given {
                return Ok(());
            }
        }
    }

    /// Waits for something to happen on any leg, at most a tick, and takes it in.
    fn receive(&mut self) -> Result<(), FfnError> {
        let legs = &self.memory.legs;
        let n_active = legs.iter().filter(|leg| leg.is_active()).count();
        if n_active == 0 {
            if self.n_missing > 0 {
                let is_paused = legs.iter().any(|leg| leg.paused_until.is_some());
                self.peers
                    .wait_for_change(if is_paused { PAUSE } else { TICK });
            }
            return Ok(());
        }
        if n_active == 1 && legs.iter().all(|leg| leg.connection.out.is_empty()) {
            let i = legs.iter().position(Leg::is_active).unwrap_or_default();
            return self.take(i, Socket::recv);
        }
        let mut sockets: Vec<_> = legs
            .iter()
            .map(|leg| {
                let wanted = Wanted {
                    recv: !leg.flights.is_empty(),
                    send: !leg.connection.out.is_empty(),
                };
                (leg.connection.socket.as_fd(), wanted)
            })
            .collect();
        if let Err(error) = wait(&mut sockets, TICK) {
            return Err(FfnError::Invalid(format!(
                "cannot wait for sockets: {error}"
            )));
        }
        let ready: Vec<bool> = sockets.iter().map(|(_, came)| came.recv).collect();
        // From the last, so that a leg that fails moves none that is still to be looked at.
        for i in (0..ready.len()).rev().filter(|i| ready[*i]) {
            self.take(i, Socket::recv_now)?;
        }
        Ok(())
    }

    /// Receives once on leg `i` and takes in every frame that is whole.
    fn take(
        &mut self,
        i: usize,
        recv: impl FnOnce(&Socket, &mut [u8]) -> io::Result<usize>,
    ) -> Result<(), FfnError> {
        let leg = &mut self.memory.legs[i];
        let Connection {
            socket,
            inlet,
            session,
            ..
        } = &mut leg.connection;
        match inlet.fill(|bytes| recv(socket, bytes)) {
            Ok(n_bytes) => {
                leg.moved = Instant::now();
                self.peers.counters[leg.peer]
                    .bytes_received
                    .fetch_add(n_bytes as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                self.fail(i, transport(&error));
                return Ok(());
            }
        }
        let (seed, limits) = (session.seed_to_node, session.limits);
        loop {
            let leg = &mut self.memory.legs[i];
            let header = match leg.connection.inlet.frame(seed, &limits) {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.fail(i, error.to_string());
                    return Ok(());
                }
            };
            match self.heed(i, &header) {
                Heeded::Well => self.memory.legs[i].connection.inlet.pass(&header),
                Heeded::Lost(reason) => {
                    self.fail(i, reason);
                    return Ok(());
                }
                Heeded::Over(error) => return Err(error),
            }
        }
    }

    /// Acts on one frame of leg `i`.
    fn heed(&mut self, i: usize, header: &Header) -> Heeded {
        let leg = &mut self.memory.legs[i];
        let payload = leg.connection.inlet.payload(header);
        let flight = leg.flights.iter().position(|(id, _)| *id == header.id);
        match (header.kind, flight) {
            (Kind::Rows, Some(flight)) => {
                let wire = self.peers.options.wire;
                let visits = leg.flights[flight].1.visits.clone();
                if header.layer != self.layer
                    || header.n_visits as usize != visits.len()
                    || header.row_type != Some(wire)
                {
                    return Heeded::Lost("an answer to another question".into());
                }
                let row_bytes = self.hidden * wire.n_bytes();
                for (&visit, bytes) in self.memory.order[visits]
                    .iter()
                    .zip(payload.chunks_exact(row_bytes))
                {
                    let row = &mut self.out[visit as usize * self.hidden..][..self.hidden];
                    if rows::decode(bytes, wire, row).is_err() {
                        return Heeded::Lost("a row with a number that is not finite".into());
                    }
                }
                self.n_missing -= header.n_visits as usize;
                leg.flights.swap_remove(flight);
                let counters = &self.peers.counters[leg.peer];
                counters.round_trips.fetch_add(1, Ordering::Relaxed);
                counters
                    .served_micros
                    .fetch_add(u64::from(header.micros), Ordering::Relaxed);
                if leg.flights.is_empty() {
                    self.peers.waited(leg.peer, leg.moved - leg.began);
                }
                Heeded::Well
            }
            (Kind::Refused, Some(flight)) => {
                let (refusal, text) = Refusal::read(header, payload);
                let address = &self.peers.addresses[leg.peer];
                match refusal {
                    Refusal::Range => {
                        return Heeded::Over(FfnError::Invalid(format!(
                            "{address}: {text}; use a wider --wire"
                        )));
                    }
                    Refusal::Busy => {
                        self.peers.busy(leg.peer);
                        leg.paused_until = Some(Instant::now() + PAUSE);
                    }
                    Refusal::NotHere | Refusal::Failed => {
                        self.last_refusal = Some(format!("{address} refused: {text}"));
                        self.memory.shunned.push(leg.peer as u32);
                        leg.is_leaving = true;
                    }
                    Refusal::Draining => {
                        leg.is_leaving = true;
                        self.peers
                            .lose_by(leg.peer, &leg.connection, "it is draining".into());
                    }
                    _ => return Heeded::Lost(format!("it refused: {text}")),
                }
                let (_, piece) = leg.flights.swap_remove(flight);
                if leg.flights.is_empty() {
                    self.peers.waited(leg.peer, leg.moved - leg.began);
                }
                self.memory
                    .pool
                    .extend_from_slice(&self.memory.order[piece.visits]);
                self.memory.reclaim();
                Heeded::Well
            }
            (Kind::Refused, None) => {
                Heeded::Lost(format!("it refused: {}", Refusal::read(header, payload).1))
            }
            (Kind::Goodbye, _) => {
                // What it took it still answers.
                leg.is_leaving = true;
                self.peers
                    .lose_by(leg.peer, &leg.connection, "it is draining".into());
                self.memory.reclaim();
                Heeded::Well
            }
            (Kind::Rows, None) => Heeded::Lost("an answer to no question".into()),
            (kind, _) => Heeded::Lost(format!("a {kind:?} frame from a server")),
        }
    }

    /// Leg `i` is over: its visits are without a row again, and its peer is down.
    fn fail(&mut self, i: usize, reason: String) {
        let leg = self.memory.legs.swap_remove(i);
        let is_waited_for = !leg.flights.is_empty();
        for (_, piece) in leg.flights {
            self.memory
                .pool
                .extend_from_slice(&self.memory.order[piece.visits]);
        }
        self.memory.reclaim();
        if is_waited_for {
            self.peers.waited(leg.peer, leg.began.elapsed());
        }
        self.peers.discard(leg.peer, leg.connection, Some(reason));
    }

    /// The deadline of the call, and the patience with each leg.
    fn judge_time(&mut self) -> Result<(), FfnError> {
        let now = Instant::now();
        if self.n_missing > 0 && now >= self.until {
            let silent = self
                .memory
                .legs
                .iter()
                .filter(|leg| leg.is_active())
                .min_by_key(|leg| leg.moved);
            let orphan = self
                .memory
                .pool
                .first()
                .map(|visit| self.batch.visits[*visit as usize].expert)
                .map(|expert| self.peers.options.model.holder(expert));
            if let (None, Some(expert)) = (silent, orphan) {
                self.wait_or_give_up(expert)?;
            }
            let peer = silent.map_or(self.last_asked, |leg| leg.peer);
            return Err(FfnError::Deadline {
                layer: self.layer,
                deadline: self.peers.options.deadline,
                peer: self.peers.addresses[peer].to_string(),
            });
        }
        let stall = self.peers.options.stall;
        let mut i = 0;
        while i < self.memory.legs.len() {
            let leg = &self.memory.legs[i];
            let is_silent = leg.is_active() && now.saturating_duration_since(leg.moved) > stall;
            if is_silent && self.has_replica(leg) {
                self.fail(i, format!("no answer for {stall:?}"));
            } else {
                i += 1;
            }
        }
        Ok(())
    }

    fn has_replica(&self, leg: &Leg) -> bool {
        let states = self.peers.states();
        leg.flights.iter().all(|(_, piece)| {
            let others = states
                .iter()
                .enumerate()
                .filter(|(peer, _)| *peer != leg.peer);
            others.into_iter().any(|(peer, state)| {
                state.holds(self.layer, &piece.experts)
                    && !self.memory.shunned.contains(&(peer as u32))
            })
        })
    }
}

impl Memory {
    /// Puts back into the pool the pieces that no leg takes, to be routed again.
    fn reclaim(&mut self) {
        let Memory {
            queue,
            legs,
            pool,
            order,
            ..
        } = self;
        queue.retain(|piece| {
            let is_taken = legs.iter().any(|leg| leg.takes(piece));
            if !is_taken {
                pool.extend_from_slice(&order[piece.visits.clone()]);
            }
            is_taken
        });
        pool.sort_unstable();
    }
}

/// What a frame means for its leg and the call.
enum Heeded {
    Well,
    Lost(String),
    Over(FfnError),
}
