//! The command line: names, options and their help, and nothing that acts on them.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use engine::DraftChoice;
use engine::wire::Address;
use hub::{Reference, RepoId};
use vindex::{Recipe, Slice, Span};

use crate::pass::Computing;

/// Extract, publish, pull and verify vindexes: a model's weights as checked GGUF parts with one index.
#[derive(Debug, Parser)]
#[command(name = "larql", version, subcommand_required = true)]
pub(crate) struct Cli {
    /// Tell results as one JSON object on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a vindex from a checkpoint; goes on where an interrupted run of the same plan stopped
    Extract(Extract),
    /// Put a vindex, or a slice of one, into a repository of the Hub, in one commit
    Publish(Publish),
    /// Fetch a vindex, or a slice of one, from a repository of the Hub
    Pull(Pull),
    /// Serve feed-forward weights to nodes, until told to stop
    Serve(Serve),
    /// Hash everything in a vindex and say which part is damaged
    Verify {
        /// The vindex
        dir: PathBuf,
    },
    /// Print what is in a vindex, as text
    Dump {
        /// The vindex
        dir: PathBuf,
    },
    /// Go on from a prompt, on this terminal
    Run(Run),
    /// Write the logits after each of some tokens to a NumPy file
    Logits(Logits),
    /// Collect what enters a model's matrices over a text, to weigh errors by: larql extract --imatrix
    Imatrix(Imatrix),
    /// Measure how well a model foresees a text, by the protocol of llama.cpp's llama-perplexity
    Perplexity(Perplexity),
    /// Measure how fast a model decodes and takes in a prompt here
    Bench(Bench),
    /// Print a completion script for a shell
    Completions {
        /// The shell that reads the script
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Extract {
    /// A directory with the checkpoint, or a file.gguf, else `owner/name[@revision]` on the Hub; what exists here wins
    pub(crate) model: String,
    /// The directory to make
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// How the weights are stored: f32, bf16, f16, q8_0 or q4k; not for a model in GGUF, which is kept as it is
    #[arg(long, value_name = "RECIPE")]
    pub(crate) quant: Option<Recipe>,
    /// Which model, where the source has several in GGUF
    #[arg(long, value_name = "NAME.gguf")]
    pub(crate) file: Option<String>,
    /// The branch, tag or commit of the repository
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Threads that encode [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Take weights that are NaN, infinite or too large for their type, and count them
    #[arg(long)]
    pub(crate) allow_nonfinite: bool,
    /// Remove the vindex, or the unfinished extraction, that is in the output directory
    #[arg(long)]
    pub(crate) force: bool,
    /// Print what would be written and stop
    #[arg(long)]
    pub(crate) plan: bool,
    /// Weigh the errors of q4k's blocks by the statistics in a file, from `larql imatrix` or llama.cpp's llama-imatrix
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Weigh the errors of q4k's blocks by statistics of this text, collected first with a copy of the model that is not
    /// quantised: it is made beside the output and removed
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["imatrix", "plan"])]
    pub(crate) calibrate: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Imatrix {
    /// The vindex, best one that is not quantised
    pub(crate) dir: PathBuf,
    /// The text, UTF-8
    pub(crate) text: PathBuf,
    /// The file to write, as llama.cpp's llama-imatrix writes it
    #[arg(short, long, value_name = "FILE.gguf")]
    pub(crate) output: PathBuf,
    /// Threads that compute [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(crate) struct Publish {
    /// The vindex
    pub(crate) dir: PathBuf,
    /// The repository that receives exactly this slice; made if absent
    #[arg(long, value_name = "OWNER/NAME")]
    pub(crate) repo: RepoId,
    /// What to publish: full (or none, for a vindex that is not sliced), expert-server or attention
    #[arg(long, value_name = "SLICE", value_parser = published_slice)]
    pub(crate) slices: Slice,
    /// A file that becomes the repository's README.md, in the same commit
    #[arg(long, value_name = "FILE")]
    pub(crate) card: Option<PathBuf>,
    /// Make the repository private, when it has to be made
    #[arg(long)]
    pub(crate) private: bool,
    /// Print what would be sent and deleted, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// `owner/name[@revision]` on the Hub
    #[arg(value_name = "OWNER/NAME[@REVISION]")]
    pub(crate) from: Reference,
    /// The directory to fill
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// full, expert-server or attention [default: the most that the repository holds]
    #[arg(long, value_name = "SLICE")]
    pub(crate) slice: Option<Slice>,
    #[command(flatten)]
    pub(crate) ranges: Ranges,
    /// Remove another vindex that is in the directory
    #[arg(long)]
    pub(crate) force: bool,
}

/// Some layers or experts of an expert server.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Ranges {
    /// Of an expert server, these layers only: 0..4 is 0, 1, 2 and 3
    #[arg(long, value_name = "A..B")]
    pub(crate) layers: Option<Span>,
    /// Of an expert server, these experts of each layer only
    #[arg(long, value_name = "A..B")]
    pub(crate) experts: Option<Span>,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The directory of a vindex, else `owner/name[@revision]` on the Hub; a directory that exists wins
    #[arg(value_name = "DIR|OWNER/NAME[@REVISION]")]
    pub(crate) from: String,
    #[command(flatten)]
    pub(crate) ranges: Ranges,
    /// Where nodes find it: HOST:PORT or unix:/path; beyond this machine only with a secret
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7844")]
    pub(crate) listen: Address,
    /// Where /health, /ready and /metrics are; port 0: a free one, which is told
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub(crate) http: SocketAddr,
    /// A file with the secret that nodes must know [default: $SKULK_SECRET, else none]
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_file: Option<PathBuf>,
    /// A file with the token (`Authorization: Bearer`) that /metrics wants
    #[arg(long, value_name = "FILE")]
    pub(crate) http_token_file: Option<PathBuf>,
    /// Threads that compute [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Nodes that may be connected at a time [default: 256]
    #[arg(long, value_name = "N")]
    pub(crate) max_connections: Option<NonZeroUsize>,
    /// Memory for requests that wait, in MiB; more are refused as busy [default: 256]
    #[arg(long, value_name = "MIB")]
    pub(crate) queue: Option<NonZeroU32>,
    /// How long what was taken may still be answered when told to stop, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub(crate) drain: u64,
    /// Where what is pulled is kept [default: skulk, in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The vindex
    pub(crate) dir: PathBuf,
    /// The prompt; several words are joined by spaces
    #[arg(conflicts_with = "ids")]
    pub(crate) prompt: Vec<String>,
    /// The prompt as tokens: 1,45,100
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    pub(crate) ids: Option<Vec<u32>>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// Take the likeliest token each time
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    pub(crate) greedy: bool,
    /// Draw tokens, with logits divided by this; 0 takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Draw from the k likeliest tokens
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Draw the same tokens each time
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
    /// Go on past the tokens that end a text
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Who guesses tokens that the next step checks: none, ngram, mtp=FILE, or model=DIR for a smaller vindex of the same
    /// tokens
    #[arg(long, value_name = "WHO", default_value = "none")]
    pub(crate) draft: DraftChoice,
    /// Guess so many tokens each time, up to 8 [default: as many as pay]
    #[arg(long, value_name = "N")]
    pub(crate) draft_depth: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(crate) computing: Computing,
}

#[derive(Debug, Args)]
pub(crate) struct Logits {
    /// The vindex
    pub(crate) dir: PathBuf,
    /// The tokens: 1,45,100
    #[arg(long, value_name = "ID,…", value_delimiter = ',', required = true)]
    pub(crate) ids: Vec<u32>,
    /// The file to write: f32, (tokens, vocabulary)
    #[arg(short, long, value_name = "FILE.npy")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) computing: Computing,
}

#[derive(Debug, Args)]
pub(crate) struct Perplexity {
    /// The vindex
    pub(crate) dir: PathBuf,
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens in a window; the second half of each is scored
    #[arg(long, value_name = "N", default_value = "512")]
    pub(crate) window: NonZeroUsize,
    #[command(flatten)]
    pub(crate) computing: Computing,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// The vindex
    pub(crate) dir: PathBuf,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value = "512")]
    pub(crate) prompt: NonZeroUsize,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value = "64")]
    pub(crate) tokens: NonZeroUsize,
    /// Texts that are decoded side by side, each with a prompt of its own
    #[arg(long, value_name = "N", default_value = "1")]
    pub(crate) streams: NonZeroUsize,
    #[command(flatten)]
    pub(crate) computing: Computing,
}

/// A vindex that is not sliced is the full one.
fn published_slice(text: &str) -> Result<Slice, String> {
    let mut slices: Vec<&str> = text.split(',').map(str::trim).collect();
    slices.dedup();
    match slices.as_slice() {
        ["none"] => Ok(Slice::Full),
        [one] => one.parse().map_err(|_| {
            format!("'{one}' is no slice; use none, full, expert-server or attention")
        }),
        _ => Err(
            "a repository holds one slice; publish each into a repository of its own".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slice_for_one_repository() {
        assert_eq!(published_slice("none"), Ok(Slice::Full));
        assert_eq!(published_slice("full"), Ok(Slice::Full));
        assert_eq!(
            published_slice("expert-server,expert-server"),
            Ok(Slice::ExpertServer)
        );
        assert!(
            published_slice("full,expert-server").is_err_and(|text| text.contains("of its own"))
        );
        assert!(published_slice("experts").is_err_and(|text| text.contains("expert-server")));
    }
}
