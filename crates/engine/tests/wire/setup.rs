//! What many of the tests begin with: nodes with little patience, slow servers, and servers that strangers meet.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::wire::{Address, Identity, Refusal, Remote, RemoteOptions, Server, ServerOptions};
use engine::{FeedForward, FfnError, Visit};

use crate::oracle::{Oracle, Running, ask, bits, model, options, rows, tcp, visits};

pub(crate) const DENSE: fn() -> Identity = || model(64, 2, 1);

/// A model with two experts, for servers that strangers meet.
pub(crate) const MODEL: fn() -> Identity = || model(64, 2, 2);

pub(crate) fn slow(model: Identity, millis: u64) -> Oracle {
    Oracle {
        pause: Duration::from_millis(millis),
        ..Oracle::whole(model)
    }
}

pub(crate) fn remote(addresses: &[&Address], options: RemoteOptions) -> Remote {
    let addresses: Vec<Address> = addresses.iter().map(|address| (*address).clone()).collect();
    Remote::connect(&addresses, options).expect("servers of the model")
}

pub(crate) fn patience(model: Identity, deadline: u64, stall: u64) -> RemoteOptions {
    RemoteOptions {
        deadline: Duration::from_millis(deadline),
        stall: Duration::from_millis(stall),
        hello: Duration::from_millis(500),
        ..RemoteOptions::new(model)
    }
}

/// Asks for a few rows of layer 0 and asserts them.
pub(crate) fn answers(ffn: &dyn FeedForward, model: Identity, n_rows: usize) {
    let rows = rows(n_rows, model.hidden, n_rows as u64);
    let visits = visits(n_rows, model.n_experts.min(2), model.n_experts);
    let wanted =
        ask(&Oracle::whole(model), 0, &rows, &visits, model.hidden).expect("the oracle answers");
    let got = ask(ffn, 0, &rows, &visits, model.hidden).expect("an answer in spite of it");
    assert!(bits(&got) == bits(&wanted), "{n_rows} rows differ");
}

/// Asks for a row of layer 0, which nobody has.
pub(crate) fn fails(ffn: &dyn FeedForward, model: Identity) -> FfnError {
    let rows = rows(1, model.hidden, 3);
    ask(ffn, 0, &rows, &[Visit { row: 0, expert: 0 }], model.hidden).expect_err("nobody can answer")
}

pub(crate) fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{what} did not happen"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn has_work(server: &Server) -> bool {
    server.stats().frames_received > 0
}

/// A server of [`MODEL`] with little patience.
pub(crate) fn server(change: impl FnOnce(&mut ServerOptions)) -> Running {
    let oracle = Oracle::whole(MODEL());
    let mut options = options(&oracle);
    options.limits.hello = Duration::from_millis(400);
    options.limits.frame = Duration::from_millis(400);
    options.limits.send = Duration::from_millis(400);
    change(&mut options);
    Running::start(Arc::new(oracle), options, &tcp())
}

/// Asserts that a node has its rows.
pub(crate) fn still_serves(remote: &Remote) {
    let model = MODEL();
    let rows = rows(3, model.hidden, 11);
    let visits = [(0, 0), (1, 1), (2, 0)].map(|(row, expert)| Visit { row, expert });
    let got = ask(remote, 1, &rows, &visits, model.hidden).expect("an answer");
    let wanted = ask(&Oracle::whole(model), 1, &rows, &visits, model.hidden).expect("an answer");
    assert!(bits(&got) == bits(&wanted));
}

/// Everything that arrives until the other end closes, which it must do within a few seconds.
pub(crate) fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => bytes,
        Err(error) => panic!("the connection was not closed: {error}"),
    }
}

pub(crate) fn refused(server: &Server, refusal: Refusal) -> u64 {
    let stats = server.stats();
    stats
        .refused
        .iter()
        .find(|(reason, _)| *reason == refusal)
        .map_or(0, |(_, n)| *n)
}
