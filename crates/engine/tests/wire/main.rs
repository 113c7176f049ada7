//! The seam over sockets: the conformance suite of `FeedForward`, what servers that fail do to a call, and hostile peers.

mod conformance;
mod failure;
mod hostile;
mod oracle;
mod raw;
mod split;
