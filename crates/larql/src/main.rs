//! The weight operator's tool: extract a vindex from a checkpoint, publish it, pull it, verify it, read it.
//!
//! A thin layer: `vindex` makes and checks directories, `hub` reads and commits, and each command here says in one
//! file what it does with them. `cli` names the arguments, `model` finds a checkpoint, `output` prints.
//!
//! Invariant: only this module prints failures and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted. What is
//! interrupted can be run again. No message holds a token.

mod cli;
mod context;
mod directory;
mod extract;
mod failure;
mod model;
mod output;
mod publish;
mod pull;
mod verify;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};
use context::Context;
use failure::Failure;
use output::Output;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    let output = Output { json: cli.json };
    match Context::new(output).and_then(|context| run(&cli.command, &context)) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}");
            // Nothing is left to be done when this cannot be written either.
            let _ = output.value(&failure.to_json());
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Extract(args) => extract::extract(args, context),
        Command::Publish(args) => publish::publish(args, context),
        Command::Pull(args) => pull::pull(args, context),
        Command::Verify { dir } => verify::verify(dir, context),
        Command::Dump { dir } => verify::dump(dir, context),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "larql", &mut script);
            output::write(&String::from_utf8_lossy(&script))
        }
    }
}
