//! A frame: 40 bytes of header, a payload whose length follows from the header's counts, 8 bytes of checksum.
//!
//! ```text
//!  0        4    5    6    7    8                16       20       24       28       32               40
//!  +--------+----+----+----+----+----------------+--------+--------+--------+--------+----------------+---------+----------+
//!  | "SKFF" |vers|kind|type|code| id             | layer  | n_rows |n_visits| micros | payload length | payload | checksum |
//!  +--------+----+----+----+----+----------------+--------+--------+--------+--------+----------------+---------+----------+
//!  bytes 4     1    1    1    1    8                 4        4        4        4        8               length    8
//! ```
//!
//! Integers are little-endian; a field that a kind has no use for is zero. `docs/wire.md` draws every kind.
//!
//! Invariant: [`parse`] asks for no more bytes than the limits that both ends agreed on allow, and lets no frame pass
//! whose header, length or checksum is not exactly what it must be. Reading and writing sockets is left to others.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::rows::RowType;
use crate::ffn::Visit;

/// Of the header.
pub(super) const HEADER_BYTES: usize = 40;
/// Of the checksum, at the end of every frame.
pub(super) const CHECKSUM_BYTES: usize = 8;
/// Of a visit: row and expert.
pub(super) const VISIT_BYTES: usize = 8;
/// Of the text of a refusal, at most.
pub(super) const TEXT_BYTES_MAX: usize = 512;
/// The version of this protocol; both ends must speak the same.
pub(super) const VERSION: u8 = 1;

const MAGIC: [u8; 4] = *b"SKFF";

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Node: a fresh number; let us talk.
    Hello = 1,
    /// Server: my fresh number.
    Challenge = 2,
    /// Node: the model it wants, and the proof that it knows the secret.
    Proof = 3,
    /// Server: the layers and experts it holds, its limits, and the same proof.
    Welcome = 4,
    /// Node: rows that enter a layer, and which experts they visit.
    Forward = 5,
    /// Server: one row for each visit.
    Rows = 6,
    /// Server: no, and why.
    Refused = 7,
    /// Node: are you there?
    Ping = 8,
    /// Server: yes.
    Pong = 9,
    /// Server: ask me nothing more.
    Goodbye = 10,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        const KINDS: [Kind; 10] = [
            Kind::Hello,
            Kind::Challenge,
            Kind::Proof,
            Kind::Welcome,
            Kind::Forward,
            Kind::Rows,
            Kind::Refused,
            Kind::Ping,
            Kind::Pong,
            Kind::Goodbye,
        ];
        KINDS.get(usize::from(byte).checked_sub(1)?).copied()
    }
}

/// Bytes of the payloads of the handshake; `hello.rs` lays them out.
pub(super) const HELLO_BYTES: usize = 32;
pub(super) const CHALLENGE_BYTES: usize = 32;
pub(super) const PROOF_BYTES: usize = 80;
pub(super) const WELCOME_BYTES: usize = 64;

/// The fields of a header, except those that are the same in every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Forward and Rows: how the rows are written.
    pub(super) row_type: Option<RowType>,
    /// Refused: why, as a number. Forward: 1 when more of the same layer follows at once, else 0.
    pub(super) code: u8,
    /// Forward and Ping choose it, their answers repeat it. 0 in all else.
    pub(super) id: u64,
    /// Forward, Rows.
    pub(super) layer: u32,
    /// Forward.
    pub(super) n_rows: u32,
    /// Forward, Rows.
    pub(super) n_visits: u32,
    /// Rows: microseconds that the request spent at the server.
    pub(super) micros: u32,
    /// Bytes between header and checksum.
    pub(super) n_payload_bytes: u64,
}

impl Header {
    /// A header with every other field zero.
    pub(super) fn new(kind: Kind) -> Header {
        Header {
            kind,
            row_type: None,
            code: 0,
            id: 0,
            layer: 0,
            n_rows: 0,
            n_visits: 0,
            micros: 0,
            n_payload_bytes: 0,
        }
    }
}

/// What a frame may measure, agreed on in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Numbers in a row.
    pub(super) hidden: u32,
    /// Rows, and visits, of one frame; 0 before the handshake is done.
    pub(super) max_rows: u32,
}

impl Limits {
    /// Of a connection on which nothing is agreed on.
    pub(super) const HANDSHAKE: Limits = Limits {
        hidden: 0,
        max_rows: 0,
    };
}

/// Why bytes are no frame. Whoever sent them is not to be talked to any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("no frame begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("protocol version {0}; this end speaks {VERSION}")]
    Version(u8),
    #[error("{0} is no kind of frame")]
    Kind(u8),
    #[error("{field} is {got} in a {kind:?} frame; {expected}")]
    Field {
        field: &'static str,
        kind: Kind,
        got: u64,
        expected: &'static str,
    },
    #[error("a payload of {got} bytes in a {kind:?} frame; expected {expected}")]
    Length { kind: Kind, got: u64, expected: u64 },
    #[error("the checksum of a {0:?} frame is wrong")]
    Checksum(Kind),
}

