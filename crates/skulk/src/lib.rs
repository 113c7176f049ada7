//! The node: runs attention, asks weight servers for feed-forward rows, and speaks the OpenAI API.
//!
//! Read in this order: [`request`] (what a client may ask).
//!
//! Invariant: nothing here ends the process; the program does.

mod error;
pub mod request;
