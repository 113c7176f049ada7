//! The OpenAI API over HTTP: which path leads where, who is let in, and how much is taken.
//!
//! A request's route: `mod` (key, place, body), `crate::request` (fields), `chat` or `completion` (what the model has to
//! say to it), `running` (the engine), `answer` (JSON), `stream` (as events). `calls` reads tool calls.
//!
//! Invariant: every answer carries `x-request-id`; every refusal is OpenAI's error object with its status. Work that
//! takes long runs where it blocks nobody.

mod answer;
mod calls;
mod chat;
mod completion;
mod logprobs;
pub(crate) mod node;
mod running;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use self::node::Node;
use crate::error::ApiError;
use crate::listen::{Engaged, Seat};
use crate::request::{self, ChatRequest, CompletionRequest};

/// Of a body, whatever the model's context: encoding a text takes some hundred times its bytes for a while.
const BODY_BYTES_MAX: usize = 8 << 20;
/// Of a body, for what is no prompt (tools, schemas, names), and for each token of the context. A token is about four
/// bytes of text, and six times as many where JSON escapes them all.
const BODY_BYTES_BESIDE: usize = 1 << 20;
const BODY_BYTES_OF_TOKEN: usize = 64;
/// Of what follows in a body that is too large.
const BODY_BYTES_PASSED: usize = 64 << 20;
/// A body up to this size is read whoever else sends one.
const SMALL_BODY_BYTES: usize = 64 << 10;
/// Larger bodies that are held at a time.
pub(crate) const LARGE_BODIES_MAX: usize = 16;
/// For a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// All routes.
pub(crate) fn router(node: Arc<Node>) -> Router {
    let shut = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(node.clone(), let_in));
    Router::new()
        .route(
            "/health",
            get(|| async { json_response(200, &json!({"status": "ok"})) }),
        )
        .route("/ready", get(ready))
        .merge(shut)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(node.clone(), around))
        .with_state(node)
}

/// Gives every answer its id, and counts refusals.
async fn around(State(node): State<Arc<Node>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        node.metrics.refused(status.as_u16());
    }
    if let Ok(id) = HeaderValue::from_str(&format!("req_{}", answer::random(24))) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// Lets in who shows a key, where keys are asked for.
async fn let_in(State(node): State<Arc<Node>>, request: Request, next: Next) -> Response {
    if node.keys.is_empty() {
        return next.run(request).await;
    }
    match shown(request.headers()) {
        Some(key) if node.keys.hold(key) => next.run(request).await,
        Some(_) => ApiError::key("Incorrect API key provided.").into_response(),
        None => {
            ApiError::key("You didn't provide an API key; send it as 'Authorization: Bearer KEY'.")
                .into_response()
        }
    }
}

