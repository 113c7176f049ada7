//! Bytes of nodes that do not mean well, or do not know how: each is answered with a reason or an end, and no other
//! connection notices.

use std::io::Write;
use std::net::Shutdown;

use engine::wire::{Refusal, Remote};
use proptest::prelude::*;

use crate::oracle::{Running, connect, rows};
use crate::raw::{self, Frame, Node};
use crate::setup::{MODEL, refused, rest, server, still_serves, until};

#[test]
fn a_frame_that_is_none_ends_its_connection_with_a_reason_and_no_other() {
    let model = MODEL();
    let server = server(|_| {});
    let remote = connect(std::slice::from_ref(&server), model);
    let row = rows(1, model.hidden, 1);
    let good = raw::forward(5, 1, &row, model.hidden, 1);
    let with = |change: fn(&mut Frame)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    // What is said, and its bytes in a session with this seed.
    type Bad = (&'static str, Box<dyn Fn(u64) -> Vec<u8>>);
    let plain =
        |frame: Frame| -> Box<dyn Fn(u64) -> Vec<u8>> { Box::new(move |seed| frame.bytes(seed)) };
    let bad: Vec<Bad> = vec![
        (
            "another protocol",
            Box::new(|_| b"GET / HTTP/1.1\r\nHost: weights\r\n\r\n".to_vec()),
        ),
        (
            "another session",
            Box::new({
                let f = good.clone();
                move |seed| f.bytes(!seed)
            }),
        ),
        (
            "a version of tomorrow",
            Box::new({
                let f = good.clone();
                move |seed| {
                    let mut b = f.bytes(seed);
                    b[4] = 2;
                    b
                }
            }),
        ),
        ("a kind that is none", plain(with(|f| f.kind = 11))),
        ("kind zero", plain(with(|f| f.kind = 0))),
        ("rows of no type", plain(with(|f| f.row_type = 0))),
        ("rows of an unknown type", plain(with(|f| f.row_type = 4))),
        ("rows shorter than said", plain(with(|f| f.row_type = 2))),
        ("a field that must be zero", plain(with(|f| f.micros = 1))),
        ("no rows", plain(with(|f| f.n_rows = 0))),
        ("no visits", plain(with(|f| f.n_visits = 0))),
        ("2^32 - 1 rows", plain(with(|f| f.n_rows = u32::MAX))),
        (
            "2^32 - 1 of everything, consistently",
            Box::new({
                let f = with(|f| (f.n_rows, f.n_visits) = (u32::MAX, u32::MAX));
                move |seed| f.bytes_saying(u64::from(u32::MAX) * (64 * 4 + 8), seed)
            }),
        ),
        (
            "a length of 2^63",
            Box::new({
                let f = good.clone();
                move |seed| f.bytes_saying(1 << 63, seed)
            }),
        ),
        (
            "a length of 2^64 - 1",
            Box::new({
                let f = good.clone();
                move |seed| f.bytes_saying(u64::MAX, seed)
            }),
        ),
        (
            "a length that is one too small",
            Box::new({
                let f = good.clone();
                move |seed| f.bytes_saying(f.payload.len() as u64 - 1, seed)
            }),
        ),
        (
            "a visit of a row that is not there",
            plain(with(|f| f.payload[256] = 1)),
        ),
        (
            "a number that is none",
            plain(with(|f| {
                f.payload[..4].copy_from_slice(&f32::NAN.to_le_bytes())
            })),
        ),
        (
            "an answer",
            plain(with(|f| {
                f.kind = raw::ROWS;
                f.n_rows = 0;
                f.payload.truncate(256);
            })),
        ),
        (
            "a hello out of turn",
            Box::new(|seed| {
                Frame {
                    kind: raw::HELLO,
                    payload: vec![1; 32],
                    ..Frame::default()
                }
                .bytes(seed)
            }),
        ),
    ];
    for (n, (what, bytes)) in bad.iter().enumerate() {
        let mut node = Node::greet(&server.address, b"", &model);
        let bytes = bytes(node.to_server);
        // Whoever is refused at the header may be gone before the rest is written.
        let _ = node.stream.write_all(&bytes);
        let told = node
            .read()
            .unwrap_or_else(|error| panic!("{what}: no refusal: {error}"));
        assert_eq!(
            (told.kind, told.code),
            (raw::REFUSED, Refusal::BadFrame as u8),
            "{what}"
        );
        assert!(!told.payload.is_empty(), "{what}");
        assert!(rest(&mut node.stream).is_empty(), "{what}");
        assert_eq!(
            refused(&server.server, Refusal::BadFrame),
            n as u64 + 1,
            "{what}"
        );
        still_serves(&remote);
    }
    let mut node = Node::greet(&server.address, b"", &model);
    node.send(&good);
    let answer = node.read().expect("the frame without a change is good");
    assert_eq!(
        (answer.kind, answer.id, answer.layer, answer.n_visits),
        (raw::ROWS, 5, 1, 1)
    );
    until("its memory is given back", || {
        server.server.stats().bytes_held == 0
    });
}

#[test]
fn what_is_not_here_is_refused_and_the_connection_goes_on() {
    let model = MODEL();
    let server = server(|options| (options.layers, options.experts) = (1..2, 0..1));
    let row = rows(1, model.hidden, 1);
    let mut node = Node::greet(&server.address, b"", &model);
    assert_eq!(node.welcome, [1, 2, 0, 1, 16384, 8]);
    for (id, layer, expert) in [
        (1, 0, 0),
        (2, 2, 0),
        (3, u32::MAX, 0),
        (4, 1, 1),
        (5, 1, u32::MAX),
    ] {
        node.send(&raw::forward(id, layer, &row, model.hidden, expert));
        let told = node.read().expect("a refusal");
        assert_eq!(
            (told.kind, told.code, told.id),
            (raw::REFUSED, Refusal::NotHere as u8, id)
        );
    }
    node.send(&Frame {
        kind: raw::PING,
        id: 9,
        ..Frame::default()
    });
    assert_eq!(
        node.read().expect("a pong"),
        Frame {
            kind: raw::PONG,
            id: 9,
            ..Frame::default()
        }
    );
    node.send(&raw::forward(10, 1, &row, model.hidden, 0));
    assert_eq!(node.read().expect("rows").kind, raw::ROWS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any bytes, at any point of a connection.
    #[test]
    fn random_bytes_do_no_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        is_greeted: bool,
        has_magic: bool,
    ) {
        use std::sync::LazyLock;
        static SERVER: LazyLock<(Running, Remote)> = LazyLock::new(|| {
            let server = server(|_| {});
            let remote = connect(std::slice::from_ref(&server), MODEL());
            (server, remote)
        });
        let (server, remote) = &*SERVER;
        let mut stream = match is_greeted {
            true => Node::greet(&server.address, b"", &MODEL()).stream,
            false => raw::dial(&server.address),
        };
        let begin: &[u8] = if has_magic { b"SKFF\x01" } else { b"" };
        let _ = stream.write_all(begin).and_then(|()| stream.write_all(&bytes));
        let _ = stream.shutdown(Shutdown::Write);
        rest(&mut stream);
        still_serves(remote);
    }

    /// A good frame with some of its bytes changed.
    #[test]
    fn damaged_frames_do_no_harm(
        damage in proptest::collection::vec((0usize..320, 1u8..), 1..4),
        cut in 0usize..400,
    ) {
        use std::sync::LazyLock;
        static SERVER: LazyLock<(Running, Remote)> = LazyLock::new(|| {
            let server = server(|_| {});
            let remote = connect(std::slice::from_ref(&server), MODEL());
            (server, remote)
        });
        let (server, remote) = &*SERVER;
        let model = MODEL();
        let mut node = Node::greet(&server.address, b"", &model);
        let mut bytes = raw::forward(1, 0, &rows(1, model.hidden, 1), model.hidden, 0).bytes(node.to_server);
        let n_bytes = bytes.len();
        for (at, flip) in damage {
            bytes[at % n_bytes] ^= flip;
        }
        let _ = node.stream.write_all(&bytes[..cut.min(n_bytes)]);
        let _ = node.stream.shutdown(Shutdown::Write);
        while let Ok(told) = node.read() {
            // Two changes of one byte may undo each other.
            prop_assert!(told.kind == raw::REFUSED || told.kind == raw::ROWS);
        }
        still_serves(remote);
    }
}
