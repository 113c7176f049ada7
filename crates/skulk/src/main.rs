//! The node: places layers and experts, runs attention, speaks the OpenAI API.
//!
//! Invariant: only this file ends the process.

use clap::Parser;

/// Serves a published model: attention here, feed-forward weights from weight servers.
#[derive(Debug, Parser)]
#[command(name = "skulk", version)]
struct Cli {}

fn main() {
    let Cli {} = Cli::parse();
}
