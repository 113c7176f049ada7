//! What must hold for any bytes that arrive, told as one function that panics when it does not. A fuzzer calls it with
//! bytes of its own; the tests with its corpus.
//!
//! Invariant: it judges only by what callers of [`parse`] and [`Inlet`] rely on.

use super::frame::{
    self, CHECKSUM_BYTES, FrameError, HEADER_BYTES, Header, Kind, Limits, Step, VISIT_BYTES,
    append, frame_bytes, parse,
};
use super::inlet::Inlet;
use super::refusal::Refusal;
use super::rows;

/// Reads `input` as a connection's bytes. The first four say how: the limits, whether checksums are put right (which no
/// fuzzer finds by chance), and the pieces that the bytes arrive in.
pub fn fuzz_frames(input: &[u8]) {
    let Some((&[hidden, max_rows, is_put_right, piece], bytes)) = input.split_first_chunk::<4>()
    else {
        return;
    };
    let limits = Limits {
        hidden: u32::from(hidden % 8),
        max_rows: u32::from(max_rows % 16),
    };
    let seed = 7;
    let mut bytes = bytes.to_vec();
    if is_put_right & 1 == 1 {
        put_checksums_right(&mut bytes, seed, &limits);
    }

    let (whole, error) = frames(&bytes, seed, &limits);
    let mut inlet = Inlet::new();
    let mut arriving = bytes.as_slice();
    let mut cut = Vec::new();
    let got = loop {
        match inlet.frame(seed, &limits) {
            Ok(Some(header)) => {
                cut.push((header, inlet.payload(&header).to_vec()));
                inlet.pass(&header);
            }
            Err(error) => break Some(error),
            Ok(None) if arriving.is_empty() => break None,
            Ok(None) => {
                let n_bytes = usize::from(piece).clamp(1, arriving.len());
                let filled = inlet.fill(|room| {
                    let n_bytes = n_bytes.min(room.len());
                    let (now, later) = arriving.split_at(n_bytes);
                    room[..n_bytes].copy_from_slice(now);
                    arriving = later;
                    Ok(n_bytes)
                });
                assert!(filled.is_ok(), "an inlet always has room for one byte more");
                // The widest frame of these limits, and some room.
                assert!(inlet.n_room() <= 1024, "{} bytes of room", inlet.n_room());
            }
        }
    };
    assert_eq!(
        cut, whole,
        "the pieces that bytes arrive in change what they mean"
    );
    // Of a wrong beginning, more or less has arrived.
    let kind = |error: Option<FrameError>| error.map(|error| std::mem::discriminant(&error));
    assert_eq!(
        kind(got),
        kind(error),
        "the pieces that bytes arrive in change what is wrong"
    );
}

/// The frames that `bytes` begin with, and what is wrong with the first that is none.
fn frames(
    mut bytes: &[u8],
    seed: u64,
    limits: &Limits,
) -> (Vec<(Header, Vec<u8>)>, Option<FrameError>) {
    let mut frames = Vec::new();
    loop {
        match parse(bytes, seed, limits) {
            Ok(Step::Need(n_bytes)) => {
                assert!(
                    n_bytes > bytes.len(),
                    "a frame that is whole is not waited for"
                );
                return (frames, None);
            }
            Ok(Step::Frame(header, payload)) => {
                let n_bytes = frame_bytes(&header);
                assert_eq!(payload.len(), n_bytes - HEADER_BYTES - CHECKSUM_BYTES);
                judge(&header, payload, limits);
                let mut again = Vec::new();
                let written = append(&mut again, &header, seed, |into| {
                    into.copy_from_slice(payload);
                    Ok::<(), ()>(())
                });
                assert_eq!(written, Ok(()));
                assert_eq!(again, bytes[..n_bytes], "a frame is written in one way");
                frames.push((header, payload.to_vec()));
                bytes = &bytes[n_bytes..];
            }
            Err(error) => return (frames, Some(error)),
        }
    }
}

/// Uses a payload as whoever receives it does.
fn judge(header: &Header, payload: &[u8], limits: &Limits) {
    match (header.kind, header.row_type) {
        (Kind::Forward | Kind::Rows, Some(row_type)) => {
            let (n_rows, visits) = match header.kind {
                Kind::Forward => (header.n_rows, header.n_visits as usize * VISIT_BYTES),
                _ => (header.n_visits, 0),
            };
            assert!((1..=limits.max_rows).contains(&n_rows));
            let (row_bytes, visits) = payload.split_at(payload.len() - visits);
            let mut values = vec![0.0; n_rows as usize * limits.hidden as usize];
            if rows::decode(row_bytes, row_type, &mut values).is_ok() {
                assert!(values.iter().all(|value| value.is_finite()));
                let mut again = vec![0; row_bytes.len()];
                assert!(rows::encode(&values, row_type, &mut again).is_ok());
                assert_eq!(
                    again, row_bytes,
                    "finite rows are written as they were read"
                );
            }
            let mut again = vec![0; visits.len()];
            frame::put_visits(frame::visits(visits), &mut again);
            assert_eq!(again, visits);
        }
        (Kind::Refused, None) => {
            let (_, text) = Refusal::read(header, payload);
            assert!(!text.chars().any(char::is_control));
        }
        (_, row_type) => assert!(row_type.is_none()),
    }
}

/// Writes the checksum that each frame should have, as far as the bytes are frames.
fn put_checksums_right(bytes: &mut [u8], seed: u64, limits: &Limits) {
    let mut start = 0;
    loop {
        let n_bytes = match parse(&bytes[start..], seed, limits) {
            Ok(Step::Frame(header, _)) => frame_bytes(&header),
            Err(FrameError::Checksum(_)) => {
                let head = bytes[start..].first_chunk::<HEADER_BYTES>();
                let length = head
                    .and_then(|head| head.last_chunk::<8>())
                    .map(|n| u64::from_le_bytes(*n));
                HEADER_BYTES + length.unwrap_or_default() as usize + CHECKSUM_BYTES
            }
            _ => return,
        };
        let (covered, checksum) =
            bytes[start..start + n_bytes].split_at_mut(n_bytes - CHECKSUM_BYTES);
        checksum
            .copy_from_slice(&xxhash_rust::xxh3::xxh3_64_with_seed(covered, seed).to_le_bytes());
        start += n_bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_corpus_holds() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/frames");
        let mut n_frames = 0;
        for entry in fs::read_dir(corpus).expect("the corpus is part of the repository") {
            let input = fs::read(entry.expect("a seed").path()).expect("a seed");
            fuzz_frames(&input);
            let limits = Limits {
                hidden: u32::from(input[0] % 8),
                max_rows: u32::from(input[1] % 16),
            };
            let mut bytes = input[4..].to_vec();
            put_checksums_right(&mut bytes, 7, &limits);
            n_frames += frames(&bytes, 7, &limits).0.len();
        }
        assert!(
            n_frames >= 10,
            "{n_frames} frames: seeds of every kind lead further than random bytes"
        );
    }
}
