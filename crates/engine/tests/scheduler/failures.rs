//! Feed-forward that fails, clients that go away, an engine that stops: one last event each, and the others go on.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use engine::{Batch, Engine, EngineError, Event, FeedForward, FfnError, FinishReason};

use super::{Answer, Loaded, answer, ask, options, request, sink, submit};

/// Feed-forward that does `trouble` at its n-th call from when it is armed.
struct Troubled {
    inner: Arc<dyn FeedForward>,
    calls_left: AtomicUsize,
    trouble: fn() -> FfnError,
}

impl FeedForward for Troubled {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        let left = self
            .calls_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if left == Ok(1) {
            return Err((self.trouble)());
        }
        self.inner.forward(layer, batch, out)
    }
}

fn troubled(loaded: &Loaded, trouble: fn() -> FfnError) -> (Engine, Arc<Troubled>) {
    let ffn = Arc::new(Troubled {
        inner: Arc::clone(&loaded.parts.ffn),
        calls_left: AtomicUsize::new(0),
        trouble,
    });
    let mut parts = loaded.parts.clone();
    parts.ffn = ffn.clone();
    (Engine::start(parts, options()).unwrap(), ffn)
}

fn no_peer() -> FfnError {
    FfnError::NoPeer {
        layer: 1,
        expert: 0,
        reason: "it went away".to_owned(),
    }
}

fn panics() -> FfnError {
    panic!("a mistake in feed-forward");
}

/// Both requests of a failing step end with `is_expected`, and the next request is answered as ever.
fn fails_and_goes_on(trouble: fn() -> FfnError, is_expected: fn(&EngineError) -> bool) -> Engine {
    let loaded = Loaded::new("fixtures/models/qwen3");
    let prompt = loaded.prompt(1, 80);
    let expected = ask(&loaded.engine(options()), request(prompt.clone(), 20)).ids;
    let (engine, ffn) = troubled(&loaded, trouble);
    assert_eq!(ask(&engine, request(prompt.clone(), 20)).ids, expected);
    for calls in [1, 2, 7] {
        let streams = [1, 2].map(|i| submit(&engine, request(loaded.prompt(i, 80), 100_000)));
        for (_, events) in &streams {
            events.recv_timeout(super::PATIENCE).unwrap();
        }
        ffn.calls_left.store(calls, Ordering::Relaxed);
        for (_, events) in &streams {
            let Answer { end, .. } = answer(events);
            let error = end.unwrap_err();
            assert!(is_expected(&error), "{error}");
        }
        assert_eq!(ask(&engine, request(prompt.clone(), 20)).ids, expected);
    }
    engine
}

#[test]
fn a_step_without_feed_forward_fails_its_requests_and_no_others() {
    let engine = fails_and_goes_on(no_peer, |e| {
        matches!(e, EngineError::Ffn(FfnError::NoPeer { layer: 1, .. }))
    });
    let stats = engine.stats();
    assert_eq!(
        (stats.n_finished, stats.n_failed, stats.n_panics),
        (4, 6, 0)
    );
}

#[test]
fn a_panic_fails_what_was_open_and_the_engine_goes_on() {
    let engine = fails_and_goes_on(
        panics,
        |e| matches!(e, EngineError::Internal(said) if said.contains("mistake")),
    );
    engine.stop(true);
    assert_eq!(engine.stats().n_panics, 3);
}

#[test]
fn who_cancels_ends_and_the_others_go_on() {
    let loaded = Loaded::new("models/kjv");
    let engine = loaded.engine(options());
    let (_, stays) = submit(&engine, request(loaded.prompt(1, 9), 60));
    let (ticket, cancelled) = submit(&engine, request(loaded.prompt(2, 9), 100_000));
    cancelled.recv_timeout(super::PATIENCE).unwrap();
    ticket.cancel();
    assert!(matches!(
        answer(&cancelled).end,
        Err(EngineError::Cancelled)
    ));
    ticket.cancel();
    // A sink that breaks hears nothing more, nor does one that panics.
    for panics in [false, true] {
        let (sender, heard) = channel();
        let gone = Box::new(move |event| {
            sender.send(event).unwrap();
            assert!(!panics, "this sink panics");
            ControlFlow::Break(())
        });
        engine
            .submit(request(loaded.prompt(3, 9), 100_000), gone)
            .unwrap();
        assert!(matches!(
            heard.recv_timeout(super::PATIENCE),
            Ok(Event::Token(_))
        ));
        assert!(heard.recv_timeout(super::PATIENCE).is_err());
    }
    assert_eq!(answer(&stays).ids.len(), 60);
}

#[test]
fn stopping_drains_or_fails_what_is_open() {
    let loaded = Loaded::new("models/kjv");
    let engine = loaded.engine(options());
    let streams: Vec<_> = (0..3)
        .map(|i| submit(&engine, request(loaded.prompt(i, 9), 30)))
        .collect();
    engine.stop(true);
    for (_, events) in &streams {
        assert_eq!(answer(events).end.unwrap().0, FinishReason::Length);
    }
    let (no_sink, events) = sink();
    let refused = engine.submit(request(vec![1], 1), no_sink);
    assert!(matches!(refused, Err(EngineError::Stopping)));
    assert!(events.try_recv().is_err());
    engine.stop(false);

    // Whoever drains is overtaken by whoever does not.
    let engine = loaded.engine(options());
    let (_, open) = submit(&engine, request(loaded.prompt(1, 9), 100_000));
    open.recv_timeout(super::PATIENCE).unwrap();
    let draining = engine.clone();
    let drained = thread::spawn(move || draining.stop(true));
    engine.stop(false);
    drained.join().unwrap();
    assert!(matches!(answer(&open).end, Err(EngineError::Stopping)));

    // The last handle takes the engine with it.
    let engine = loaded.engine(options());
    let (_, open) = submit(&engine, request(loaded.prompt(1, 9), 100_000));
    drop(engine.clone());
    open.recv_timeout(super::PATIENCE).unwrap();
    drop(engine);
    assert!(matches!(answer(&open).end, Err(EngineError::Stopping)));
}

#[test]
fn clients_that_come_and_go_at_random_leave_nothing_behind() {
    let loaded = Arc::new(Loaded::new("fixtures/models/llama"));
    let engine = loaded.engine(engine::EngineOptions {
        kv_bytes_max: loaded.pages(12),
        n_running_max: 8,
        ..options()
    });
    let failed = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..6_u32)
        .map(|client| {
            let (engine, loaded, failed) = (engine.clone(), loaded.clone(), failed.clone());
            thread::spawn(move || {
                for i in 0..15 {
                    let seed = client * 100 + i;
                    let prompt = loaded.prompt(seed % 7, 1 + seed * 13 % 150);
                    let (ticket, events) =
                        submit(&engine, request(prompt, 1 + seed as usize * 7 % 60));
                    match seed % 4 {
                        0 => drop(events),
                        1 => {
                            thread::sleep(Duration::from_millis(u64::from(seed % 9)));
                            ticket.cancel();
                            answer(&events);
                        }
                        _ => {
                            if answer(&events).end.is_err() {
                                failed.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    engine.stop(true);
    assert!(!failed.load(Ordering::Relaxed));
    let stats = engine.stats();
    assert_eq!(
        (stats.n_running, stats.n_waiting, stats.n_panics),
        (0, 0, 0)
    );
    assert_eq!(stats.n_finished + stats.n_failed, 90);
}
