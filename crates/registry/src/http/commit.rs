//! Commits: which way a file shall be sent, and the commit itself.
//!
//! Invariant: a commit is applied whole, after its last line was read, or not at all; at most one of its files is in
//! memory at a time. A commit that changes nothing is made, as on the Hub: clients ask `preupload` to avoid it.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::{self, Chunks};
use super::query::Query;
use super::reply::Refusal;
use super::{App, Caller, repo_id};
use crate::history::{Change, Entry};
use crate::names::{RepoId, check_path, is_sha256};
use crate::repos::{self, Draft, RefKind};
use crate::{Error, blobs};

/// Larger files are LFS objects, as on the Hub.
const REGULAR_BYTES_MAX: u64 = 10 << 20;
const PREUPLOAD_FILES_MAX: usize = 256;
/// All lines of a commit together, in bytes.
const COMMIT_BYTES_MAX: u64 = 4 << 30;
const CHANGES_MAX: usize = 100_000;
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// What the Hub's default `.gitattributes` names, and `gguf`.
const LFS_EXTENSIONS: [&str; 36] = [
    "7z",
    "arrow",
    "avro",
    "bin",
    "bz2",
    "ckpt",
    "ftz",
    "gguf",
    "gz",
    "h5",
    "joblib",
    "lz4",
    "mds",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
    "zstd",
];

type RevisionPath = Path<(String, String, String, String)>;

/// `POST /api/{kind}/{owner}/{name}/preupload/{rev}`
pub(crate) async fn preupload(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    query: Query,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Asked {
        files: Vec<File>,
    }
    #[derive(Deserialize)]
    struct File {
        path: String,
        size: u64,
        #[serde(default)]
        sample: String,
    }
    let id = repo_id(&kind, &owner, &name)?;
    caller.must_own()?;
    refuse_pull_request(&query)?;
    let asked: Asked = body::json(body, app.options.idle_timeout).await?;
    if asked.files.len() > PREUPLOAD_FILES_MAX {
        return Err(Refusal::bad_request(format!(
            "files: at most {PREUPLOAD_FILES_MAX} at a time"
        )));
    }
    app.work(move |app| {
        let repo = app.writer(&caller, &id)?;
        let sha = repo.resolve(&revision)?;
        let tree = repo.tree(&repo.commit(&sha)?)?;
        let mut files = Vec::new();
        for file in asked.files {
            check_path(&file.path)?;
            let sample = STANDARD.decode(&file.sample).map_err(|e| {
                Refusal::bad_request(format!("sample of {}: not base64: {e}", file.path))
            })?;
            let is_lfs =
                is_lfs(&file.path, file.size, &sample) || file.size > app.options.inline_bytes_max;
            let mut answer = json!({
                "path": file.path,
                "uploadMode": if is_lfs { "lfs" } else { "regular" },
                "shouldIgnore": false,
            });
            if let Some(entry) = tree.get(&file.path) {
                answer["oid"] = json!(entry.etag());
            }
            files.push(answer);
        }
        Ok(Json(json!({"files": files, "commitOid": sha})))
    })
    .await
}

fn is_lfs(path: &str, size: u64, sample: &[u8]) -> bool {
    let extension = path
        .rsplit('/')
        .next()
        .and_then(|name| name.rsplit_once('.'))
        .map(|(_, extension)| extension);
    let known = extension
        .is_some_and(|extension| LFS_EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str()));
    size > 0 && (known || size > REGULAR_BYTES_MAX || is_binary(sample))
}

/// Text is UTF-8 without NUL; the sample may end in the middle of a character.
fn is_binary(sample: &[u8]) -> bool {
    let valid = match std::str::from_utf8(sample) {
        Ok(_) => true,
        Err(e) => e.error_len().is_none(),
    };
    !valid || sample.contains(&0)
}

/// One line of a commit.
#[derive(Deserialize)]
#[serde(
    tag = "key",
    content = "value",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
enum Line {
    Header {
        summary: String,
        description: Option<String>,
        parent_commit: Option<String>,
    },
    File {
        path: String,
        content: String,
        encoding: Option<String>,
    },
    LfsFile {
        path: String,
        algo: Option<String>,
        oid: String,
        size: Option<u64>,
    },
    DeletedFile {
        path: String,
    },
    DeletedFolder {
        path: String,
    },
}

/// What the lines said so far.
#[derive(Default)]
struct Said {
    header: Option<(String, String, Option<String>)>,
    changes: Vec<Change>,
}

/// `POST /api/{kind}/{owner}/{name}/commit/{branch}`, a JSON object a line.
pub(crate) async fn commit(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    query: Query,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    refuse_pull_request(&query)?;
    let branch = revision
        .strip_prefix("refs/heads/")
        .unwrap_or(&revision)
        .to_owned();
    {
        let (caller, id, branch) = (caller.clone(), id.clone(), branch.clone());
        app.work(move |app| has_branch(app, &caller, &id, &branch))
            .await?;
    }
    let said = read(&app, body).await?;
    app.work(move |app| {
        let (title, message, parent) = said
            .header
            .ok_or_else(|| Refusal::bad_request("the commit has no header line; send it first"))?;
        let author = app.options.user.clone();
        let draft = Draft {
            branch,
            title,
            message,
            author,
            parent,
            changes: said.changes,
        };
        let commit = repos::commit(&app.registry.disk, &id, draft)?;
        let url = format!(
            "{}/{}{}/commit/{commit}",
            caller.base_url,
            id.kind.web_prefix(),
            id.full_name()
        );
        Ok(Json(
            json!({"success": true, "commitOid": commit, "commitUrl": url, "hookOutput": ""}),
        ))
    })
    .await
}

