//! Peers that do not mean well, or do not know how: whatever arrives, a server goes on serving others, in bounded
//! memory, and panics nowhere.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::Visit;
use engine::wire::{Address, Identity, Refusal, Remote, RemoteOptions, Secret, Server};
use proptest::prelude::*;

use crate::oracle::{Oracle, Running, ask, bits, connect, model, options, rows, tcp};
use crate::raw::{self, Frame, Node};

const MODEL: fn() -> Identity = || model(64, 2, 2);

fn server(change: impl FnOnce(&mut engine::wire::ServerOptions)) -> Running {
    let oracle = Oracle::whole(MODEL());
    let mut options = options(&oracle);
    options.limits.hello = Duration::from_millis(400);
    options.limits.frame = Duration::from_millis(400);
    options.limits.send = Duration::from_millis(400);
    change(&mut options);
    Running::start(Arc::new(oracle), options, &tcp())
}

fn still_serves(remote: &Remote) {
    let model = MODEL();
    let rows = rows(3, model.hidden, 11);
    let visits = [(0, 0), (1, 1), (2, 0)].map(|(row, expert)| Visit { row, expert });
    let got = ask(remote, 1, &rows, &visits, model.hidden).expect("an answer");
    let wanted = ask(&Oracle::whole(model), 1, &rows, &visits, model.hidden).expect("an answer");
    assert!(bits(&got) == bits(&wanted));
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

/// Everything that arrives until the other end closes, which it must do within a few seconds.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => bytes,
        Err(error) => panic!("the connection was not closed: {error}"),
    }
}

