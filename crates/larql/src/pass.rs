//! What the commands that compute with a model share: the pass over a vindex here, and its options.
//!
//! Invariant: options change where and how fast a row is computed; of them only the type of keys and values changes a
//! result. Left out: the scheduler, because one command computes one text.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use engine::wire::{Address, Identity, Remote, RemoteOptions, RowType};
use engine::{
    Collector, EngineParts, FeedForward, Forward, KvCache, KvType, Local, Model, Pool, Sequence,
    StepError, Wanted, Work,
};
use terminal::{Failure, Patience};
use vindex::{Index, Share, Vindex};

use crate::context::Context;
use crate::serve::secret;

/// Tokens that go through the layers together. More gain nothing and take memory.
pub(crate) const CHUNK: usize = 512;

#[derive(Debug, Args)]
pub(crate) struct Computing {
    /// Threads that compute [default: one for each processor]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// How keys and values are remembered: f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvType,
    /// Weight servers, HOST:PORT or unix:/path; without any, all weights are held here
    #[arg(long, value_name = "ADDRESS,…", value_delimiter = ',')]
    pub(crate) ffn: Vec<Address>,
    /// A file with the secret that weight servers know [default: $SKULK_SECRET, else none]
    #[arg(long, value_name = "FILE", requires = "ffn")]
    pub(crate) secret_file: Option<PathBuf>,
    /// How rows travel to weight servers: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", requires = "ffn")]
    pub(crate) wire: RowType,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

/// A model that computes.
pub(crate) struct Pass {
    pub(crate) forward: Forward,
    /// What the pass is made of.
    pub(crate) parts: EngineParts,
    pub(crate) n_threads: usize,
    /// The weight servers, when some are asked.
    pub(crate) remote: Option<Arc<Remote>>,
    pub(crate) kv: KvType,
}

impl Pass {
    /// Opens the vindex in `dir`.
    pub(crate) fn open(
        dir: &Path,
        options: &Computing,
        context: &Context,
    ) -> Result<Pass, Failure> {
        let cannot = || format!("cannot compute with {}", dir.display());
        let of_role = |_: &Index, recorded: Share| match options.ffn.is_empty() {
            true => Ok(recorded),
            false => Ok(recorded.attention_half()),
        };
        let vindex = Vindex::open_as(dir, of_role).map_err(Failure::of(cannot()))?;
        let vindex = Arc::new(vindex);
        let n_threads = n_threads(options.threads);
        let pool = Arc::new(Pool::new(n_threads));
        let model = Model::open(Arc::clone(&vindex)).map_err(Failure::of(cannot()))?;
        let model = Arc::new(model);
        let is_split = !options.ffn.is_empty();
        let (ffn, remote): (Arc<dyn FeedForward>, _) = match is_split {
            false => {
                let local = Local::new(vindex, Arc::clone(&pool));
                (Arc::new(local.map_err(Failure::of(cannot()))?), None)
            }
            true => {
                let remote = Arc::new(connect(options, &vindex, context)?);
                (Arc::clone(&remote) as Arc<dyn FeedForward>, Some(remote))
            }
        };
        let forward = Forward::new(Arc::clone(&model), Arc::clone(&pool), Arc::clone(&ffn));
        Ok(Pass {
            forward: if is_split { forward.resting() } else { forward },
            parts: EngineParts {
                model,
                ffn,
                pool,
                tokenizer: None,
            },
            n_threads,
            remote,
            kv: options.kv,
        })
    }

    /// Opens the vindex in `dir` for a pass that tells `collector` what enters every matrix.
    pub(crate) fn collecting(
        dir: &Path,
        threads: Option<NonZeroUsize>,
        collector: &Arc<Collector>,
    ) -> Result<Pass, Failure> {
        let cannot = || format!("cannot compute with {}", dir.display());
        let vindex = Arc::new(Vindex::open(dir).map_err(Failure::of(cannot()))?);
        let n_threads = n_threads(threads);
        let pool = Arc::new(Pool::new(n_threads));
        let model = Model::open(Arc::clone(&vindex)).map_err(Failure::of(cannot()))?;
        let model = Arc::new(model);
        let local = Local::new(vindex, Arc::clone(&pool)).map_err(Failure::of(cannot()))?;
        let ffn: Arc<dyn FeedForward> = Arc::new(local.collecting(Arc::clone(collector)));
        let forward = Forward::new(Arc::clone(&model), Arc::clone(&pool), Arc::clone(&ffn));
        Ok(Pass {
            forward: forward.collecting(Arc::clone(collector)),
            parts: EngineParts {
                model,
                ffn,
                pool,
                tokenizer: None,
            },
            n_threads,
            remote: None,
            kv: KvType::F32,
        })
    }

    /// The model.
    pub(crate) fn model(&self) -> &Model {
        self.forward.model()
    }

    /// A sequence that has room for `n_tokens`.
    pub(crate) fn sequence(&self, n_tokens: usize) -> Sequence {
        let config = self.model().config();
        let bytes = KvCache::bytes_for(config, self.kv, n_tokens);
        KvCache::new(config, self.kv, bytes).sequence()
    }

    /// Appends tokens, in chunks, and gives the logits after the last one, `(vocab)`.
    pub(crate) fn append(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
    ) -> Result<&[f32], Failure> {
        let (begin, last) = tokens.split_at(tokens.len().saturating_sub(1) / CHUNK * CHUNK);
        for tokens in begin.chunks(CHUNK) {
            self.step(sequence, tokens, Wanted::Nothing)?;
        }
        self.step(sequence, last, Wanted::Last)
    }

    /// One step of one sequence.
    pub(crate) fn step(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        logits: Wanted,
    ) -> Result<&[f32], Failure> {
        let mut works = [Work {
            sequence,
            tokens,
            logits,
        }];
        self.forward.step(&mut works).map_err(failed)
    }

    /// One step of several sequences, each with one new token; the logits are not kept.
    pub(crate) fn step_side_by_side(
        &mut self,
        sequences: &mut [Sequence],
        tokens: &[u32],
    ) -> Result<(), Failure> {
        let mut works: Vec<Work<'_>> = sequences
            .iter_mut()
            .zip(tokens.chunks_exact(1))
            .map(|(sequence, tokens)| Work {
                sequence,
                tokens,
                logits: Wanted::Last,
            })
            .collect();
        self.forward.step(&mut works).map_err(failed)?;
        Ok(())
    }
}

fn connect(options: &Computing, vindex: &Vindex, context: &Context) -> Result<Remote, Failure> {
    let mut remote = RemoteOptions::new(Identity::of(vindex));
    remote.wire = options.wire;
    remote.secret = secret(options.secret_file.as_deref(), context)?;
    remote.deadline = options.patience.deadline();
    remote.stall = options.patience.stall();
    Remote::connect(&options.ffn, remote).map_err(|error| {
        Failure::new("the weight servers cannot be used")
            .hint(error.hint())
            .cause(error)
    })
}

fn failed(error: StepError) -> Failure {
    Failure::new("cannot compute the next token").cause(error)
}

/// As many threads as are asked for, else one for each processor.
pub(crate) fn n_threads(asked: Option<NonZeroUsize>) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    asked.map_or_else(all, NonZeroUsize::get)
}
