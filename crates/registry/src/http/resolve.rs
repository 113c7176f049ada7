//! Downloads: one file of one commit, whole or a range of it, streamed from the disk.
//!
//! Invariant: `ETag` names the content, so that bytes of different contents are never joined; `X-Repo-Commit` is the
//! commit the revision stood for at that moment. Several ranges at once are answered with the whole, as RFC 9110 allows.

use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    IF_NONE_MATCH, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::reply::Refusal;
use super::{App, Caller};
use crate::names::{Kind, RepoId};
use crate::{Error, blobs};

const READ_BYTES: usize = 256 << 10;

/// What of a file is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    /// First and one past the last byte; never empty.
    Part(u64, u64),
    /// No byte of the file is in the range.
    Nothing,
}

/// `GET|HEAD /[datasets/|spaces/]{owner}/{name}/resolve/{rev}/{path}`
pub(crate) async fn resolve(
    State(app): State<Arc<App>>,
    caller: Caller,
    Extension(kind): Extension<Kind>,
    Path((owner, name, revision, path)): Path<(String, String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let id = super::repo_id(kind.plural(), &owner, &name)?;
    let (sha, entry) = app
        .work(move |app| find(app, &caller, &id, &revision, path))
        .await?;
    let etag = format!("\"{}\"", entry.etag());
    let mut about = HeaderMap::new();
    let mut say = |name: HeaderName, value: String| {
        about.extend(HeaderValue::try_from(value).ok().map(|v| (name, v)))
    };
    say(HeaderName::from_static("x-repo-commit"), sha);
    say(ETAG, etag.clone());
    say(ACCEPT_RANGES, "bytes".to_owned());
    if entry.lfs {
        say(HeaderName::from_static("x-linked-etag"), etag.clone());
        say(
            HeaderName::from_static("x-linked-size"),
            entry.size.to_string(),
        );
    }
    if matches_etag(&headers, IF_NONE_MATCH, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, about).into_response());
    }
    // What a browser would run must not come from a repository.
    say(
        CONTENT_TYPE,
        if entry.lfs {
            "application/octet-stream"
        } else {
            "text/plain; charset=utf-8"
        }
        .to_owned(),
    );
    say(
        HeaderName::from_static("x-content-type-options"),
        "nosniff".to_owned(),
    );
    say(
        HeaderName::from_static("content-security-policy"),
        "default-src 'none'; sandbox".to_owned(),
    );
    say(CONTENT_DISPOSITION, "inline".to_owned());
    let may_be_ranged = !headers.contains_key(IF_RANGE) || matches_etag(&headers, IF_RANGE, &etag);
    let range = headers
        .get(RANGE)
        .and_then(|range| range.to_str().ok())
        .filter(|_| may_be_ranged);
    let (status, start, end) =
        match range.map_or(Wanted::Whole, |range| parse_range(range, entry.size)) {
            Wanted::Whole => (StatusCode::OK, 0, entry.size),
            Wanted::Part(start, end) => {
                say(
                    CONTENT_RANGE,
                    format!("bytes {start}-{}/{}", end - 1, entry.size),
                );
                (StatusCode::PARTIAL_CONTENT, start, end)
            }
            Wanted::Nothing => {
                say(CONTENT_RANGE, format!("bytes */{}", entry.size));
                let refusal = Refusal::new(
                    StatusCode::RANGE_NOT_SATISFIABLE,
                    format!("the file has {} bytes", entry.size),
                );
                about.remove(CONTENT_TYPE);
                return Ok((about, refusal).into_response());
            }
        };
    say(CONTENT_LENGTH, (end - start).to_string());
    if method == Method::HEAD {
        return Ok((status, about, Body::empty()).into_response());
    }
    let file = app
        .work(move |app| open_at(app, &entry.sha256, start))
        .await?;
    let bytes = tokio::fs::File::from_std(file).take(end - start);
    Ok((
        status,
        about,
        Body::from_stream(ReaderStream::with_capacity(bytes, READ_BYTES)),
    )
        .into_response())
}

fn find(
    app: &App,
    caller: &Caller,
    id: &RepoId,
    revision: &str,
    path: String,
) -> Result<(String, crate::history::Entry), Refusal> {
    let repo = app.file_reader(caller, id)?;
    let sha = repo.resolve(revision)?;
    let mut tree = repo.tree(&repo.commit(&sha)?)?;
    match tree.remove(&path) {
        Some(entry) => Ok((sha, entry)),
        None => Err(Error::NoEntry {
            path: path.chars().take(200).collect(),
            commit: sha,
        }
        .into()),
    }
}

fn open_at(app: &App, sha256: &str, start: u64) -> Result<std::fs::File, Refusal> {
    let mut file = blobs::open(&app.registry.disk, sha256)?;
    file.seek(SeekFrom::Start(start))
        .map_err(Error::io("read", std::path::Path::new(sha256)))?;
    Ok(file)
}

fn matches_etag(headers: &HeaderMap, name: HeaderName, etag: &str) -> bool {
    let values = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|given| given == "*" || given.trim_start_matches("W/") == etag)
}

/// One range of RFC 9110: `bytes=a-b`, `bytes=a-` or `bytes=-n`. What is not one is ignored.
fn parse_range(text: &str, size: u64) -> Wanted {
    let Some((first, last)) = text
        .strip_prefix("bytes=")
        .and_then(|spec| spec.split_once('-'))
    else {
        return Wanted::Whole;
    };
    let number = |text: &str| match text.trim() {
        "" => Some(None),
        text if text.bytes().all(|b| b.is_ascii_digit()) => {
            Some(Some(text.parse().unwrap_or(u64::MAX)))
        }
        _ => None,
    };
    let (start, end) = match (number(first), number(last)) {
        (Some(Some(first)), Some(Some(last))) if first > last => return Wanted::Whole,
        (Some(Some(first)), Some(last)) => (
            first,
            last.map_or(size, |last: u64| last.saturating_add(1).min(size)),
        ),
        (Some(None), Some(Some(n))) => (size.saturating_sub(n), size),
        _ => return Wanted::Whole,
    };
    if start < end {
        Wanted::Part(start, end)
    } else {
        Wanted::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::{Wanted, parse_range};

    #[test]
    fn ranges() {
        let cases = [
            ("bytes=0-0", Wanted::Part(0, 1)),
            ("bytes=2-", Wanted::Part(2, 10)),
            ("bytes=2-99", Wanted::Part(2, 10)),
            ("bytes=0-18446744073709551615", Wanted::Part(0, 10)),
            ("bytes=0-99999999999999999999999", Wanted::Part(0, 10)),
            ("bytes=-3", Wanted::Part(7, 10)),
            ("bytes=-99", Wanted::Part(0, 10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=5-4", Wanted::Whole),
            ("bytes=0-1,3-4", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
        ];
        for (text, wanted) in cases {
            assert_eq!(parse_range(text, 10), wanted, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Wanted::Nothing);
    }
}
