//! LFS uploads: in one piece, in parts, and all the ways in which they are refused.

use registry::Options;
use serde_json::{Value, json};

use crate::kit::{Hub, lfs_file, noise, send, sha256};

fn small_parts() -> Options {
    Options {
        multipart_threshold_bytes: 1000,
        part_bytes: 700,
        ..Options::default()
    }
}

#[tokio::test]
async fn preupload_decides_and_tells_what_is_there() {
    let hub = Hub::with_repo(Options::default()).await;
    hub.commit_file("t.txt", b"hello\n").await;
    let files = json!([
        {"path": "t.txt", "size": 6, "sample": "aGVsbG8K"},
        {"path": "m.safetensors", "size": 1, "sample": "eA=="},
        {"path": "x", "size": 3, "sample": "AAAA"},
        {"path": "big.json", "size": 10_485_761, "sample": "e30="},
    ]);
    let answer = hub
        .post(
            "/api/models/me/model/preupload/main",
            &json!({"files": files}),
        )
        .await
        .json();
    assert_eq!(
        answer["files"][0],
        json!({
            "path": "t.txt", "uploadMode": "regular", "shouldIgnore": false, "oid": "ce013625030ba8dba906f756967f9e9ca394464a"
        })
    );
    let modes: Vec<&Value> = answer["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| &file["uploadMode"])
        .collect();
    assert_eq!(modes, ["regular", "lfs", "lfs", "lfs"]);
    assert_eq!(answer["commitOid"], hub.head_commit().await.as_str());
}

#[tokio::test]
async fn one_piece() {
    let hub = Hub::with_repo(Options::default()).await;
    let content = noise(300_000, 3);
    let object = hub.batch(&content, &["basic", "multipart"]).await;
    let upload = &object["actions"]["upload"];
    assert!(upload.get("header").is_none());
    assert_eq!(hub.put(&upload["href"], content.clone()).await.status, 200);
    let said = json!({"oid": sha256(&content), "size": content.len()});
    assert_eq!(
        hub.post("/me/model.git/info/lfs/verify", &said)
            .await
            .status,
        200
    );
    assert!(
        hub.batch(&content, &["basic"])
            .await
            .get("actions")
            .is_none()
    );
    assert_eq!(
        hub.running.stats().sum("PUT /-/lfs/").received_bytes,
        300_000
    );
}

#[tokio::test]
async fn wrong_bytes_are_not_stored() {
    let hub = Hub::with_repo(Options::default()).await;
    let content = noise(50_000, 4);
    let href = hub.batch(&content, &["basic"]).await["actions"]["upload"]["href"].clone();
    let mut other = content.clone();
    other[25_000] ^= 1;
    let wrong = hub.put(&href, other.clone()).await;
    let (got, expected) = (sha256(&other), sha256(&content));
    assert_eq!(
        wrong.refusal(),
        format!("422  | uploaded sha256 is {got}, expected {expected}; nothing was stored")
    );
    let short = hub.put(&href, content[1..].to_vec()).await;
    assert_eq!(
        short.refusal(),
        "422  | uploaded size is 49999, expected 50000; nothing was stored"
    );
    let chunked = |bytes: Vec<u8>| {
        reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>(bytes)]))
    };
    let long = send(
        hub.client
            .put(href.as_str().unwrap())
            .body(chunked(noise(50_001, 4))),
    )
    .await;
    assert_eq!(
        long.refusal(),
        "413  | the upload is larger than 50000 bytes"
    );
    let short = send(
        hub.client
            .put(href.as_str().unwrap())
            .body(chunked(content[1..].to_vec())),
    )
    .await;
    assert_eq!(
        short.refusal(),
        "422  | uploaded size is 49999, expected 50000; nothing was stored"
    );
    assert_eq!((hub.n_blobs(), hub.unfinished().len()), (0, 0));
    let missing = hub
        .commit(json!({"summary": "x"}), &[lfs_file("m.bin", &content)])
        .await;
    assert_eq!(
        missing.refusal(),
        format!(
            "400  | LFS object {expected} of m.bin was not uploaded; upload it before committing"
        )
    );
    assert_eq!(hub.put(&href, content).await.status, 200);
}

