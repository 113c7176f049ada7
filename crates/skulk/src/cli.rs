//! The command line: names, options and their help, and nothing that acts on them.

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use engine::wire::{Address, RowType};
use engine::{DraftChoice, KvType};
use terminal::Patience;

use crate::model::Model;
use crate::plan::Bytes;

/// Serve a published model: attention here, feed-forward weights from weight servers.
#[derive(Debug, Parser)]
#[command(name = "skulk", version, subcommand_required = true)]
pub(crate) struct Cli {
    /// Tell results as JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model over the OpenAI API
    Serve(Box<Serve>),
    /// Predict speed, memory and cost of a model on machines that a file describes
    Plan(Plan),
    /// Publish a small model to a Hub on this machine, serve it split in two processes, and ask it something
    Demo(Demo),
    /// Print a completion script for a shell
    Completions {
        /// The shell that reads the script
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// A vindex, else `owner/name[@revision]` on the Hub; a directory that exists wins
    pub(crate) model: Model,
    /// Weight servers, HOST:PORT or unix:/path; without any, all weights are held here
    #[arg(long, value_name = "ADDRESS,…", value_delimiter = ',')]
    pub(crate) ffn: Vec<Address>,
    /// Where the API listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,
    /// The model's name in the API [default: that of the repository, or of the vindex]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// A file with the keys that clients must show one of, one a line [default: $SKULK_API_KEY, else none]
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// A file with the secret that weight servers share [default: $SKULK_SECRET, else none]
    #[arg(long, value_name = "FILE", requires = "ffn")]
    pub(crate) secret_file: Option<PathBuf>,
    /// How rows travel to weight servers: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", requires = "ffn")]
    pub(crate) wire: RowType,
    #[command(flatten)]
    pub(crate) patience: Patience,
    /// How long a request may take, from its arrival to its last token
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) deadline: Duration,
    /// A chat template instead of the model's own
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// How keys and values are kept: f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvType,
    /// The cache's ceiling, such as 4GB [default: half of the memory that is free, at most what --max-running contexts take]
    #[arg(long, value_name = "SIZE")]
    pub(crate) kv_memory: Option<Bytes>,
    /// Longest sequence, in tokens, with its answer [default: the model's]
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<NonZeroUsize>,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Sequences that are computed together
    #[arg(long, value_name = "N", default_value = "32")]
    pub(crate) max_running: NonZeroUsize,
    /// Sequences that may wait; more are refused
    #[arg(long, value_name = "N", default_value = "256")]
    pub(crate) max_waiting: usize,
    /// Who guesses tokens that the next step checks (docs/drafting.md): none; ngram: the text itself;
    /// mtp=FILE or mtp=owner/name[@revision]: a head; model=DIR: a smaller vindex of the same tokens
    #[arg(long, value_name = "WHO", default_value = "none")]
    pub(crate) draft: DraftChoice,
    /// Serve without guesses where --draft cannot be had
    #[arg(long)]
    pub(crate) draft_optional: bool,
    /// Guess so many tokens each time, up to 8 [default: as many as pay, by what steps take and how often guesses are right]
    #[arg(long, value_name = "N")]
    pub(crate) draft_depth: Option<NonZeroUsize>,
    /// How long answers under way may take after a request to terminate
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) drain: Duration,
    /// Where pulled vindexes are kept [default: `skulk` in the user's cache]
    #[arg(long, value_name = "DIR", env = "SKULK_CACHE")]
    pub(crate) cache: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// A vindex, else `owner/name[@revision]` on the Hub; only its index is read
    pub(crate) model: Model,
    /// The machines, in YAML (docs/plan.md draws the file)
    #[arg(long, value_name = "FILE")]
    pub(crate) nodes: PathBuf,
    /// Sequences that are decoded together
    #[arg(long, value_name = "N", default_value = "1")]
    pub(crate) streams: NonZeroU64,
    /// Tokens in the cache of each [default: the model's context]
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<NonZeroU64>,
    /// How keys and values are kept: f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvType,
    /// How rows travel to weight servers: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub(crate) wire: RowType,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// A checkpoint to publish
    #[arg(long, value_name = "DIR", default_value = "models/kjv")]
    pub(crate) model_dir: PathBuf,
    /// What the model is to go on with
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "In the beginning God created the"
    )]
    pub(crate) prompt: String,
    /// Tokens to write
    #[arg(long, value_name = "N", default_value = "64")]
    pub(crate) tokens: NonZeroUsize,
    /// Keep what was made in this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn peers_are_a_list() {
        let line = [
            "skulk",
            "serve",
            "acme/m@v1",
            "--ffn",
            "a:1,unix:/tmp/b",
            "--kv-memory",
            "2GB",
        ];
        let Command::Serve(serve) = Cli::parse_from(line).command else {
            panic!("serve");
        };
        assert_eq!(serve.ffn.len(), 2);
        assert_eq!(serve.kv_memory, Some(Bytes(2_000_000_000)));
        assert!(Cli::try_parse_from(["skulk", "serve", "a/b", "--secret-file", "s"]).is_err());
    }
}
