//! Servers that die, stall or are busy, in the middle of a call. Either the call's rows are those that the weights give,
//! or it fails with one error within its deadline.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::{FfnError, Visit};

use crate::oracle::{Oracle, Running, ask, options, rows, tcp, unix};
use crate::raw::{self, Frame};
use crate::setup::{DENSE, answers, fails, has_work, patience, remote, slow, until};

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
