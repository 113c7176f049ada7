//! The node: runs attention, asks weight servers for feed-forward rows, and speaks the OpenAI API.
//!
//! Read in this order: [`request`] (what a client may ask), `api` (the routes, and a request's way through the engine
//! and back), `serve` (how a node comes up and goes away), [`plan`] (what a node would do on other machines), `demo`
//! (all of it on this machine).
//!
//! Invariant: nothing here ends the process but by returning from [`main`]; `terminal` decides the exit status.

mod api;
mod cli;
mod context;
mod demo;
mod error;
mod keys;
mod listen;
mod metrics;
mod model;
pub mod plan;
pub mod request;
mod serve;

use std::process::ExitCode;

use clap::Parser;
use terminal::{Failure, Output};

use cli::{Cli, Command};
use context::Context;

/// The program: reads the command line, runs the command, tells how it ended.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::start_logging();
    let output = Output { json: cli.json };
    let ended = Context::new().and_then(|context| run(&cli.command, &context, output));
    terminal::finish(ended, output)
}

fn run(command: &Command, context: &Context, output: Output) -> Result<(), Failure> {
    match command {
        Command::Serve(args) => serve::serve(args, context, output),
        Command::Plan(args) => plan::run(args, context, output),
        Command::Demo(args) => demo::demo(args, context, output),
        Command::Completions { shell } => terminal::completions::<Cli>(*shell, "skulk"),
    }
}
