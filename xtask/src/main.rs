//! The project's own chores, as `cargo xtask COMMAND`: the demo that the README promises, llama.cpp as a second
//! reader of what we write, and the bench of extraction. Nothing here is part of what users install.

mod bench;
mod build;
mod checkpoint;
mod peers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "The project's own chores")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the programs and publish a real small model to a registry on this machine.
    Demo {
        /// Arguments for `skulk-weights demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Open our vindexes in llama.cpp and compare what it writes (needs PyPI; builds llama.cpp once).
    Peers,
    /// Measure extraction against llama-quantize on this machine (needs what `peers` built).
    Bench,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo { arguments } => build::demo(&arguments),
        Command::Peers => peers::run_peers(),
        Command::Bench => bench::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
