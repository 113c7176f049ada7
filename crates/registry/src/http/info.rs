//! Reading about repositories: what they are, what they hold, how they came to be.
//!
//! Left out: figures the registry does not keep (downloads and likes are 0) and the sorting of lists by them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header::CONTENT_TYPE};
use axum::response::Response;
use serde_json::{Map, Value, json};
use url::form_urlencoded;

use super::query::{Query, is_true};
use super::reply::Refusal;
use super::{App, Caller, body, repo_id};
use crate::history::{Commit, Entry, Tree, below, folder_id};
use crate::names::{Kind, is_commit};
use crate::repos::{self, Gated, MAIN, RefKind, Repo};
use crate::{Error, blobs, card};

const PAGE: usize = 1000;
const PAGE_EXPANDED: usize = 50;
const CARD_BYTES_MAX: u64 = 1 << 20;
const PATHS_MAX: usize = 20_000;

type RepoPath = Path<(String, String, String)>;
type RevisionPath = Path<(String, String, String, String)>;

/// `GET /api/whoami-v2`: who has the token owns everything, and may make repositories of owners that are not there yet.
pub(crate) async fn whoami(
    State(app): State<Arc<App>>,
    caller: Caller,
) -> Result<Json<Value>, Refusal> {
    caller.must_own()?;
    let owners = app.work(all_owners).await?;
    let orgs: Vec<Value> = owners
        .iter()
        .map(|name| json!({"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"}))
        .collect();
    Ok(Json(json!({
        "type": "user",
        "id": "000000000000000000000000",
        "name": app.options.user,
        "fullname": app.options.user,
        "isPro": false,
        "orgs": orgs,
        "auth": {"type": "access_token", "accessToken": {
            "displayName": "registry",
            "role": "write",
            "fineGrained": {"global": ["repo.write"], "scoped": []},
        }},
    })))
}

fn all_owners(app: &App) -> Result<BTreeSet<String>, Refusal> {
    let mut owners = BTreeSet::new();
    for kind in Kind::ALL {
        owners.extend(repos::owners(&app.registry.disk, kind)?);
    }
    owners.remove(&app.options.user);
    Ok(owners)
}

/// `GET /api/{models|datasets|spaces}`, sorted by name.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(kind): Path<String>,
    query: Query,
) -> Result<Response, Refusal> {
    let kind = Kind::from_plural(&kind).ok_or_else(|| Refusal::no_route(&kind))?;
    app.work(move |app| {
        let filters: Vec<String> = query
            .all("filter")
            .flat_map(|text| text.split(','))
            .map(str::to_owned)
            .filter(|text| !text.is_empty())
            .collect();
        let search = query.get("search").unwrap_or_default().to_lowercase();
        let (author, cursor, limit) = (query.get("author"), query.get("cursor"), query.limit(PAGE));
        let mut entries = Vec::new();
        let mut next = None;
        for id in repos::list(&app.registry.disk, kind)? {
            let name = id.full_name();
            let wanted = author.is_none_or(|author| author == id.owner)
                && cursor.is_none_or(|cursor| name.as_str() > cursor)
                && name.to_lowercase().contains(&search);
            // A repository may go while we look; then it is not listed.
            let Some(repo) = wanted.then(|| app.reader(&caller, &id).ok()).flatten() else {
                continue;
            };
            let mut info = repo_json(app, &repo, MAIN, false)?;
            let tags = info["tags"].as_array();
            if !filters
                .iter()
                .all(|filter| tags.is_some_and(|tags| tags.iter().any(|tag| tag == filter)))
            {
                continue;
            }
            if entries.len() == limit {
                next = entries
                    .last()
                    .and_then(|last: &Value| last["id"].as_str())
                    .map(str::to_owned);
                break;
            }
            if !query.is_set("full") && query.get("expand").is_none() {
                info.remove("siblings");
                info.remove("cardData");
            }
            entries.push(Value::Object(info));
        }
        Ok(query.page(&caller.base_url, entries, next.as_deref()))
    })
    .await
}

