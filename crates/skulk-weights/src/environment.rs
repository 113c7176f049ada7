//! What the process was given: directories, variables, and a runtime when something must wait for the network.
//!
//! Invariant: this is the only module that reads the process environment.

use std::future::Future;
use std::path::{Path, PathBuf};

use terminal::Failure;

use crate::scratch;

/// The working directory and the home directory; variables are read when asked for.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    pub(crate) working_dir: PathBuf,
    pub(crate) home: Option<PathBuf>,
}

impl Environment {
    /// That of this process.
    pub(crate) fn of_process() -> Result<Environment, Failure> {
        let working_dir = std::env::current_dir().map_err(|error| {
            Failure::new("cannot tell the working directory")
                .cause(error)
                .hint("change into a directory that exists")
        })?;
        let home = ["HOME", "USERPROFILE"]
            .into_iter()
            .find_map(std::env::var_os)
            .filter(|home| !home.is_empty());
        Ok(Environment {
            working_dir,
            home: home.map(PathBuf::from),
        })
    }

    /// The variable, when it is set to text.
    pub(crate) fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    /// The directories in which programs are looked for.
    pub(crate) fn path(&self) -> Vec<PathBuf> {
        std::env::var_os("PATH")
            .map(|path| std::env::split_paths(&path).collect())
            .unwrap_or_default()
    }

    /// The scratch directory, with the option that names one.
    pub(crate) fn scratch(&self, option: Option<&Path>) -> PathBuf {
        scratch::root(
            option,
            std::env::var_os(scratch::VARIABLE).as_deref(),
            &self.working_dir,
            self.home.as_deref(),
        )
    }

    /// The Hub's settings in the variables that all of its clients read.
    pub(crate) fn hub_settings(&self) -> Result<hub::Settings, Failure> {
        hub::Settings::from_vars(|name| self.var(name))
            .map_err(|error| Failure::new("cannot use the Hub's settings").cause(error))
    }

    /// Waits for `future` on a runtime of its own.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> Result<T, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build();
        Ok(runtime
            .map_err(|error| Failure::new("cannot start threads").cause(error))?
            .block_on(future))
    }
}
