//! One request and its answer: credentials, deadlines, redirects, retries, refusals.
//!
//! Invariant: the token goes to the endpoint's own origin and nowhere else; every wait is bounded. Knows
//! nothing of what is asked; the modules above build the addresses and read the bodies.

use std::error::Error as StdError;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};

use crate::error::Answer;
use crate::retry::{Patience, asked_wait, passes};
use crate::{Commit, Error, RepoId, Settings};

const N_REDIRECTS_MAX: usize = 5;
const REFUSAL_BYTES_MAX: usize = 64 << 10;

/// What a request is about: names the refusal when the Hub's status alone does not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct About<'a> {
    pub(crate) repo: Option<&'a RepoId>,
    pub(crate) revision: Option<&'a str>,
    pub(crate) file: Option<(&'a Commit, &'a str)>,
}

/// When an attempt may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// Doing it twice is doing it once.
    Always,
    /// Only when the Hub says that it did nothing (429).
    IfRefused,
}

/// A request with a body small enough to be held.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) what: String,
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) about: About<'a>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) timeout: Duration,
    pub(crate) again: Again,
    /// `false` for signed addresses, which must not see the token even at the endpoint.
    pub(crate) with_token: bool,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) response: Response,
    /// Headers of the endpoint's own last answer, which may have sent us elsewhere; empty when it was not asked.
    pub(crate) own: HeaderMap,
}

/// Why one attempt brought no usable answer.
pub(crate) enum Failure {
    /// No connection: nothing was sent.
    Unreachable(Box<dyn StdError + Send + Sync>),
    /// Sent, but the answer did not come or was cut.
    Lost(Box<dyn StdError + Send + Sync>),
    /// Answered with another status than 2xx.
    Status(Response),
    /// Nothing that a second attempt would change.
    Final(Error),
}

#[derive(Debug)]
pub(crate) struct Wire {
    client: Client,
    settings: Settings,
    endpoint: Url,
    token: Option<HeaderValue>,
    /// The endpoint has answered at least once, so it exists.
    heard: AtomicBool,
}

impl Wire {
    pub(crate) fn new(settings: Settings) -> Result<Wire, Error> {
        let wrong = |reason| Error::Setting {
            name: "HF_ENDPOINT",
            text: settings.endpoint.clone(),
            reason,
        };
        let endpoint = Url::parse(&settings.endpoint)
            .map_err(|_| wrong("an address such as https://huggingface.co"))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
            return Err(wrong("an http:// or https:// address"));
        }
        if !endpoint.username().is_empty() || endpoint.password().is_some() {
            return Err(Error::Setting {
                name: "HF_ENDPOINT",
                text: "***".to_owned(),
                reason: "an address without a user name; credentials belong in HF_TOKEN",
            });
        }
        let token = match &settings.token {
            Some(token) => Some(token.header().ok_or(Error::Setting {
                name: "HF_TOKEN",
                text: "***".to_owned(),
                reason: "a token of printable ASCII characters",
            })?),
            None => None,
        };
        let client = Client::builder()
            .user_agent(concat!("skulk/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(settings.metadata_timeout)
            .build()
            .map_err(|e| Error::Http {
                what: "set up HTTP".to_owned(),
                url: settings.endpoint.clone(),
                n_attempts: 0,
                source: Box::new(e),
            })?;
        Ok(Wire {
            client,
            settings,
            endpoint,
            token,
            heard: AtomicBool::new(false),
        })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The client itself, for bodies that are streamed; the caller sets its own deadlines.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The `Authorization` header, for a client that is handed the endpoint's addresses.
    pub(crate) fn auth_headers(&self) -> HeaderMap {
        self.token
            .iter()
            .map(|value| (AUTHORIZATION, value.clone()))
            .collect()
    }

    /// `{endpoint}/a/b/c`, each segment percent-encoded (a `/` inside one as well).
    pub(crate) fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// `{endpoint}/api/models/{owner}/{name}/…`.
    pub(crate) fn model_url(&self, repo: &RepoId, rest: &[&str]) -> Url {
        self.url(&[&["api", "models", repo.owner(), repo.name()], rest].concat())
    }

    /// Whether an address has the endpoint's scheme, host and port.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// A `GET` of something small.
    pub(crate) fn get<'a>(&self, what: impl Into<String>, url: Url, about: About<'a>) -> Ask<'a> {
        Ask {
            what: what.into(),
            method: Method::GET,
            url,
            about,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            timeout: self.settings.metadata_timeout,
            again: Again::Always,
            with_token: true,
        }
    }