/// `GET /api/{kind}/{owner}/{name}`
pub(crate) async fn repo(
    state: State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name)): RepoPath,
    query: Query,
) -> Result<Json<Value>, Refusal> {
    repo_at(
        state,
        caller,
        Path((kind, owner, name, MAIN.to_owned())),
        query,
    )
    .await
}

/// `GET /api/{kind}/{owner}/{name}/revision/{rev}`
pub(crate) async fn repo_at(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    query: Query,
) -> Result<Json<Value>, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| {
        let repo = app.reader(&caller, &id)?;
        let mut info = repo_json(app, &repo, &revision, query.is_set("blobs"))?;
        let expand: Vec<&str> = query.all("expand").collect();
        if !expand.is_empty() {
            info.retain(|key, _| {
                matches!(key.as_str(), "_id" | "id") || expand.contains(&key.as_str())
            });
        }
        Ok(Json(Value::Object(info)))
    })
    .await
}

fn repo_json(
    app: &App,
    repo: &Repo<'_>,
    revision: &str,
    blobs: bool,
) -> Result<Map<String, Value>, Refusal> {
    let sha = repo.resolve(revision)?;
    let commit = repo.commit(&sha)?;
    let tree = repo.tree(&commit)?;
    let card = match tree.get("README.md") {
        Some(readme) => {
            let bytes = blobs::read(&app.registry.disk, &readme.sha256, CARD_BYTES_MAX)?;
            card::front_matter(&String::from_utf8_lossy(&bytes))
        }
        None => None,
    };
    let sibling = |(path, entry): (&String, &Entry)| {
        let mut sibling = json!({"rfilename": path});
        if blobs {
            sibling["size"] = json!(entry.size);
            sibling["blobId"] = json!(entry.oid);
            if entry.lfs {
                sibling["lfs"] = json!({"size": entry.size, "sha256": entry.sha256, "pointerSize": entry.pointer_size()});
            }
        }
        sibling
    };
    let mut info = json!({
        "_id": repo.meta.id,
        "id": repo.id.full_name(),
        "modelId": repo.id.full_name(),
        "author": repo.id.owner,
        "sha": sha,
        "private": repo.meta.private,
        "gated": match repo.meta.gated { Gated::Open => json!(false), Gated::Auto => json!("auto"), Gated::Manual => json!("manual") },
        "disabled": false,
        "downloads": 0,
        "likes": 0,
        "tags": card::tags(card.as_ref(), tree.keys().map(String::as_str)),
        "createdAt": repo.meta.created_at,
        "lastModified": commit.date,
        "siblings": tree.iter().map(sibling).collect::<Vec<Value>>(),
    });
    if let Some(card) = card {
        for key in ["pipeline_tag", "library_name"] {
            if let Some(value) = card.get(key) {
                info[key] = value.clone();
            }
        }
        info["cardData"] = Value::Object(card);
    }
    match info {
        Value::Object(info) => Ok(info),
        _ => Ok(Map::new()),
    }
}

/// `GET /api/{kind}/{owner}/{name}/tree/{rev}`
pub(crate) async fn tree(
    state: State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    query: Query,
) -> Result<Response, Refusal> {
    tree_below(
        state,
        caller,
        Path((kind, owner, name, revision, String::new())),
        query,
    )
    .await
}

