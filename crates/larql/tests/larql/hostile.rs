//! Hubs that refuse: each command ends with a message that says what, on what, and why, and leaves nothing half done.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use hub::{Addition, CommitRequest, Content, Hub, Settings, Token};

use crate::bench::{Bench, TOKEN, kjv, model, names};

/// Answers every request with `status`, for as long as the test runs.
fn refusing(status: u16, headers: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 16 << 10];
            let _ = stream.read(&mut request);
            let body = "{\"error\":\"refused here\"}";
            let _ = write!(
                stream,
                "HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\n{headers}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
    });
    url
}

#[test]
fn each_refusal_is_told_with_its_status() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    for (status, headers, word) in [
        (401, "", "not authorised"),
        (403, "", "forbidden"),
        (429, "Retry-After: 3600\r\n", "rate limited"),
    ] {
        let url = refusing(status, headers);
        let vars = [("HF_ENDPOINT", url.as_str())];
        for args in [
            &["publish", "out", "--repo", "acme/x", "--slices", "none"][..],
            &["pull", "acme/x", "-o", "pulled"],
            &["extract", "acme/x", "-o", "extracted", "--quant", "q4k"],
        ] {
            let run = bench.run_with(args, &vars);
            assert_eq!(run.code, Some(1), "{status} {args:?}");
            assert!(
                run.stderr.contains(word) && run.stderr.contains("acme/x"),
                "{status} {args:?}\n{}",
                run.stderr
            );
        }
    }
    assert!(!bench.path("pulled").exists() && !bench.path("extracted").exists());
}

/// Passes connections on to `url`; `odd` sees the number of the connection, how many bytes went one way so far and the
/// next ones, and may change those; when it answers false, the connection is cut there.
fn between(
    url: &str,
    odd: impl Fn(usize, usize, &mut [u8]) -> bool + Send + Sync + 'static,
) -> String {
    let target = url.trim_start_matches("http://").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let odd = Arc::new(odd);
    let n_connections = AtomicUsize::new(0);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(&target)) else {
                return;
            };
            let number = n_connections.fetch_add(1, Ordering::Relaxed);
            let ways = [
                (client.try_clone().unwrap(), server.try_clone().unwrap()),
                (server, client),
            ];
            for (from, to) in ways {
                let odd = Arc::clone(&odd);
                thread::spawn(move || pass_on(from, to, |n, bytes| odd(number, n, bytes)));
            }
        }
    });
    address
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, odd: impl Fn(usize, &mut [u8]) -> bool) {
    let mut bytes = [0; 4 << 10];
    let mut n_bytes = 0;
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if !odd(n_bytes, &mut bytes[..n]) || to.write_all(&bytes[..n]).is_err() {
            break;
        }
        n_bytes += n;
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

#[test]
fn connections_that_are_cut_are_gone_on_from() {
    let bench = Bench::with_vindex(&kjv(), "q8_0");
    for args in [
        &["publish", "out", "--repo", "acme/kjv", "--slices", "none"][..],
        &["pull", "acme/kjv", "-o", "pulled"],
    ] {
        // Parts have up to 700 kB; the first connections bring less.
        let n_cut = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&n_cut);
        let url = between(bench.registry.url(), move |number, n, _| {
            let is_cut = number < 6 && n > 300_000;
            seen.fetch_add(usize::from(is_cut), Ordering::Relaxed);
            !is_cut
        });
        let run = bench.run_with(args, &[("HF_ENDPOINT", url.as_str())]);
        assert_eq!(run.code, Some(0), "{args:?}\n{}{}", run.stdout, run.stderr);
        assert!(
            n_cut.load(Ordering::Relaxed) > 0,
            "{args:?}: nothing was cut"
        );
    }
    assert_eq!(bench.verified("pulled"), bench.verified("out"));
}

