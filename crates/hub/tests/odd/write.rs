//! Writing to a Hub that misbehaves.

use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use hub::{Addition, Commit, CommitReport, CommitRequest, Content, Error, RepoId};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::hub_server::{Server, cut, refuse, sha256};

fn repo() -> RepoId {
    "ann/model".parse().unwrap()
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn addition(path: &str, bytes: &[u8]) -> Addition {
    Addition {
        path: path.to_owned(),
        content: Content::Bytes(bytes.to_vec()),
        sha256: None,
        size_bytes: bytes.len() as u64,
    }
}

fn file(dir: &std::path::Path, path: &str, bytes: &[u8]) -> Addition {
    let local = dir.join(path);
    std::fs::write(&local, bytes).unwrap();
    Addition {
        content: Content::File(local),
        ..addition(path, bytes)
    }
}

fn request(additions: Vec<Addition>) -> CommitRequest {
    CommitRequest {
        summary: "Add weights".to_owned(),
        additions,
        deletions: Vec::new(),
    }
}

async fn commit(server: &Server, request: &CommitRequest) -> Result<CommitReport, Error> {
    server.client().commit(&repo(), request, &|_| ()).await
}

fn number(n: usize) -> Option<Commit> {
    Some(format!("{n:040x}").parse().unwrap())
}

#[tokio::test]
async fn one_commit_carries_small_and_large_files_and_deletions() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::with(&[
        ("kept.bin", &bytes(2000)),
        ("old.txt", b"old"),
        ("same.txt", b"same"),
    ])
    .await;
    let large = bytes(700_000);
    let mut request = request(vec![
        file(dir.path(), "w.bin", &large),
        file(dir.path(), "kept.bin", &bytes(2000)),
        addition("README.md", b"# card"),
        addition("same.txt", b"same"),
        addition("twin.bin", &large),
        addition("empty.bin", b""),
    ]);
    request.deletions = vec!["old.txt".to_owned(), "never-there.txt".to_owned()];
    let report = commit(&server, &request).await.unwrap();
    assert_eq!(
        report,
        CommitReport {
            commit: number(2),
            uploaded: ["w.bin", "README.md", "twin.bin", "empty.bin"]
                .map(str::to_owned)
                .to_vec(),
            skipped: ["kept.bin", "same.txt"].map(str::to_owned).to_vec(),
            deleted: vec!["old.txt".to_owned()],
            bytes_sent: 700_006,
        }
    );
    {
        let shelf = server.shelf.lock().unwrap();
        let paths: Vec<_> = shelf
            .head()
            .iter()
            .map(|(path, bytes)| (path.as_str(), bytes.len()))
            .collect();
        let expected = [
            ("README.md", 6),
            ("empty.bin", 0),
            ("kept.bin", 2000),
            ("same.txt", 4),
            ("twin.bin", 700_000),
            ("w.bin", 700_000),
        ];
        assert_eq!(paths, expected);
    }
    // The large file was streamed to its own address, once and without the token, and not inlined.
    let puts = server.requests("/_lfs/");
    assert!(puts.len() == 1 && !puts[0].has_token);
    assert!(server.requests("/commit/")[0].body.len() < 2000);
    assert!(server.requests("/_verify/").iter().all(|s| s.has_token));

    let n_before = server.requests("").len();
    let again = commit(&server, &request).await.unwrap();
    assert_eq!(
        (again.commit, again.skipped.len(), again.bytes_sent),
        (None, 6, 0)
    );
    let after = server.requests("");
    assert!(
        after[n_before..].iter().all(|s| s.method == "GET"),
        "{:?}",
        &after[n_before..]
    );
}

#[tokio::test]
async fn a_large_object_goes_in_parts_when_the_hub_wants_it_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::with(&[]).await;
    server.shelf.lock().unwrap().chunk_bytes = Some(300_000);
    let large = bytes(1_000_000);
    let mut n = 0;
    server.hook(move |seen, _| {
        n += usize::from(seen.path.ends_with("/2"));
        (seen.path.ends_with("/2") && n == 1).then(|| refuse(500, &[]))
    });
    let report = commit(&server, &request(vec![file(dir.path(), "w.bin", &large)]))
        .await
        .unwrap();
    assert_eq!(report.commit, number(2));
    assert!(server.shelf.lock().unwrap().head()["w.bin"] == large);
    let sizes: Vec<_> = server
        .requests("/_part/")
        .iter()
        .map(|s| (s.path.chars().last().unwrap(), s.body.len()))
        .collect();
    assert_eq!(
        sizes,
        [
            ('1', 300_000),
            ('2', 300_000),
            ('2', 300_000),
            ('3', 300_000),
            ('4', 100_000)
        ]
    );
    let complete = &server.requests("/_complete/")[0];
    assert!(
        !complete.has_token
            && String::from_utf8_lossy(&complete.body)
                .contains(r#"{"partNumber":4,"etag":"\"e4\""}"#)
    );
}