fn shown(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = text.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

async fn ready(State(node): State<Arc<Node>>) -> Response {
    if node.is_stopping() {
        return ApiError::stopping().into_response();
    }
    json_response(200, &json!({"status": "ready", "model": node.name}))
}

async fn metrics(State(node): State<Arc<Node>>) -> Response {
    let text = node
        .metrics
        .render(node.load(), node.remote_stats().as_ref());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn models(State(node): State<Arc<Node>>) -> Response {
    json_response(200, &json!({"object": "list", "data": [describe(&node)]}))
}

async fn model(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    node.serves(&id)?;
    Ok(json_response(200, &describe(&node)))
}

fn describe(node: &Node) -> Value {
    json!({
        "id": node.name, "object": "model", "created": node.created, "owned_by": "skulk",
        "max_model_len": node.context,
    })
}

async fn chat_completions(
    State(node): State<Arc<Node>>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = admit(&node, request).await?;
    let worker = node.clone();
    let prepare = move |body: &[u8]| {
        let request = ChatRequest::parse(request::json(body)?)?;
        chat::prepare(&worker, request)
    };
    let (place, prepared) = admitted.work(&node, prepare).await?;
    chat::answer(node, prepared, place).await
}

async fn completions(
    State(node): State<Arc<Node>>,
    request: Request,
) -> Result<Response, ApiError> {
    let admitted = admit(&node, request).await?;
    let worker = node.clone();
    let prepare = move |body: &[u8]| {
        let request = CompletionRequest::parse(request::json(body)?)?;
        completion::prepare(&worker, request)
    };
    let (place, prepared) = admitted.work(&node, prepare).await?;
    completion::answer(node, prepared, place).await
}

/// A place among the node's requests: as long as it is held, an answer is prepared or under way.
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    /// The client's connection is not given up for another.
    _engaged: Option<Engaged>,
}

/// A request that was let in.
struct Admitted {
    place: Place,
    body: Vec<u8>,
    /// One of those for large bodies.
    large: Option<OwnedSemaphorePermit>,
}

impl Admitted {
    /// Runs work on the body that takes long where it blocks nobody, on large bodies one after the other. Place and body
    /// are held as long as it runs, even when the client is gone, so that what waits to be worked on is bounded.
    async fn work<T: Send + 'static>(
        self,
        node: &Node,
        work: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<(Place, T), ApiError> {
        let Admitted { place, body, large } = self;
        let turn = match large.is_some() {
            true => Some(node.large_work.clone().acquire_owned().await),
            false => None,
        };
        let worked = tokio::task::spawn_blocking(move || {
            let done = work(&body)?;
            drop((body, large, turn));
            Ok((place, done))
        });
        match worked.await {
            Ok(result) => result,
            Err(_) => Err(ApiError::internal("a request could not be prepared")),
        }
    }
}

/// Takes a request in. The body comes first: who sends one slowly keeps no place.
async fn admit(node: &Node, request: Request) -> Result<Admitted, ApiError> {
    if node.is_stopping() {
        return Err(ApiError::stopping());
    }
    let seat = request.extensions().get::<Arc<Seat>>().cloned();
    let reading = read(node, request.into_body());
    let body = tokio::time::timeout(BODY_TIMEOUT, reading).await;
    let (body, large) = body.map_err(|_| ApiError::late())??;
    let permit = node.places.clone().try_acquire_owned();
    let place = Place {
        _permit: permit.map_err(|_| ApiError::busy())?,
        _engaged: seat.map(|seat| seat.engage()),
    };
    Ok(Admitted { place, body, large })
}

/// Reads a body. Only some large ones are held at a time, so that all connections together cannot fill the memory.
async fn read(
    node: &Node,
    body: Body,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
    let of_context = node.context.saturating_mul(BODY_BYTES_OF_TOKEN);
    let bytes_max = of_context
        .saturating_add(BODY_BYTES_BESIDE)
        .min(BODY_BYTES_MAX);
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut large = None;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| ApiError::body("The request's body was cut off."))?;
        if bytes.len() + chunk.len() > bytes_max {
            drop((bytes, large));
            pass_over(stream).await;
            return Err(ApiError::too_large(bytes_max));
        }
        if bytes.len() + chunk.len() > SMALL_BODY_BYTES && large.is_none() {
            let permit = node.large_bodies.clone().acquire_owned().await;
            large = Some(permit.map_err(|_| ApiError::stopping())?);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes, large))
}

/// Lets the rest of a body pass, up to a bound: a client that is still sending when it is answered may not read why.
async fn pass_over(mut stream: BodyDataStream) {
    let mut n_bytes = 0;
    while let Some(Ok(chunk)) = stream.next().await {
        n_bytes += chunk.len();
        if n_bytes > BODY_BYTES_PASSED {
            return;
        }
    }
}

async fn no_route(request: Request) -> ApiError {
    ApiError::route(request.method().as_str(), request.uri().path())
}

async fn no_method(request: Request) -> ApiError {
    ApiError::method(request.method().as_str(), request.uri().path())
}

/// An answer of JSON.
fn json_response(status: u16, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = axum::http::StatusCode::from_u16(status)
        .unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.to_json());
        let headers = response.headers_mut();
        match self.status {
            401 => headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            // OpenAI's clients wait that long and ask again.
            429 | 503 => headers.insert(RETRY_AFTER, HeaderValue::from_static("1")),
            _ => None,
        };
        response
    }
}