/// What the bytes received until now are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// The beginning of a frame; it cannot be had before there are this many bytes in all.
    Need(usize),
    /// A frame, which takes [`frame_bytes`] of them.
    Frame(Header, &'a [u8]),
}

/// Bytes of the whole frame.
pub(super) fn frame_bytes(header: &Header) -> usize {
    // `parse` lets only lengths pass that fit in memory many times over.
    HEADER_BYTES + header.n_payload_bytes as usize + CHECKSUM_BYTES
}

/// Reads the frame that `bytes` begin with. `seed` is the session's.
///
/// # Errors
/// [`FrameError`], as soon as the bytes can't become a frame: a length is judged before its payload arrives.
pub(super) fn parse<'a>(
    bytes: &'a [u8],
    seed: u64,
    limits: &Limits,
) -> Result<Step<'a>, FrameError> {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
        // The magic is judged even of a single byte, so that a peer that speaks another protocol is told apart from
        // one that is slow.
        let n = bytes.len().min(MAGIC.len());
        if bytes[..n] != MAGIC[..n] {
            let mut got = [0; 4];
            got[..n].copy_from_slice(&bytes[..n]);
            return Err(FrameError::Magic(got));
        }
        return Ok(Step::Need(HEADER_BYTES));
    };
    let header = header(head, limits)?;
    let n_bytes = frame_bytes(&header);
    let Some(frame) = bytes.get(..n_bytes) else {
        return Ok(Step::Need(n_bytes));
    };
    let (covered, checksum) = frame.split_at(n_bytes - CHECKSUM_BYTES);
    if checksum != xxh3_64_with_seed(covered, seed).to_le_bytes() {
        return Err(FrameError::Checksum(header.kind));
    }
    Ok(Step::Frame(header, &covered[HEADER_BYTES..]))
}

fn header(bytes: &[u8; HEADER_BYTES], limits: &Limits) -> Result<Header, FrameError> {
    let u32_at =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if bytes[..4] != MAGIC {
        return Err(FrameError::Magic([bytes[0], bytes[1], bytes[2], bytes[3]]));
    }
    if bytes[4] != VERSION {
        return Err(FrameError::Version(bytes[4]));
    }
    let kind = Kind::of(bytes[5]).ok_or(FrameError::Kind(bytes[5]))?;
    let header = Header {
        kind,
        row_type: RowType::of(bytes[6]),
        code: bytes[7],
        id: u64_at(8),
        layer: u32_at(16),
        n_rows: u32_at(20),
        n_visits: u32_at(24),
        micros: u32_at(28),
        n_payload_bytes: u64_at(32),
    };
    let has_rows = matches!(kind, Kind::Forward | Kind::Rows);
    let field = |is_right: bool, field, got, expected| {
        let error = FrameError::Field {
            field,
            kind,
            got,
            expected,
        };
        if is_right { Ok(()) } else { Err(error) }
    };
    let unused = "it must be zero";
    let is_known = if has_rows {
        header.row_type.is_some()
    } else {
        bytes[6] == 0
    };
    field(
        is_known,
        "row type",
        u64::from(bytes[6]),
        "1, 2 or 3 with rows, else 0",
    )?;
    let (allowed, expected) = match kind {
        Kind::Refused => (255, "any"),
        Kind::Forward => (1, "0 or 1"),
        _ => (0, unused),
    };
    field(
        header.code <= allowed,
        "code",
        u64::from(header.code),
        expected,
    )?;
    let has_id = has_rows || matches!(kind, Kind::Refused | Kind::Ping | Kind::Pong);
    field(has_id || header.id == 0, "id", header.id, unused)?;
    field(
        has_rows || header.layer == 0,
        "layer",
        u64::from(header.layer),
        unused,
    )?;
    field(
        kind == Kind::Rows || header.micros == 0,
        "time",
        u64::from(header.micros),
        unused,
    )?;
    let counted = "from 1 to what the handshake allows";
    let allowed = 1..=limits.max_rows;
    let (n_rows, n_visits) = (header.n_rows, header.n_visits);
    match kind {
        Kind::Forward => field(
            allowed.contains(&n_rows),
            "count of rows",
            u64::from(n_rows),
            counted,
        )?,
        _ => field(n_rows == 0, "count of rows", u64::from(n_rows), unused)?,
    }
    match has_rows {
        true => field(
            allowed.contains(&n_visits),
            "count of visits",
            u64::from(n_visits),
            counted,
        )?,
        false => field(
            n_visits == 0,
            "count of visits",
            u64::from(n_visits),
            unused,
        )?,
    }
    let expected = match kind {
        Kind::Refused => header.n_payload_bytes.min(TEXT_BYTES_MAX as u64),
        _ => payload_bytes(&header, limits.hidden),
    };
    if header.n_payload_bytes != expected {
        return Err(FrameError::Length {
            kind,
            got: header.n_payload_bytes,
            expected,
        });
    }
    Ok(header)
}

