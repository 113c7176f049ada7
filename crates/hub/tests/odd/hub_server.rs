//! A small Hub with one repository, `ann/model`, and a place to misbehave: a hook sees every request first
//! and may answer in its stead.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use sha1::Digest as _;

pub(crate) const TOKEN: &str = "hf_very_secret";

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) host: String,
    /// `bytes=a-b`, both included.
    pub(crate) range: Option<(usize, usize)>,
    pub(crate) has_token: bool,
    pub(crate) body: Bytes,
}

type Hook = Box<dyn FnMut(&Seen, &mut Shelf) -> Option<Response<Body>> + Send>;

/// What the Hub holds.
#[derive(Default)]
pub(crate) struct Shelf {
    /// Heads, oldest first; a commit is named by its number.
    pub(crate) commits: Vec<BTreeMap<String, Vec<u8>>>,
    pub(crate) lfs: HashMap<String, Vec<u8>>,
    pub(crate) parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Files go through another host name.
    pub(crate) through_cdn: bool,
    pub(crate) page_len: Option<usize>,
    pub(crate) chunk_bytes: Option<usize>,
    pub(crate) url: String,
}

#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    pub(crate) shelf: Arc<Mutex<Shelf>>,
    hook: Arc<Mutex<Hook>>,
}

impl Server {
    pub(crate) async fn with(files: &[(&str, &[u8])]) -> Server {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let head = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec()))
            .collect();
        let shelf = Shelf {
            commits: vec![head],
            url: url.clone(),
            ..Shelf::default()
        };
        let server = Server {
            url,
            seen: Arc::default(),
            shelf: Arc::new(Mutex::new(shelf)),
            hook: Arc::new(Mutex::new(Box::new(|_, _| None))),
        };
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        server
    }

    pub(crate) fn hook(
        &self,
        hook: impl FnMut(&Seen, &mut Shelf) -> Option<Response<Body>> + Send + 'static,
    ) {
        *self.hook.lock().unwrap() = Box::new(hook);
    }

    /// Settings of an impatient client of this server.
    pub(crate) fn settings(&self) -> hub::Settings {
        hub::Settings {
            endpoint: self.url.clone(),
            token: hub::Token::new(TOKEN),
            backoff_base: Duration::from_millis(2),
            give_up_after: Duration::from_millis(400),
            ..hub::Settings::default()
        }
    }

    pub(crate) fn client(&self) -> hub::Hub {
        hub::Hub::new(self.settings()).unwrap()
    }

    pub(crate) fn requests(&self, part_of_path: &str) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|s| s.path.contains(part_of_path))
            .cloned()
            .collect()
    }
}

async fn answer(State(server): State<Server>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let text = |name: header::HeaderName| {
        head.headers
            .get(name)
            .map(|v| v.to_str().unwrap().to_owned())
    };
    let range = text(header::RANGE).map(|range| {
        let (start, end) = range
            .strip_prefix("bytes=")
            .unwrap()
            .split_once('-')
            .unwrap();
        (start.parse().unwrap(), end.parse().unwrap())
    });
    // A body that breaks off is what a client sends that found out that its file changed.
    let Ok(body) = to_bytes(body, usize::MAX).await else {
        return refuse(400, &[]);
    };
    let seen = Seen {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        host: text(header::HOST).unwrap_or_default(),
        range,
        has_token: text(header::AUTHORIZATION).is_some_and(|v| v == format!("Bearer {TOKEN}")),
        body,
    };
    server.seen.lock().unwrap().push(seen.clone());
    let mut shelf = server.shelf.lock().unwrap();
    let odd = (server.hook.lock().unwrap())(&seen, &mut shelf);
    odd.unwrap_or_else(|| shelf.route(&seen))
}

pub(crate) fn refuse(status: u16, headers: &[(&str, &str)]) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Body::from("{}")).unwrap()
}

/// Announces `length` bytes, sends `bytes`, then drops the connection.
pub(crate) fn cut(mut response: Response<Body>, length: usize, bytes: &[u8]) -> Response<Body> {
    let sent = futures::stream::iter([Ok(Bytes::copy_from_slice(bytes))]);
    // The server needs a moment to flush what it has before the connection goes.
    let then = futures::stream::once(async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(std::io::Error::other("cut"))
    });
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, length.into());
    *response.body_mut() = Body::from_stream(futures::StreamExt::chain(sent, then));
    response
}

