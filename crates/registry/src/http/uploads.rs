//! LFS: objects are uploaded before the commit that names them, in one piece or in parts.
//!
//! Invariant: bytes become an object only when they are as many as announced and have the sha256 announced. The
//! addresses handed out are signed (`sign`), because clients send no token to them. Parts go straight to their place in
//! one file; abandoned uploads are forgotten at their deadline or when the process ends.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};

use super::query::Query;
use super::reply::Refusal;
use super::{App, Caller, body, repo_id};
use crate::names::{Kind, RepoId, is_sha256, random_hex};
use crate::{Error, blobs, clock};

const PARTS_MAX: u64 = 10_000;
const OBJECTS_MAX: usize = 1_000;
const UPLOADS_MAX: usize = 10_000;
/// How long upload addresses are good for, in seconds.
const HREF_LIFETIME_S: u64 = 24 * 3600;

/// The multipart uploads that are under way, by their id.
#[derive(Default)]
pub(crate) struct Uploads {
    open: Mutex<HashMap<String, Upload>>,
}

/// One object that comes in parts.
struct Upload {
    file: TempPath,
    part_bytes: u64,
    /// The tag of each part that is there whole.
    tags: Vec<Option<String>>,
    n_writers: usize,
    until: u64,
}

/// What an object is announced to be.
#[derive(Debug, Clone, Deserialize)]
struct Object {
    oid: String,
    size: u64,
}

/// What a signed address says about its object.
struct Ticket {
    object: Object,
    upload: String,
}

#[derive(Deserialize)]
struct Batch {
    operation: String,
    #[serde(default)]
    transfers: Vec<String>,
    objects: Vec<Object>,
    hash_algo: Option<String>,
}

fn lfs_repo(kind: Kind, owner: &str, name: &str) -> Result<RepoId, Refusal> {
    repo_id(
        kind.plural(),
        owner,
        name.strip_suffix(".git").unwrap_or(name),
    )
}

/// `POST /[datasets/|spaces/]{owner}/{name}.git/info/lfs/objects/batch`
pub(crate) async fn batch(
    State(app): State<Arc<App>>,
    caller: Caller,
    Extension(kind): Extension<Kind>,
    Path((owner, name)): Path<(String, String)>,
    body: Body,
) -> Result<Response, Refusal> {
    let id = lfs_repo(kind, &owner, &name)?;
    caller.must_own()?;
    let batch: Batch = body::json(body, app.options.idle_timeout).await?;
    if batch.operation != "upload" {
        return Err(Refusal::bad_request(
            "operation: must be upload; files are downloaded from /resolve/",
        ));
    }
    if batch
        .hash_algo
        .as_deref()
        .is_some_and(|algo| algo != "sha256")
    {
        return Err(Refusal::bad_request("hash_algo: must be sha256"));
    }
    if batch.objects.len() > OBJECTS_MAX {
        return Err(Refusal::bad_request(format!(
            "objects: at most {OBJECTS_MAX} at a time"
        )));
    }
    let answer = app
        .work(move |app| {
            app.writer(&caller, &id)?;
            let may_split = batch
                .transfers
                .iter()
                .any(|transfer| transfer == "multipart");
            let verify = format!(
                "{}/{}{}.git/info/lfs/verify",
                caller.base_url,
                id.kind.web_prefix(),
                id.full_name()
            );
            let mut objects = Vec::new();
            let mut split = false;
            for object in batch.objects {
                let answer = offer(app, &caller.base_url, &object, may_split, &verify)?;
                split |= answer["actions"]["upload"]["header"]
                    .get("chunk_size")
                    .is_some();
                objects.push(answer);
            }
            Ok(json!({"transfer": if split { "multipart" } else { "basic" }, "objects": objects}))
        })
        .await?;
    Ok((
        [(CONTENT_TYPE, "application/vnd.git-lfs+json")],
        answer.to_string(),
    )
        .into_response())
}

