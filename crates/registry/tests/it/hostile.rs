//! What strangers may send.

use registry::Options;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::kit::{Hub, file, lfs_file, send};

/// Sends bytes as they are, and returns the first line of the answer.
async fn raw(hub: &Hub, request: &str) -> String {
    let mut stream =
        tokio::net::TcpStream::connect(hub.running.url().trim_start_matches("http://"))
            .await
            .unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[tokio::test]
async fn a_page_in_a_browser_may_not_write() {
    let hub = Hub::with_repo(Options::default()).await;
    let create = |origin: &str| {
        hub.request(Method::POST, "/api/repos/create")
            .header("origin", origin)
            .header("content-type", "text/plain")
            .body(r#"{"name": "planted"}"#)
    };
    for origin in ["https://evil.example", "null", hub.running.url()] {
        assert_eq!(send(create(origin)).await.status, 401, "{origin}");
    }
}

#[tokio::test]
async fn addresses_in_answers_are_those_that_clients_use() {
    let hub = Hub::with_repo(Options {
        public_url: Some("https://hub.example.org/x/".to_owned()),
        ..Options::default()
    })
    .await;
    let actions = hub.batch(b"weights", &["basic"]).await["actions"].clone();
    for action in ["upload", "verify"] {
        let href = actions[action]["href"].as_str().unwrap();
        assert!(href.starts_with("https://hub.example.org/x/"), "{href}");
    }
}

#[tokio::test]
async fn no_path_leads_out() {
    let hub = Hub::with_repo(Options::default()).await;
    std::fs::write(hub.dir.path().join("outside.txt"), "secret").unwrap();
    for path in [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a\\..\\b",
        ".git/config",
        "a//b",
        "",
        ".",
        "a\u{0}b",
    ] {
        let answer = hub
            .commit(json!({"summary": "x"}), &[file(path, b"x")])
            .await;
        assert!(
            answer.refusal().starts_with("400  | path in repository"),
            "{path}: {}",
            answer.refusal()
        );
    }
    for target in [
        "/me/model/resolve/main/../../../../../outside.txt",
        "/me/model/resolve/main/%2e%2e/%2e%2e/outside.txt",
        "/me/model/resolve/main/..%2f..%2foutside.txt",
        "/me/model/resolve/..%2f..%2frefs/repo.json",
        "/me/..%2fmodel/resolve/main/x",
        "/api/models/..%2f../models/revision/main",
        "/api/models/me/model/tree/..%2f..%2f..",
        "/api/collections/..%2f../x-000000000000000000000000",
        "/-/lfs/..%2f..%2foutside.txt?size=1&until=9999999999&sig=00",
    ] {
        let line = raw(
            &hub,
            &format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        )
        .await;
        assert!(
            ["HTTP/1.1 404", "HTTP/1.1 400", "HTTP/1.1 405"]
                .iter()
                .any(|start| line.starts_with(start)),
            "{target}: {line}"
        );
    }
    for name in ["..", "a/b/c", "a..b", "-a", "a.git", "x\u{0}", "", "é"] {
        let answer = hub
            .post(
                "/api/repos/create",
                &json!({"name": name, "organization": "me"}),
            )
            .await;
        assert!(
            answer.refusal().starts_with("400  | "),
            "{name}: {}",
            answer.refusal()
        );
    }
    let owners = std::fs::read_dir(hub.dir.path().join("repos/models"))
        .unwrap()
        .count();
    assert_eq!((owners, hub.files().await.len()), (1, 0));
}

#[tokio::test]
async fn bodies_that_are_not_what_they_should_be() {
    let hub = Hub::with_repo(Options::default()).await;
    let deep = "[".repeat(100_000);
    for body in [
        "{",
        "[]",
        "null",
        "{\"name\": 3}",
        "\u{0}",
        &deep,
        "{\"name\": \"x\", \"private\": \"maybe\"}",
    ] {
        let answer = send(
            hub.request(Method::POST, "/api/repos/create")
                .body(body.to_owned()),
        )
        .await;
        assert!(
            answer
                .refusal()
                .starts_with("400  | the body is not the JSON expected: "),
            "{}",
            answer.refusal()
        );
    }
    let huge = send(
        hub.request(Method::POST, "/api/repos/create")
            .body(" ".repeat((8 << 20) + 1)),
    )
    .await;
    assert_eq!(
        huge.refusal(),
        "413  | the body is larger than 8388608 bytes"
    );
    let head = hub.head_commit().await;
    let header = json!({"key": "header", "value": {"summary": "x"}}).to_string();
    let lfs = |value: serde_json::Value| json!({"key": "lfsFile", "value": value}).to_string();
    let lines = [
        "nonsense".to_owned(),
        json!({"key": "header", "value": {"summary": ""}}).to_string(),
        json!({"key": "copyFile", "value": {"path": "x"}}).to_string(),
        json!({"key": "file", "value": {"path": "x", "content": "?", "encoding": "base64"}})
            .to_string(),
        json!({"key": "file", "value": {"path": "x", "content": "", "encoding": "rot13"}})
            .to_string(),
        lfs(json!({"path": "x", "oid": "ABC", "size": 1})),
        lfs(json!({"path": "x", "oid": "../../../registry.json", "size": 1})),
        lfs(json!({"path": "x", "oid": "0".repeat(64), "size": -1})),
        lfs_file("x", b"never uploaded").to_string(),
    ];
    for line in lines {
        let body = format!("{header}\n{}\n{line}\n", file("good.txt", b"good"));
        let answer = send(
            hub.request(Method::POST, "/api/models/me/model/commit/main")
                .body(body),
        )
        .await;
        assert_eq!(answer.status, 400, "{line}: {}", answer.text());
    }
    let headless = send(
        hub.request(Method::POST, "/api/models/me/model/commit/main")
            .body(file("x", b"x").to_string()),
    )
    .await;
    assert!(
        headless
            .refusal()
            .starts_with("400  | the commit has no header line")
    );
    assert_eq!(hub.head_commit().await, head);
}

#[tokio::test]
async fn a_file_too_large_for_a_commit_is_refused() {
    let hub = Hub::with_repo(Options {
        inline_bytes_max: 1000,
        ..Options::default()
    })
    .await;
    let lines = [file("x", &[b'x'; 1001])];
    assert_eq!(
        hub.commit(json!({"summary": "x"}), &lines).await.refusal(),
        "413  | x is larger than 1000 bytes"
    );
    let endless = send(
        hub.request(Method::POST, "/api/models/me/model/commit/main")
            .body("x".repeat(200_000)),
    )
    .await;
    let message =
        "413  | a file in the commit (send it as an LFS object) is larger than 1000 bytes";
    assert_eq!(endless.refusal(), message);
    assert_eq!(hub.n_blobs(), 0);
}

#[tokio::test]
async fn a_host_that_cannot_be_one_is_refused() {
    let hub = Hub::with_repo(Options::default()).await;
    for host in ["evil.example/path", "a b", "a@b", "<script>"] {
        let line = raw(
            &hub,
            &format!("GET /api/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"),
        )
        .await;
        assert!(line.starts_with("HTTP/1.1 400"), "{host}: {line}");
    }
}
