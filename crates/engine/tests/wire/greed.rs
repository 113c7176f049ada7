//! Nodes that ask for more than their share, and layers that panic: others are served on, in bounded memory.

use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Visit;
use engine::wire::Refusal;

use crate::oracle::{Oracle, Running, ask, connect, options, rows, tcp};
use crate::raw::{self, Frame, Node};
use crate::setup::{MODEL, server, still_serves, until};

#[test]
fn a_node_that_reads_no_answers_is_cut_off_and_holds_up_nobody() {
    let model = MODEL();
    let server = server(|_| {});
    let remote = connect(std::slice::from_ref(&server), model);
    let mut greedy = Node::greet(&server.address, b"", &model);
    let frame = raw::forward(1, 0, &rows(8000, model.hidden, 1), model.hidden, 0);
    let bytes = frame.bytes(greedy.to_server);
    greedy
        .stream
        .set_write_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout");
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut is_cut = false;
    while !is_cut && began.elapsed() < Duration::from_secs(20) {
        is_cut = greedy
            .stream
            .write_all(&bytes)
            .is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
        let asked = Instant::now();
        still_serves(&remote);
        slowest = slowest.max(asked.elapsed());
    }
    assert!(is_cut, "it was never cut off");
    assert!(
        slowest < Duration::from_millis(300),
        "another node waited {slowest:?}"
    );
    until("its memory is given back", || {
        server.server.stats().bytes_held == 0
    });
    assert!(server.server.stats().bytes_sent < 1 << 30);
}

#[test]
fn a_node_that_pings_and_does_not_listen_is_cut_off() {
    let model = MODEL();
    let server = server(|options| options.limits.send = Duration::from_secs(60));
    let remote = connect(std::slice::from_ref(&server), model);
    let mut deaf = Node::greet(&server.address, b"", &model);
    let ping = Frame {
        kind: raw::PING,
        id: 1,
        ..Frame::default()
    };
    let pings = ping.bytes(deaf.to_server).repeat(1000);
    let began = Instant::now();
    // Kernels hold some megabytes of pongs; nobody holds more.
    while deaf.stream.write_all(&pings).is_ok() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "it was never cut off"
        );
        still_serves(&remote);
    }
}

#[test]
fn more_requests_than_allowed_in_flight_are_refused_as_busy() {
    let model = MODEL();
    let oracle = Oracle {
        pause: Duration::from_millis(300),
        ..Oracle::whole(model)
    };
    let server = Running::of(oracle, &tcp());
    let mut node = Node::greet(&server.address, b"", &model);
    let row = rows(1, model.hidden, 1);
    for id in 1..=12 {
        node.send(&Frame {
            code: 1,
            ..raw::forward(id, 0, &row, model.hidden, 0)
        });
    }
    let kinds: Vec<(u8, u8)> = (0..12)
        .map(|_| node.read().expect("an answer"))
        .map(|f| (f.kind, f.code))
        .collect();
    let busy = kinds
        .iter()
        .filter(|kind| **kind == (raw::REFUSED, Refusal::Busy as u8))
        .count();
    let rows = kinds.iter().filter(|kind| **kind == (raw::ROWS, 0)).count();
    assert_eq!((busy, rows), (4, 8), "{kinds:?}");
}

#[test]
fn a_layer_that_panics_is_refused_and_the_next_is_computed() {
    struct Panics(Oracle);
    impl engine::FeedForward for Panics {
        fn forward(
            &self,
            layer: u32,
            batch: engine::Batch<'_>,
            out: &mut [f32],
        ) -> Result<(), engine::FfnError> {
            assert!(layer != 0, "layer 0 always panics");
            self.0.forward(layer, batch, out)
        }
    }
    let model = MODEL();
    let oracle = Oracle::whole(model);
    let server = Running::start(
        Arc::new(Panics(Oracle::whole(model))),
        options(&oracle),
        &tcp(),
    );
    let remote = connect(std::slice::from_ref(&server), model);
    let row = rows(1, model.hidden, 1);
    for _ in 0..3 {
        let error = ask(
            &remote,
            0,
            &row,
            &[Visit { row: 0, expert: 0 }],
            model.hidden,
        )
        .expect_err("it panics");
        assert!(error.to_string().contains("panicked"), "{error}");
        still_serves(&remote);
    }
    assert_eq!(
        remote.stats().peers[0].failures,
        0,
        "a server that can't compute one layer is not down"
    );
}