#[tokio::test]
async fn in_parts() {
    let hub = Hub::with_repo(small_parts()).await;
    let content = noise(2000, 5);
    assert!(
        hub.batch(&content, &["basic"]).await["actions"]["upload"]
            .get("header")
            .is_none()
    );
    let upload = hub.batch(&content, &["basic", "multipart"]).await["actions"]["upload"].clone();
    let header = upload["header"].as_object().unwrap();
    assert_eq!(header["chunk_size"], "700");
    assert_eq!(
        header.keys().collect::<Vec<_>>(),
        ["chunk_size", "00001", "00002", "00003"]
    );
    let complete = async |parts: &[Value]| {
        let body = json!({"oid": sha256(&content), "parts": parts});
        send(
            hub.client
                .post(upload["href"].as_str().unwrap())
                .json(&body),
        )
        .await
    };
    let mut parts = Vec::new();
    for (at, chunk) in content.chunks(700).enumerate().rev() {
        let early = complete(&parts).await;
        assert!(
            early.refusal().starts_with("400  | part "),
            "{}",
            early.refusal()
        );
        let answer = hub
            .put(&header[&format!("{:05}", at + 1)], chunk.to_vec())
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        parts.push(json!({"partNumber": at + 1, "etag": answer.header("etag")}));
    }
    let short = hub.put(&header["00002"], noise(699, 1)).await;
    assert_eq!(
        short.refusal(),
        "422  | uploaded size is 699, expected 700; nothing was stored"
    );
    let spoilt = complete(&parts).await;
    assert_eq!(
        spoilt.refusal(),
        "400  | part 2 is missing or was changed; upload it again"
    );
    assert_eq!(
        hub.put(&header["00002"], content[700..1400].to_vec())
            .await
            .status,
        200
    );
    assert_eq!(complete(&parts).await.status, 200);
    assert_eq!(
        complete(&parts).await.status,
        200,
        "the answer to the first may have been lost"
    );
    assert!(hub.unfinished().is_empty());
    hub.commit(json!({"summary": "x"}), &[lfs_file("m.bin", &content)])
        .await;
    assert_eq!(hub.get("/me/model/resolve/main/m.bin").await.body, content);
}

#[tokio::test]
async fn a_changed_part_is_found() {
    let hub = Hub::with_repo(small_parts()).await;
    let content = noise(1400, 6);
    let upload = hub.batch(&content, &["multipart"]).await["actions"]["upload"].clone();
    let mut parts = Vec::new();
    for part in 1..=2 {
        let answer = hub
            .put(&upload["header"][format!("{part:05}")], noise(700, 99))
            .await;
        parts.push(json!({"partNumber": part, "etag": answer.header("etag")}));
    }
    let body = json!({"oid": sha256(&content), "parts": parts});
    let answer = send(
        hub.client
            .post(upload["href"].as_str().unwrap())
            .json(&body),
    )
    .await;
    assert!(
        answer.refusal().starts_with("422  | uploaded sha256 is "),
        "{}",
        answer.refusal()
    );
    assert_eq!((hub.n_blobs(), hub.unfinished().len()), (0, 0));
}

#[tokio::test]
async fn addresses_are_good_for_what_they_were_signed_for() {
    let hub = Hub::with_repo(small_parts()).await;
    let content = noise(2000, 7);
    let whole = hub.batch(&content, &["basic"]).await["actions"]["upload"]["href"]
        .as_str()
        .unwrap()
        .to_owned();
    let parts = hub.batch(&content, &["multipart"]).await["actions"]["upload"].clone();
    let part = parts["header"]["00001"].as_str().unwrap().to_owned();
    let (base, query) = whole.split_once('?').unwrap();
    let forged = [
        whole.replace("size=2000", "size=2001"),
        whole.replace("until=", "until=9"),
        whole.replace(&sha256(&content), &sha256(b"other")),
        whole[..whole.len() - 1].to_owned(),
        base.to_owned(),
        format!("{base}/parts/1?{query}"),
        part.replace("/parts/1?", "/parts/2?"),
        part.replace("upload=", "upload=0"),
        part.replace("/parts/1?", "?"),
    ];
    for href in forged {
        let answer = hub.put(&json!(href), content.clone()).await;
        assert_eq!(
            answer.refusal(),
            "403  | this upload address is not valid, or no longer; ask for a new one",
            "{href}"
        );
    }
    let Hub {
        running,
        dir,
        client,
        ..
    } = hub;
    running.stop();
    let running = registry::spawn(dir.path(), small_parts()).unwrap();
    let href = format!(
        "{}{}",
        running.url(),
        whole
            .split_once("/-/")
            .map(|(_, rest)| format!("/-/{rest}"))
            .unwrap()
    );
    assert_eq!(
        send(client.put(href).body(content)).await.status,
        403,
        "the key died with the process"
    );
}

#[tokio::test]
async fn an_upload_that_stops_is_given_up() {
    let hub = Hub::with_repo(Options {
        idle_timeout: std::time::Duration::from_millis(100),
        ..Options::default()
    })
    .await;
    let content = noise(1000, 8);
    let href = hub.batch(&content, &["basic"]).await["actions"]["upload"]["href"].clone();
    let first = futures::stream::iter([Ok::<_, std::io::Error>(content[..10].to_vec())]);
    let stalled = futures::StreamExt::chain(first, futures::stream::pending());
    let answer = send(
        hub.client
            .put(href.as_str().unwrap())
            .body(reqwest::Body::wrap_stream(stalled)),
    )
    .await;
    assert!(
        answer
            .refusal()
            .starts_with("408  | no byte of the body for "),
        "{}",
        answer.refusal()
    );
    assert_eq!((hub.n_blobs(), hub.unfinished().len()), (0, 0));
}
