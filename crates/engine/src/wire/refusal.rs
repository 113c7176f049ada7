//! A server's no: a number that the node acts on, and a sentence for people.
//!
//! Invariant: whatever text a peer sends, it is told as printable characters and at most 512 bytes of them.

use std::fmt;

use super::frame::{Header, Kind, TEXT_BYTES_MAX, append_short};

/// Why a server refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Refusal {
    /// Too much waits already; ask again soon, or somebody else.
    Busy = 1,
    /// It takes no more connections.
    Full = 2,
    /// It is going away.
    Draining = 3,
    /// The secrets differ.
    Secret = 4,
    /// It holds another model.
    Model = 5,
    /// It does not hold this layer or expert.
    NotHere = 6,
    /// What came is no frame, or out of turn.
    BadFrame = 7,
    /// A result does not fit the type of rows on the wire.
    Range = 8,
    /// It could not compute the rows.
    Failed = 9,
}

impl Refusal {
    /// All of them, by number.
    pub const ALL: [Refusal; 9] = [
        Refusal::Busy,
        Refusal::Full,
        Refusal::Draining,
        Refusal::Secret,
        Refusal::Model,
        Refusal::NotHere,
        Refusal::BadFrame,
        Refusal::Range,
        Refusal::Failed,
    ];

    /// Appends the frame; `id` is that of the request, or 0.
    pub(super) fn append(self, frame: &mut Vec<u8>, id: u64, text: &str, seed: u64) {
        let header = Header {
            id,
            code: self as u8,
            ..Header::new(Kind::Refused)
        };
        append_short(
            frame,
            header,
            seed,
            &text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)],
        );
    }

    /// What a frame of kind Refused says. A number that is not known here counts as a failure.
    pub(super) fn read(header: &Header, text: &[u8]) -> (Refusal, String) {
        let known = Refusal::ALL
            .iter()
            .copied()
            .find(|refusal| *refusal as u8 == header.code);
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let text = String::from_utf8_lossy(text)
            .chars()
            .map(printable)
            .collect();
        (known.unwrap_or(Refusal::Failed), text)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Refusal::Busy => "busy",
            Refusal::Full => "full",
            Refusal::Draining => "draining",
            Refusal::Secret => "secret",
            Refusal::Model => "model",
            Refusal::NotHere => "not_here",
            Refusal::BadFrame => "bad_frame",
            Refusal::Range => "range",
            Refusal::Failed => "failed",
        })
    }
}