    /// A `POST` of something small; waits as long as a write may take.
    pub(crate) fn post<'a>(
        &self,
        what: impl Into<String>,
        url: Url,
        about: About<'a>,
        content_type: &'static str,
        body: impl Into<Bytes>,
    ) -> Ask<'a> {
        let mut ask = self.get(what, url, about);
        ask.method = Method::POST;
        ask.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        ask.body = body.into();
        ask.timeout = self.settings.write_timeout;
        ask
    }

    /// A `POST` of a JSON value.
    pub(crate) fn post_json<'a>(
        &self,
        what: impl Into<String>,
        url: Url,
        about: About<'a>,
        body: &serde_json::Value,
    ) -> Ask<'a> {
        self.post(what, url, about, "application/json", body.to_string())
    }

    /// Sends `ask`, again where that makes sense, and reads the whole body, at most `bytes_max` long, within
    /// [`Settings::give_up_after`].
    pub(crate) async fn fetch(
        &self,
        ask: &Ask<'_>,
        bytes_max: usize,
    ) -> Result<(HeaderMap, Bytes), Error> {
        let mut patience = Patience::new(&self.settings);
        loop {
            patience.attempt();
            let failure = match self.exchange(ask).await {
                Ok(Reply { response, own }) => {
                    let wait = self.settings.give_up_after;
                    match timeout(wait, self.body(&ask.what, response, bytes_max)).await {
                        Ok(Ok(body)) => return Ok((own, body)),
                        Ok(Err(failure)) => failure,
                        Err(_) => Failure::Lost(too_slow("no whole answer", wait)),
                    }
                }
                Err(failure) => failure,
            };
            self.pause(ask, failure, &patience).await?;
        }
    }

    /// As [`Wire::fetch`], read as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        ask: &Ask<'_>,
        bytes_max: usize,
    ) -> Result<T, Error> {
        let (_, body) = self.fetch(ask, bytes_max).await?;
        parse(&ask.what, &body)
    }

    /// Waits before the next attempt, or says why there is none.
    pub(crate) async fn pause(
        &self,
        ask: &Ask<'_>,
        failure: Failure,
        patience: &Patience,
    ) -> Result<(), Error> {
        let give_up = |source| Error::Http {
            what: ask.what.clone(),
            url: bare(&ask.url),
            n_attempts: patience.n_attempts(),
            source,
        };
        let wait = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Unreachable(source) => {
                let heard = self.heard.load(Ordering::Relaxed);
                patience
                    .wait_unreachable(heard)
                    .ok_or_else(|| give_up(source))?
            }
            Failure::Lost(source) if ask.again == Again::IfRefused => return Err(give_up(source)),
            Failure::Lost(source) => patience.wait(None).ok_or_else(|| give_up(source))?,
            Failure::Status(response) => {
                let status = response.status();
                let retry = passes(status)
                    && (ask.again == Again::Always || status == StatusCode::TOO_MANY_REQUESTS);
                let wait = if retry {
                    patience.wait(asked_wait(response.headers()))
                } else {
                    None
                };
                match wait {
                    Some(wait) => wait,
                    None => return Err(self.refusal(ask, response).await),
                }
            }
        };
        tracing::debug!(
            what = ask.what,
            attempt = patience.n_attempts(),
            ?wait,
            "trying again"
        );
        sleep(wait).await;
        Ok(())
    }

    /// One attempt, redirects followed.
    pub(crate) async fn exchange(&self, ask: &Ask<'_>) -> Result<Reply, Failure> {
        if self.settings.offline {
            return Err(Failure::Final(Error::Offline {
                what: ask.what.clone(),
            }));
        }
        let mut url = ask.url.clone();
        let mut own = HeaderMap::new();
        for _ in 0..=N_REDIRECTS_MAX {
            let mut request = self
                .client
                .request(ask.method.clone(), url.clone())
                .headers(ask.headers.clone())
                .header(ACCEPT_ENCODING, "identity");
            let is_own = self.is_own(&url);
            if ask.with_token && is_own {
                request = request.headers(self.auth_headers());
            }
            if ask.method != Method::GET && ask.method != Method::HEAD {
                request = request.body(ask.body.clone());
            }
            let response = self.head(request, ask.timeout).await?;
            if is_own {
                own = response.headers().clone();
            }
            let status = response.status();
            if !status.is_redirection() || !response.headers().contains_key(LOCATION) {
                if !status.is_success() {
                    return Err(Failure::Status(response));
                }
                return Ok(Reply { response, own });
            }
            url = self
                .next_hop(ask, &url, &response)
                .map_err(Failure::Final)?;
        }
        Err(Failure::Final(protocol(
            ask,
            format!("more than {N_REDIRECTS_MAX} redirects"),
        )))
    }

    /// Sends one request and waits for the head of its answer.
    pub(crate) async fn head(
        &self,
        request: reqwest::RequestBuilder,
        wait: Duration,
    ) -> Result<Response, Failure> {
        match timeout(wait, request.send()).await {
            Ok(Ok(response)) => {
                self.heard.store(true, Ordering::Relaxed);
                Ok(response)
            }
            Ok(Err(e)) if e.is_connect() => Err(Failure::Unreachable(Box::new(e.without_url()))),
            Ok(Err(e)) => Err(Failure::Lost(Box::new(e.without_url()))),
            Err(_) => Err(Failure::Lost(too_slow("no answer", wait))),
        }
    }

    fn next_hop(&self, ask: &Ask<'_>, url: &Url, response: &Response) -> Result<Url, Error> {
        let next = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| url.join(text).ok())
            .ok_or_else(|| protocol(ask, "a redirect to an unreadable address".to_owned()))?;
        if !matches!(
            (url.scheme(), next.scheme()),
            ("http", "http" | "https") | ("https", "https")
        ) {
            return Err(protocol(
                ask,
                format!("a redirect from {} to {}", url.scheme(), next.scheme()),
            ));
        }
        let keeps_method = matches!(response.status().as_u16(), 307 | 308);
        if ask.method != Method::GET && !(keeps_method && self.is_own(&next)) {
            return Err(protocol(
                ask,
                format!("a redirect of a {} to {}", ask.method, bare(&next)),
            ));
        }
        Ok(next)
    }

    async fn body(
        &self,
        what: &str,
        mut response: Response,
        bytes_max: usize,
    ) -> Result<Bytes, Failure> {
        let too_large = || {
            Failure::Final(Error::Protocol {
                what: what.to_owned(),
                detail: format!("more than {bytes_max} bytes"),
            })
        };
        if response
            .content_length()
            .is_some_and(|n| n > bytes_max as u64)
        {
            return Err(too_large());
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if body.len() + chunk.len() > bytes_max {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// The next piece of a body; `None` at its end.
    pub(crate) async fn chunk(&self, response: &mut Response) -> Result<Option<Bytes>, Failure> {
        let wait = self.settings.download_timeout;
        match timeout(wait, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(e)) => Err(Failure::Lost(Box::new(e.without_url()))),
            Err(_) => Err(Failure::Lost(too_slow("no more bytes", wait))),
        }
    }

    /// The error that a refusal means.
    pub(crate) async fn refusal(&self, ask: &Ask<'_>, mut response: Response) -> Error {
        let status = response.status();
        let headers = response.headers().clone();
        let text = |name: &str| {
            headers
                .get(name)
                .and_then(|v| v.to_str().ok())
                .map(str::to_owned)
        };
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await
                && body.len() + chunk.len() <= REFUSAL_BYTES_MAX
            {
                body.extend_from_slice(&chunk);
            }
        };
        // What did not come in time is not needed.
        let _ = timeout(self.settings.download_timeout, read).await;
        let answer = Box::new(Answer {
            status: status.as_u16(),
            url: bare(response.url()),
            message: text("x-error-message")
                .or_else(|| message(&body))
                .map(one_line),
            request_id: text("x-request-id"),
        });
        let what = ask.what.clone();
        let About {
            repo,
            revision,
            file,
        } = ask.about;
        match (text("x-error-code").as_deref(), status.as_u16(), repo) {
            (Some("GatedRepo"), _, Some(repo)) => Error::Gated {
                repo: repo.clone(),
                page: format!("{}/{repo}", self.settings.endpoint),
                answer,
            },
            (Some("RepoNotFound"), _, Some(repo)) => Error::RepoNotFound {
                repo: repo.clone(),
                answer,
            },
            (Some("RevisionNotFound"), _, Some(repo)) => {
                let revision = revision
                    .or(file.map(|(commit, _)| commit.as_str()))
                    .unwrap_or("main")
                    .to_owned();
                Error::RevisionNotFound {
                    repo: repo.clone(),
                    revision,
                    answer,
                }
            }
            (_, 401, _) => Error::Unauthorized { what, answer },
            (_, 403, _) => Error::Forbidden { what, answer },
            (_, 404, Some(repo)) => match file {
                Some((commit, path)) => Error::EntryNotFound {
                    repo: repo.clone(),
                    commit: commit.clone(),
                    path: path.to_owned(),
                    answer: Some(answer),
                },
                None => Error::RepoNotFound {
                    repo: repo.clone(),
                    answer,
                },
            },
            (_, 409 | 412, _) => Error::Conflict { what, answer },
            (_, 429, _) => Error::RateLimited {
                what,
                retry_after: asked_wait(&headers),
                answer,
            },
            _ => Error::Refused { what, answer },
        }
    }
}

