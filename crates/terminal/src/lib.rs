//! What a person at a terminal meets, the same in every program: how a failure reads, where results and progress
//! go, which exit status means what, how a program is told to stop, how long it waits for weight servers.
//!
//! Invariant: only [`finish`] prints a failure and decides the exit status: 0 done, 1 failed, 130 interrupted (2,
//! wrong usage, is clap's). No text here can hold a token: the errors of the libraries hold none.

mod failure;
mod meter;
mod output;
mod patience;
mod secret;
mod stop;

use std::io;
use std::process::ExitCode;

pub use failure::Failure;
pub use meter::{Meter, size};
pub use output::{Output, json_line, tell, write};
pub use patience::Patience;
pub use secret::read_secret;
pub use stop::Stop;

/// Exit status of a program that an interrupt ended.
pub const INTERRUPTED: u8 = 130;

/// Sends the logs of all crates to standard error: warnings, or what `RUST_LOG` asks for.
pub fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would panic where nobody reads standard error.
        .log_internal_errors(false)
        .init();
}

/// Shows how a command ended and turns that into an exit status.
pub fn finish(ended: Result<(), Failure>, output: Output) -> ExitCode {
    let failure = match ended {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    if !matches!(failure, Failure::Shown) {
        tell(&failure);
        // Nothing is left to be done when this cannot be written either.
        let _ = output.value(&failure.to_json());
    }
    match failure {
        Failure::Interrupted => ExitCode::from(INTERRUPTED),
        _ => ExitCode::FAILURE,
    }
}

/// Writes the completion script of the program `name` for a shell to standard output.
///
/// # Errors
/// When standard output cannot be written.
pub fn completions<Cli: clap::CommandFactory>(
    shell: clap_complete::Shell,
    name: &str,
) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), name, &mut script);
    write(&String::from_utf8_lossy(&script))
}
