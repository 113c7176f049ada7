//! Kills a server at arbitrary moments of uploads and commits, and looks at what it left.
//!
//! The test runs itself as the server (`serve DIR`), so that the kill hits a real process. After each round the folder is
//! read as files: every object is named by its hash, every ref leads to a commit, a tree and blobs that are there, and
//! every acknowledged commit is still in the history of `main`.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use registry::Options;
use reqwest::Client;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const ROUNDS: u64 = 40;

fn main() {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("serve") {
        return serve(Path::new(&args.next().expect("serve DIR")));
    }
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let mut n_cut = 0;
    for round in 0..ROUNDS {
        let mut server = Server::start(dir.path());
        assert_eq!(
            unfinished(dir.path()),
            0,
            "round {round}: opening cleans up"
        );
        if round == 0 {
            runtime
                .block_on(post(
                    &server.url,
                    "/api/repos/create",
                    json!({"name": "me/model"}).to_string(),
                ))
                .unwrap();
        }
        let before = acknowledged.lock().unwrap().len();
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (url, acknowledged) = (server.url.clone(), acknowledged.clone());
                runtime
                    .spawn(async move { write_until_cut(&url, round, writer, &acknowledged).await })
            })
            .collect();
        // Another moment each round; late enough in most that something was acknowledged.
        std::thread::sleep(Duration::from_millis(20 + round * 7919 % 150));
        server.kill();
        runtime.block_on(async {
            for writer in writers {
                writer.await.unwrap();
            }
        });
        n_cut += unfinished(dir.path());
        assert!(before <= acknowledged.lock().unwrap().len());
        check(dir.path(), &acknowledged.lock().unwrap());
    }
    let acknowledged = acknowledged.lock().unwrap().len();
    assert!(acknowledged > 0, "no commit was ever acknowledged");
    drop(Server::start(dir.path()));
    println!(
        "{ROUNDS} kills, {acknowledged} acknowledged commits, {n_cut} unfinished files left and cleaned: all consistent"
    );
}

fn serve(dir: &Path) {
    let options = Options {
        multipart_threshold_bytes: 100_000,
        part_bytes: 60_000,
        ..Options::default()
    };
    let running = registry::spawn(dir, options).unwrap();
    println!("{}", running.url());
    loop {
        std::thread::park();
    }
}

struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(dir: &Path) -> Server {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command
            .arg("serve")
            .arg(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut url)
            .unwrap();
        Server {
            child,
            url: url.trim().to_owned(),
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn post(url: &str, path: &str, body: String) -> Result<Value, reqwest::Error> {
    Client::new()
        .post(format!("{url}{path}"))
        .body(body)
        .send()
        .await?
        .error_for_status()?
        .json()
        .await
}

/// Uploads and commits until the server is gone; notes which commits were acknowledged.
async fn write_until_cut(url: &str, round: u64, writer: u64, acknowledged: &Mutex<Vec<String>>) {
    for n in 0.. {
        match write_once(url, round, writer, n).await {
            Ok(commit) => acknowledged.lock().unwrap().push(commit),
            Err(e) => {
                assert!(e.status().is_none(), "the server refused: {e}");
                return;
            }
        }
    }
}

async fn write_once(url: &str, round: u64, writer: u64, n: u64) -> Result<String, reqwest::Error> {
    let path = format!("{writer}/{round}-{n}");
    let header = json!({"key": "header", "value": {"summary": path}});
    // Writer 0 sends small files, 1 objects in one piece, 2 objects in parts.
    let size = [200, 90_000, 300_000][writer as usize];
    let content = format!("{path} ")
        .repeat(size / (path.len() + 1))
        .into_bytes();
    if writer == 0 {
        let file = json!({"key": "file", "value": {"path": path, "content": String::from_utf8_lossy(&content), "encoding": "utf-8"}});
        return commit(url, format!("{header}\n{file}\n")).await;
    }
    let oid = hex::encode(Sha256::digest(&content));
    let object = json!({"oid": oid, "size": content.len()});
    let body =
        json!({"operation": "upload", "transfers": ["basic", "multipart"], "objects": [object]});
    let batch = post(
        url,
        "/me/model.git/info/lfs/objects/batch",
        body.to_string(),
    )
    .await?;
    let upload = &batch["objects"][0]["actions"]["upload"];
    let href = upload["href"].as_str().unwrap();
    if writer == 1 {
        Client::new()
            .put(href)
            .body(content.clone())
            .send()
            .await?
            .error_for_status()?;
    } else {
        let mut parts = Vec::new();
        for (at, chunk) in content.chunks(60_000).enumerate() {
            let href = upload["header"][format!("{:05}", at + 1)].as_str().unwrap();
            let answer = Client::new()
                .put(href)
                .body(chunk.to_vec())
                .send()
                .await?
                .error_for_status()?;
            parts.push(
                json!({"partNumber": at + 1, "etag": answer.headers()["etag"].to_str().unwrap()}),
            );
        }
        let body = json!({"oid": oid, "parts": parts});
        Client::new()
            .post(href)
            .body(body.to_string())
            .send()
            .await?
            .error_for_status()?;
    }
    let file = json!({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": content.len()}});
    commit(url, format!("{header}\n{file}\n")).await
}

async fn commit(url: &str, body: String) -> Result<String, reqwest::Error> {
    let answer = post(url, "/api/models/me/model/commit/main", body).await?;
    Ok(answer["commitOid"].as_str().unwrap().to_owned())
}

/// Files in the sessions of dead processes.
fn unfinished(root: &Path) -> usize {
    let sessions = fs::read_dir(root.join("tmp")).unwrap();
    sessions
        .map(|session| fs::read_dir(session.unwrap().path()).unwrap().count() - 1)
        .sum()
}

/// Reads the whole folder as plain files.
fn check(root: &Path, acknowledged: &[String]) {
    let repo = root.join("repos/models/me/model");
    for folder in ["commits", "trees"] {
        for (name, bytes) in files(&repo.join(folder)) {
            assert_eq!(name, hex::encode(Sha1::digest(&bytes)), "{folder}/{name}");
        }
    }
    let mut blobs = HashSet::new();
    for folder in fs::read_dir(root.join("blobs")).unwrap() {
        let folder = folder.unwrap().path();
        for (name, bytes) in files(&folder) {
            let id = format!("{}{name}", folder.file_name().unwrap().to_str().unwrap());
            assert_eq!(id, hex::encode(Sha256::digest(&bytes)));
            blobs.insert(id);
        }
    }
    let head = fs::read_to_string(repo.join("refs/heads/main")).unwrap();
    let mut next = Some(head.trim_end().to_owned());
    let mut history = HashSet::new();
    while let Some(id) = next {
        let commit: Value =
            serde_json::from_slice(&fs::read(repo.join("commits").join(&id)).unwrap()).unwrap();
        let tree = fs::read(repo.join("trees").join(commit["tree"].as_str().unwrap())).unwrap();
        let tree: Value = serde_json::from_slice(&tree).unwrap();
        for (path, entry) in tree.as_object().unwrap() {
            assert!(
                blobs.contains(entry["sha256"].as_str().unwrap()),
                "{path} of {id} has no blob"
            );
        }
        history.insert(id);
        next = commit["parent"].as_str().map(str::to_owned);
    }
    for commit in acknowledged {
        assert!(
            history.contains(commit),
            "{commit} was acknowledged and is lost"
        );
    }
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (
            entry.file_name().into_string().unwrap(),
            fs::read(entry.path()).unwrap(),
        )
    };
    fs::read_dir(folder).unwrap().map(read).collect()
}
