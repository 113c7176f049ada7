//! What the Hugging Face Hub is to us: read a range, take a snapshot, make one commit, file a
//! repository into a collection.
//!
//! Route of a request: a public method builds an address below [`Settings::endpoint`]; `wire` sends it,
//! follows redirects by hand (the token stays with the endpoint's own origin), retries what passes by
//! itself until [`Settings::give_up_after`], and turns a refusal into the [`Error`] variant that says
//! what to do. Reads are pinned: [`Hub::snapshot`] resolves a revision to its commit once, and every
//! byte of a [`Snapshot`] comes from that commit. Writes are one commit: [`Hub::commit`] sends only
//! what the head does not hold, large files first (Xet, LFS basic or multipart, always streamed).
//!
//! Invariant: no request without a deadline, no token to another origin, no second commit for one call.
//! Left out: datasets, spaces, branches and pull requests, and the shared download cache of other
//! clients. Xet uploads are `hf-xet`'s; everything else is plain HTTP over `reqwest`, because `hf-hub`
//! reads the environment by itself, repeats commits, drops the token's role and inlines large files
//! when a Hub has no Xet.

pub mod card;
mod collection;
mod commit;
mod content;
mod download;
mod error;
mod id;
mod lfs;
mod partial;
mod published;
mod range;
mod repo;
mod retry;
mod settings;
mod snapshot;
mod token;
mod wire;
mod xet;

use std::sync::Arc;

pub use collection::{Collection, Filed};
pub use commit::{Addition, CommitReport, CommitRequest, Content, Upload};
pub use download::{Download, Downloaded};
pub use error::{Answer, Error};
pub use id::{Commit, Reference, RepoId};
pub use published::{Cached, Published, PullError, Pulled, Pulling, Wanted, cached_vindex};
pub use repo::{Created, ModelInfo, Org, Right, Role, WhoAmI};
pub use settings::Settings;
pub use snapshot::{File, Snapshot};
pub use token::Token;

use wire::Wire;

/// A Hub: its address, our credentials and a pool of connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hub {
    wire: Arc<Wire>,
}

impl Hub {
    /// A client of the Hub that `settings` name. Sends nothing yet.
    ///
    /// # Errors
    /// [`Error::Setting`] when the endpoint is not an `http(s)` address.
    pub fn new(settings: Settings) -> Result<Hub, Error> {
        Ok(Hub {
            wire: Arc::new(Wire::new(settings)?),
        })
    }

    /// The Hub's address, without a trailing slash.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.wire.settings().endpoint
    }

    /// The settings this client was made with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        self.wire.settings()
    }

    /// The page of a repository, for people: `{endpoint}/{owner}/{name}`.
    #[must_use]
    pub fn page(&self, repo: &RepoId) -> String {
        format!("{}/{repo}", self.endpoint())
    }
}
