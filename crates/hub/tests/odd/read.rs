//! Reading from a Hub that misbehaves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use hub::{Error, RepoId};
use vindex::Source;

use crate::hub_server::{Server, TOKEN, cut, partial, refuse, sha256};

fn repo() -> RepoId {
    "ann/model".parse().unwrap()
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// The whole chain of an error, as a person would see it.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(source) = at {
        text = format!("{text}: {source}");
        at = source.source();
    }
    text
}

#[tokio::test]
async fn a_refusal_says_what_the_hub_said_and_what_to_do_and_is_not_repeated() {
    type Case = (u16, &'static [(&'static str, &'static str)], &'static str);
    let cases: [Case; 6] = [
        (
            401,
            &[
                ("x-error-message", "Invalid credentials"),
                ("x-request-id", "r-1"),
            ],
            "look up ann/model: not authorised (HTTP 401 from URL/api/models/ann/model: Invalid credentials [request r-1]); set HF_TOKEN to a valid token or run `hf auth login`",
        ),
        (
            403,
            &[("x-error-message", "read-only token")],
            "look up ann/model: forbidden (HTTP 403 from URL/api/models/ann/model: read-only token); use a token with the right to do this",
        ),
        (
            403,
            &[("x-error-code", "GatedRepo")],
            "ann/model is gated (HTTP 403 from URL/api/models/ann/model); accept its terms at URL/ann/model and use a token of that account",
        ),
        (
            401,
            &[("x-error-code", "RepoNotFound")],
            "no repository ann/model (HTTP 401 from URL/api/models/ann/model); check the name, and set HF_TOKEN if it is private",
        ),
        (
            404,
            &[("x-error-code", "RevisionNotFound")],
            "ann/model has no revision main (HTTP 404 from URL/api/models/ann/model)",
        ),
        (
            429,
            &[("ratelimit", "\"api\";r=0;t=55")],
            "look up ann/model: rate limited (HTTP 429 from URL/api/models/ann/model); try again in 55 s",
        ),
    ];
    for (status, headers, expected) in cases {
        let server = Server::with(&[]).await;
        server.hook(move |_, _| Some(refuse(status, headers)));
        let error = server.client().model_info(&repo(), None).await.unwrap_err();
        assert_eq!(text(&error).replace(&server.url, "URL"), expected);
        assert_eq!(server.requests("").len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_rate_limit_that_passes_is_waited_for() {
    let server = Server::with(&[]).await;
    let mut n = 0;
    server.hook(move |_, _| {
        n += 1;
        (n <= 2).then(|| refuse(429, &[("retry-after", "0")]))
    });
    server.client().model_info(&repo(), None).await.unwrap();
    assert_eq!(server.requests("").len(), 3);
}

#[tokio::test]
async fn a_hub_that_fails_for_ever_is_given_up() {
    for status in [429, 500, 503] {
        let server = Server::with(&[]).await;
        server.hook(move |_, _| Some(refuse(status, &[("x-error-message", "down")])));
        let error = server.client().model_info(&repo(), None).await.unwrap_err();
        assert_eq!(error.answer().unwrap().status, status);
        assert!(server.requests("").len() > 3);
    }
}

#[tokio::test]
async fn a_silent_or_absent_hub_is_given_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let settings = hub::Settings {
        endpoint,
        metadata_timeout: Duration::from_millis(50),
        give_up_after: Duration::from_millis(200),
        backoff_base: Duration::from_millis(1),
        ..hub::Settings::default()
    };
    let error = hub::Hub::new(settings.clone())
        .unwrap()
        .whoami()
        .await
        .unwrap_err();
    assert!(
        text(&error).contains("no answer within 0.1 s"),
        "{}",
        text(&error)
    );
    drop(listener);
    let error = hub::Hub::new(settings).unwrap().whoami().await.unwrap_err();
    assert!(
        matches!(error, Error::Http { n_attempts: 3, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn offline_nothing_is_asked() {
    let server = Server::with(&[]).await;
    let client = hub::Hub::new(hub::Settings {
        offline: true,
        ..server.settings()
    })
    .unwrap();
    let error = client.snapshot(&repo(), Some("v1")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "look up ann/model@v1: offline mode is on; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to ask the Hub"
    );
    assert!(server.requests("").is_empty());
}

#[tokio::test]
async fn a_listing_comes_in_pages() {
    let files: Vec<_> = (0..5).map(|i| (format!("d/{i}.bin"), bytes(i))).collect();
    let files: Vec<_> = files
        .iter()
        .map(|(p, b)| (p.as_str(), b.as_slice()))
        .collect();
    let server = Server::with(&files).await;
    server.shelf.lock().unwrap().page_len = Some(2);
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    let listed: Vec<_> = snapshot
        .files()
        .iter()
        .map(|f| (f.path.as_str(), f.size_bytes, f.sha256.clone()))
        .collect();
    let expected: Vec<_> = files
        .iter()
        .map(|(p, b)| (*p, b.len() as u64, Some(sha256(b))))
        .collect();
    assert_eq!(listed, expected);
    assert_eq!(server.requests("/tree/").len(), 3);
    assert_eq!(snapshot.commit().as_str(), format!("{:040x}", 1));
    assert!(matches!(
        snapshot.read_file("absent", 10).await,
        Err(Error::EntryNotFound { .. })
    ));
    assert!(matches!(
        snapshot.read_file("d/4.bin", 3).await,
        Err(Error::TooLarge { size_bytes: 4, .. })
    ));
}

#[tokio::test]
async fn a_renamed_repository_is_listed_whole() {
    let files: Vec<_> = (0..5).map(|i| (format!("{i}.txt"), bytes(i))).collect();
    let files: Vec<_> = files
        .iter()
        .map(|(p, b)| (p.as_str(), b.as_slice()))
        .collect();
    let server = Server::with(&files).await;
    server.shelf.lock().unwrap().page_len = Some(2);
    server.hook(|seen, shelf| {
        let path = seen.path.replace("/ann/old", "/ann/model");
        let query = &seen.query;
        (path != seen.path).then(|| {
            refuse(
                307,
                &[("location", &format!("{}{path}?{query}", shelf.url))],
            )
        })
    });
    let old = "ann/old".parse().unwrap();
    let snapshot = server.client().snapshot(&old, None).await.unwrap();
    assert_eq!(snapshot.files().len(), 5);
    assert_eq!(
        snapshot.read_file("4.txt", 10).await.unwrap(),
        bytes(4),
        "the token follows a redirect to the endpoint itself"
    );
    assert!(server.requests("").iter().all(|seen| seen.has_token));
}

#[tokio::test]
async fn an_answer_that_only_trickles_is_given_up() {
    let server = Server::with(&[]).await;
    server.hook(|_, _| {
        let drops = futures::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Some((Ok::<_, std::io::Error>(" "), ()))
        });
        Some(Response::new(Body::from_stream(drops)))
    });
    let error = server.client().model_info(&repo(), None).await.unwrap_err();
    assert!(
        text(&error).ends_with("no whole answer within 0.4 s"),
        "{}",
        text(&error)
    );
}

#[tokio::test]
async fn the_hub_is_asked_once_where_a_file_is_and_again_when_that_address_has_expired() {
    let content = bytes(5000);
    let server = Server::with(&[("w.bin", &content)]).await;
    server.shelf.lock().unwrap().through_cdn = true;
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    for at in [0, 700, 1400] {
        let range = at..at + 700;
        assert_eq!(
            snapshot.read_range("w.bin", range).await.unwrap(),
            content[at as usize..at as usize + 700]
        );
    }
    assert_eq!(server.requests("/resolve/").len(), 1);
    let mut has_expired = true;
    server.hook(move |seen, _| {
        let refused = seen.path.starts_with("/_cdn") && std::mem::take(&mut has_expired);
        refused.then(|| refuse(403, &[]))
    });
    assert_eq!(
        snapshot.read_range("w.bin", 2100..5000).await.unwrap(),
        content[2100..]
    );
    assert_eq!(server.requests("/resolve/").len(), 2);
}

#[tokio::test]
async fn every_read_names_the_commit_that_was_resolved() {
    let server = Server::with(&[("a.txt", b"old")]).await;
    let snapshot = server
        .client()
        .snapshot(&repo(), Some("main"))
        .await
        .unwrap();
    server
        .shelf
        .lock()
        .unwrap()
        .commits
        .push([("a.txt".to_owned(), b"new".to_vec())].into());
    assert_eq!(snapshot.read_file("a.txt", 100).await.unwrap(), "old");
    assert!(
        server
            .requests("/resolve/")
            .iter()
            .all(|s| s.path.contains(snapshot.commit().as_str()))
    );
}

#[tokio::test]
async fn a_path_that_leaves_the_directory_is_refused() {
    let server = Server::with(&[("../evil", b"x")]).await;
    let error = server.client().snapshot(&repo(), None).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"../evil\" is no path inside a repository"),
        "{error}"
    );
}

#[cfg(unix)]
#[tokio::test]
async fn a_name_that_another_system_would_not_take_hides_no_other_file() {
    let server = Server::with(&[("runs/12:30\\x", b"odd"), ("a.txt", b"a")]).await;
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    assert_eq!(snapshot.read_file("a.txt", 9).await.unwrap(), "a");
}

#[tokio::test]
async fn a_gated_repository_that_hides_its_commit_is_called_gated() {
    let server = Server::with(&[]).await;
    server.hook(|_, _| {
        let info = serde_json::json!({"id": "ann/model", "gated": "manual"});
        Some(Response::new(Body::from(info.to_string())))
    });
    let error = server.client().snapshot(&repo(), None).await.unwrap_err();
    assert_eq!(
        error.to_string().replace(&server.url, "URL"),
        "ann/model is gated (HTTP 200 from URL/api/models/ann/model: its commit is not told); accept its terms at \
         URL/ann/model and use a token of that account"
    );
}

#[tokio::test]
async fn the_token_stays_with_the_endpoint() {
    let content = bytes(5000);
    let server = Server::with(&[("w.bin", &content)]).await;
    server.shelf.lock().unwrap().through_cdn = true;
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    assert_eq!(
        snapshot.read_range("w.bin", 1000..2000).await.unwrap(),
        content[1000..2000]
    );
    let (at_store, at_hub): (Vec<_>, Vec<_>) = server
        .requests("")
        .into_iter()
        .partition(|s| s.path.starts_with("/_cdn"));
    assert!(
        at_store
            .iter()
            .all(|s| !s.has_token && s.host.starts_with("localhost"))
            && !at_store.is_empty()
    );
    assert!(at_hub.iter().all(|s| s.has_token));
}

#[tokio::test]
async fn no_error_shows_a_secret() {
    let server = Server::with(&[("w.bin", &bytes(100))]).await;
    server.shelf.lock().unwrap().through_cdn = true;
    server.hook(|seen, _| seen.path.starts_with("/_cdn").then(|| refuse(403, &[])));
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    let error = snapshot.read_range("w.bin", 0..10).await.unwrap_err();
    let shown = format!(
        "{} {error:?} {:?} {snapshot:?}",
        text(&error),
        server.settings()
    );
    assert!(
        shown.contains("403") && !shown.contains("s3cret") && !shown.contains(TOKEN),
        "{shown}"
    );
}

#[tokio::test]
async fn a_cut_body_goes_on_where_it_was_cut() {
    let content = bytes(300_000);
    let server = Server::with(&[("w.bin", &content)]).await;
    let whole = content.clone();
    let mut n = 0;
    server.hook(move |seen, _| {
        let (start, end) = seen.range?;
        n += 1;
        let half = start + (end + 1 - start) / 2;
        (n <= 3).then(|| {
            cut(
                partial(&whole, start, end),
                end + 1 - start,
                &whole[start..half],
            )
        })
    });
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    assert_eq!(
        snapshot.read_range("w.bin", 0..300_000).await.unwrap(),
        content
    );
    let starts: Vec<_> = server
        .requests("/resolve/")
        .iter()
        .map(|s| s.range.unwrap().0)
        .collect();
    assert_eq!(starts, [0, 150_000, 225_000, 262_500]);
}

#[tokio::test]
async fn a_server_without_ranges_is_read_all_the_same() {
    let content = bytes(9000);
    let server = Server::with(&[("w.bin", &content)]).await;
    let whole = content.clone();
    server.hook(move |seen, _| seen.range.map(|_| Response::new(Body::from(whole.clone()))));
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    assert_eq!(
        snapshot.read_range("w.bin", 3000..4000).await.unwrap(),
        content[3000..4000]
    );
}

#[tokio::test]
async fn bytes_that_were_not_asked_for_are_refused() {
    let content = bytes(1000);
    type Odd = fn(&[u8]) -> Response<Body>;
    let cases: [(Odd, &str); 5] = [
        (
            |b| partial(b, 0, 99),
            "asked for bytes 100-199 of 1000, got Content-Range \"bytes 0-99/1000\"",
        ),
        (
            |b| partial(&b[..999], 100, 199),
            "got Content-Range \"bytes 100-199/999\"",
        ),
        (
            |b| {
                let mut response = partial(b, 100, 199);
                *response.body_mut() = Body::from(b[100..300].to_vec());
                response
            },
            "200 bytes announced where 100 were expected",
        ),
        (
            |b| {
                let pieces = vec![
                    Ok::<_, std::io::Error>(b[100..200].to_vec()),
                    Ok(b[200..300].to_vec()),
                ];
                let mut response = partial(b, 100, 199);
                *response.body_mut() = Body::from_stream(futures::stream::iter(pieces));
                response
            },
            "more bytes than asked for",
        ),
        (
            |b| Response::new(Body::from(b[..500].to_vec())),
            "500 bytes announced where 1000 were expected",
        ),
    ];
    for (odd, expected) in cases {
        let server = Server::with(&[("w.bin", &content)]).await;
        let whole = content.clone();
        server.hook(move |seen, _| seen.range.map(|_| odd(&whole)));
        let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
        let error = snapshot.read_range("w.bin", 100..200).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error} / {expected}");
    }
}

#[tokio::test]
async fn a_download_arrives_whole() {
    let content = bytes(100_000);
    let server =
        Server::with(&[("w.bin", &content), ("empty.txt", b""), ("a.txt", b"small")]).await;
    let client = hub::Hub::new(hub::Settings {
        chunk_bytes: 7000,
        ..server.settings()
    })
    .unwrap();
    let snapshot = client.snapshot(&repo(), None).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (path, expected) in [
        ("w.bin", content.as_slice()),
        ("empty.txt", b""),
        ("a.txt", b"small"),
    ] {
        let target = dir.path().join(path);
        let n = AtomicU64::new(0);
        let count = |step| {
            if let hub::Download::Bytes(more) = step {
                n.fetch_add(more, Ordering::Relaxed);
            }
        };
        let done = snapshot.download(path, &target, &count).await.unwrap();
        assert_eq!(
            done,
            hub::Downloaded::Fetched {
                bytes: expected.len() as u64
            }
        );
        assert_eq!(n.load(Ordering::Relaxed), expected.len() as u64);
        assert_eq!(std::fs::read(&target).unwrap(), expected);
        assert_eq!(
            snapshot.download(path, &target, &|_| ()).await.unwrap(),
            hub::Downloaded::AlreadyThere
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[tokio::test]
async fn a_killed_download_fetches_only_what_is_missing() {
    let content = bytes(1_000_000);
    let server = Server::with(&[("w.bin", &content)]).await;
    let settings = hub::Settings {
        chunk_bytes: 50_000,
        n_parallel: 2,
        ..server.settings()
    };
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("w.bin");
    // The first process dies once ten ranges are on disk: nothing of it runs on.
    let snapshot = hub::Hub::new(settings.clone())
        .unwrap()
        .snapshot(&repo(), None)
        .await
        .unwrap();
    let (died, mut at_death) = tokio::sync::mpsc::unbounded_channel();
    let n = AtomicU64::new(0);
    let count = move |step| {
        if let hub::Download::Bytes(more) = step
            && n.fetch_add(more, Ordering::Relaxed) + more >= 500_000
        {
            let _ = died.send(());
        }
    };
    let download = snapshot.download("w.bin", &target, &count);
    tokio::select! {
        done = download => panic!("{done:?}"),
        _ = at_death.recv() => {}
    }
    assert!(!target.exists());
    let snapshot = hub::Hub::new(settings)
        .unwrap()
        .snapshot(&repo(), None)
        .await
        .unwrap();
    let done = snapshot.download("w.bin", &target, &|_| ()).await.unwrap();
    let hub::Downloaded::Fetched { bytes: fetched } = done else {
        panic!("{done:?}")
    };
    assert!(fetched <= 500_000, "{fetched}");
    // Both together asked for the file once, and again only for the two ranges in flight at the death.
    let seen = server.requests("/resolve/");
    let asked: usize = seen
        .iter()
        .map(|s| s.range.unwrap())
        .map(|(a, b)| b + 1 - a)
        .sum();
    assert!((1_000_000..=1_100_000).contains(&asked), "{asked}");
    assert_eq!(std::fs::read(&target).unwrap(), content);
}

#[tokio::test]
async fn bytes_with_another_hash_are_discarded() {
    let content = bytes(1000);
    let server = Server::with(&[("w.bin", &content)]).await;
    let mut lie = content.clone();
    lie[500] ^= 1;
    let (expected, got) = (sha256(&content), sha256(&lie));
    server.hook(move |seen, _| seen.range.map(|(a, b)| partial(&lie, a, b)));
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = snapshot
        .download("w.bin", &dir.path().join("w.bin"), &|_| ())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "ann/model: w.bin has the hash {got}, the Hub announced {expected}; the download was discarded, run it again"
        )
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn two_downloads_to_one_place_do_not_mix() {
    let server = Server::with(&[("w.bin", &bytes(1000))]).await;
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = std::fs::File::create(dir.path().join("w.bin.incomplete")).unwrap();
    other.lock().unwrap();
    let error = snapshot
        .download("w.bin", &dir.path().join("w.bin"), &|_| ())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_costs_one_request_when_it_is_read_as_a_source() {
    let content = bytes(400_000);
    let server = Server::with(&[("w.bin", &content)]).await;
    let snapshot = server.client().snapshot(&repo(), None).await.unwrap();
    let read = move |ranges: &'static [(u64, usize)]| {
        let snapshot = snapshot.clone();
        std::thread::spawn(move || {
            let read_one = |&(at, len): &(u64, usize)| {
                let mut buf = vec![0; len];
                snapshot.read_at("w.bin", at, &mut buf).unwrap();
                buf
            };
            ranges.iter().map(read_one).collect::<Vec<_>>()
        })
        .join()
        .unwrap()
    };
    let got = read(&[(0, 8), (8, 60_000)]);
    assert_eq!(got, [&content[..8], &content[8..60_008]]);
    assert_eq!(server.requests("/resolve/").len(), 1);
    let got = read(&[(0, 8), (8, 200_000), (300_000, 100_000)]);
    assert_eq!(
        got,
        [&content[..8], &content[8..200_008], &content[300_000..]]
    );
    let asked: Vec<_> = server.requests("/resolve/")[1..]
        .iter()
        .map(|s| s.range.unwrap())
        .collect();
    assert_eq!(
        asked,
        [(0, 131_071), (131_072, 200_007), (300_000, 399_999)]
    );
}