/// `GET /api/{kind}/{owner}/{name}/tree/{rev}/{path}`
pub(crate) async fn tree_below(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision, path)): Path<(String, String, String, String, String)>,
    query: Query,
) -> Result<Response, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| {
        let repo = app.reader(&caller, &id)?;
        let sha = repo.resolve(&revision)?;
        let tree = repo.tree(&repo.commit(&sha)?)?;
        let path = path.trim_matches('/');
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        let all = nodes(&tree, &prefix, query.is_set("recursive"));
        if all.is_empty() && !path.is_empty() {
            return Err(Error::NoEntry {
                path: path.to_owned(),
                commit: sha,
            }
            .into());
        }
        let expand = query.is_set("expand");
        let limit = query.limit(if expand { PAGE_EXPANDED } else { PAGE });
        let cursor = query.get("cursor").unwrap_or_default();
        let mut page: Vec<(String, Option<&Entry>)> = all
            .into_iter()
            .filter(|(path, _)| path.as_str() > cursor)
            .take(limit + 1)
            .collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let next = page.last().filter(|_| more).map(|(path, _)| path.clone());
        let entries = describe(&repo, &sha, &tree, page, expand)?;
        Ok(query.page(&caller.base_url, entries, next.as_deref()))
    })
    .await
}

/// Files and folders below a prefix, sorted by path; folders have no entry.
fn nodes<'a>(
    tree: &'a Tree,
    prefix: &'a str,
    recursive: bool,
) -> BTreeMap<String, Option<&'a Entry>> {
    let mut nodes = BTreeMap::new();
    for (path, entry) in below(tree, prefix) {
        let inner = &path[prefix.len()..];
        let mut folders = inner
            .match_indices('/')
            .map(|(at, _)| &path[..prefix.len() + at]);
        if recursive {
            nodes.extend(folders.map(|folder| (folder.to_owned(), None)));
            nodes.insert(path.clone(), Some(entry));
        } else if let Some(folder) = folders.next() {
            nodes.insert(folder.to_owned(), None);
        } else {
            nodes.insert(path.clone(), Some(entry));
        }
    }
    nodes
}

/// `POST /api/{kind}/{owner}/{name}/paths-info/{rev}`, a form or JSON; paths that are not there are left out.
pub(crate) async fn paths(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    let bytes = body::collect(body, app.options.idle_timeout).await?;
    let is_form = headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.contains("form-urlencoded"));
    let (paths, expand) = if is_form {
        asked_in_form(&bytes)
    } else {
        asked_in_json(&bytes)?
    };
    if paths.len() > PATHS_MAX {
        return Err(Refusal::bad_request(format!(
            "paths: at most {PATHS_MAX} at a time"
        )));
    }
    app.work(move |app| {
        let repo = app.reader(&caller, &id)?;
        let sha = repo.resolve(&revision)?;
        let tree = repo.tree(&repo.commit(&sha)?)?;
        let mut found = Vec::new();
        for path in paths {
            let path = path.trim_end_matches('/').to_owned();
            if let Some(entry) = tree.get(&path) {
                found.push((path, Some(entry)));
            } else if below(&tree, &format!("{path}/")).next().is_some() {
                found.push((path, None));
            }
        }
        Ok(Json(Value::Array(describe(
            &repo, &sha, &tree, found, expand,
        )?)))
    })
    .await
}

fn asked_in_form(bytes: &[u8]) -> (Vec<String>, bool) {
    let (mut paths, mut expand) = (Vec::new(), false);
    for (key, value) in form_urlencoded::parse(bytes) {
        match key.as_ref() {
            "paths" | "paths[]" => paths.push(value.into_owned()),
            "expand" => expand = is_true(&value),
            _ => {}
        }
    }
    (paths, expand)
}

fn asked_in_json(bytes: &[u8]) -> Result<(Vec<String>, bool), Refusal> {
    #[derive(serde::Deserialize)]
    struct Asked {
        paths: Vec<String>,
        #[serde(default)]
        expand: bool,
    }
    let asked: Asked = serde_json::from_slice(bytes).map_err(|e| {
        Refusal::bad_request(format!(
            "the body is neither a form nor the JSON expected: {e}"
        ))
    })?;
    Ok((asked.paths, asked.expand))
}