/// `body` as JSON, or what is wrong with it.
pub(crate) fn parse<T: DeserializeOwned>(what: &str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| Error::Protocol {
        what: what.to_owned(),
        detail: format!("unexpected JSON: {e}"),
    })
}

/// The address without what may be signed or secret.
pub(crate) fn bare(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // These fail only for addresses that cannot have them.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// The next page that `Link: <…>; rel="next"` names.
pub(crate) fn next_page(page: &Url, headers: &HeaderMap) -> Option<Url> {
    let links = headers.get("link")?.to_str().ok()?;
    links.split(',').find_map(|link| {
        let (address, rest) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = rest
            .split(';')
            .any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next"));
        if is_next {
            page.join(address).ok()
        } else {
            None
        }
    })
}

pub(crate) fn too_slow(what: &str, wait: Duration) -> Box<dyn StdError + Send + Sync> {
    Box::new(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("{what} within {:.1} s", wait.as_secs_f64()),
    ))
}

fn protocol(ask: &Ask<'_>, detail: String) -> Error {
    Error::Protocol {
        what: ask.what.clone(),
        detail,
    }
}

fn message(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let mut parts = vec![value.get("error")?.as_str()?.to_owned()];
    let more = value
        .get("errors")
        .and_then(|e| e.as_array())
        .into_iter()
        .flatten();
    parts.extend(
        more.filter_map(|e| e.get("message")?.as_str())
            .map(str::to_owned),
    );
    Some(parts.join("; "))
}

