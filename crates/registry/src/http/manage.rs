//! Changing what a repository is: making, deleting, moving, settings, branches, tags; and checking a card.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::reply::Refusal;
use super::{App, Caller, body, repo_id};
use crate::names::{Kind, RepoId};
use crate::repos::{self, Gated, MAIN, RefKind};
use crate::{Error, card, collections};

type RepoPath = Path<(String, String, String)>;
type NamedPath = Path<(String, String, String, String)>;

/// Which repository a body names; also how it shall be seen.
#[derive(Deserialize)]
struct Named {
    name: String,
    organization: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    private: Option<bool>,
    visibility: Option<String>,
}

impl Named {
    fn id(&self, user: &str) -> Result<RepoId, Error> {
        let kind = Kind::from_singular(self.kind.as_deref().unwrap_or("model"))?;
        match &self.organization {
            Some(owner) => RepoId::new(kind, owner, &self.name),
            None if self.name.contains('/') => RepoId::parse(kind, &self.name),
            None => RepoId::new(kind, user, &self.name),
        }
    }
}

/// `None` where nothing is said.
fn is_private(private: Option<bool>, visibility: Option<&str>) -> Result<Option<bool>, Error> {
    match visibility {
        None => Ok(private),
        Some("private") => Ok(Some(true)),
        Some("public") => Ok(Some(false)),
        Some(_) => Err(Error::invalid("visibility", "must be public or private")),
    }
}

fn web_url(caller: &Caller, id: &RepoId) -> String {
    format!(
        "{}/{}{}",
        caller.base_url,
        id.kind.web_prefix(),
        id.full_name()
    )
}

/// `POST /api/repos/create`
pub(crate) async fn create_repo(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    caller.must_own()?;
    let named: Named = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let id = named.id(&app.options.user)?;
        let private = is_private(named.private, named.visibility.as_deref())?.unwrap_or(false);
        let url = web_url(&caller, &id);
        match repos::create(&app.registry.disk, &id, private, &app.options.user) {
            Ok(()) => Ok(Json(json!({"url": url, "name": id.full_name()}))),
            Err(e @ Error::Exists { .. }) => Err(Refusal::from(e).with("url", json!(url))),
            Err(e) => Err(e.into()),
        }
    })
    .await
}

/// `DELETE /api/repos/delete`
pub(crate) async fn delete_repo(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<StatusCode, Refusal> {
    caller.must_own()?;
    let named: Named = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        Ok(repos::delete(
            &app.registry.disk,
            &named.id(&app.options.user)?,
        )?)
    })
    .await?;
    Ok(StatusCode::OK)
}

/// `POST /api/repos/move`
pub(crate) async fn move_repo(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<StatusCode, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Move {
        from_repo: String,
        to_repo: String,
        #[serde(rename = "type")]
        kind: Option<String>,
    }
    caller.must_own()?;
    let wanted: Move = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let kind = Kind::from_singular(wanted.kind.as_deref().unwrap_or("model"))?;
        let (source, target) = (
            RepoId::parse(kind, &wanted.from_repo)?,
            RepoId::parse(kind, &wanted.to_repo)?,
        );
        repos::rename(&app.registry.disk, &source, &target)?;
        collections::follow(&app.registry.disk, &source, &target)?;
        Ok(StatusCode::OK)
    })
    .await
}

/// `PUT /api/{kind}/{owner}/{name}/settings`
pub(crate) async fn settings(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name)): RepoPath,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Settings {
        private: Option<bool>,
        visibility: Option<String>,
        gated: Option<Value>,
    }
    let id = repo_id(&kind, &owner, &name)?;
    caller.must_own()?;
    let settings: Settings = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        let private = is_private(settings.private, settings.visibility.as_deref())?;
        let gated = match &settings.gated {
            None => None,
            Some(Value::Bool(false)) => Some(Gated::Open),
            Some(Value::String(text)) if text == "auto" => Some(Gated::Auto),
            Some(Value::String(text)) if text == "manual" => Some(Gated::Manual),
            Some(_) => {
                return Err(
                    Error::invalid("gated", "must be false, \"auto\" or \"manual\"").into(),
                );
            }
        };
        repos::set(&app.registry.disk, &id, |meta| {
            meta.private = private.unwrap_or(meta.private);
            meta.gated = gated.unwrap_or(meta.gated);
        })?;
        Ok(Json(json!({})))
    })
    .await
}

/// `GET /api/{kind}/{owner}/{name}/auth-check`
pub(crate) async fn auth_check(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name)): RepoPath,
) -> Result<StatusCode, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| app.file_reader(&caller, &id).map(drop))
        .await?;
    Ok(StatusCode::OK)
}