/// Bytes of the payload of every kind except a refusal, whose text is as long as it is. Counts are at most 2^32 - 1
/// and `hidden` is at most 2^24, so nothing overflows.
pub(super) fn payload_bytes(header: &Header, hidden: u32) -> u64 {
    let row =
        |row_type: Option<RowType>| u64::from(hidden) * row_type.map_or(0, RowType::n_bytes) as u64;
    match header.kind {
        Kind::Hello => HELLO_BYTES as u64,
        Kind::Challenge => CHALLENGE_BYTES as u64,
        Kind::Proof => PROOF_BYTES as u64,
        Kind::Welcome => WELCOME_BYTES as u64,
        Kind::Forward => {
            u64::from(header.n_rows) * row(header.row_type)
                + u64::from(header.n_visits) * VISIT_BYTES as u64
        }
        Kind::Rows => u64::from(header.n_visits) * row(header.row_type),
        Kind::Refused | Kind::Ping | Kind::Pong | Kind::Goodbye => 0,
    }
}

/// Appends a frame to `bytes`: the header, a payload of `header.n_payload_bytes` that `fill` writes, the checksum.
///
/// # Errors
/// Whatever `fill` returns; `bytes` is then as before.
pub(super) fn append<E>(
    bytes: &mut Vec<u8>,
    header: &Header,
    seed: u64,
    fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let start = bytes.len();
    bytes.resize(start + frame_bytes(header), 0);
    let (covered, checksum) = {
        let frame = &mut bytes[start..];
        frame.split_at_mut(frame.len() - CHECKSUM_BYTES)
    };
    let (head, payload) = covered.split_at_mut(HEADER_BYTES);
    head[..4].copy_from_slice(&MAGIC);
    head[4] = VERSION;
    head[5] = header.kind as u8;
    head[6] = header.row_type.map_or(0, |row_type| row_type as u8);
    head[7] = header.code;
    head[8..16].copy_from_slice(&header.id.to_le_bytes());
    head[16..20].copy_from_slice(&header.layer.to_le_bytes());
    head[20..24].copy_from_slice(&header.n_rows.to_le_bytes());
    head[24..28].copy_from_slice(&header.n_visits.to_le_bytes());
    head[28..32].copy_from_slice(&header.micros.to_le_bytes());
    head[32..40].copy_from_slice(&header.n_payload_bytes.to_le_bytes());
    if let Err(error) = fill(payload) {
        bytes.truncate(start);
        return Err(error);
    }
    checksum.copy_from_slice(&xxh3_64_with_seed(covered, seed).to_le_bytes());
    Ok(())
}

/// Appends a frame without a payload, or with a short one.
pub(super) fn append_short(bytes: &mut Vec<u8>, mut header: Header, seed: u64, payload: &[u8]) {
    header.n_payload_bytes = payload.len() as u64;
    let Ok(()) = append(bytes, &header, seed, |into| {
        into.copy_from_slice(payload);
        Ok::<(), std::convert::Infallible>(())
    });
}

/// Writes visits, 8 bytes each: row, expert.
pub(super) fn put_visits(visits: impl Iterator<Item = Visit>, bytes: &mut [u8]) {
    for (bytes, visit) in bytes
        .as_chunks_mut::<VISIT_BYTES>()
        .0
        .iter_mut()
        .zip(visits)
    {
        bytes[..4].copy_from_slice(&visit.row.to_le_bytes());
        bytes[4..].copy_from_slice(&visit.expert.to_le_bytes());
    }
}

/// Reads visits that [`put_visits`] wrote; whether rows and experts exist is the caller's to judge.
pub(super) fn visits(bytes: &[u8]) -> impl ExactSizeIterator<Item = Visit> {
    bytes.as_chunks::<VISIT_BYTES>().0.iter().map(|bytes| {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Visit {
            row: u32::from_le_bytes([a, b, c, d]),
            expert: u32::from_le_bytes([e, f, g, h]),
        }
    })
}

// The layouts of the handshake, held against the sum of their fields.
const _: () = assert!(HEADER_BYTES == 4 + 4 + 8 + 4 * 4 + 8);
const _: () = assert!(HELLO_BYTES == 32 && CHALLENGE_BYTES == 32);
const _: () = assert!(PROOF_BYTES == 32 + 3 * 4 + 4 + 32);
const _: () = assert!(WELCOME_BYTES == 4 * 4 + 2 * 4 + 8 + 32);
const _: () = assert!(VISIT_BYTES == size_of::<Visit>());
