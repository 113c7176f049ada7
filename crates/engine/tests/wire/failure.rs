//! Servers that die, stall, lie, leave or come back as another, in the middle of a call. Either the call's rows are
//! those that the weights give, or it fails with one error within its deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use engine::wire::{Address, ConnectError, Identity, Remote, RemoteOptions, Secret, Server};
use engine::{FeedForward, FfnError, Visit};
use vindex::VindexId;

use crate::oracle::{Oracle, Running, ask, bits, model, options, rows, tcp, unix, visits};
use crate::raw::{self, Frame};

const DENSE: fn() -> Identity = || model(64, 2, 1);

fn slow(model: Identity, millis: u64) -> Oracle {
    Oracle {
        pause: Duration::from_millis(millis),
        ..Oracle::whole(model)
    }
}

fn remote(addresses: &[&Address], options: RemoteOptions) -> Remote {
    let addresses: Vec<Address> = addresses.iter().map(|address| (*address).clone()).collect();
    Remote::connect(&addresses, options).expect("servers of the model")
}

fn patience(model: Identity, deadline: u64, stall: u64) -> RemoteOptions {
    RemoteOptions {
        deadline: Duration::from_millis(deadline),
        stall: Duration::from_millis(stall),
        hello: Duration::from_millis(500),
        ..RemoteOptions::new(model)
    }
}

/// Asks for a few rows of layer 0 and asserts them.
fn answers(ffn: &dyn FeedForward, model: Identity, n_rows: usize) {
    let rows = rows(n_rows, model.hidden, n_rows as u64);
    let visits = visits(n_rows, model.n_experts.min(2), model.n_experts);
    let wanted =
        ask(&Oracle::whole(model), 0, &rows, &visits, model.hidden).expect("the oracle answers");
    let got = ask(ffn, 0, &rows, &visits, model.hidden).expect("an answer in spite of it");
    assert!(bits(&got) == bits(&wanted), "{n_rows} rows differ");
}

