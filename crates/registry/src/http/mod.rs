//! The Hub's HTTP interface: which path leads where, who may do what, and how much is accepted.
//!
//! Invariant: a handler looks a repository up through [`App::reader`] or [`App::writer`], so that no route forgets who
//! is asking. Every answer carries `X-Request-Id`; every refusal its code and message (`reply`).

mod body;
mod commit;
mod info;
pub(crate) mod listen;
mod manage;
mod query;
mod reply;
mod resolve;
mod shelf;
mod sign;
pub(crate) mod stats;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router};

use self::reply::Refusal;
use self::sign::Signer;
use self::stats::Counters;
use self::uploads::Uploads;
use crate::names::{Kind, RepoId, random_hex};
use crate::repos::{self, Gated, Repo};
use crate::{Error, Registry};

/// How a registry serves.
#[derive(Clone)]
pub struct Options {
    /// Who has it may write and sees what is private. Without it everyone may, and the listener must be loopback.
    pub token: Option<String>,
    /// The name `whoami` answers, and the owner of repositories created without one.
    pub user: String,
    /// Where clients reach the server, such as `https://hub.example.org` behind a proxy that speaks TLS; else
    /// `http://` and each request's `Host`.
    pub public_url: Option<String>,
    /// LFS objects larger than this, in bytes, are uploaded in parts where the client can.
    pub multipart_threshold_bytes: u64,
    /// The size of such a part, in bytes; it grows where an object would need more than 10 000 parts.
    pub part_bytes: u64,
    /// The largest file taken within a commit, in bytes.
    pub inline_bytes_max: u64,
    /// How long a request may go without a byte in either direction.
    pub idle_timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            token: None,
            user: "local".to_owned(),
            public_url: None,
            multipart_threshold_bytes: 64 << 20,
            part_bytes: 64 << 20,
            inline_bytes_max: 32 << 20,
            idle_timeout: Duration::from_secs(60),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("user", &self.user)
            .field("public_url", &self.public_url)
            .finish_non_exhaustive()
    }
}

/// What all requests of a server share.
pub(crate) struct App {
    pub(crate) registry: Registry,
    pub(crate) options: Options,
    pub(crate) signer: Signer,
    pub(crate) uploads: Uploads,
    pub(crate) counters: Arc<Counters>,
}

impl App {
    pub(crate) fn new(registry: Registry, options: Options) -> App {
        App {
            registry,
            options,
            signer: Signer::new(),
            uploads: Uploads::default(),
            counters: Arc::default(),
        }
    }

    /// Runs work on the disk where it may block.
    pub(crate) async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&App) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let app = self.clone();
        match tokio::task::spawn_blocking(move || work(&app)).await {
            Ok(result) => result,
            Err(e) => Err(Refusal::internal(&e)),
        }
    }

    /// Looks up a repository for someone who wants to read about it.
    pub(crate) fn reader<'a>(&'a self, caller: &Caller, id: &RepoId) -> Result<Repo<'a>, Refusal> {
        let hidden = |e| {
            if caller.is_owner {
                Refusal::from(e)
            } else {
                Refusal::from(e).unauthorized()
            }
        };
        let repo = repos::find(&self.registry.disk, id).map_err(hidden)?;
        if repo.meta.private && !caller.is_owner {
            return Err(hidden(Error::NoRepo { id: id.to_string() }));
        }
        Ok(repo)
    }

    /// Looks up a repository for someone who wants its files.
    pub(crate) fn file_reader<'a>(
        &'a self,
        caller: &Caller,
        id: &RepoId,
    ) -> Result<Repo<'a>, Refusal> {
        let repo = self.reader(caller, id)?;
        if repo.meta.gated != Gated::Open && !caller.is_owner {
            return Err(Refusal::gated(&id.full_name()));
        }
        Ok(repo)
    }

    /// Looks up a repository for someone who wants to change it.
    pub(crate) fn writer<'a>(&'a self, caller: &Caller, id: &RepoId) -> Result<Repo<'a>, Refusal> {
        caller.must_own()?;
        self.reader(caller, id)
    }
}

/// Who is asking, and under which address they reached the server.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) is_owner: bool,
    pub(crate) base_url: String,
}