/// How one object of a batch is to be uploaded, if it has to be.
fn offer(
    app: &App,
    base_url: &str,
    object: &Object,
    may_split: bool,
    verify: &str,
) -> Result<Value, Refusal> {
    let Object { oid, size } = object;
    let error = |message: &str| json!({"oid": oid, "size": size, "error": {"code": 422, "message": message}});
    if !is_sha256(oid) {
        return Ok(error("the oid must be a sha256 of 64 small hex digits"));
    }
    match blobs::size(&app.registry.disk, oid)? {
        Some(stored) if stored == *size => return Ok(json!({"oid": oid, "size": size})),
        Some(_) => return Ok(error("the object is stored with another size")),
        None => {}
    }
    let until = clock::seconds() + HREF_LIFETIME_S;
    let object_url = format!("{base_url}/-/lfs/{oid}");
    let upload = if may_split && *size > app.options.multipart_threshold_bytes {
        let part_bytes = app.options.part_bytes.max(size.div_ceil(PARTS_MAX)).max(1);
        let n_parts = size.div_ceil(part_bytes);
        let upload = app.uploads.begin(app, *size, part_bytes, n_parts, until)?;
        let query = |role: &str| {
            let signature = app.signer.sign(&grant(role, object, &upload, until));
            format!("upload={upload}&size={size}&until={until}&sig={signature}")
        };
        let mut header = Map::new();
        header.insert("chunk_size".to_owned(), json!(part_bytes.to_string()));
        for part in 1..=n_parts {
            let query = query(&format!("part {part}"));
            header.insert(
                format!("{part:05}"),
                json!(format!("{object_url}/parts/{part}?{query}")),
            );
        }
        json!({"href": format!("{object_url}/complete?{}", query("complete")), "header": header})
    } else {
        let signature = app.signer.sign(&grant("whole", object, "", until));
        json!({"href": format!("{object_url}?size={size}&until={until}&sig={signature}")})
    };
    Ok(json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": verify}}}))
}

/// What a signature stands for.
fn grant(role: &str, object: &Object, upload: &str, until: u64) -> String {
    format!("{role}\n{}\n{}\n{upload}\n{until}", object.oid, object.size)
}

/// Checks the signature of an address.
fn ticket(app: &App, role: &str, oid: String, query: &Query) -> Result<Ticket, Refusal> {
    let refused = || {
        Refusal::new(
            StatusCode::FORBIDDEN,
            "this upload address is not valid, or no longer; ask for a new one",
        )
    };
    let number = |key| {
        query
            .get(key)
            .and_then(|text| text.parse::<u64>().ok())
            .ok_or_else(refused)
    };
    let object = Object {
        oid,
        size: number("size")?,
    };
    let (until, upload) = (
        number("until")?,
        query.get("upload").unwrap_or_default().to_owned(),
    );
    let signature = query.get("sig").unwrap_or_default();
    if is_sha256(&object.oid)
        && app
            .signer
            .allows(&grant(role, &object, &upload, until), signature, until)
    {
        return Ok(Ticket { object, upload });
    }
    Err(refused())
}

/// `PUT /-/lfs/{oid}`: an object in one piece.
pub(crate) async fn put_whole(
    State(app): State<Arc<App>>,
    Path(oid): Path<String>,
    query: Query,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let Ticket { object, .. } = ticket(&app, "whole", oid, &query)?;
    check_length(&headers, object.size)?;
    let spool = app
        .work(|app| Ok(blobs::Spool::new(&app.registry.disk)?))
        .await?;
    let spool = body::stream(
        body,
        app.options.idle_timeout,
        object.size,
        spool,
        blobs::Spool::write,
    )
    .await?;
    app.work(move |app| Ok(spool.store_as(&app.registry.disk, &object.oid, object.size)?))
        .await?;
    Ok(StatusCode::OK)
}

/// `PUT /-/lfs/{oid}/parts/{part}`: parts are counted from 1; the answer's `ETag` names what arrived.
pub(crate) async fn put_part(
    State(app): State<Arc<App>>,
    Path((oid, part)): Path<(String, u64)>,
    query: Query,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let ticket = ticket(&app, &format!("part {part}"), oid, &query)?;
    let writing = Writing::begin(app.clone(), ticket.upload, part, ticket.object.size)?;
    check_length(&headers, writing.len)?;
    let mut file = File::options()
        .write(true)
        .open(&writing.path)
        .map_err(Error::io("open", &writing.path))?;
    file.seek(SeekFrom::Start(writing.start))
        .map_err(Error::io("write", &writing.path))?;
    let state = (file, Sha256::new(), 0u64, writing);
    let step = |(file, hash, n, _): &mut (File, Sha256, u64, Writing), bytes: &[u8]| {
        hash.update(bytes);
        *n += bytes.len() as u64;
        file.write_all(bytes)
    };
    let max = state.3.len;
    let (_, hash, n, writing) =
        body::stream(body, app.options.idle_timeout, max, state, step).await?;
    if n != writing.len {
        let (expected, got) = (writing.len.to_string(), n.to_string());
        return Err(Error::Mismatch {
            what: "size",
            expected,
            got,
        }
        .into());
    }
    let tag = hex::encode(hash.finalize());
    writing.finish(&tag);
    Ok((StatusCode::OK, [(ETAG, format!("\"{tag}\""))]).into_response())
}

/// `POST /-/lfs/{oid}/complete`: the parts become the object.
pub(crate) async fn complete(
    State(app): State<Arc<App>>,
    Path(oid): Path<String>,
    query: Query,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Complete {
        oid: String,
        parts: Vec<Part>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Part {
        part_number: usize,
        etag: String,
    }
    let Ticket { object, upload } = ticket(&app, "complete", oid, &query)?;
    let said: Complete = body::json(body, app.options.idle_timeout).await?;
    if said.oid != object.oid {
        return Err(Refusal::bad_request("oid: is not that of this upload"));
    }
    app.work(move |app| {
        if blobs::size(&app.registry.disk, &object.oid)? == Some(object.size) {
            // Either the answer to an earlier completion was lost, or someone else was faster.
            app.uploads.forget(&upload);
            return Ok(Json(json!({"success": true})));
        }
        let tags: HashMap<usize, &str> = said
            .parts
            .iter()
            .map(|part| (part.part_number, part.etag.trim_matches('"')))
            .collect();
        let file = app.uploads.end(&upload, &tags)?;
        let temp = File::open(&file).map_err(Error::io("open", &file))?;
        blobs::store_file(
            &app.registry.disk,
            NamedTempFile::from_parts(temp, file),
            &object.oid,
            object.size,
        )?;
        Ok(Json(json!({"success": true})))
    })
    .await
}

/// `POST /[datasets/|spaces/]{owner}/{name}.git/info/lfs/verify`
pub(crate) async fn verify(
    State(app): State<Arc<App>>,
    caller: Caller,
    Extension(kind): Extension<Kind>,
    Path((owner, name)): Path<(String, String)>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let id = lfs_repo(kind, &owner, &name)?;
    caller.must_own()?;
    let object: Object = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        if is_sha256(&object.oid)
            && blobs::size(&app.registry.disk, &object.oid)? == Some(object.size)
        {
            return Ok(Json(json!({"success": true})));
        }
        Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "the object is not stored, or has another size",
        ))
    })
    .await
}

