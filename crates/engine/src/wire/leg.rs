//! A call's connection to one server: the pieces that were asked for on it, and the frames that ask.
//!
//! Invariant: a piece is in flight under one request id, which this connection has used for nothing else.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::frame::{Header, Kind, VISIT_BYTES, append, payload_bytes, put_visits};
use super::peers::{Connection, Peers};
use super::remote::RemoteOptions;
use super::rows::{self, NotFinite};
use crate::ffn::{Batch, FfnError, Visit};

/// Bytes written ahead of what the kernel takes.
const AHEAD_BYTES: usize = 512 << 10;

#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Of `order`.
    pub(super) visits: Range<usize>,
    /// Different rows among them.
    pub(super) n_rows: usize,
    /// Whoever is asked must hold these; what is beside the experts counts as expert 0.
    pub(super) experts: Range<u32>,
}

#[derive(Debug)]
pub(super) struct Leg {
    pub(super) peer: usize,
    pub(super) connection: Connection,
    /// Pieces asked for, by request id.
    pub(super) flights: Vec<(u64, Piece)>,
    /// What it may be asked for, of this layer.
    pub(super) experts: Range<u32>,
    /// When it was asked after it had nothing in flight.
    pub(super) began: Instant,
    /// When bytes moved last.
    pub(super) moved: Instant,
    /// Asked for nothing more: it said goodbye.
    pub(super) is_leaving: bool,
    /// Asked for nothing before.
    pub(super) paused_until: Option<Instant>,
}

impl Piece {
    /// Without visits; they will begin there in `order`.
    pub(super) fn at(start: usize) -> Piece {
        Piece {
            visits: start..start,
            n_rows: 0,
            experts: 0..0,
        }
    }

    /// One more visit, of `expert` or of what its holders hold too.
    pub(super) fn add(&mut self, expert: u32) {
        self.experts = if self.visits.is_empty() {
            expert..expert + 1
        } else {
            self.experts.start.min(expert)..self.experts.end.max(expert + 1)
        };
        self.visits.end += 1;
    }
}

impl Leg {
    /// Whether it may be asked for this piece, now or later.
    pub(super) fn takes(&self, piece: &Piece) -> bool {
        let max_rows = self.connection.session.limits.max_rows as usize;
        !self.is_leaving
            && within(&piece.experts, &self.experts)
            && piece.n_rows.max(piece.visits.len()) <= max_rows
    }

    pub(super) fn has_room(&self) -> bool {
        self.paused_until.is_none()
            && self.flights.len() < self.connection.max_in_flight
            && self.connection.out.len() - self.connection.n_sent < AHEAD_BYTES
    }

    pub(super) fn is_active(&self) -> bool {
        !self.flights.is_empty() || !self.connection.out.is_empty()
    }

    /// Appends the frame that asks for a piece; with `more`, another follows at once. Its rows are numbered anew: those
    /// of the batch that it needs.
    ///
    /// # Errors
    /// [`FfnError::Invalid`] when a row can't be written.
    pub(super) fn ask(
        &mut self,
        piece: Piece,
        more: bool,
        layer: u32,
        batch: &Batch<'_>,
        order: &[u32],
        options: &RemoteOptions,
    ) -> Result<(), FfnError> {
        let hidden = options.model.hidden as usize;
        let wire = options.wire;
        let visits = || {
            order[piece.visits.clone()]
                .iter()
                .map(|visit| batch.visits[*visit as usize])
        };
        let connection = &mut self.connection;
        let mut header = Header {
            row_type: Some(wire),
            code: u8::from(more),
            id: connection.next_id,
            layer,
            n_rows: piece.n_rows as u32,
            n_visits: piece.visits.len() as u32,
            ..Header::new(Kind::Forward)
        };
        header.n_payload_bytes = payload_bytes(&header, options.model.hidden);
        let seed = connection.session.seed_to_server;
        append(&mut connection.out, &header, seed, |bytes| {
            let (row_bytes, visit_bytes) =
                bytes.split_at_mut(bytes.len() - visits().len() * VISIT_BYTES);
            let mut into = row_bytes.chunks_exact_mut(hidden * wire.n_bytes());
            let (mut row_before, mut n_rows, mut is_finite) = (None, 0, true);
            let numbered = visits().map(|visit| {
                if row_before != Some(visit.row) {
                    row_before = Some(visit.row);
                    n_rows += 1;
                    let row = &batch.rows[visit.row as usize * hidden..][..hidden];
                    let bytes = into.next().expect("a piece counts its rows");
                    is_finite &= rows::encode(row, wire, bytes).is_ok();
                }
                Visit {
                    row: n_rows - 1,
                    expert: visit.expert,
                }
            });
            put_visits(numbered, visit_bytes);
            if is_finite { Ok(()) } else { Err(NotFinite) }
        })
        .map_err(|NotFinite| {
            FfnError::Invalid(format!(
                "layer {layer}: a row has a number that is not finite or does not fit {wire} on the wire"
            ))
        })?;
        connection.next_id += 1;
        self.flights.push((header.id, piece));
        Ok(())
    }

    /// Hands to the kernel what it takes at once.
    pub(super) fn push(&mut self, peers: &Peers) -> io::Result<()> {
        let Connection {
            socket,
            out,
            n_sent,
            ..
        } = &mut self.connection;
        while *n_sent < out.len() {
            match socket.send_now(&out[*n_sent..]) {
                Ok(sent) => {
                    *n_sent += sent;
                    self.moved = Instant::now();
                    peers.counters[self.peer]
                        .bytes_sent
                        .fetch_add(sent as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        out.clear();
        *n_sent = 0;
        Ok(())
    }
}

pub(super) fn within(inner: &Range<u32>, outer: &Range<u32>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}
