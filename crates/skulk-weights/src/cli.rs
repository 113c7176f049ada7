//! The command line: names, options and their help, and nothing that acts on them.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::catalog::View;
use crate::entry::Tier;
use crate::plan::Artifact;

/// Publish models from a checked catalog: vindexes, their cards and collections.
#[derive(Debug, Parser)]
#[command(
    name = "skulk-weights",
    version,
    infer_long_args = true,
    args_override_self = true,
    subcommand_required = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command; the catalog is named before the command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The operator config with the catalog sources [default: ./skulk-weights.yaml, else the built-in catalog]
    #[arg(long, value_name = "PATH")]
    pub(crate) config: Option<PathBuf>,
    /// Use this manifest alone, without namespaces and owners
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub(crate) manifest: Option<PathBuf>,
    /// Tell results as JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

impl Global {
    /// The view that the options name.
    pub(crate) fn view(&self) -> View {
        match (&self.manifest, &self.config) {
            (Some(path), _) => View::Manifest(path.clone()),
            (None, Some(path)) => View::Config(path.clone()),
            (None, None) => View::Default,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Read and check the catalog: the built-in entries and those that the operator's sources add
    #[command(subcommand, alias = "catalogue")]
    Catalog(Catalog),
    /// Publish the artifacts of one catalog entry
    Publish(Publish),
    /// Read what is published for an entry again and compare it with its source
    Verify(Verify),
    /// The directory for intermediate files
    #[command(subcommand)]
    Scratch(Scratch),
    /// Check that this machine can plan, or with --publish, publish
    Doctor(Doctor),
    /// A Hub of one's own, over a directory
    #[command(subcommand)]
    Registry(Registry),
    /// Print a completion script for a shell
    Completions {
        /// The shell that reads the script
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Catalog {
    /// Check every source and report all errors at once
    Validate,
    /// List the sources: the built-in catalog and those that the config adds
    Sources,
    /// List the keys, one a line
    List {
        /// Only the entries of this tier
        #[arg(long, value_enum, default_value_t = TierChoice::All)]
        tier: TierChoice,
    },
    /// Print an entry as JSON
    Show {
        /// The key with its namespace, such as foxlight/gemma-3-4b-full-q4-k
        key: String,
    },
    /// Print the entries of a source model, one JSON object a line
    Find {
        /// owner/name, or the model's huggingface.co URL
        model: String,
    },
    /// Add an entry for a model to your manifest, from what the Hub tells about it
    Add(Add),
    /// Write a config to begin with
    Init {
        /// Where to write it
        #[arg(long, value_name = "PATH", default_value = "skulk-weights.yaml")]
        output: PathBuf,
        /// Replace a file that exists
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// owner/name, or the model's huggingface.co URL
    pub(crate) model: String,
    /// Show the entry and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// The operator source that gets the entry, by its namespace, where the config has several
    #[arg(long, value_name = "NAME", conflicts_with = "manifest")]
    pub(crate) source: Option<String>,
    /// Who publishes, in a manifest that does not tell [default: the owner of its entries, else FoxlightAI]
    #[arg(long, value_name = "OWNER")]
    pub(crate) owner: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TierChoice {
    /// Every entry
    All,
    /// Small models
    Smoke,
    /// Mixture-of-experts models
    Moe,
}

impl TierChoice {
    pub(crate) fn tier(self) -> Option<Tier> {
        match self {
            TierChoice::All => None,
            TierChoice::Smoke => Some(Tier::Smoke),
            TierChoice::Moe => Some(Tier::Moe),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Publish {
    /// The key of the catalog entry
    #[arg(long, value_name = "KEY", required_unless_present = "tier")]
    pub(crate) model: Option<String>,
    /// Publish every entry of this tier, one after another, and sum up
    #[arg(long, value_enum, conflicts_with = "model")]
    pub(crate) tier: Option<TierChoice>,
    /// With --tier: after an entry that failed, go on with the next
    #[arg(long, requires = "tier")]
    pub(crate) continue_on_error: bool,
    /// What to publish
    #[arg(long, value_enum, default_value_t = Artifact::All)]
    pub(crate) artifact: Artifact,
    /// Print the plan and stop: no request, no token, no larql, nothing written
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// With --dry-run: also ask the Hub for commits, sizes, types and what would be replaced
    #[arg(long, requires = "dry_run")]
    pub(crate) inspect: bool,
    /// Replace an output directory, or a published sidecar, that exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Keep router biases that the source has in F32 in F32 in the MTP sidecar
    #[arg(long)]
    pub(crate) keep_f32: bool,
    #[command(flatten)]
    pub(crate) scratch: ScratchDir,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The key of the catalog entry
    #[arg(value_name = "KEY")]
    pub(crate) model: String,
    /// What to compare
    #[arg(long, value_enum, default_value_t = Artifact::All)]
    pub(crate) artifact: Artifact,
}

#[derive(Debug, Args)]
pub(crate) struct ScratchDir {
    /// The directory for intermediate files [default: $SKULK_WEIGHTS_SCRATCH, else ./.scratch]
    #[arg(long = "scratch", value_name = "PATH")]
    pub(crate) path: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Scratch {
    /// Delete the scratch directory with everything in it
    Clean {
        #[command(flatten)]
        scratch: ScratchDir,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Also check what publishing needs: larql, the token and its rights, the Hub
    #[arg(long)]
    pub(crate) publish: bool,
    /// With --publish: also hold the free space against the plan of this entry
    #[arg(long, value_name = "KEY", requires = "publish")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) scratch: ScratchDir,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Registry {
    /// Serve a directory as a Hub
    Serve {
        /// The directory that holds the repositories; made if absent
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
        /// The address to listen on; one beyond loopback needs --token-file
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7843")]
        listen: SocketAddr,
        /// A file with the token that clients must show
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// The address that clients use, where it is another one: of a proxy that speaks TLS
        #[arg(long, value_name = "URL")]
        public_url: Option<String>,
    },
}
