//! What a node and a server count.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::oracle::{Running, ask, model, rows, tcp, visits};
use crate::raw::{self, zeros};
use crate::setup::{DENSE, answers, patience, remote, slow};

#[test]
fn requests_that_wait_together_share_a_pass() {
    let model = DENSE();
    let server = Running::of(slow(model, 10), &tcp());
    let remote = remote(&[&server.address], patience(model, 10_000, 5_000));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for n_rows in 1..10 {
                    answers(&remote, model, n_rows);
                }
            });
        }
    });
    let stats = server.server.stats();
    assert!(stats.merged > stats.frames_received / 2, "{stats:?}");
    assert!(stats.passes < stats.frames_received * 2 / 3, "{stats:?}");
}

#[test]
fn a_call_waits_no_longer_for_its_only_server_than_it_takes() {
    // Narrow rows, so that the answers of all requests in flight arrive at once, and the connection is asked anew.
    let model = model(4, 1, 1);
    let together = Mutex::new(Vec::new());
    let server = raw::serve(
        model,
        b"",
        Box::new(move |request, seed| {
            let mut together = together.lock().expect("one connection");
            together.extend(zeros(request).bytes(seed));
            if !request.id.is_multiple_of(8) {
                return Some(Vec::new());
            }
            thread::sleep(Duration::from_millis(50));
            Some(std::mem::take(&mut *together))
        }),
    );
    let remote = remote(&[&server], patience(model, 10_000, 5_000));
    let n_rows = 64 * 8 * 4;
    let rows = rows(n_rows, model.hidden, 1);
    let began = Instant::now();
    ask(&remote, 0, &rows, &visits(n_rows, 1, 1), model.hidden).expect("an answer");
    let took = began.elapsed().as_secs_f64();
    let peer = &remote.stats().peers[0];
    assert_eq!(peer.round_trips, 32);
    assert!(
        peer.waited_seconds >= 0.2 && peer.waited_seconds <= took,
        "waited {} s in {took} s",
        peer.waited_seconds
    );
}