fn has_branch(app: &App, caller: &Caller, id: &RepoId, branch: &str) -> Result<(), Refusal> {
    let repo = app.writer(caller, id)?;
    let found = repo
        .references(RefKind::Branch)?
        .iter()
        .any(|(name, _)| name == branch);
    if found {
        Ok(())
    } else {
        Err(repo.no_revision(branch).into())
    }
}

fn refuse_pull_request(query: &Query) -> Result<(), Refusal> {
    if query.is_set("create_pr") {
        return Err(Refusal::bad_request(
            "this registry has no pull requests; commit to a branch",
        ));
    }
    Ok(())
}

/// Reads a commit line by line; the content of files goes to the disk at once.
async fn read(app: &Arc<App>, body: Body) -> Result<Said, Refusal> {
    let inline_max = app.options.inline_bytes_max;
    // Base64 takes 4 bytes for 3; the rest is the path and the JSON around.
    let line_max = usize::try_from(inline_max / 3 * 4)
        .unwrap_or(usize::MAX)
        .saturating_add(64 << 10);
    let mut chunks = Chunks::new(
        body,
        app.options.idle_timeout,
        COMMIT_BYTES_MAX,
        "the commit",
    );
    let mut said = Said::default();
    let mut line = Vec::new();
    while let Some(chunk) = chunks.next().await? {
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            if line.len() + piece.len() > line_max {
                let message = "a file in the commit (send it as an LFS object)";
                return Err(Refusal::too_large(message, inline_max));
            }
            line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                said = take(app, said, std::mem::take(&mut line)).await?;
            }
        }
    }
    take(app, said, line).await
}

async fn take(app: &Arc<App>, mut said: Said, line: Vec<u8>) -> Result<Said, Refusal> {
    if line.trim_ascii().is_empty() {
        return Ok(said);
    }
    app.work(move |app| {
        let line: Line = serde_json::from_slice(&line).map_err(|e| {
            Refusal::bad_request(format!(
                "line {} of the commit: {e}",
                said.changes.len() + 1 + usize::from(said.header.is_some())
            ))
        })?;
        match line {
            Line::Header {
                summary,
                description,
                parent_commit,
            } => {
                let description = description.unwrap_or_default();
                if summary.trim().is_empty()
                    || summary.len() + description.len() > MESSAGE_BYTES_MAX
                {
                    return Err(Refusal::bad_request(format!(
                        "summary: must be 1 to {MESSAGE_BYTES_MAX} bytes"
                    )));
                }
                said.header = Some((summary, description, parent_commit));
            }
            line => said.changes.push(change(app, line)?),
        }
        if said.changes.len() > CHANGES_MAX {
            return Err(Refusal::bad_request(format!(
                "a commit changes at most {CHANGES_MAX} files"
            )));
        }
        Ok(said)
    })
    .await
}

fn change(app: &App, line: Line) -> Result<Change, Refusal> {
    let disk = &app.registry.disk;
    Ok(match line {
        Line::File {
            path,
            content,
            encoding,
        } => {
            check_path(&path)?;
            let content = match encoding.as_deref() {
                Some("base64") => STANDARD.decode(&content).map_err(|e| {
                    Refusal::bad_request(format!("content of {path}: not base64: {e}"))
                })?,
                None | Some("utf-8") => content.into_bytes(),
                Some(_) => {
                    return Err(Refusal::bad_request(format!(
                        "encoding of {path}: must be base64 or utf-8"
                    )));
                }
            };
            if content.len() as u64 > app.options.inline_bytes_max {
                return Err(Refusal::too_large(&path, app.options.inline_bytes_max));
            }
            Change::Put {
                path,
                entry: Entry::regular(disk, &content)?,
            }
        }
        Line::LfsFile {
            path,
            algo,
            oid,
            size,
        } => {
            check_path(&path)?;
            if algo.is_some_and(|algo| algo != "sha256") || !is_sha256(&oid) {
                return Err(Refusal::bad_request(format!(
                    "oid of {path}: must be a sha256 of 64 small hex digits"
                )));
            }
            let stored = blobs::size(disk, &oid)?;
            let stored = stored.ok_or_else(|| Error::MissingObject {
                path: path.clone(),
                oid: oid.clone(),
            })?;
            if let Some(size) = size.filter(|size| *size != stored) {
                return Err(Refusal::bad_request(format!(
                    "size of {path}: is {stored}, the commit says {size}"
                )));
            }
            Change::Put {
                path,
                entry: Entry::lfs(oid, stored),
            }
        }
        Line::DeletedFile { path } => Change::DeleteFile { path },
        Line::DeletedFolder { path } => Change::DeleteFolder { path },
        Line::Header { .. } => return Err(Refusal::bad_request("the commit has two headers")),
    })
}

#[cfg(test)]
mod tests {
    use super::is_lfs;

    #[test]
    fn what_is_lfs() {
        assert!(is_lfs("a/model.safetensors", 1, b"x"));
        assert!(is_lfs("M.GGUF", 1, b"x"));
        assert!(is_lfs("x.json", (10 << 20) + 1, b"{"));
        assert!(is_lfs("x", 3, b"a\0b"));
        assert!(is_lfs("x", 3, b"a\xffb"));
        assert!(!is_lfs("config.json", 10 << 20, b"{"));
        assert!(!is_lfs("x.bin", 0, b""));
        assert!(!is_lfs(
            "x.txt",
            600,
            "ü".as_bytes().split_last().unwrap().1
        ));
    }
}
