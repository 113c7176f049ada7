//! The seam over sockets: the conformance suite of `FeedForward`, what servers that fail do to a call, and hostile peers.

mod changes;
mod conformance;
mod failure;
mod frames;
mod greed;
mod greeting;
mod liars;
mod oracle;
mod raw;
mod setup;
mod split;
mod stats;
