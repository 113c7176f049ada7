//! A Hub-compatible server over a directory: for clusters without internet, for tests, and as the embedded default.
//!
//! It answers the calls that clients of the Hugging Face Hub make (repositories, commits, LFS uploads, ranged downloads,
//! collections, model cards) from files under one folder. One invariant: whatever was acknowledged is on the disk, whole,
//! and is found again after the process was killed at any moment; whatever was not acknowledged is either there whole or
//! not at all. Left out: Xet, pull requests, user accounts (one token owns everything), collecting unused blobs.
//!
//! ```text
//! listen ── http/* (routes, bodies, errors) ── repos, collections ── history ── blobs ── disk
//! ```

mod blobs;
mod card;
mod clock;
mod collections;
mod disk;
mod error;
mod history;
mod http;
mod names;
mod repos;

use std::path::Path;
use std::sync::Arc;

pub use crate::error::Error;
pub use crate::http::Options;
pub use crate::http::listen::{Running, serve, spawn};
pub use crate::http::stats::{RouteStats, Stats};

/// A registry's folder, opened. Clones share it; several processes may open the same folder.
#[derive(Debug, Clone)]
pub struct Registry {
    disk: Arc<disk::Disk>,
}

impl Registry {
    /// Opens the folder, making it where it is not there, and removes the unfinished files of processes that died.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written, [`Error::Corrupt`] when it belongs to something else.
    pub fn open(root: &Path) -> Result<Registry, Error> {
        Ok(Registry {
            disk: Arc::new(disk::Disk::open(root)?),
        })
    }
}
