//! A registry of its own for each test, and the few calls that tests repeat.

use std::fmt::Write as _;

use base64::Engine as _;
use registry::{Options, Running};
use reqwest::header::HeaderMap;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A running registry over a fresh folder.
pub(crate) struct Hub {
    pub(crate) running: Running,
    pub(crate) client: Client,
    pub(crate) token: Option<String>,
    pub(crate) dir: TempDir,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// Status, error code and message in one line, as the snapshot of a refusal.
    pub(crate) fn refusal(&self) -> String {
        assert_eq!(
            self.json()["error"].as_str().unwrap_or_default(),
            self.header("x-error-message")
        );
        format!(
            "{} {} | {}",
            self.status.as_u16(),
            self.header("x-error-code"),
            self.header("x-error-message")
        )
    }
}

pub(crate) async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    assert!(
        headers.contains_key("x-request-id"),
        "every answer has an id"
    );
    Answer {
        status,
        headers,
        body: response.bytes().await.unwrap().to_vec(),
    }
}

impl Hub {
    pub(crate) fn new(options: Options) -> Hub {
        let dir = tempfile::tempdir().unwrap();
        let token = options.token.clone();
        Hub {
            running: registry::spawn(dir.path(), options).unwrap(),
            client: Client::new(),
            token,
            dir,
        }
    }

    /// A registry with the repository `me/model`.
    pub(crate) async fn with_repo(options: Options) -> Hub {
        let hub = Hub::new(options);
        let made = hub
            .post(
                "/api/repos/create",
                &json!({"name": "model", "organization": "me"}),
            )
            .await;
        assert_eq!(made.status, 200, "{}", made.text());
        hub
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.running.url())
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, self.url(path));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn anonymous(&self, path: &str) -> Answer {
        send(self.client.get(self.url(path))).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    /// Commits lines to `main` of `me/model`.
    pub(crate) async fn commit(&self, header: Value, lines: &[Value]) -> Answer {
        let mut body = json!({"key": "header", "value": header}).to_string();
        for line in lines {
            write!(body, "\n{line}").unwrap();
        }
        send(
            self.request(Method::POST, "/api/models/me/model/commit/main")
                .body(body),
        )
        .await
    }

    /// Commits one small file, and returns the commit.
    pub(crate) async fn commit_file(&self, path: &str, content: &[u8]) -> String {
        let answer = self
            .commit(
                json!({"summary": format!("add {path}")}),
                &[file(path, content)],
            )
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["commitOid"].as_str().unwrap().to_owned()
    }

    /// Asks how to upload an object.
    pub(crate) async fn batch(&self, content: &[u8], transfers: &[&str]) -> Value {
        let object = json!({"oid": sha256(content), "size": content.len()});
        let body = json!({"operation": "upload", "transfers": transfers, "objects": [object], "hash_algo": "sha256"});
        let answer = self
            .post("/me/model.git/info/lfs/objects/batch", &body)
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(
            answer.header("content-type"),
            "application/vnd.git-lfs+json"
        );
        answer.json()["objects"][0].clone()
    }

    /// Sends bytes to a signed address, as clients do: without a token.
    pub(crate) async fn put(&self, href: &Value, content: Vec<u8>) -> Answer {
        send(self.client.put(href.as_str().unwrap()).body(content)).await
    }

    /// Uploads an object in one piece.
    pub(crate) async fn upload(&self, content: &[u8]) {
        let object = self.batch(content, &["basic"]).await;
        let answer = self
            .put(&object["actions"]["upload"]["href"], content.to_vec())
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    pub(crate) async fn head_commit(&self) -> String {
        self.get("/api/models/me/model").await.json()["sha"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) async fn files(&self) -> Vec<String> {
        let info = self.get("/api/models/me/model").await.json();
        info["siblings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["rfilename"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Unfinished files that the server keeps at this moment.
    pub(crate) fn unfinished(&self) -> Vec<String> {
        let mut names = Vec::new();
        for session in std::fs::read_dir(self.dir.path().join("tmp")).unwrap() {
            let files = std::fs::read_dir(session.unwrap().path()).unwrap();
            names.extend(files.map(|file| file.unwrap().file_name().into_string().unwrap()));
        }
        names.retain(|name| name != "lock");
        names
    }

    /// How many blobs are stored.
    pub(crate) fn n_blobs(&self) -> usize {
        let folders = std::fs::read_dir(self.dir.path().join("blobs")).unwrap();
        folders
            .map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap().count())
            .sum()
    }
}

/// A commit line that adds a small file.
pub(crate) fn file(path: &str, content: &[u8]) -> Value {
    let content = base64::engine::general_purpose::STANDARD.encode(content);
    json!({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
}

/// A commit line that adds an uploaded object.
pub(crate) fn lfs_file(path: &str, content: &[u8]) -> Value {
    json!({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha256(content), "size": content.len()}})
}

pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Bytes that do not repeat, the same for the same seed.
pub(crate) fn noise(n_bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(n_bytes).collect()
}
