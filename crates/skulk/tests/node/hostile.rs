//! Clients that mean no good: each is refused or cut off, in bounded memory, and others are answered meanwhile.

use std::collections::VecDeque;
use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::node::{self, Node, Options};

const COMPLETIONS: &str = "/v1/completions";

fn is_answered(node: &Node) {
    let began = Instant::now();
    let body = json!({"model": "kjv", "prompt": "And God", "max_tokens": 4});
    let (status, answer) = node.post(COMPLETIONS, &body);
    assert_eq!(status, 200, "{answer}");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

/// How many files this process may have open, once it has asked for all.
#[cfg(target_os = "linux")]
fn files_max() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(maximum.unwrap_or(20_000));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("it may be raised so far");
    current.map_or(0, |n| n as usize)
}

#[cfg(target_os = "linux")]
#[test]
fn ten_thousand_connections_keep_nobody_out() {
    let node = Node::start(&Options::default());
    is_answered(&node);
    let before = node.resident_bytes();
    // Of them as many at a time as this process may have.
    let open_max = files_max().saturating_sub(200).clamp(100, 10_000);
    let mut open: VecDeque<TcpStream> = VecDeque::new();
    for n in 0..10_000 {
        let mut stream = node.dial();
        let said: &[u8] = match n % 4 {
            0 => b"",
            1 => b"GET /health HTT",
            2 => b"POST /v1/completions HTTP/1.1\r\nhost: node\r\nauthorization: ",
            _ => b"POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-length: 50000\r\n\r\n{\"model\": ",
        };
        // Whoever has made room is told so when it speaks.
        let _ = stream.write_all(said);
        open.push_back(stream);
        if open.len() > open_max {
            open.pop_front();
        }
        if n % 1000 == 999 {
            is_answered(&node);
        }
    }
    let grown = node.resident_bytes().saturating_sub(before);
    assert!(grown < 256 << 20, "{grown} bytes for silence");
    assert_eq!(node.get_as("/health", "").0, 200);
    drop(open);
    is_answered(&node);
}

#[test]
fn bodies_that_are_no_requests_are_refused() {
    let node = Node::start(&Options::default());
    let refused = |body: &[u8], status: u16, code: &str| {
        let (got, answer) = node::answer(node.send_bytes(COMPLETIONS, body, body.len() as u64));
        assert_eq!(
            (got, &answer["error"]["code"]),
            (status, &Value::from(code)),
            "{answer}"
        );
    };
    refused(b"", 400, "invalid_json");
    refused(
        b"{\"model\": \"kjv\", \"prompt\": \"\xff\xfe\"}",
        400,
        "invalid_json",
    );
    refused(
        b"{\"model\": \"kjv\", \"prompt\": \"\\ud800\"}",
        400,
        "invalid_json",
    );
    refused("[".repeat(1_000_000).as_bytes(), 400, "invalid_json");
    // Longer than any prompt of this model.
    let wide = format!(
        "{{\"model\": \"kjv\", \"prompt\": [{}0]}}",
        "0,".repeat(300_000)
    );
    refused(wide.as_bytes(), 400, "context_length_exceeded");
    let long = json!({"model": "kjv", "prompt": "word ".repeat(150_000)}).to_string();
    refused(long.as_bytes(), 400, "context_length_exceeded");

    // Longer than is read, as said or as sent; a length without its bytes.
    let huge = vec![b' '; 20 << 20];
    let (status, _) = node::answer(node.send_bytes(COMPLETIONS, &huge, huge.len() as u64));
    assert_eq!(status, 413);
    for said in [1 << 40, u64::MAX] {
        let stream = node.send_bytes(COMPLETIONS, b"{}", said);
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("half a connection");
        assert!(!node::read_all(stream).contains(" 200 "));
    }
    is_answered(&node);
}

#[cfg(target_os = "linux")]
#[test]
fn many_huge_bodies_at_once_take_bounded_memory_and_keep_nobody_out() {
    let node = Node::start(&Options::default());
    is_answered(&node);
    let before = node.resident_bytes();
    let body = json!({"model": "kjv", "prompt": "In the beginning ".repeat(60_000)}).to_string();
    let mut most = 0;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..24)
            .map(|_| {
                scope.spawn(|| {
                    let stream = node.send_bytes(COMPLETIONS, body.as_bytes(), body.len() as u64);
                    let (status, answer) = node::answer(stream);
                    assert_eq!(status, 400, "{answer}");
                })
            })
            .collect();
        while !clients.iter().all(|client| client.is_finished()) {
            most = most.max(node.resident_bytes());
            is_answered(&node);
        }
    });
    let grown = most.saturating_sub(before);
    assert!(
        grown < 1 << 30,
        "{grown} bytes for prompts that are too long"
    );
}