/// `GET /api/{kind}/{owner}/{name}/auth-check/write`
pub(crate) async fn auth_check_write(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name)): RepoPath,
) -> Result<StatusCode, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| app.writer(&caller, &id).map(drop))
        .await?;
    Ok(StatusCode::OK)
}

/// `POST /api/{kind}/{owner}/{name}/branch/{name}`
pub(crate) async fn create_branch(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, branch)): NamedPath,
    body: Body,
) -> Result<StatusCode, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Branch {
        starting_point: Option<String>,
    }
    let id = repo_id(&kind, &owner, &name)?;
    caller.must_own()?;
    let wanted: Branch = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        let start = wanted.starting_point.as_deref().unwrap_or(MAIN);
        Ok(repos::create_ref(
            &app.registry.disk,
            &id,
            RefKind::Branch,
            &branch,
            start,
        )?)
    })
    .await?;
    Ok(StatusCode::OK)
}

/// `DELETE /api/{kind}/{owner}/{name}/branch/{name}`
pub(crate) async fn delete_branch(
    state: State<Arc<App>>,
    caller: Caller,
    path: NamedPath,
) -> Result<StatusCode, Refusal> {
    delete_ref(state, caller, path, RefKind::Branch).await
}

/// `POST /api/{kind}/{owner}/{name}/tag/{rev}`; a tag's message is not kept, as no route tells it.
pub(crate) async fn create_tag(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, revision)): NamedPath,
    body: Body,
) -> Result<StatusCode, Refusal> {
    #[derive(Deserialize)]
    struct Tag {
        tag: String,
    }
    let id = repo_id(&kind, &owner, &name)?;
    caller.must_own()?;
    let wanted: Tag = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        Ok(repos::create_ref(
            &app.registry.disk,
            &id,
            RefKind::Tag,
            &wanted.tag,
            &revision,
        )?)
    })
    .await?;
    Ok(StatusCode::OK)
}

/// `DELETE /api/{kind}/{owner}/{name}/tag/{tag}`
pub(crate) async fn delete_tag(
    state: State<Arc<App>>,
    caller: Caller,
    path: NamedPath,
) -> Result<StatusCode, Refusal> {
    delete_ref(state, caller, path, RefKind::Tag).await
}

async fn delete_ref(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, reference)): NamedPath,
    ref_kind: RefKind,
) -> Result<StatusCode, Refusal> {
    let id = repo_id(&kind, &owner, &name)?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        Ok(repos::delete_ref(
            &app.registry.disk,
            &id,
            ref_kind,
            &reference,
        )?)
    })
    .await?;
    Ok(StatusCode::OK)
}

/// `POST /api/{kind}/{owner}/{name}/super-squash/{branch}`
pub(crate) async fn squash(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((kind, owner, name, branch)): NamedPath,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Squash {
        message: Option<String>,
    }
    let id = repo_id(&kind, &owner, &name)?;
    caller.must_own()?;
    let wanted: Squash = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        app.writer(&caller, &id)?;
        let message = wanted
            .message
            .unwrap_or_else(|| format!("Super-squash branch '{branch}'"));
        let commit = repos::squash(
            &app.registry.disk,
            &id,
            &branch,
            &message,
            &app.options.user,
        )?;
        Ok(Json(json!({"commitId": commit})))
    })
    .await
}

/// `POST /api/validate-yaml`
pub(crate) async fn validate_yaml(
    State(app): State<Arc<App>>,
    _caller: Caller,
    body: Body,
) -> Result<Response, Refusal> {
    #[derive(Deserialize)]
    struct Card {
        content: String,
    }
    let wanted: Card = body::json(body, app.options.idle_timeout).await?;
    let findings = app.work(move |_| Ok(card::check(&wanted.content))).await?;
    let messages = |texts: &[String]| {
        texts
            .iter()
            .map(|text| json!({"message": text}))
            .collect::<Vec<_>>()
    };
    let answer =
        json!({"errors": messages(&findings.errors), "warnings": messages(&findings.warnings)});
    if findings.errors.is_empty() {
        return Ok(Json(answer).into_response());
    }
    let refusal = Refusal::bad_request(format!(
        "Invalid metadata in README.md: {}",
        findings.errors.join("; ")
    ));
    Ok(refusal
        .with("errors", answer["errors"].clone())
        .with("warnings", answer["warnings"].clone())
        .into_response())
}

/// `GET /api/agent-harnesses`: clients ask daily which programs may run them; we name none.
pub(crate) async fn agent_harnesses() -> Json<Value> {
    Json(json!({"standardEnvVars": [], "harnesses": {}}))
}
