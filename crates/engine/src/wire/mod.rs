//! Feed-forward rows over sockets: [`Remote`] asks, [`Server`] answers, `docs/wire.md` draws what they say.
//!
//! Read in this order: `frame` (the bytes), `hello` (the handshake), `server` and `queue` (answering), `remote`, `call`
//! and `peers` (asking, and asking somebody else).
//!
//! Invariant: everything that waits has a limit, and everything that a peer sends is judged before it is used.

mod address;
mod call;
mod frame;
#[cfg(any(fuzzing, test))]
mod fuzz;
mod hello;
mod inlet;
mod leg;
mod outlet;
mod peers;
mod queue;
mod refusal;
mod remote;
mod rows;
mod secret;
mod server;
mod server_stats;
mod socket;

pub use address::{Address, NoAddress};
#[cfg(any(fuzzing, test))]
pub use fuzz::fuzz_frames;
pub use hello::Identity;
pub use refusal::Refusal;
pub use remote::{ConnectError, PeerStats, Remote, RemoteOptions, RemoteStats};
pub use rows::{NoRowType, RowType};
pub use secret::Secret;
pub use server::{Server, ServerLimits, ServerOptions};
pub use server_stats::{Histogram, ServerStats};
pub use socket::Listener;
