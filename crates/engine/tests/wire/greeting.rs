//! Who is let in: the first bytes of a connection, from both ends, honest or not, and the bounds of how many.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::wire::{Address, ConnectError, Identity, Refusal, Remote, RemoteOptions, Secret};
use vindex::VindexId;

use crate::oracle::{Oracle, Running, connect, model, options, rows, tcp};
use crate::raw::{self, Frame, Node};
use crate::setup::{DENSE, MODEL, answers, refused, rest, server, still_serves, until};

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
    // Nobody beyond this machine is asked without a secret, and that is said before anybody is.
    let far: Address = "weights.example:7844".parse().expect("an address");
    assert_eq!(
        connect(&[&low.address, &far]).expect_err("there is no secret"),
        ConnectError::Stranger { peer: far }
    );
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
