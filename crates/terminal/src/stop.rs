//! Requests to stop: an interrupt (Ctrl-C), or a request to terminate where the system has one.
//!
//! Invariant: from the moment that it is made none ends the process by itself, and none is missed. What a program does
//! when it is told is its own affair.

use std::io;
#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Hears requests to stop, from the moment that it is made.
#[derive(Debug)]
pub struct Stop {
    #[cfg(unix)]
    interrupted: Signal,
    #[cfg(unix)]
    terminated: Signal,
}

impl Stop {
    /// Begins to listen; within a runtime of tokio.
    ///
    /// # Errors
    /// When the system refuses.
    ///
    /// # Panics
    /// Outside of a runtime.
    #[cfg(unix)]
    pub fn new() -> io::Result<Stop> {
        Ok(Stop {
            interrupted: signal(SignalKind::interrupt())?,
            terminated: signal(SignalKind::terminate())?,
        })
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// Never: here the system is asked at each [`Stop::told`].
    #[cfg(not(unix))]
    pub fn new() -> io::Result<Stop> {
        Ok(Stop {})
    }

    /// Resolves at the next request.
    pub async fn told(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.interrupted.recv() => {}
            _ = self.terminated.recv() => {}
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