#[tokio::test]
async fn an_upload_that_was_cut_after_more_than_our_patience_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::with(&[]).await;
    let large = bytes(24_000_000);
    let slow = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow_url = format!("http://{}", slow.local_addr().unwrap());
    let mut first = true;
    server.hook(move |seen, shelf| {
        let is_first = seen.path.ends_with("/batch") && std::mem::take(&mut first);
        is_first.then(|| {
            shelf.lfs.insert(sha256(&bytes(24_000_000)), Vec::new());
            let object: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
            let mut object = object["objects"][0].clone();
            object["actions"] = json!({"upload": {"href": format!("{slow_url}/x")}});
            Response::new(Body::from(json!({"objects": [object]}).to_string()))
        })
    });
    let received = tokio::spawn(async move {
        // The first connection takes its time, longer than `give_up_after`, and is cut; the second is taken whole.
        let (mut stream, _) = slow.accept().await.unwrap();
        let mut buf = vec![0; 200_000];
        for _ in 0..30 {
            stream.read_exact(&mut buf).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(stream);
        let (mut stream, _) = slow.accept().await.unwrap();
        let mut all = Vec::new();
        let body_start = |all: &[u8]| Some(all.windows(4).position(|w| w == b"\r\n\r\n")? + 4);
        while body_start(&all[..all.len().min(4096)])
            .is_none_or(|start| all.len() < start + 24_000_000)
        {
            assert!(stream.read_buf(&mut all).await.unwrap() > 0);
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        all[body_start(&all).unwrap()..].to_vec()
    });
    let report = commit(&server, &request(vec![file(dir.path(), "w.bin", &large)])).await;
    assert_eq!(report.unwrap().commit, number(2));
    assert!(received.await.unwrap() == large);
}

#[tokio::test]
async fn a_commit_over_which_the_hub_broods_before_it_fails_is_sent_again() {
    let server = Server::with(&[]).await;
    let mut first = true;
    server.hook(move |seen, _| {
        let fails = seen.path.contains("/commit/") && std::mem::take(&mut first);
        fails.then(|| {
            let brooding = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(600)).await;
                Ok::<_, std::io::Error>("{}")
            });
            let mut response = refuse(504, &[]);
            *response.body_mut() = Body::from_stream(brooding);
            response
        })
    });
    let report = commit(&server, &request(vec![addition("a.txt", b"a")])).await;
    assert_eq!(report.unwrap().commit, number(2));
}

#[tokio::test]
async fn a_lost_answer_to_a_commit_that_was_made_makes_no_second_one() {
    let server = Server::with(&[]).await;
    server.hook(|seen, shelf| {
        seen.path.contains("/commit/").then(|| {
            shelf.commit(seen);
            cut(Response::new(Body::empty()), 100, b"{")
        })
    });
    let report = commit(
        &server,
        &request(vec![addition("w.bin", &bytes(10)), addition("a.txt", b"a")]),
    )
    .await
    .unwrap();
    assert_eq!(report.commit, number(2));
    assert_eq!(server.shelf.lock().unwrap().commits.len(), 2);
    assert_eq!(server.requests("/commit/").len(), 1);
}

#[tokio::test]
async fn a_commit_that_was_not_made_is_sent_again() {
    for odd in [
        || refuse(502, &[]),
        || cut(Response::new(Body::empty()), 100, b"{"),
    ] {
        let server = Server::with(&[]).await;
        let mut n = 0;
        server.hook(move |seen, _| {
            n += usize::from(seen.path.contains("/commit/"));
            (seen.path.contains("/commit/") && n <= 2).then(odd)
        });
        let report = commit(&server, &request(vec![addition("a.txt", b"a")]))
            .await
            .unwrap();
        assert_eq!(report.commit, number(2));
        assert_eq!(server.shelf.lock().unwrap().commits.len(), 2);
        assert_eq!(server.requests("/commit/").len(), 3);
    }
}

#[tokio::test]
async fn someone_elses_commit_is_never_overwritten() {
    // Before ours arrives: the Hub refuses.
    let server = Server::with(&[]).await;
    server.hook(|seen, shelf| {
        if seen.path.contains("/commit/") {
            shelf
                .commits
                .push([("b.txt".to_owned(), b"b".to_vec())].into());
        }
        None
    });
    let wanted = request(vec![addition("a.txt", b"a")]);
    let error = commit(&server, &wanted).await.unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    assert_eq!(server.requests("/commit/").len(), 1);
    // And when, besides, the answer is lost: the new head does not hold our files.
    server.hook(|seen, shelf| {
        seen.path.contains("/commit/").then(|| {
            shelf
                .commits
                .push([("b.txt".to_owned(), b"b".to_vec())].into());
            refuse(504, &[])
        })
    });
    let error = commit(&server, &wanted).await.unwrap_err();
    assert!(matches!(error, Error::Moved { .. }), "{error}");
    assert!(!server.shelf.lock().unwrap().head().contains_key("a.txt"));
}

