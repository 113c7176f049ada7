//! How much went over which route: later checks count bytes.
//!
//! Invariant: bytes are counted as they pass, so that a cut connection counts what it moved.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use http_body::{Frame, SizeHint};

/// What a server has done so far, by route: `GET /api/{kind}/{owner}/{name}/tree/{rev}`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// The routes that were called; a route is the method, a space, and the pattern of the path.
    pub routes: BTreeMap<String, RouteStats>,
}

/// What went over one route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteStats {
    /// Requests begun.
    pub n_requests: u64,
    /// Bytes of request bodies received.
    pub received_bytes: u64,
    /// Bytes of answers' bodies sent.
    pub sent_bytes: u64,
}

impl Stats {
    /// The sum over the routes whose name contains `part`: `"/resolve/"`, `"PUT "`; everything for `""`.
    #[must_use]
    pub fn sum(&self, part: &str) -> RouteStats {
        let mut sum = RouteStats::default();
        for (_, route) in self.routes.iter().filter(|(name, _)| name.contains(part)) {
            sum.n_requests += route.n_requests;
            sum.received_bytes += route.received_bytes;
            sum.sent_bytes += route.sent_bytes;
        }
        sum
    }
}

/// The counters of all routes.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    routes: Mutex<BTreeMap<String, Arc<Route>>>,
}

/// The counters of one route.
#[derive(Debug, Default)]
pub(crate) struct Route {
    n_requests: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

impl Counters {
    /// Counts a request, and lets its body count itself.
    pub(crate) fn start(&self, request: Request) -> (Arc<Route>, Request) {
        let path = request
            .extensions()
            .get::<MatchedPath>()
            .map_or("(none)", MatchedPath::as_str);
        let name = format!("{} {path}", request.method());
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let route = routes.entry(name).or_default().clone();
        drop(routes);
        route.n_requests.fetch_add(1, Relaxed);
        let counted = route.clone();
        (
            route,
            request.map(|body| {
                Body::new(Counted {
                    body,
                    route: counted,
                    counter: |route| &route.received_bytes,
                })
            }),
        )
    }

    pub(crate) fn stats(&self) -> Stats {
        let routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |(name, route): (&String, &Arc<Route>)| (name.clone(), route.read());
        Stats {
            routes: routes.iter().map(read).collect(),
        }
    }
}

impl Route {
    /// Lets an answer's body count itself.
    pub(crate) fn finish(self: Arc<Self>, response: Response) -> Response {
        response.map(|body| {
            Body::new(Counted {
                body,
                route: self,
                counter: |route| &route.sent_bytes,
            })
        })
    }

    fn read(&self) -> RouteStats {
        RouteStats {
            n_requests: self.n_requests.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
        }
    }
}

/// A body that counts what passes through it.
struct Counted {
    body: Body,
    route: Arc<Route>,
    counter: fn(&Route) -> &AtomicU64,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = frame
            .as_ref()
            .and_then(|frame| frame.as_ref().ok())
            .and_then(Frame::data_ref)
        {
            (self.counter)(&self.route).fetch_add(data.len() as u64, Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
