//! The weight operator's tool: extract a vindex from a checkpoint, publish it, pull it, serve it, verify it, read it,
//! compute with it.
//!
//! A thin layer: `vindex` makes and checks directories, `hub` reads and commits, `engine` computes, and each command here
//! says in one file what it does with them. `cli` names the arguments, `model` finds a checkpoint, `pass` opens a model.
//!
//! Invariant: a command that was interrupted or killed can be run again.

mod bench;
mod calibrate;
mod cli;
mod context;
mod extract;
mod http;
mod logits;
mod model;
mod pass;
mod perplexity;
mod publish;
mod pull;
mod run;
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
        Command::Run(args) => run::run(args, context),
        Command::Logits(args) => logits::logits(args, context),
        Command::Imatrix(args) => calibrate::imatrix(args, context),
        Command::Perplexity(args) => perplexity::perplexity(args, context),
        Command::Bench(args) => bench::bench(args, context),
        Command::Completions { shell } => terminal::completions::<Cli>(*shell, "larql"),
    }
}