#[tokio::test]
async fn a_hub_that_never_makes_the_commit_is_given_up() {
    let server = Server::with(&[]).await;
    server.hook(|seen, _| {
        seen.path
            .contains("/commit/")
            .then(|| refuse(500, &[("x-error-message", "disk full")]))
    });
    let error = commit(&server, &request(vec![addition("a.txt", b"a")]))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("commit to ann/model: refused (HTTP 500"),
        "{error}"
    );
    assert!(error.to_string().contains("disk full"), "{error}");
}

#[tokio::test]
async fn a_file_that_changed_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    for (path, announced) in [
        ("w.bin", bytes(1000)),
        ("a.txt", bytes(1000)),
        ("w.bin", bytes(999)),
    ] {
        let server = Server::with(&[]).await;
        let mut changed = file(dir.path(), path, &bytes(1000));
        changed.size_bytes = announced.len() as u64;
        changed.sha256 = Some(sha256(&announced));
        if let (Content::File(local), 1000) = (&changed.content, announced.len()) {
            std::fs::write(local, vec![1; 1000]).unwrap();
        }
        let error = commit(&server, &request(vec![changed])).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
        assert!(
            error.to_string().contains(path) && error.to_string().contains("announced"),
            "{error}"
        );
        assert_eq!(server.shelf.lock().unwrap().commits.len(), 1);
    }
}

#[tokio::test]
async fn what_cannot_be_committed_is_refused_before_it_is_sent() {
    let server = Server::with(&[]).await;
    let error = commit(
        &server,
        &request(vec![addition("big.txt", &bytes(10_000_001))]),
    )
    .await
    .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooLarge {
                size_bytes: 10_000_001,
                ..
            }
        ),
        "{error}"
    );
    let error = commit(&server, &request(vec![addition("ignored.txt", b"x")]))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Ignored { .. }), "{error}");
    for path in ["../x", "/x", ""] {
        let error = commit(&server, &request(vec![addition(path, b"x")]))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Id { .. }), "{error}");
    }
    let error = commit(
        &server,
        &request(vec![addition("a", b"x"), addition("a", b"y")]),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, Error::Id { .. }), "{error}");
    assert!(server.requests("/commit/").is_empty());
}

#[tokio::test]
async fn xet_is_asked_for_unless_it_is_switched_off() {
    for (xet, expected) in [
        (true, r#"["basic","multipart","xet"]"#),
        (false, r#"["basic","multipart"]"#),
    ] {
        let server = Server::with(&[]).await;
        let client = hub::Hub::new(hub::Settings {
            xet,
            ..server.settings()
        })
        .unwrap();
        client
            .commit(&repo(), &request(vec![addition("w.bin", b"w")]), &|_| ())
            .await
            .unwrap();
        let asked = String::from_utf8(server.requests("/batch")[0].body.to_vec()).unwrap();
        assert!(
            asked.contains(&format!("\"transfers\":{expected}")),
            "{asked}"
        );
        assert!(server.requests("xet-write-token").is_empty());
    }
}

#[tokio::test]
async fn a_hub_that_chooses_xet_is_asked_for_a_xet_token_and_never_sent_the_bytes_inline() {
    let server = Server::with(&[]).await;
    server.hook(|seen, _| {
        seen.path
            .ends_with("/batch")
            .then(|| Response::new(Body::from(r#"{"transfer":"xet","objects":[]}"#)))
    });
    let error = commit(&server, &request(vec![addition("w.bin", &bytes(1000))]))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("no repository ann/model"),
        "{error}"
    );
    assert_eq!(
        server
            .requests("/api/models/ann/model/xet-write-token/main")
            .len(),
        1
    );
    assert!(server.requests("/commit/").is_empty());
}

#[tokio::test]
async fn a_card_that_the_hub_refuses_tells_why() {
    let server = Server::with(&[]).await;
    server.hook(|_, _| {
        let body = r#"{"errors":[{"message":"\"license\" must be a string"}],"warnings":[]}"#;
        Some(
            Response::builder()
                .status(200)
                .body(Body::from(body))
                .unwrap(),
        )
    });
    let error = server
        .client()
        .validate_card("---\nlicense: 1\n---\n")
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the Hub does not accept the model card: \"license\" must be a string"
    );
}
