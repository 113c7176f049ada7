//! Hubs that refuse: each command ends with a message that says what, on what, and why, and leaves nothing half done.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;

use hub::{Addition, CommitRequest, Content, Hub, Settings, Token};

use crate::bench::{Bench, TOKEN, model};

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
    let bench = Bench::new();
    bench.ok(&["extract", &model("llama"), "-o", "out", "--quant", "q8_0"]);
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
    let bench = Bench::new();
    bench.ok(&["extract", &model("llama"), "-o", "out", "--quant", "q8_0"]);
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