fn fails(ffn: &dyn FeedForward, model: Identity) -> FfnError {
    let rows = rows(1, model.hidden, 3);
    ask(ffn, 0, &rows, &[Visit { row: 0, expert: 0 }], model.hidden).expect_err("nobody can answer")
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{what} did not happen"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

fn has_work(server: &Server) -> bool {
    server.stats().frames_received > 0
}

#[test]
fn a_server_that_dies_in_a_call_is_replaced_by_its_replica() {
    let model = DENSE();
    let folder = tempfile::tempdir().expect("a folder");
    for at in [[tcp(), tcp()], [unix(&folder, "a"), unix(&folder, "b")]] {
        let [first, second] = at.map(|at| Running::of(slow(model, 300), &at));
        let remote = remote(
            &[&first.address, &second.address],
            patience(model, 10_000, 5_000),
        );
        thread::scope(|scope| {
            // More than one frame, so that both are asked.
            let call = scope.spawn(|| answers(&remote, model, 2000));
            until("a request", || {
                has_work(&first.server) && has_work(&second.server)
            });
            drop(first);
            call.join().expect("the call");
        });
        let stats = remote.stats();
        assert_eq!(
            (stats.peers[0].is_up, stats.peers[0].failures),
            (false, 1),
            "{stats:?}"
        );
        assert_eq!(
            (stats.peers[1].is_up, stats.peers[1].failures),
            (true, 0),
            "{stats:?}"
        );
        // And it is not asked again while it is down.
        answers(&remote, model, 3);
    }
}

#[test]
fn without_a_replica_a_dead_server_is_one_error_within_the_deadline_and_then_at_once() {
    let model = DENSE();
    let server = Running::of(slow(model, 200), &tcp());
    let remote = remote(&[&server.address], patience(model, 700, 200));
    answers(&remote, model, 1);
    drop(server);
    let began = Instant::now();
    let error = fails(&remote, model);
    assert!(
        matches!(
            &error,
            FfnError::NoPeer {
                layer: 0,
                expert: 0,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("connection refused"), "{error}");
    assert!(
        began.elapsed() < Duration::from_millis(1500),
        "{:?}",
        began.elapsed()
    );
    // Whoever comes later does not wait the whole deadline once more.
    let began = Instant::now();
    fails(&remote, model);
    assert!(
        began.elapsed() < Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_call_outlives_the_restart_of_its_only_server() {
    let model = DENSE();
    let folder = tempfile::tempdir().expect("a folder");
    for at in [tcp(), unix(&folder, "only")] {
        let server = Running::of(slow(model, 200), &at);
        let address = server.address.clone();
        let remote = remote(&[&address], patience(model, 10_000, 5_000));
        thread::scope(|scope| {
            let call = scope.spawn(|| answers(&remote, model, 5));
            until("a request", || has_work(&server.server));
            drop(server);
            thread::sleep(Duration::from_millis(150));
            let server = Running::of(Oracle::whole(model), &address);
            call.join().expect("the call");
            assert_eq!(remote.stats().peers[0].reconnects, 1);
            answers(&remote, model, 5);
            drop(server);
        });
    }
}

#[test]
fn a_restart_between_calls_is_not_noticed() {
    let model = DENSE();
    let server = Running::of(Oracle::whole(model), &tcp());
    let address = server.address.clone();
    let remote = remote(&[&address], patience(model, 10_000, 5_000));
    answers(&remote, model, 2);
    drop(server);
    let _server = Running::of(Oracle::whole(model), &address);
    for n_rows in 1..5 {
        answers(&remote, model, n_rows);
    }
}

#[test]
fn a_silent_server_is_left_after_the_stall_when_there_is_a_replica() {
    let model = DENSE();
    let silent = raw::serve(model, b"", Box::new(|_, _| Some(Vec::new())));
    let server = Running::of(Oracle::whole(model), &tcp());
    let remote = remote(&[&silent, &server.address], patience(model, 10_000, 150));
    let began = Instant::now();
    // Enough rows for both.
    answers(&remote, model, 3000);
    assert!(
        began.elapsed() >= Duration::from_millis(150),
        "the silent one was not asked"
    );
    assert!(
        began.elapsed() < Duration::from_millis(2000),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(remote.stats().peers[0].failures, 1);
}

#[test]
fn a_silent_server_without_a_replica_is_an_error_at_the_deadline() {
    let model = DENSE();
    let silent = raw::serve(model, b"", Box::new(|_, _| Some(Vec::new())));
    let remote = remote(&[&silent], patience(model, 400, 100));
    let began = Instant::now();
    let error = fails(&remote, model);
    let spent = began.elapsed();
    assert!(
        matches!(&error, FfnError::Deadline { peer, .. } if *peer == silent.to_string()),
        "{error}"
    );
    assert!(
        spent >= Duration::from_millis(400) && spent < Duration::from_millis(1000),
        "{spent:?}"
    );
}

#[test]
fn a_server_that_drips_bytes_does_not_pass_the_deadline() {
    let model = DENSE();
    let drip = raw::serve(
        model,
        b"",
        Box::new(|request, seed| {
            let whole = Frame {
                kind: raw::ROWS,
                row_type: 1,
                id: request.id,
                n_visits: 1,
                ..Frame::default()
            };
            let whole = Frame {
                payload: vec![0; 256],
                ..whole
            }
            .bytes(seed);
            thread::sleep(Duration::from_millis(300));
            // The first bytes of an answer whose rest never comes.
            Some(whole[..100].to_vec())
        }),
    );
    let remote = remote(&[&drip], patience(model, 600, 100));
    let began = Instant::now();
    assert!(matches!(fails(&remote, model), FfnError::Deadline { .. }));
    assert!(
        began.elapsed() < Duration::from_millis(1200),
        "{:?}",
        began.elapsed()
    );
}

/// An answer of a server that greets well and then lies, for a request of one row of 64 numbers.
type Lie = fn(&Frame, u64) -> Option<Vec<u8>>;

fn right(request: &Frame) -> Frame {
    Frame {
        kind: raw::ROWS,
        row_type: 1,
        id: request.id,
        layer: request.layer,
        n_visits: request.n_visits,
        payload: vec![0; request.n_visits as usize * 256],
        ..Frame::default()
    }
}

const LIES: [(&str, Lie); 13] = [
    ("no frame", |_, _| {
        Some(b"HTTP/1.1 400 Bad Request\r\n\r\n this is not what was asked for".to_vec())
    }),
    ("another session's checksum", |request, seed| {
        Some(right(request).bytes(seed ^ 1))
    }),
    ("a flipped bit", |request, seed| {
        let mut bytes = right(request).bytes(seed);
        bytes[100] ^= 4;
        Some(bytes)
    }),
    ("a length of 2^63", |request, seed| {
        Some(right(request).bytes_saying(1 << 63, seed))
    }),
    ("an id that was not asked", |request, seed| {
        Some(
            Frame {
                id: request.id + 1000,
                ..right(request)
            }
            .bytes(seed),
        )
    }),
    ("another layer", |request, seed| {
        Some(
            Frame {
                layer: request.layer + 1,
                ..right(request)
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
                ..right(request)
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
                ..right(request)
            }
            .bytes(seed),
        )
    }),
    ("a number that is none", |request, seed| {
        let mut answer = right(request);
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
fn a_failure_of_one_range_leaves_calls_for_others_alone() {
    let model = DENSE();
    let first = Running::of(
        Oracle {
            layers: 0..1,
            ..Oracle::whole(model)
        },
        &tcp(),
    );
    let second = Running::of(
        Oracle {
            layers: 1..2,
            ..Oracle::whole(model)
        },
        &tcp(),
    );
    let remote = remote(
        &[&first.address, &second.address],
        patience(model, 400, 100),
    );
    drop(second);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            for n_rows in 1..60 {
                answers(&remote, model, n_rows);
            }
        });
        let rows = rows(1, model.hidden, 3);
        let error = ask(
            &remote,
            1,
            &rows,
            &[Visit { row: 0, expert: 0 }],
            model.hidden,
        )
        .expect_err("it is gone");
        assert!(
            matches!(error, FfnError::NoPeer { layer: 1, .. }),
            "{error}"
        );
        other.join().expect("layer 0 goes on");
    });
}

#[test]
fn a_full_queue_makes_callers_wait_and_not_fail() {
    let model = DENSE();
    let oracle = slow(model, 5);
    let mut options = options(&oracle);
    // Room for one small request at a time.
    options.limits.held_bytes = 1500;
    let server = Running::start(Arc::new(oracle), options, &tcp());
    let remote = remote(&[&server.address], patience(model, 20_000, 5_000));
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..5 {
                    answers(&remote, model, 1);
                }
            });
        }
    });
    let stats = remote.stats();
    assert!(
        stats.peers[0].busy > 0 && stats.peers[0].failures == 0,
        "{stats:?}"
    );
    until("everything is given back", || {
        server.server.stats().bytes_held == 0
    });
}

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
fn connecting_says_what_is_missing_and_why() {
    let model = model(64, 3, 4);
    let part = |layers, experts| Oracle {
        layers,
        experts,
        ..Oracle::whole(model)
    };
    let low = Running::of(part(0..3, 0..2), &tcp());
    let high = Running::of(part(0..2, 2..4), &tcp());
    let gone = Running::of(part(2..3, 2..4), &tcp()).address.clone();
    let connect = |addresses: &[&Address]| {
        let addresses: Vec<Address> = addresses.iter().map(|address| (*address).clone()).collect();
        Remote::connect(&addresses, RemoteOptions::new(model))
    };
    let error = connect(&[&low.address, &high.address, &gone]).expect_err("layer 2 is not covered");
    let ConnectError::Uncovered {
        layer: 2,
        expert: 2,
        peers,
    } = &error
    else {
        panic!("{error}")
    };
    for told in [
        format!("{}: layers 0..3, experts 0..2", low.address),
        format!("{}: layers 0..2, experts 2..4", high.address),
        format!("{gone}: connection refused"),
    ] {
        assert!(peers.contains(&told), "{peers}");
    }
    assert!(matches!(connect(&[]), Err(ConnectError::Peers(_))));
    assert!(matches!(
        connect(&[&low.address, &low.address]),
        Err(ConnectError::Peers(_))
    ));
    // With the missing part, a server that can't be reached is no obstacle.
    let rest = Running::of(part(2..3, 2..4), &tcp());
    let remote =
        connect(&[&low.address, &high.address, &rest.address, &gone]).expect("all is covered");
    answers(&remote, model, 3);
}

