//! The weight operator's tool: extract a vindex from a checkpoint, publish it, pull it, serve it, verify it, read it.
//!
//! A thin layer: `vindex` makes and checks directories, `hub` reads and commits, and each command here says in one
//! file what it does with them. `cli` names the arguments, `model` finds a checkpoint.
//!
//! Invariant: a command that was interrupted or killed can be run again.

mod cli;
mod context;
mod extract;
mod http;
mod model;
mod publish;
mod pull;
mod serve;
mod verify;

use std::process::ExitCode;

use clap::Parser;
use terminal::{Failure, Output};

use cli::{Cli, Command};
use context::Context;

fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::start_logging();
    let output = Output { json: cli.json };
    terminal::finish(
        Context::new(output).and_then(|context| run(&cli.command, &context)),
        output,
    )
}

fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Extract(args) => extract::extract(args, context),
        Command::Publish(args) => publish::publish(args, context),
        Command::Pull(args) => pull::pull(args, context),
        Command::Serve(args) => serve::serve(args, context),
        Command::Verify { dir } => verify::verify(dir, context),
        Command::Dump { dir } => verify::dump(dir, context),
        Command::Completions { shell } => terminal::completions::<Cli>(*shell, "larql"),
    }
}