#[test]
fn bytes_that_are_not_what_the_hub_promised_are_refused() {
    let bench = Bench::with_vindex(&kjv(), "q8_0");
    bench.ok(&["publish", "out", "--repo", "acme/kjv", "--slices", "none"]);
    // Only parts are this long.
    let url = between(bench.registry.url(), |_, n, bytes| {
        if n > 100_000 {
            bytes[0] ^= 1;
        }
        true
    });
    let run = bench.run_with(
        &["pull", "acme/kjv", "-o", "pulled"],
        &[("HF_ENDPOINT", url.as_str())],
    );
    assert_eq!(run.code, Some(1), "{}", run.stdout);
    assert!(
        run.stderr.contains("cannot pull kjv-q8_0-0000") && run.stderr.contains("[SHA256]"),
        "{}",
        run.stderr
    );
    assert!(
        !names(&bench.path("pulled")).contains(&"index.json".to_owned()),
        "a damaged directory opens as a vindex"
    );
    bench.ok(&["pull", "acme/kjv", "-o", "pulled"]);
    assert_eq!(bench.verified("pulled"), bench.verified("out"));
}

#[test]
fn a_hub_that_only_fails_is_given_up() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    let url = refusing(500, "");
    let vars = [("HF_ENDPOINT", url.as_str())];
    // Each is patient for half a minute, so they wait together.
    thread::scope(|scope| {
        for args in [
            &["publish", "out", "--repo", "acme/x", "--slices", "none"][..],
            &["pull", "acme/x", "-o", "pulled"],
            &["extract", "acme/x", "-o", "extracted", "--quant", "q4k"],
        ] {
            let (bench, vars) = (&bench, &vars);
            scope.spawn(move || {
                let run = bench.run_with(args, vars);
                assert_eq!(run.code, Some(1), "{args:?}");
                assert!(
                    run.stderr.contains("500") && run.stderr.contains("acme/x"),
                    "{args:?}\n{}",
                    run.stderr
                );
            });
        }
    });
    assert!(!bench.path("pulled").exists() && !bench.path("extracted").exists());
}

#[test]
fn offline_is_offline() {
    let bench = Bench::new();
    let run = bench.run_with(
        &["pull", "acme/x", "-o", "pulled"],
        &[("HF_HUB_OFFLINE", "1")],
    );
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("HF_HUB_OFFLINE"), "{}", run.stderr);
    assert_eq!(bench.registry.stats().sum("").n_requests, 0);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_and_says_what_stays() {
    let bench = Bench::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let mut command = bench.command(&["pull", "acme/x", "-o", "pulled"]);
    let command = command.env("HF_ENDPOINT", url).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // It has asked, so it is past its beginning, and nobody will answer.
    let _asked = silent.accept().unwrap();
    let sent = Command::new("sh")
        .arg("-c")
        .arg(format!("kill -INT {}", child.id()))
        .status();
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("interrupted: what is fetched stays"),
        "{stderr}"
    );
}

#[test]
fn an_index_that_lies_about_a_part_is_found_before_anything_is_fetched() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    bench.ok(&["publish", "out", "--repo", "acme/x", "--slices", "none"]);
    let index = std::fs::read_to_string(bench.path("out/index.json")).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&index).unwrap();
    let sha256 = parsed["parts"][2]["sha256"].as_str().unwrap();
    let lying = index.replace(sha256, &"0".repeat(64));
    let settings = Settings {
        endpoint: bench.registry.url().to_owned(),
        token: Token::new(TOKEN),
        ..Settings::default()
    };
    let request = CommitRequest {
        summary: "Lie".into(),
        additions: vec![Addition {
            path: "index.json".into(),
            size_bytes: lying.len() as u64,
            sha256: None,
            content: Content::Bytes(lying.into()),
        }],
        deletions: Vec::new(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let hub = Hub::new(settings).unwrap();
    let repo = "acme/x".parse().unwrap();
    runtime
        .block_on(hub.commit(&repo, &request, &|_| {}))
        .unwrap();
    let run = bench.run(&["pull", "acme/x", "-o", "pulled"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr
            .contains("does not belong to the repository's own index"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("-00003-of-"), "{}", run.stderr);
    assert!(!bench.path("pulled").exists());
}
