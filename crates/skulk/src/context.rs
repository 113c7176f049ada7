//! What a command is given by the process: the environment, the Hub it names, and a runtime to wait on.
//!
//! Invariant: this is the only module that reads the process environment.

use std::future::Future;
use std::path::PathBuf;

use hub::{Hub, Settings};
use terminal::{Failure, Stop};
use tokio::runtime::Runtime;

/// The surroundings of a command.
#[derive(Debug)]
pub(crate) struct Context {
    runtime: Runtime,
}

impl Context {
    pub(crate) fn new() -> Result<Context, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        Ok(Context {
            runtime: runtime.map_err(Failure::of("cannot start threads"))?,
        })
    }

    /// Waits for `future`.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Takes interrupts and requests to terminate from here on; none ends the process by itself any longer.
    pub(crate) fn stop(&self) -> Result<Stop, Failure> {
        let _in_runtime = self.runtime.enter();
        Stop::new().map_err(Failure::of("cannot listen for signals"))
    }

    /// The Hub of the environment.
    pub(crate) fn hub(&self) -> Result<Hub, Failure> {
        let settings = Settings::from_vars(variable);
        settings
            .and_then(Hub::new)
            .map_err(Failure::of("cannot use the Hub"))
    }

    /// The keys of the environment.
    pub(crate) fn api_keys(&self) -> Option<String> {
        variable("SKULK_API_KEY")
    }

    /// The secret of the environment.
    pub(crate) fn secret(&self) -> Option<String> {
        let secret = variable("SKULK_SECRET")?.trim().to_owned();
        Some(secret).filter(|secret| !secret.is_empty())
    }

    /// Where pulled vindexes are kept when the command line does not say.
    pub(crate) fn cache(&self) -> PathBuf {
        let home = || PathBuf::from(variable("HOME").unwrap_or_default());
        variable("XDG_CACHE_HOME")
            .filter(|dir| !dir.is_empty())
            .map_or_else(|| home().join(".cache"), PathBuf::from)
            .join("skulk")
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
