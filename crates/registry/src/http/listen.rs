//! The listener: accepts connections, and ends in good order.
//!
//! Invariant: beyond loopback nothing is served without a token. Every connection has a deadline for its headers and for
//! silence in either direction; at shutdown requests under way may finish within a grace period.

use std::future::Future;
use std::net::Ipv4Addr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Sleep;

use super::stats::{Counters, Stats};
use super::{App, Options, router};
use crate::{Error, Registry};

const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(10);
const CONNECTIONS_MAX: usize = 4096;

/// Serves a registry until `shutdown` resolves; then requests under way have 10 s to finish.
///
/// # Errors
/// [`Error::TokenRequired`] when the listener is reachable from other machines and `options` has no token.
pub async fn serve(
    registry: Registry,
    listener: TcpListener,
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    run(listener, Arc::new(App::new(registry, options)), shutdown).await
}

async fn run(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let address = listener
        .local_addr()
        .map_err(Error::io("listen at", Path::new("the address given")))?;
    if !address.ip().is_loopback() && app.options.token.as_deref().is_none_or(str::is_empty) {
        return Err(Error::TokenRequired { address });
    }
    let idle = app.options.idle_timeout;
    let router = router(app);
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &slots) => accepted,
            () = &mut shutdown => break,
        };
        let (stream, slot) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Most often too many open files: others must end first.
                tracing::warn!(error = %e, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let io = TokioIo::new(Patient {
            stream,
            idle,
            deadline: None,
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(io, TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!(error = %e, "connection ended");
            }
            drop(slot);
        });
    }
    drop(listener);
    if tokio::time::timeout(GRACE, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("requests were cut off at shutdown");
    }
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = slots
        .clone()
        .acquire_owned()
        .await
        .map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, slot))
}

/// A connection whose writes fail when the other side takes nothing for too long. Reading needs no such bound here:
/// headers and bodies have deadlines of their own, and while an answer is on its way silence is no fault.
struct Patient {
    stream: TcpStream,
    idle: Duration,
    /// Runs while a write is waiting.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    /// Passes on what is ready, and turns waiting into an error after `idle`.
    fn bounded<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: Poll<std::io::Result<T>>,
    ) -> Poll<std::io::Result<T>> {
        if poll.is_ready() {
            self.deadline = None;
            return poll;
        }
        let idle = self.idle;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A registry that serves on a free port of 127.0.0.1 from a thread of its own, until dropped.
#[derive(Debug)]
pub struct Running {
    url: String,
    counters: Arc<Counters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Opens the folder and serves it on a free port of 127.0.0.1, from a thread of its own: usable from any program,
/// asynchronous or not.
///
/// # Errors
/// As [`Registry::open`]; [`Error::Io`] when no port or thread can be had.
pub fn spawn(root: &Path, options: Options) -> Result<Running, Error> {
    let failed = || Error::io("serve", root);
    let registry = Registry::open(root)?;
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())?;
    listener.set_nonblocking(true).map_err(failed())?;
    let url = format!("http://{}", listener.local_addr().map_err(failed())?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failed())?;
    let app = Arc::new(App::new(registry, options));
    let counters = app.counters.clone();
    let (stop, stopped) = oneshot::channel();
    let work = move || {
        let served = runtime.block_on(async {
            let listener = TcpListener::from_std(listener)
                .map_err(Error::io("listen at", Path::new("127.0.0.1")))?;
            // The sender going away means the same as its word.
            run(listener, app, async { stopped.await.unwrap_or_default() }).await
        });
        if let Err(e) = served {
            tracing::error!(error = %e, "the registry ended");
        }
    };
    let thread = std::thread::Builder::new()
        .name("registry".to_owned())
        .spawn(work)
        .map_err(failed())?;
    Ok(Running {
        url,
        counters,
        stop: Some(stop),
        thread: Some(thread),
    })
}

impl Running {
    /// Where it is reached, such as `http://127.0.0.1:41234`; without a slash at the end.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.stats()
    }

    /// Ends it, after the requests under way.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there was reported when it happened.
            let _ = thread.join();
        }
    }
}
