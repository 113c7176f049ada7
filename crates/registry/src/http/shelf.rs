//! Collections over HTTP.
//!
//! Invariant: in a list, collections have no `position` and at most 4 items, as on the Hub (its clients break on the
//! first and expect the second). Items that the caller may not see are left out.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::query::Query;
use super::reply::Refusal;
use super::{App, Caller, body};
use crate::collections::{self, Collection, Fields};
use crate::names::check_name;
use crate::{Error, repos};

const PAGE: usize = 100;
const ITEMS_LISTED: usize = 4;

type SlugPath = Path<(String, String)>;
type ItemPath = Path<(String, String, String)>;

fn to_json(app: &App, caller: &Caller, collection: &Collection) -> Result<Value, Refusal> {
    let mut items = Vec::new();
    for (position, item) in collection.items.iter().enumerate() {
        let mut json =
            json!({"_id": item.id, "id": item.target, "type": item.kind, "position": position});
        if let Some(id) = item.repo() {
            let repo = match repos::find(&app.registry.disk, &id) {
                Ok(repo) if repo.meta.private && !caller.is_owner => continue,
                Ok(repo) => repo,
                Err(Error::NoRepo { .. }) => continue,
                Err(e) => return Err(e.into()),
            };
            json["author"] = json!(id.owner);
            json["private"] = json!(repo.meta.private);
            json["repoType"] = json!(id.kind.singular());
        }
        if let Some(note) = &item.note {
            json["note"] = json!({"text": note, "html": ""});
        }
        items.push(json);
    }
    Ok(json!({
        "slug": collection.slug(),
        "title": collection.title,
        "description": collection.description,
        "owner": {"name": collection.owner, "fullname": collection.owner, "type": "user"},
        "items": items,
        "lastUpdated": collection.last_updated,
        "position": collection.position,
        "private": collection.private,
        "theme": collection.theme,
        "upvotes": 0,
    }))
}

/// `GET /api/collections?owner=&item=&limit=`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Query,
) -> Result<Response, Refusal> {
    app.work(move |app| {
        let disk = &app.registry.disk;
        let mut owners: Vec<String> = query.all("owner").map(str::to_owned).collect();
        for owner in &owners {
            check_name("owner", owner)?;
        }
        if owners.is_empty() {
            owners = collections::owners(disk)?;
        }
        let skip: usize = query
            .get("cursor")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let limit = query.limit(PAGE);
        let wanted: Vec<&str> = query.all("item").collect();
        let mut found = Vec::new();
        for owner in owners {
            found.extend(collections::list(disk, &owner)?);
        }
        found.retain(|collection| {
            let named = |item: &collections::Item| {
                wanted.contains(&format!("{}s/{}", item.kind, item.target).as_str())
            };
            (caller.is_owner || !collection.private)
                && (wanted.is_empty() || collection.items.iter().any(named))
        });
        let next = (found.len() > skip.saturating_add(limit)).then(|| (skip + limit).to_string());
        let mut page = Vec::new();
        for collection in found.iter().skip(skip).take(limit) {
            let mut json = to_json(app, &caller, collection)?;
            if let Some(object) = json.as_object_mut() {
                object.shift_remove("position");
            }
            if let Some(items) = json["items"].as_array_mut() {
                items.truncate(ITEMS_LISTED);
            }
            page.push(json);
        }
        Ok(query.page(&caller.base_url, page, next.as_deref()))
    })
    .await
}

/// `POST /api/collections`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Wanted {
        namespace: Option<String>,
        #[serde(flatten)]
        fields: Fields,
    }
    caller.must_own()?;
    let wanted: Wanted = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let owner = wanted.namespace.as_deref().unwrap_or(&app.options.user);
        let collection = collections::create(&app.registry.disk, owner, wanted.fields)?;
        Ok(Json(to_json(app, &caller, &collection)?))
    })
    .await
}

/// `GET /api/collections/{owner}/{slug}`
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug)): SlugPath,
) -> Result<Json<Value>, Refusal> {
    app.work(move |app| {
        let collection = collections::get(&app.registry.disk, &owner, &slug)?;
        if collection.private && !caller.is_owner {
            return Err(Error::NoCollection {
                slug: format!("{owner}/{slug}"),
            }
            .into());
        }
        Ok(Json(to_json(app, &caller, &collection)?))
    })
    .await
}

/// `PATCH /api/collections/{owner}/{slug}`
pub(crate) async fn update(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug)): SlugPath,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    caller.must_own()?;
    let fields: Fields = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let collection = collections::update(&app.registry.disk, &owner, &slug, fields)?;
        Ok(Json(
            json!({"success": true, "data": to_json(app, &caller, &collection)?}),
        ))
    })
    .await
}

/// `DELETE /api/collections/{owner}/{slug}`
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug)): SlugPath,
) -> Result<StatusCode, Refusal> {
    caller.must_own()?;
    app.work(move |app| Ok(collections::delete(&app.registry.disk, &owner, &slug)?))
        .await?;
    Ok(StatusCode::OK)
}

/// `POST /api/collections/{owner}/{slug}/items`
pub(crate) async fn add_item(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug)): SlugPath,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Wanted {
        item: Target,
        note: Option<String>,
    }
    #[derive(Deserialize)]
    struct Target {
        id: String,
        #[serde(rename = "type")]
        kind: String,
    }
    caller.must_own()?;
    let Wanted { item, note } = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let collection = collections::add_item(
            &app.registry.disk,
            &owner,
            &slug,
            &item.kind,
            &item.id,
            note,
        )?;
        Ok(Json(to_json(app, &caller, &collection)?))
    })
    .await
}

/// `PATCH /api/collections/{owner}/{slug}/items/{item}`
pub(crate) async fn update_item(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug, item)): ItemPath,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    #[derive(Deserialize)]
    struct Wanted {
        note: Option<String>,
        position: Option<u64>,
    }
    caller.must_own()?;
    let wanted: Wanted = body::json(body, app.options.idle_timeout).await?;
    app.work(move |app| {
        let disk = &app.registry.disk;
        let collection =
            collections::update_item(disk, &owner, &slug, &item, wanted.note, wanted.position)?;
        Ok(Json(to_json(app, &caller, &collection)?))
    })
    .await
}

/// `DELETE /api/collections/{owner}/{slug}/items/{item}`
pub(crate) async fn delete_item(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((owner, slug, item)): ItemPath,
) -> Result<StatusCode, Refusal> {
    caller.must_own()?;
    app.work(move |app| {
        Ok(collections::delete_item(
            &app.registry.disk,
            &owner,
            &slug,
            &item,
        )?)
    })
    .await?;
    Ok(StatusCode::OK)
}
