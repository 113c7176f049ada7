//! Servers that greet well and then lie: what they say is found out at once, and changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::FfnError;

use crate::oracle::{Oracle, Running, tcp};
use crate::raw::{self, Frame, zeros};
use crate::setup::{DENSE, answers, fails, patience, remote};

/// An answer of a server that greets well and then lies, for a request of one row of 64 numbers.
type Lie = fn(&Frame, u64) -> Option<Vec<u8>>;

const LIES: [(&str, Lie); 13] = [
    ("no frame", |_, _| {
        Some(b"HTTP/1.1 400 Bad Request\r\n\r\n this is not what was asked for".to_vec())
    }),
    ("another session's checksum", |request, seed| {
        Some(zeros(request).bytes(seed ^ 1))
    }),
    ("a flipped bit", |request, seed| {
        let mut bytes = zeros(request).bytes(seed);
        bytes[100] ^= 4;
        Some(bytes)
    }),
    ("a length of 2^63", |request, seed| {
        Some(zeros(request).bytes_saying(1 << 63, seed))
    }),
    ("an id that was not asked", |request, seed| {
        Some(
            Frame {
                id: request.id + 1000,
                ..zeros(request)
            }
            .bytes(seed),
        )
    }),
    ("another layer", |request, seed| {
        Some(
            Frame {
                layer: request.layer + 1,
                ..zeros(request)
            }
            .bytes(seed),
        )
    }),
    ("fewer rows", |request, seed| {
        let n_visits = request.n_visits - 1;
        let payload = vec![0; n_visits as usize * 256];
        Some(
            Frame {
                n_visits,
                payload,
                ..zeros(request)
            }
            .bytes(seed),
        )
    }),
    ("another type of rows", |request, seed| {
        let payload = vec![0; request.n_visits as usize * 128];
        Some(
            Frame {
                row_type: 3,
                payload,
                ..zeros(request)
            }
            .bytes(seed),
        )
    }),
    ("a number that is none", |request, seed| {
        let mut answer = zeros(request);
        answer.payload[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
        Some(answer.bytes(seed))
    }),
    ("a request", |request, seed| Some(request.bytes(seed))),
    ("a close in the middle", |_, _| None),
    ("a refusal of nothing", |_, seed| {
        Some(
            Frame {
                kind: raw::REFUSED,
                code: 9,
                id: 77,
                ..Frame::default()
            }
            .bytes(seed),
        )
    }),
    ("a refusal without a known reason", |request, seed| {
        let payload = b"\x1b[31m\xff".to_vec();
        Some(
            Frame {
                kind: raw::REFUSED,
                code: 200,
                id: request.id,
                payload,
                ..Frame::default()
            }
            .bytes(seed),
        )
    }),
];

#[test]
fn a_lying_server_is_left_for_its_replica() {
    let model = DENSE();
    for (what, lie) in LIES {
        let n_lies = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&n_lies);
        let lies = move |request: &Frame, seed: u64| {
            counted.fetch_add(1, Ordering::Relaxed);
            lie(request, seed)
        };
        let liar = raw::serve(model, b"", Box::new(lies));
        let server = Running::of(Oracle::whole(model), &tcp());
        let remote = remote(&[&liar, &server.address], patience(model, 10_000, 300));
        for _ in 0..5 {
            answers(&remote, model, 2000);
        }
        assert!(
            n_lies.load(Ordering::Relaxed) > 0,
            "{what}: nobody asked the liar"
        );
    }
}

#[test]
fn a_lying_server_without_a_replica_is_an_error_and_not_asked_in_a_tight_loop() {
    let model = DENSE();
    for (what, lie) in LIES {
        let n_lies = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&n_lies);
        let lies = move |request: &Frame, seed: u64| {
            counted.fetch_add(1, Ordering::Relaxed);
            lie(request, seed)
        };
        let liar = raw::serve(model, b"", Box::new(lies));
        let remote = remote(&[&liar], patience(model, 300, 100));
        let began = Instant::now();
        let error = fails(&remote, model);
        assert!(
            began.elapsed() < Duration::from_millis(1000),
            "{what}: {:?}",
            began.elapsed()
        );
        assert!(
            matches!(error, FfnError::NoPeer { .. } | FfnError::Deadline { .. }),
            "{what}: {error}"
        );
        assert!(!error.to_string().contains('\x1b'), "{what}: {error}");
        assert!(n_lies.load(Ordering::Relaxed) < 20, "{what}: {n_lies:?}");
    }
}
