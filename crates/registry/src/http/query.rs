//! Query strings and pages.
//!
//! Invariant: a page holds at most what its route allows, whatever the client asks for; the address of the next page
//! repeats the request with a `cursor`.

use axum::extract::{FromRequestParts, OriginalUri};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header::LINK};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::Uri};
use serde_json::Value;
use url::form_urlencoded;

use super::reply::Refusal;

/// The pairs of a query string, in order, and the address they came with.
#[derive(Debug)]
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
    uri: Uri,
}

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Query, Refusal> {
        let OriginalUri(uri) = match OriginalUri::from_request_parts(parts, state).await {
            Ok(uri) => uri,
            Err(never) => match never {},
        };
        let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
        Ok(Query { pairs, uri })
    }
}

impl Query {
    pub(crate) fn get<'a>(&'a self, key: &'a str) -> Option<&'a str> {
        self.all(key).next()
    }

    /// Every value of a key, written `key` or `key[]`.
    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.pairs
            .iter()
            .filter(move |(k, _)| k.strip_suffix("[]").unwrap_or(k) == key)
            .map(|(_, v)| v.as_str())
    }

    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some_and(is_true)
    }

    /// How many entries a page may hold.
    pub(crate) fn limit(&self, max: usize) -> usize {
        self.get("limit")
            .and_then(|text| text.parse().ok())
            .unwrap_or(max)
            .clamp(1, max)
    }

    /// A page as JSON, with the address of the next one if there is one.
    pub(crate) fn page(&self, base_url: &str, entries: Vec<Value>, next: Option<&str>) -> Response {
        let mut response = Json(entries).into_response();
        if let Some(cursor) = next {
            let others = self.pairs.iter().filter(|(key, _)| key != "cursor");
            let query = form_urlencoded::Serializer::new(String::new())
                .extend_pairs(others)
                .append_pair("cursor", cursor)
                .finish();
            let link = format!("<{base_url}{}?{query}>; rel=\"next\"", self.uri.path());
            response
                .headers_mut()
                .extend(HeaderValue::try_from(link).ok().map(|link| (LINK, link)));
        }
        response
    }
}

pub(crate) fn is_true(text: &str) -> bool {
    matches!(text, "1" | "true" | "True" | "TRUE")
}
