//! The project's own chores, as `cargo xtask COMMAND`: the demo that the README promises, llama.cpp as a second
//! reader of what we write, the benches against it, and bad networks. Nothing here is part of what users install.

mod bench;
mod build;
mod calibration;
mod checkpoint;
mod drafting;
mod failure;
mod fleet;
mod llama_cpp;
mod peers;
mod predicted;
mod proxy;
mod real;
mod speed;

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
    /// Build the programs; publish a real small model to a Hub on this machine, serve it split and ask it something.
    Demo {
        /// Arguments for `skulk demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Open our vindexes in llama.cpp and compare what it writes (needs PyPI; builds llama.cpp once).
    Peers,
    /// Build programs of llama.cpp where they are not there (from PyPI), and print their folder.
    LlamaCpp {
        /// Such as llama-perplexity.
        #[arg(required = true)]
        tools: Vec<String>,
    },
    /// Measure against llama.cpp on this machine (builds it once).
    Bench {
        /// What is measured.
        #[arg(value_enum)]
        what: What,
    },
    /// Weight servers that die, stop, lose their cable and come back as others, in the middle of generations: the table
    /// of docs/failure.md with real processes.
    Failure {
        /// How often each failure is repeated.
        #[arg(long, default_value_t = 100)]
        rounds: usize,
        /// The failures whose name has this in it, and no others.
        #[arg(long, default_value = "")]
        only: String,
        /// The larql to use [default: built now]
        #[arg(long)]
        larql: Option<std::path::PathBuf>,
    },
    /// A bad network: passes bytes on from one address to another (`HOST:PORT` or `unix:/path`), late, in bursts, or
    /// only so many.
    Proxy {
        /// Where it listens.
        #[arg(long)]
        listen: String,
        /// Where the bytes go.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        network: proxy::Network,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// Extraction to q4k against llama-quantize.
    Extract,
    /// Decoding and prefill against llama-bench, split and unsplit.
    Serve,
    /// Decoding and prefill of real weights in GGUF against llama-bench on the same files.
    Real,
    /// Serving with guesses against serving without, unsplit and over a slow link.
    Draft,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo { arguments } => build::demo(&arguments),
        Command::Peers => peers::run_peers(),
        Command::LlamaCpp { tools } => {
            let tools: Vec<&str> = tools.iter().map(String::as_str).collect();
            llama_cpp::programs(&tools).map(|folder| println!("{}", folder.display()))
        }
        Command::Bench {
            what: What::Extract,
        } => bench::run(),
        Command::Bench { what: What::Serve } => speed::run(),
        Command::Bench { what: What::Real } => real::bench(),
        Command::Bench { what: What::Draft } => drafting::run(),
        Command::Failure {
            rounds,
            only,
            larql,
        } => failure::run(rounds, &only, larql),
        Command::Proxy {
            listen,
            to,
            network,
        } => proxy::run(&listen, &to, network),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
