//! The receiving half of a connection: bytes as they come, frames as they are whole.
//!
//! Invariant: it holds at most one frame of the agreed size more than it was asked for, and grows only as bytes arrive
//! that belong to a frame whose header was judged. One call to the system usually brings a whole frame.

use std::io;

use super::frame::{FrameError, Header, Limits, Step, frame_bytes, parse};

/// Bytes received and not yet used.
#[derive(Debug)]
pub(super) struct Inlet {
    /// Its whole length is room that may be received into.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// What the frame under way needs in all.
    needed: usize,
}

/// Room to begin with: a handshake fits.
const ROOM_FIRST: usize = 256;
/// Room for a frame under way grows by this factor of what has arrived, so that a length alone sizes nothing.
const GROWTH: usize = 4;
/// Room that is always granted once a connection is agreed on: the rows of a token or two in one call.
const ROOM: usize = 64 << 10;

impl Inlet {
    pub(super) fn new() -> Inlet {
        Inlet {
            buffer: vec![0; ROOM_FIRST],
            start: 0,
            end: 0,
            needed: 0,
        }
    }

    /// Grants the room of an agreed connection.
    pub(super) fn widen(&mut self) {
        if self.buffer.len() < ROOM {
            self.buffer.resize(ROOM, 0);
        }
    }

    /// Whether a part of a frame is here.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next frame when it is whole: its header, and what [`Inlet::payload`] and [`Inlet::pass`] want.
    pub(super) fn frame(
        &mut self,
        seed: u64,
        limits: &Limits,
    ) -> Result<Option<Header>, FrameError> {
        match parse(&self.buffer[self.start..self.end], seed, limits)? {
            Step::Frame(header, _) => {
                self.needed = 0;
                Ok(Some(header))
            }
            Step::Need(n_bytes) => {
                self.needed = n_bytes;
                Ok(None)
            }
        }
    }

    /// The payload of the frame that [`Inlet::frame`] returned last.
    pub(super) fn payload(&self, header: &Header) -> &[u8] {
        let start = self.start + super::frame::HEADER_BYTES;
        &self.buffer[start..start + header.n_payload_bytes as usize]
    }

    /// Passes over that frame.
    pub(super) fn pass(&mut self, header: &Header) {
        self.start += frame_bytes(header);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Bytes of room, used or not.
    #[cfg(any(fuzzing, test))]
    pub(super) fn n_room(&self) -> usize {
        self.buffer.len()
    }

    /// Receives once, as `recv` does, into room for at least one byte.
    ///
    /// # Errors
    /// Those of `recv`; when it receives nothing, the connection is closed: [`io::ErrorKind::UnexpectedEof`].
    pub(super) fn fill(
        &mut self,
        recv: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let held = self.end - self.start;
        if self.end == self.buffer.len() || self.start + self.needed > self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, held);
            }
            let granted = self.needed.min(held.saturating_mul(GROWTH).max(ROOM_FIRST));
            if granted > self.buffer.len() {
                self.buffer.resize(granted, 0);
            }
        }
        match recv(&mut self.buffer[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n_bytes => {
                self.end += n_bytes;
                Ok(n_bytes)
            }
        }
    }
}