/// Text from outside as one line of at most 500 printable characters.
fn one_line(text: String) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(500)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_encoded_one_by_one() {
        let wire = Wire::new(Settings {
            endpoint: "http://hub.test/x".to_owned(),
            ..Settings::default()
        })
        .unwrap();
        let repo = "a/b".parse().unwrap();
        let url = wire.model_url(&repo, &["tree", "refs/pr/1", "ä b#?%.txt"]);
        assert_eq!(
            url.as_str(),
            "http://hub.test/x/api/models/a/b/tree/refs%2Fpr%2F1/%C3%A4%20b%23%3F%25.txt"
        );
    }

    #[test]
    fn the_next_page_is_the_link_that_says_so() {
        let page = Url::parse("http://h/api/x?limit=2").unwrap();
        let headers = |v: &str| HeaderMap::from_iter([(reqwest::header::LINK, v.parse().unwrap())]);
        let next = next_page(
            &page,
            &headers("<http://h/z>; rel=\"prev\", </api/x?cursor=2>; rel=\"next\""),
        );
        assert_eq!(next.unwrap().as_str(), "http://h/api/x?cursor=2");
        assert_eq!(
            next_page(&page, &headers("<http://h/z>; rel=\"prev\"")),
            None
        );
    }

    #[test]
    fn an_endpoint_is_an_http_address_without_credentials() {
        for endpoint in ["", "huggingface.co", "ftp://x", "http://user:secret@x"] {
            let error = Wire::new(Settings {
                endpoint: endpoint.to_owned(),
                ..Settings::default()
            })
            .unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Setting {
                        name: "HF_ENDPOINT",
                        ..
                    }
                ),
                "{endpoint}"
            );
            assert!(!error.to_string().contains("secret"));
        }
    }
}
