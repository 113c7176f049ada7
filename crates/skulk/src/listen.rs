//! The listener: accepts connections, and ends in good order.
//!
//! Invariant: there is a bound for connections, a deadline for headers, and one for a reader that takes nothing, so
//! that nobody can hold memory or sockets by doing nothing. Beyond the bound, the connection that has been open longest
//! without an answer under way makes room: whoever means well is let in at once. What is under way at a stop may finish
//! within a grace.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::Sleep;

/// Of a request's headers and of what is read ahead of a handler.
const BUFFER_BYTES: usize = 64 << 10;
const CONNECTIONS_MAX: usize = 4096;
/// Files that a process has open beside its clients' connections.
const FILES_BESIDE: usize = 256;

/// The bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time.
    pub(crate) connections: usize,
    /// From a connection, or from the end of an answer, to the end of the next request's headers.
    pub(crate) header: Duration,
    /// How long a client may take nothing of an answer.
    pub(crate) idle: Duration,
}

impl Limits {
    /// As many connections as the process may have files for, once it has asked for all that it may have.
    pub(crate) fn of_process() -> Limits {
        let n_files = files_max().unwrap_or(CONNECTIONS_MAX + FILES_BESIDE);
        Limits {
            connections: n_files
                .saturating_sub(FILES_BESIDE)
                .max(n_files / 2)
                .clamp(1, CONNECTIONS_MAX),
            header: Duration::from_secs(60),
            idle: Duration::from_secs(60),
        }
    }
}

/// Raises the process's bound of open files as far as it may be raised; the bound.
#[cfg(target_os = "linux")]
fn files_max() -> Option<usize> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = (CONNECTIONS_MAX + FILES_BESIDE) as u64;
    let raised = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let current = current?;
    if current >= raised {
        return Some(current as usize);
    }
    let new = Rlimit {
        current: Some(raised),
        maximum,
    };
    let bound = setrlimit(Resource::Nofile, new).map_or(current, |()| raised);
    Some(bound as usize)
}

/// Elsewhere the bound of the system is met when it is met.
#[cfg(not(target_os = "linux"))]
fn files_max() -> Option<usize> {
    None
}

/// An open connection, as the listener and the handlers of its requests see it.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    n_answers: AtomicUsize,
    /// It has to make room.
    given_up: Notify,
}

/// An answer is under way on a connection: it keeps its seat.
#[derive(Debug)]
pub(crate) struct Engaged(Arc<Seat>);

impl Seat {
    /// From here until the value is dropped an answer is under way.
    pub(crate) fn engage(self: &Arc<Seat>) -> Engaged {
        self.n_answers.fetch_add(1, Ordering::Relaxed);
        Engaged(self.clone())
    }
}

impl Drop for Engaged {
    fn drop(&mut self) {
        self.0.n_answers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The open connections, the oldest first.
#[derive(Debug, Default)]
struct Seats {
    open: Mutex<BTreeMap<u64, Arc<Seat>>>,
}

impl Seats {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Seat>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat for connection `id`, if need be that of another; `None` when all others have answers under way.
    fn take(&self, id: u64, connections_max: usize) -> Option<Arc<Seat>> {
        let mut open = self.lock();
        if open.len() >= connections_max {
            let is_free = |seat: &Arc<Seat>| seat.n_answers.load(Ordering::Relaxed) == 0;
            let oldest = *open.iter().find(|(_, seat)| is_free(seat))?.0;
            if let Some(seat) = open.remove(&oldest) {
                seat.given_up.notify_one();
            }
        }
        let seat = Arc::new(Seat::default());
        open.insert(id, seat.clone());
        Some(seat)
    }
}

/// Serves until `stop` resolves, then lets what is under way finish until `cut` does.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: impl Future<Output = ()>,
    cut: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let seats = Arc::new(Seats::default());
    let mut stop = std::pin::pin!(stop);
    for id in 0.. {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Most often too many open files: others must end first.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(seat) = seats.take(id, limits.connections) else {
            continue;
        };
        let io = TokioIo::new(Patient {
            stream,
            deadline: None,
            limit: limits.idle,
        });
        let service = Seated {
            inner: TowerToHyperService::new(router.clone()),
            seat: seat.clone(),
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header)
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(io, service);
        let connection = graceful.watch(connection);
        let seats = seats.clone();
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                },
                () = seat.given_up.notified() => tracing::debug!("connection made room"),
            }
            seats.lock().remove(&id);
        });
    }
    drop(listener);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = cut => tracing::warn!("requests were cut off"),
    }
}

async fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The routes, with the connection's [`Seat`] among the extensions of each request.
struct Seated {
    inner: TowerToHyperService<Router>,
    seat: Arc<Seat>,
}

impl Service<Request<Incoming>> for Seated {
    type Response = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.seat.clone());
        self.inner.call(request)
    }
}

/// A connection whose writes fail when the other side takes nothing for too long.
struct Patient {
    stream: TcpStream,
    /// Runs while a write is waiting.
    deadline: Option<Pin<Box<Sleep>>>,
    limit: Duration,
}

impl Patient {
    fn bounded<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.deadline = None;
            return poll;
        }
        let limit = self.limit;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bounded(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.bounded(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use axum::Extension;
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Answers on `/` at once, on `/slow` after a second, on `/body` when the body is there, and keeps the seat of the
    /// last two as the API does.
    fn router() -> Router {
        let slow = |Extension(seat): Extension<Arc<Seat>>| async move {
            let _engaged = seat.engage();
            tokio::time::sleep(Duration::from_secs(1)).await;
            "slow"
        };
        let body = |Extension(seat): Extension<Arc<Seat>>, body: String| async move {
            let _engaged = seat.engage();
            body
        };
        Router::new()
            .route("/", get(|| async { "here" }))
            .route("/slow", get(slow))
            .route("/body", post(body))
    }

    async fn listening(connections: usize) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let limits = Limits {
            connections,
            header: Duration::from_millis(300),
            idle: Duration::from_millis(300),
        };
        let never = || std::future::pending();
        tokio::spawn(serve(listener, router(), limits, never(), never()));
        address
    }

    async fn say(address: std::net::SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(text.as_bytes()).await.expect("it is sent");
        stream
    }

    /// All that comes until the other end closes.
    async fn rest(mut stream: TcpStream) -> String {
        let mut bytes = Vec::new();
        let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes));
        // A reset says as well as an end that the connection is over.
        let _ = reading.await.expect("the connection is closed");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn is_answered(address: std::net::SocketAddr) {
        let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let text = rest(say(address, request).await).await;
        assert!(text.ends_with("here"), "{text}");
    }

    #[tokio::test]
    async fn whoever_says_nothing_makes_room() {
        let address = listening(4).await;
        let mut silent = Vec::new();
        for _ in 0..40 {
            silent.push(say(address, "").await);
            is_answered(address).await;
        }
        for stream in silent {
            assert_eq!(rest(stream).await, "");
        }
    }

    #[tokio::test]
    async fn an_answer_under_way_keeps_its_seat_and_a_slow_body_does_not() {
        let address = listening(4).await;
        let slow = say(
            address,
            "GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        )
        .await;
        let half = "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf";
        let half = say(address, half).await;
        // The first has been heard before the flood begins.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut flood = Vec::new();
        for _ in 0..20 {
            is_answered(address).await;
            flood.push(say(address, "GET / HT").await);
        }
        assert!(rest(slow).await.ends_with("slow"));
        assert_eq!(rest(half).await, "");
    }

    #[tokio::test]
    async fn heads_that_do_not_end_are_cut_off() {
        let address = listening(4).await;
        for begun in ["", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nhost: x\r\nx: "] {
            let began = tokio::time::Instant::now();
            let text = rest(say(address, begun).await).await;
            assert!(!text.contains("200 OK"), "{text}");
            assert!(began.elapsed() < Duration::from_secs(10));
        }
        // And those that never end at all, by their size.
        let mut stream = say(address, "GET / HTTP/1.1\r\nhost: x\r\n").await;
        let line = format!("x: {}\r\n", "y".repeat(1000));
        let mut n_bytes = 0;
        while stream.write_all(line.as_bytes()).await.is_ok() {
            n_bytes += line.len();
            assert!(n_bytes < 64 << 20, "a head without an end is read for ever");
        }
        is_answered(address).await;
    }
}
