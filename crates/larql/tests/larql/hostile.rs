//! Hubs that refuse: each command ends with a message that says what, on what, and why, and leaves nothing half done.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use crate::bench::{Bench, model};

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