fn check_length(headers: &HeaderMap, expected: u64) -> Result<(), Refusal> {
    let got = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .filter(|got| *got != expected.to_string());
    match got {
        None => Ok(()),
        Some(got) => Err(Error::Mismatch {
            what: "size",
            expected: expected.to_string(),
            got: got.to_owned(),
        }
        .into()),
    }
}

impl Uploads {
    fn begin(
        &self,
        app: &App,
        size: u64,
        part_bytes: u64,
        n_parts: u64,
        until: u64,
    ) -> Result<String, Refusal> {
        let temp = app.registry.disk.temp()?;
        temp.as_file()
            .set_len(size)
            .map_err(Error::io("make room in", temp.path()))?;
        let tags = vec![None; usize::try_from(n_parts).unwrap_or(usize::MAX)];
        let upload = Upload {
            file: temp.into_temp_path(),
            part_bytes,
            tags,
            n_writers: 0,
            until,
        };
        let mut open = self.lock();
        let now = clock::seconds();
        open.retain(|_, upload| upload.until >= now);
        if open.len() >= UPLOADS_MAX {
            return Err(Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many uploads are under way; try again later",
            ));
        }
        let id = random_hex::<16>();
        open.insert(id.clone(), upload);
        Ok(id)
    }

    /// Takes an upload whose parts are all there, under the tags the client was given.
    fn end(&self, id: &str, tags: &HashMap<usize, &str>) -> Result<TempPath, Refusal> {
        let mut open = self.lock();
        let upload = open.get(id).ok_or_else(gone)?;
        if upload.n_writers > 0 {
            return Err(Refusal::new(
                StatusCode::CONFLICT,
                "a part of this upload is still being written",
            ));
        }
        for (at, tag) in upload.tags.iter().enumerate() {
            if tag
                .as_deref()
                .is_none_or(|tag| tags.get(&(at + 1)) != Some(&tag))
            {
                return Err(Refusal::bad_request(format!(
                    "part {} is missing or was changed; upload it again",
                    at + 1
                )));
            }
        }
        open.remove(id).map(|upload| upload.file).ok_or_else(gone)
    }

    fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Upload>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "this upload is over or was forgotten; ask for a new address",
    )
}

/// A part that is being written; until it is finished, the part counts as missing.
struct Writing {
    app: Arc<App>,
    upload: String,
    index: usize,
    path: std::path::PathBuf,
    start: u64,
    len: u64,
}

impl Writing {
    fn begin(app: Arc<App>, id: String, part: u64, size: u64) -> Result<Writing, Refusal> {
        let mut open = app.uploads.lock();
        let upload = open.get_mut(&id).ok_or_else(gone)?;
        // The part's number is signed, and so is one of those handed out.
        let start = part.saturating_sub(1).saturating_mul(upload.part_bytes);
        let index = usize::try_from(part.saturating_sub(1)).unwrap_or(usize::MAX);
        *upload.tags.get_mut(index).ok_or_else(gone)? = None;
        upload.n_writers += 1;
        let (path, len) = (
            upload.file.to_path_buf(),
            upload.part_bytes.min(size.saturating_sub(start)),
        );
        drop(open);
        Ok(Writing {
            app,
            upload: id,
            index,
            path,
            start,
            len,
        })
    }

    fn finish(self, tag: &str) {
        if let Some(upload) = self.app.uploads.lock().get_mut(&self.upload) {
            upload.tags[self.index] = Some(tag.to_owned());
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(upload) = self.app.uploads.lock().get_mut(&self.upload) {
            upload.n_writers -= 1;
        }
    }
}
