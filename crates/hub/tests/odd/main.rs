//! The client against a Hub that cuts, lies, stalls, redirects and refuses.

mod hub_server;
mod read;
mod write;
