//! What a command is given by the process: where results go, the Hub that the environment names, a runtime to wait
//! on, and the parent whose end it shares.
//!
//! Invariant: this is the only module that reads the process environment. A checkpoint on the Hub is read by threads
//! that wait on the runtime, so nothing here runs on its workers.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hub::{Hub, Settings};
use terminal::{Failure, INTERRUPTED, Output, Stop, tell};
use tokio::runtime::Runtime;

/// Names the process that this one is a step of, and ends with.
#[cfg(target_os = "linux")]
const PARENT_VARIABLE: &str = "LARQL_PARENT";

/// The surroundings of a command.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) output: Output,
    runtime: Runtime,
    /// What is removed when the process is told to end.
    scratch: Arc<Mutex<Option<PathBuf>>>,
}

impl Context {
    pub(crate) fn new(output: Output) -> Result<Context, Failure> {
        end_with_parent();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build();
        Ok(Context {
            output,
            runtime: runtime.map_err(Failure::of("cannot start threads"))?,
            scratch: Arc::default(),
        })
    }

    /// Waits for `future`.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// The Hub of the environment.
    pub(crate) fn hub(&self) -> Result<Hub, Failure> {
        let settings = Settings::from_vars(|name| std::env::var(name).ok());
        settings
            .and_then(Hub::new)
            .map_err(Failure::of("cannot use the Hub"))
    }

    /// What weight servers and nodes must both know, from the environment.
    pub(crate) fn secret(&self) -> Option<String> {
        let secret = std::env::var("SKULK_SECRET").ok()?;
        Some(secret.trim().to_owned()).filter(|secret| !secret.is_empty())
    }

    /// Where pulled vindexes are kept when the command line does not say.
    pub(crate) fn cache(&self) -> Result<PathBuf, Failure> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")));
        let caches = caches.ok_or_else(|| {
            Failure::new("it is unknown where to keep what is pulled: neither XDG_CACHE_HOME nor HOME is set")
                .hint("name a directory with --cache")
        })?;
        Ok(caches.join("skulk"))
    }

    /// Takes interrupts and requests to terminate from here on; none ends the process by itself any longer.
    pub(crate) fn stop(&self) -> Result<Stop, Failure> {
        let _in_runtime = self.runtime.enter();
        Stop::new().map_err(Failure::of("cannot listen for signals"))
    }

    /// Runs `future` beside whatever the command does.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(future);
    }

    /// From now on, an interrupt ends the process after it has said `state`. Everything on disk is left as a kill
    /// would leave it, which every command can go on from.
    pub(crate) fn on_interrupt(&self, state: &'static str) {
        let scratch = Arc::clone(&self.scratch);
        self.runtime.spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                remove_scratch(&scratch);
                tell(format_args!("interrupted: {state}"));
                std::process::exit(INTERRUPTED.into());
            }
        });
    }

    /// From now on, a vindex in `dir` is removed when the process is interrupted (after [`Context::on_interrupt`]) or asked
    /// to terminate, which ends it.
    pub(crate) fn scratch(&self, dir: PathBuf) -> Result<(), Failure> {
        *self.scratch.lock().unwrap_or_else(PoisonError::into_inner) = Some(dir);
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let _in_runtime = self.runtime.enter();
            let terminated = signal(SignalKind::terminate());
            let mut terminated = terminated.map_err(Failure::of("cannot listen for signals"))?;
            let scratch = Arc::clone(&self.scratch);
            self.runtime.spawn(async move {
                if terminated.recv().await.is_some() {
                    remove_scratch(&scratch);
                    std::process::exit(TERMINATED);
                }
            });
        }
        Ok(())
    }
}

/// Exit status of a process that was asked to terminate, as shells tell it.
#[cfg(unix)]
const TERMINATED: i32 = 128 + 15;

fn remove_scratch(scratch: &Mutex<Option<PathBuf>>) {
    if let Some(dir) = scratch
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
    {
        crate::calibrate::remove(&dir);
    }
}

/// Has the system end this process when its parent ends, killed or not, if that is the process that
/// [`PARENT_VARIABLE`] names. Nothing is lost: the next run goes on from what is on disk.
#[cfg(target_os = "linux")]
fn end_with_parent() {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    let named = std::env::var(PARENT_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get());
    if named.is_some() && parent == named {
        // Without it, the lock of the output tells the next run that this one still works.
        let _ = set_parent_process_death_signal(Some(Signal::TERM));
    }
}

/// Other systems have no such signal; the lock of the output tells the next run that this one still works.
#[cfg(not(target_os = "linux"))]
fn end_with_parent() {}