pub(crate) fn partial(bytes: &[u8], start: usize, end: usize) -> Response<Body> {
    Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(
            header::CONTENT_RANGE,
            format!("bytes {start}-{end}/{}", bytes.len()),
        )
        .body(Body::from(bytes[start..=end].to_vec()))
        .unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn git_oid(bytes: &[u8]) -> String {
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    sha1::Sha1::digest(blob)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn sha(n: usize) -> String {
    format!("{n:040x}")
}

fn ok(value: Value) -> Response<Body> {
    Response::builder()
        .header("content-type", "application/json")
        .body(Body::from(value.to_string()))
        .unwrap()
}

fn is_large(path: &str) -> bool {
    path.ends_with(".bin")
}

impl Shelf {
    pub(crate) fn head(&self) -> &BTreeMap<String, Vec<u8>> {
        self.commits.last().unwrap()
    }

    pub(crate) fn head_sha(&self) -> String {
        sha(self.commits.len())
    }

    fn route(&mut self, seen: &Seen) -> Response<Body> {
        let parts: Vec<_> = seen.path.split('/').skip(1).collect();
        match (seen.method.as_str(), parts.as_slice()) {
            (
                "GET",
                ["api", "models", "ann", "model"]
                | ["api", "models", "ann", "model", "revision", _],
            ) => ok(
                json!({"id": "ann/model", "sha": self.head_sha(), "gated": false, "tags": ["x"],
                    "cardData": {"license": "mit"}, "siblings": []}),
            ),
            ("GET", ["api", "models", "ann", "model", "tree", at]) => self.tree(seen, at),
            ("GET", ["ann", "model", "resolve", at, path @ ..]) => {
                let path = path.join("/");
                let Some(bytes) = self.at(at).get(&path) else {
                    return refuse(404, &[("x-error-code", "EntryNotFound")]);
                };
                if self.through_cdn {
                    let url = self.url.replace("127.0.0.1", "localhost");
                    return Response::builder()
                        .status(302)
                        .header("x-repo-commit", *at)
                        .header(
                            "location",
                            format!("{url}/_cdn/{at}/{path}?X-Signature=s3cret"),
                        )
                        .body(Body::empty())
                        .unwrap();
                }
                serve(bytes, seen.range)
            }
            ("GET", ["_cdn", at, path @ ..]) => serve(&self.at(at)[&path.join("/")], seen.range),
            ("POST", ["api", "models", "ann", "model", "preupload", "main"]) => {
                let body: Value = serde_json::from_slice(&seen.body).unwrap();
                let files = body["files"].as_array().unwrap().iter().map(|file| {
                    let path = file["path"].as_str().unwrap();
                    let mode = if is_large(path) { "lfs" } else { "regular" };
                    json!({"path": path, "uploadMode": mode, "shouldIgnore": path == "ignored.txt"})
                });
                ok(json!({"files": files.collect::<Vec<_>>()}))
            }
            ("POST", ["ann", "model.git", "info", "lfs", "objects", "batch"]) => self.batch(seen),
            ("PUT", ["_lfs", oid]) => {
                if sha256(&seen.body) != *oid {
                    return refuse(400, &[("x-error-message", "oid mismatch")]);
                }
                self.lfs.insert((*oid).to_owned(), seen.body.to_vec());
                ok(json!({}))
            }
            ("PUT", ["_part", oid, number]) => {
                self.parts.insert(
                    ((*oid).to_owned(), number.parse().unwrap()),
                    seen.body.to_vec(),
                );
                Response::builder()
                    .header("etag", format!("\"e{number}\""))
                    .body(Body::empty())
                    .unwrap()
            }
            ("POST", ["_complete", oid]) => {
                let bytes = self
                    .parts
                    .iter()
                    .filter(|((o, _), _)| o == oid)
                    .flat_map(|(_, b)| b.clone())
                    .collect();
                self.lfs.insert((*oid).to_owned(), bytes);
                ok(json!({}))
            }
            ("POST", ["_verify", oid]) => refuse(
                if self.lfs.contains_key(*oid) {
                    200
                } else {
                    404
                },
                &[],
            ),
            ("POST", ["api", "models", "ann", "model", "commit", "main"]) => self.commit(seen),
            _ => refuse(404, &[]),
        }
    }

    fn at(&self, sha: &str) -> &BTreeMap<String, Vec<u8>> {
        &self.commits[usize::from_str_radix(sha, 16).unwrap() - 1]
    }

    fn tree(&self, seen: &Seen, at: &str) -> Response<Body> {
        let files = self.at(at);
        let page_len = self.page_len.unwrap_or(usize::MAX);
        let start: usize = seen
            .query
            .split('&')
            .find_map(|q| q.strip_prefix("cursor="))
            .map_or(0, |n| n.parse().unwrap());
        let entries = files.iter().skip(start).take(page_len).map(|(path, bytes)| {
            let mut entry = json!({"type": "file", "path": path, "size": bytes.len(), "oid": git_oid(bytes)});
            if is_large(path) {
                entry["lfs"] = json!({"oid": sha256(bytes), "size": bytes.len(), "pointerSize": 134});
            }
            entry
        });
        let mut response = ok(Value::Array(entries.collect()));
        let next = start.saturating_add(page_len);
        if next < files.len() {
            let link = format!(
                "<{}{}?recursive=true&cursor={next}>; rel=\"next\"",
                self.url, seen.path
            );
            response.headers_mut().insert("link", link.parse().unwrap());
        }
        response
    }

    fn batch(&self, seen: &Seen) -> Response<Body> {
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        let objects = body["objects"].as_array().unwrap().iter().map(|object| {
            let (oid, size) = (
                object["oid"].as_str().unwrap(),
                object["size"].as_u64().unwrap() as usize,
            );
            let mut answer = json!({"oid": oid, "size": size});
            if self.lfs.contains_key(oid) {
                return answer;
            }
            let url = &self.url;
            let upload = match self.chunk_bytes {
                None => json!({"href": format!("{url}/_lfs/{oid}")}),
                Some(chunk_bytes) => {
                    let mut header = json!({"chunk_size": chunk_bytes.to_string()});
                    for number in 1..=size.div_ceil(chunk_bytes) {
                        header[format!("{number:05}")] =
                            format!("{url}/_part/{oid}/{number}").into();
                    }
                    json!({"href": format!("{url}/_complete/{oid}"), "header": header})
                }
            };
            answer["actions"] =
                json!({"upload": upload, "verify": {"href": format!("{url}/_verify/{oid}")}});
            answer
        });
        ok(json!({"transfer": "basic", "objects": objects.collect::<Vec<_>>()}))
    }

    pub(crate) fn commit(&mut self, seen: &Seen) -> Response<Body> {
        let mut files = self.head().clone();
        for line in seen
            .body
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
        {
            let line: Value = serde_json::from_slice(line).unwrap();
            let value = &line["value"];
            let path = value["path"].as_str().unwrap_or_default().to_owned();
            match line["key"].as_str().unwrap() {
                "header" => {
                    if value["parentCommit"] != self.head_sha() {
                        return refuse(412, &[("x-error-message", "a commit has happened since")]);
                    }
                }
                "file" => drop(files.insert(
                    path,
                    BASE64.decode(value["content"].as_str().unwrap()).unwrap(),
                )),
                "lfsFile" => {
                    drop(files.insert(path, self.lfs[value["oid"].as_str().unwrap()].clone()))
                }
                "deletedFile" => drop(files.remove(&path)),
                other => panic!("{other}"),
            }
        }
        self.commits.push(files);
        ok(json!({"success": true, "commitOid": self.head_sha(), "commitUrl": "x"}))
    }
}

fn serve(bytes: &[u8], range: Option<(usize, usize)>) -> Response<Body> {
    match range {
        Some((start, end)) => partial(bytes, start, end),
        None => Response::new(Body::from(bytes.to_vec())),
    }
}