impl Caller {
    pub(crate) fn must_own(&self) -> Result<(), Refusal> {
        if self.is_owner {
            Ok(())
        } else {
            Err(Refusal::token_needed())
        }
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Caller, Refusal> {
        Ok(Caller {
            is_owner: is_owner(app, &parts.headers)?,
            base_url: base_url(app, &parts.headers)?,
        })
    }
}

fn is_owner(app: &App, headers: &HeaderMap) -> Result<bool, Refusal> {
    let Some(token) = &app.options.token else {
        // Everyone on this machine may write, but no page that a browser on it shows.
        return Ok(!headers.contains_key(ORIGIN));
    };
    let Some(value) = headers.get(AUTHORIZATION) else {
        return Ok(false);
    };
    let given = value.to_str().ok().and_then(|text| text.split_once(' '));
    match given {
        Some((scheme, given))
            if scheme.eq_ignore_ascii_case("bearer") && app.signer.same(token, given.trim()) =>
        {
            Ok(true)
        }
        _ => Err(Refusal::bad_token()),
    }
}

/// Only the requester sees the address made from `Host`; what cannot stand in one is refused.
fn base_url(app: &App, headers: &HeaderMap) -> Result<String, Refusal> {
    if let Some(url) = &app.options.public_url {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let host = headers
        .get(HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let fine =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']' | '_');
    if host.is_empty() || host.len() > 255 || !host.chars().all(fine) {
        return Err(Error::invalid("Host header", "must name the host that was called").into());
    }
    Ok(format!("http://{host}"))
}

/// A repository named in the path of a request: `models/owner/name`.
pub(crate) fn repo_id(kind: &str, owner: &str, name: &str) -> Result<RepoId, Refusal> {
    let kind = Kind::from_plural(kind).ok_or_else(|| Refusal::no_route(kind))?;
    // A name the Hub would not accept is one it does not have.
    let no_repo = |_| {
        Refusal::from(Error::NoRepo {
            id: format!("{}/{owner}/{name}", kind.plural()),
        })
    };
    RepoId::new(kind, owner, name).map_err(no_repo)
}

pub(crate) fn router(app: Arc<App>) -> Router {
    let repo = Router::new()
        .route("/", get(info::repo))
        .route("/revision/{rev}", get(info::repo_at))
        .route("/tree/{rev}", get(info::tree))
        .route("/tree/{rev}/{*path}", get(info::tree_below))
        .route("/paths-info/{rev}", post(info::paths))
        .route("/commits/{rev}", get(info::commits))
        .route("/refs", get(info::refs))
        .route("/auth-check", get(manage::auth_check))
        .route("/auth-check/write", get(manage::auth_check_write))
        .route("/settings", put(manage::settings))
        .route(
            "/branch/{name}",
            post(manage::create_branch).delete(manage::delete_branch),
        )
        .route(
            "/tag/{name}",
            post(manage::create_tag).delete(manage::delete_tag),
        )
        .route("/super-squash/{name}", post(manage::squash))
        .route("/preupload/{rev}", post(commit::preupload))
        .route("/commit/{rev}", post(commit::commit));
    let collection = Router::new()
        .route(
            "/",
            get(shelf::get).patch(shelf::update).delete(shelf::delete),
        )
        .route("/items", post(shelf::add_item))
        .route(
            "/items/{item}",
            axum::routing::patch(shelf::update_item).delete(shelf::delete_item),
        );
    let mut web = Router::new();
    for kind in Kind::ALL {
        let repo = format!("/{}{{owner}}/{{name}}", kind.web_prefix());
        let routes = Router::new()
            .route(
                &format!("{repo}/resolve/{{rev}}/{{*path}}"),
                get(resolve::resolve),
            )
            .route(
                &format!("{repo}/info/lfs/objects/batch"),
                post(uploads::batch),
            )
            .route(&format!("{repo}/info/lfs/verify"), post(uploads::verify));
        web = web.merge(routes.layer(Extension(kind)));
    }
    web.route("/api/whoami-v2", get(info::whoami))
        .route("/api/agent-harnesses", get(manage::agent_harnesses))
        .route("/api/validate-yaml", post(manage::validate_yaml))
        .route("/api/repos/create", post(manage::create_repo))
        .route("/api/repos/delete", delete(manage::delete_repo))
        .route("/api/repos/move", post(manage::move_repo))
        .route("/api/collections", get(shelf::list).post(shelf::create))
        .nest("/api/collections/{owner}/{slug}", collection)
        .route("/api/{kind}", get(info::list))
        .nest("/api/{kind}/{owner}/{name}", repo)
        .route("/-/lfs/{oid}", put(uploads::put_whole))
        .route("/-/lfs/{oid}/parts/{part}", put(uploads::put_part))
        .route("/-/lfs/{oid}/complete", post(uploads::complete))
        .fallback(async |request: Request| Refusal::no_route(request.uri().path()))
        .method_not_allowed_fallback(async || Refusal::method_not_allowed())
        .layer(middleware::from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// Counts the request and names it in the answer.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
    let id = request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| id.len() <= 128)
        .cloned();
    let id = id.or_else(|| HeaderValue::try_from(random_hex::<16>()).ok());
    let (route, request) = app.counters.start(request);
    let mut response = route.finish(next.run(request).await);
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
