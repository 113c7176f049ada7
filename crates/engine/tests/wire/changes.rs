//! Servers that leave, or come back as another, in the middle of calls.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use engine::wire::{Address, Identity};
use engine::{Batch, FeedForward, FfnError, Visit};
use vindex::VindexId;

use crate::oracle::{Oracle, Running, ask, model, options, rows, tcp, visits};
use crate::raw::{self, Frame, zeros};
use crate::setup::{DENSE, answers, fails, has_work, patience, remote, slow, until};

#[test]
fn a_server_that_comes_back_with_another_vindex_is_not_used_until_it_has_the_right_one() {
    let model = DENSE();
    let server = Running::of(Oracle::whole(model), &tcp());
    let replica = Running::of(Oracle::whole(model), &tcp());
    let address = server.address.clone();
    let alone = remote(&[&address], patience(model, 500, 100));
    let both = remote(&[&address, &replica.address], patience(model, 5_000, 100));
    drop(server);
    let other = Identity {
        id: VindexId::of(b"another"),
        ..model
    };
    let imposter = Running::of(Oracle::whole(other), &address);
    let error = fails(&alone, model);
    assert!(
        error.to_string().contains("another model")
            && error.to_string().contains(&other.id.to_string()),
        "{error}"
    );
    for n_rows in 1..10 {
        answers(&both, model, n_rows);
    }
    assert_eq!(imposter.server.stats().frames_received, 0);
    drop(imposter);
    let server = Running::of(Oracle::whole(model), &address);
    until("the right vindex is found", || {
        alone.stats().peers[0].is_up && both.stats().peers[0].is_up
    });
    answers(&alone, model, 4);
    // It is used again for work that two can share.
    until("it is asked again", || {
        answers(&both, model, 2000);
        both.stats().peers[0].is_up && server.server.stats().rows > 100
    });
}

#[test]
fn a_server_may_come_back_with_another_range() {
    let model = model(64, 2, 4);
    let part = |experts| Oracle {
        experts,
        ..Oracle::whole(model)
    };
    let low = Running::of(part(0..2), &tcp());
    let high = Running::of(part(2..4), &tcp());
    let spare = Running::of(part(0..2), &tcp());
    let addresses = [&low.address, &high.address, &spare.address].map(Address::clone);
    let remote = remote(
        &[&addresses[0], &addresses[1], &addresses[2]],
        patience(model, 10_000, 5_000),
    );
    answers(&remote, model, 9);
    drop((high, spare));
    let _spare = Running::of(part(2..3), &addresses[2]);
    let _high = Running::of(part(3..4), &addresses[1]);
    for n_rows in 1..9 {
        answers(&remote, model, n_rows);
    }
}

/// Passes the first connection on to `first` and all later ones to `then`: a server that was replaced while a node held
/// a connection to it.
fn replaced(first: Address, then: Address) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    thread::spawn(move || {
        for (n, node) in listener.incoming().flatten().enumerate() {
            let server = raw::dial(if n == 0 { &first } else { &then });
            for (mut from, mut to) in [(&node, &server), (&server, &node)]
                .map(|(from, to)| [from, to].map(|end| end.try_clone().expect("a handle")))
                .map(|[from, to]: [TcpStream; 2]| (from, to))
            {
                thread::spawn(move || io::copy(&mut from, &mut to));
            }
        }
    });
    address.parse().expect("an address")
}

/// Computes its first pass when it is told to, or after some seconds.
struct Held {
    oracle: Oracle,
    is_free: Arc<AtomicBool>,
}

impl FeedForward for Held {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        let until = Instant::now() + Duration::from_secs(5);
        let is_first = self.oracle.n_passes.load(Ordering::Relaxed) == 0;
        while is_first && !self.is_free.load(Ordering::Relaxed) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        self.oracle.forward(layer, batch, out)
    }
}

#[test]
fn a_server_that_changed_between_two_connections_is_greeted_anew() {
    let model = model(64, 2, 2);
    let is_free = Arc::new(AtomicBool::new(false));
    let held = |experts| {
        let oracle = Oracle {
            experts,
            ..Oracle::whole(model)
        };
        let (options, is_free) = (options(&oracle), is_free.clone());
        Running::start(Arc::new(Held { oracle, is_free }), options, &tcp())
    };
    let whole = held(0..2);
    let low = held(0..1);
    let high = Running::of(
        Oracle {
            experts: 1..2,
            ..Oracle::whole(model)
        },
        &tcp(),
    );
    let changing = replaced(whole.address.clone(), high.address.clone());
    let remote = remote(&[&changing, &low.address], patience(model, 10_000, 10_000));
    let one = || {
        let row = rows(1, model.hidden, 1);
        let visit = [Visit { row: 0, expert: 0 }];
        ask(&remote, 0, &row, &visit, model.hidden).expect("a row")
    };
    thread::scope(|scope| {
        // Both servers have a call under way, so that the next prefers the first again, over a new connection.
        scope.spawn(one);
        until("the first call", || has_work(&whole.server));
        scope.spawn(one);
        until("the second call", || has_work(&low.server));
        let third = scope.spawn(|| answers(&remote, model, 9));
        until("the change is noticed", || {
            remote.stats().peers[0].failures == 1 || third.is_finished()
        });
        is_free.store(true, Ordering::Relaxed);
    });
    let peer = &remote.stats().peers[0];
    assert_eq!((peer.experts, peer.failures), ((1, 2), 1), "{peer:?}");
}

#[test]
fn draining_answers_what_was_taken_and_sends_the_rest_elsewhere() {
    let model = DENSE();
    let leaving = Running::of(slow(model, 5), &tcp());
    let staying = Running::of(slow(model, 5), &tcp());
    let remote = remote(
        &[&leaving.address, &staying.address],
        patience(model, 10_000, 5_000),
    );
    thread::scope(|scope| {
        let calls: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for n_rows in 1..40 {
                        answers(&remote, model, n_rows);
                    }
                })
            })
            .collect();
        until("work", || has_work(&leaving.server));
        assert!(
            leaving.server.drain(Duration::from_secs(5)),
            "everything taken was answered"
        );
        for call in calls {
            call.join().expect("no call failed");
        }
    });
    let stats = leaving.server.stats();
    assert_eq!((stats.queued, stats.bytes_held), (0, 0), "{stats:?}");
    assert_eq!(stats.frames_received, stats.frames_sent, "{stats:?}");
}

#[test]
fn a_goodbye_in_the_middle_of_a_batch_sends_the_rest_to_whoever_is_there_next() {
    let model = DENSE();
    let leaving = raw::serve(
        model,
        b"",
        Box::new(|request, seed| {
            let mut bytes = zeros(request).bytes(seed);
            if request.id == 2 {
                let goodbye = Frame {
                    kind: raw::GOODBYE,
                    ..Frame::default()
                };
                bytes.extend(goodbye.bytes(seed));
            }
            Some(bytes)
        }),
    );
    let remote = remote(&[&leaving], patience(model, 5_000, 5_000));
    // Many more frames than may be in flight at once.
    let rows = rows(3000, model.hidden, 1);
    let visits = visits(3000, 1, 1);
    let got = ask(&remote, 0, &rows, &visits, model.hidden).expect("an answer");
    assert!(got.iter().all(|value| *value == 0.0));
    assert!(
        remote.stats().peers[0].reconnects > 0,
        "it was greeted again"
    );
}