/// Files and folders as the Hub describes them; expanded, each with the commit that last changed it.
fn describe(
    repo: &Repo<'_>,
    sha: &str,
    tree: &Tree,
    nodes: Vec<(String, Option<&Entry>)>,
    expand: bool,
) -> Result<Vec<Value>, Refusal> {
    let last = if expand {
        last_commits(repo, sha, nodes.iter().map(|(path, _)| path.as_str()))?
    } else {
        BTreeMap::new()
    };
    let one = |(path, entry): (String, Option<&Entry>)| {
        let mut json = match entry {
            Some(entry) => {
                json!({"type": "file", "oid": entry.oid, "size": entry.size, "path": path})
            }
            None => {
                json!({"type": "directory", "oid": folder_id(tree, &format!("{path}/")), "size": 0, "path": path})
            }
        };
        if let Some(entry) = entry.filter(|entry| entry.lfs) {
            json["lfs"] = json!({"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size()});
        }
        if let Some((id, commit)) = last.get(&path) {
            json["lastCommit"] = json!({"id": id, "title": commit.title, "date": commit.date});
        }
        json
    };
    Ok(nodes.into_iter().map(one).collect())
}

/// For each path the youngest commit at or before `sha` in which it differs from the commit before.
fn last_commits<'a>(
    repo: &Repo<'_>,
    sha: &str,
    paths: impl Iterator<Item = &'a str>,
) -> Result<BTreeMap<String, (String, Commit)>, Refusal> {
    let state = |tree: &Tree, path: &str| match tree.get(path) {
        Some(entry) => entry.oid.clone(),
        None => folder_id(tree, &format!("{path}/")),
    };
    let mut open: Vec<&str> = paths.collect();
    let mut found = BTreeMap::new();
    let mut id = sha.to_owned();
    let mut commit = repo.commit(&id)?;
    let mut tree = repo.tree(&commit)?;
    while !open.is_empty() {
        let parent = match &commit.parent {
            Some(parent) => Some((parent.clone(), repo.commit(parent)?)),
            None => None,
        };
        let before = match &parent {
            Some((_, parent)) => repo.tree(parent)?,
            None => Tree::new(),
        };
        open.retain(|path| {
            let same = parent.is_some() && state(&tree, path) == state(&before, path);
            if !same {
                found.insert((*path).to_owned(), (id.clone(), commit.clone()));
            }
            same
        });
        let Some((parent_id, parent)) = parent else {
            break;
        };
        (id, commit, tree) = (parent_id, parent, before);
    }
    Ok(found)
}

/// `GET /api/{kind}/{owner}/{name}/commits/{rev}`, the youngest first.
pub(crate) async fn commits(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): RevisionPath,
    query: Query,
) -> Result<Response, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| {
        let repo = app.reader(&caller, &id)?;
        let start = query
            .get("cursor")
            .filter(|cursor| is_commit(cursor))
            .unwrap_or(&revision);
        let mut next = Some(repo.resolve(start)?);
        let mut entries = Vec::new();
        let limit = query.limit(PAGE);
        while let Some(sha) = next.take_if(|_| entries.len() < limit) {
            let commit = repo.commit(&sha)?;
            entries.push(json!({
                "id": sha,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }));
            next = commit.parent;
        }
        Ok(query.page(&caller.base_url, entries, next.as_deref()))
    })
    .await
}

/// `GET /api/{kind}/{owner}/{name}/refs`
pub(crate) async fn refs(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name)): RepoPath,
    query: Query,
) -> Result<Json<Value>, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| {
        let repo = app.reader(&caller, &id)?;
        let list = |kind: RefKind| -> Result<Vec<Value>, Error> {
            let one = |(name, commit)| json!({"name": name, "ref": kind.full_name(name), "targetCommit": commit});
            Ok(repo.references(kind)?.iter().map(|(name, commit)| one((name, commit))).collect())
        };
        let mut refs = json!({"branches": list(RefKind::Branch)?, "converts": [], "tags": list(RefKind::Tag)?});
        if query.is_set("include_prs") {
            refs["pullRequests"] = json!([]);
        }
        Ok(Json(refs))
    })
    .await
}