fn refused(server: &Server, refusal: Refusal) -> u64 {
    let stats = server.stats();
    stats
        .refused
        .iter()
        .find(|(reason, _)| *reason == refusal)
        .map_or(0, |(_, n)| *n)
}

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
        (
            "a kind that is none",
            Box::new({
                let f = with(|f| f.kind = 11);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "kind zero",
            Box::new({
                let f = with(|f| f.kind = 0);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "rows of no type",
            Box::new({
                let f = with(|f| f.row_type = 0);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "rows of an unknown type",
            Box::new({
                let f = with(|f| f.row_type = 4);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "rows shorter than said",
            Box::new({
                let f = with(|f| f.row_type = 2);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "a field that must be zero",
            Box::new({
                let f = with(|f| f.micros = 1);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "no rows",
            Box::new({
                let f = with(|f| f.n_rows = 0);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "no visits",
            Box::new({
                let f = with(|f| f.n_visits = 0);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "2^32 - 1 rows",
            Box::new({
                let f = with(|f| f.n_rows = u32::MAX);
                move |seed| f.bytes(seed)
            }),
        ),
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
            Box::new({
                let f = with(|f| f.payload[256] = 1);
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "a number that is none",
            Box::new({
                let f = with(|f| f.payload[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
                move |seed| f.bytes(seed)
            }),
        ),
        (
            "an answer",
            Box::new({
                let f = with(|f| {
                    f.kind = raw::ROWS;
                    f.n_rows = 0;
                    f.payload.truncate(256);
                });
                move |seed| f.bytes(seed)
            }),
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

#[test]
fn a_recorded_hello_opens_nothing() {
    let model = MODEL();
    let server = server(|options| options.secret = Secret::new(*b"a secret"));
    // What an honest node says: everything it writes goes through a recorder.
    let recorder = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = recorder
        .local_addr()
        .expect("an address")
        .to_string()
        .parse()
        .expect("an address");
    let recording = thread::spawn({
        let server = server.address.clone();
        move || {
            let (mut node, _) = recorder.accept().expect("a node");
            let mut there = raw::dial(&server);
            let frame = |from: &mut TcpStream, to: &mut TcpStream, n: usize| {
                let mut bytes = vec![0; n];
                from.read_exact(&mut bytes).expect("a frame");
                to.write_all(&bytes).expect("it is passed on");
                bytes
            };
            let hello = frame(&mut node, &mut there, 40 + 32 + 8);
            let challenge = frame(&mut there, &mut node, 40 + 32 + 8);
            let proof = frame(&mut node, &mut there, 40 + 80 + 8);
            let welcome = frame(&mut there, &mut node, 40 + 64 + 8);
            (hello, challenge, proof, welcome)
        }
    });
    let options = RemoteOptions {
        secret: Secret::new(*b"a secret"),
        ..RemoteOptions::new(model)
    };
    let remote = Remote::connect(std::slice::from_ref(&address), options.clone())
        .expect("the recorder passes all on");
    drop(remote);
    let (hello, challenge, proof, welcome) = recording.join().expect("a recording");

    // To the server: the same Hello gets another challenge, so that the Proof proves nothing.
    let mut stream = raw::dial(&server.address);
    stream.write_all(&hello).expect("a hello");
    let fresh = Frame::read(&mut stream, 0).expect("a challenge");
    assert_ne!(fresh.payload, challenge[40..72]);
    stream.write_all(&proof).expect("a proof");
    let told = Frame::read(&mut stream, 0).expect("a refusal");
    assert_eq!(
        (told.kind, told.code),
        (raw::REFUSED, Refusal::Secret as u8)
    );
    assert!(rest(&mut stream).is_empty());
    assert_eq!(server.server.stats().greeted, 1);

    // To a node: its nonce is another, so that the recorded Welcome proves nothing.
    let imposter = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = imposter
        .local_addr()
        .expect("an address")
        .to_string()
        .parse()
        .expect("an address");
    let playing = thread::spawn(move || {
        let (mut node, _) = imposter.accept().expect("a node");
        Frame::read(&mut node, 0).expect("a hello");
        node.write_all(&challenge).expect("the old challenge");
        Frame::read(&mut node, 0).expect("a proof");
        node.write_all(&welcome).expect("the old welcome");
    });
    let error =
        Remote::connect(std::slice::from_ref(&address), options).expect_err("it knows no secret");
    assert_eq!(error, engine::wire::ConnectError::Secret { peer: address });
    playing.join().expect("it was heard");
}

#[test]
fn a_server_that_echoes_a_nodes_own_proof_is_found_out() {
    let model = MODEL();
    let mirror = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: Address = mirror
        .local_addr()
        .expect("an address")
        .to_string()
        .parse()
        .expect("an address");
    let playing = thread::spawn(move || {
        let (mut node, _) = mirror.accept().expect("a node");
        let hello = Frame::read(&mut node, 0).expect("a hello");
        node.write_all(
            &Frame {
                kind: raw::CHALLENGE,
                ..hello
            }
            .bytes(0),
        )
        .expect("its own nonce");
        let proof = Frame::read(&mut node, 0).expect("a proof");
        let mut welcome: Vec<u8> = [0, 2, 0, 2, 64, 8, 0, 0u32]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        welcome.extend(&proof.payload[48..]);
        let welcome = Frame {
            kind: raw::WELCOME,
            payload: welcome,
            ..Frame::default()
        };
        node.write_all(&welcome.bytes(0)).expect("its own proof");
    });
    let options = RemoteOptions {
        secret: Secret::new(*b"a secret"),
        ..RemoteOptions::new(model)
    };
    let error =
        Remote::connect(std::slice::from_ref(&address), options).expect_err("it knows no secret");
    assert_eq!(error, engine::wire::ConnectError::Secret { peer: address });
    playing.join().expect("it was heard");
}

#[test]
fn half_open_sockets_are_closed_in_time() {
    let model = MODEL();
    let server = server(|_| {});
    let remote = connect(std::slice::from_ref(&server), model);
    let hello = Frame {
        kind: raw::HELLO,
        payload: vec![3; 32],
        ..Frame::default()
    }
    .bytes(0);
    // Nothing; half a hello; a hello and no proof; a hello a byte at a time.
    let mut silent = raw::dial(&server.address);
    let mut half = raw::dial(&server.address);
    half.write_all(&hello[..30]).expect("half a hello");
    let mut unproved = raw::dial(&server.address);
    unproved.write_all(&hello).expect("a hello");
    let mut dripping = raw::dial(&server.address);
    let began = Instant::now();
    for byte in &hello {
        if dripping.write_all(&[*byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(rest(&mut silent).is_empty());
    assert!(rest(&mut half).is_empty());
    assert_eq!(
        rest(&mut unproved).len(),
        80,
        "the challenge, and then the end"
    );
    rest(&mut dripping);
    assert!(began.elapsed() < Duration::from_secs(5));

    // Greeted, and then half a frame, at once or in drips.
    let frame = raw::forward(1, 0, &rows(1, model.hidden, 1), model.hidden, 0);
    let mut cut = Node::greet(&server.address, b"", &model);
    let bytes = frame.bytes(cut.to_server);
    cut.stream.write_all(&bytes[..100]).expect("half a frame");
    rest(&mut cut.stream);
    let mut dripping = Node::greet(&server.address, b"", &model);
    let bytes = frame.bytes(dripping.to_server);
    let began = Instant::now();
    let n_written = bytes.iter().take_while(|byte| {
        thread::sleep(Duration::from_millis(10));
        dripping.stream.write_all(&[**byte]).is_ok()
    });
    assert!(
        n_written.count() < bytes.len(),
        "a frame may not take as long as it likes"
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    // A node that says nothing between frames is as welcome as any.
    thread::sleep(Duration::from_millis(500));
    still_serves(&remote);
    assert_eq!(remote.stats().peers[0].failures, 0);
    until("all are forgotten", || {
        server.server.stats().connections == 1
    });
}

#[test]
fn ten_thousand_connections_do_not_keep_a_node_out() {
    let model = MODEL();
    let server = server(|options| options.limits.handshakes = 32);
    let remote = connect(std::slice::from_ref(&server), model);
    let flood: Vec<_> = (0..4)
        .map(|_| {
            let address = server.address.clone();
            thread::spawn(move || {
                let mut open = std::collections::VecDeque::new();
                for _ in 0..2500 {
                    open.push_back(raw::dial(&address));
                    // This end must not run out of file descriptors.
                    if open.len() > 64 {
                        open.pop_front();
                    }
                }
            })
        })
        .collect();
    let mut most = 0;
    while flood.iter().any(|thread| !thread.is_finished()) {
        most = most.max(server.server.stats().connections);
        still_serves(&remote);
        thread::sleep(Duration::from_millis(5));
    }
    for thread in flood {
        thread.join().expect("the flood");
    }
    assert!(most <= 33 + 1, "{most} connections at once");
    assert!(
        refused(&server.server, Refusal::Full) > 0,
        "the bound was never met"
    );
    // And another node gets in at once.
    still_serves(&connect(std::slice::from_ref(&server), model));
    until("the flood is forgotten", || {
        server.server.stats().connections <= 2
    });
}

#[test]
fn connections_beyond_the_bound_are_refused_and_calls_share_those_there_are() {
    let model = MODEL();
    let server = server(|options| options.limits.connections = 2);
    let remote = connect(std::slice::from_ref(&server), model);
    let _second = Node::greet(&server.address, b"", &model);
    let mut third = raw::dial(&server.address);
    let told = Frame::read(&mut third, 0).expect("a refusal");
    assert_eq!((told.kind, told.code), (raw::REFUSED, Refusal::Full as u8));
    assert!(rest(&mut third).is_empty());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..20).for_each(|_| still_serves(&remote)));
        }
    });
    assert_eq!(
        remote.stats().peers[0].failures,
        0,
        "a full server is not down"
    );
}

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