#[test]
fn ends_with_different_secrets_do_not_talk() {
    let model = DENSE();
    let server = |secret: &Secret| {
        let oracle = Oracle::whole(model);
        let options = engine::wire::ServerOptions {
            secret: secret.clone(),
            ..options(&oracle)
        };
        Running::start(Arc::new(oracle), options, &tcp())
    };
    let secrets = [
        Secret::default(),
        Secret::new(*b"right"),
        Secret::new(*b"wrong"),
    ];
    for ours in &secrets {
        for theirs in &secrets {
            let server = server(theirs);
            let options = RemoteOptions {
                secret: ours.clone(),
                ..RemoteOptions::new(model)
            };
            let remote = Remote::connect(std::slice::from_ref(&server.address), options);
            if ours == theirs {
                answers(&remote.expect("the same secret"), model, 1);
            } else {
                let error = remote.expect_err("different secrets");
                assert_eq!(
                    error,
                    ConnectError::Secret {
                        peer: server.address.clone()
                    }
                );
                assert_eq!(server.server.stats().greeted, 0);
            }
        }
    }
    let other = Identity {
        id: VindexId::of(b"another"),
        ..model
    };
    let error = Remote::connect(
        &[server(&Secret::default()).address.clone()],
        RemoteOptions::new(other),
    );
    assert!(error.is_err());
}
