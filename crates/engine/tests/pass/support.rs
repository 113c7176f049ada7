//! Models of the repository, extracted and ready to compute.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Forward, KvCache, KvType, Local, Model, Pool, Sequence, Wanted, Work};
use tempfile::TempDir;
use vindex::{ExtractOptions, LocalDir, Plan, Recipe, Vindex, extract, plan};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A vindex in a directory that goes with it.
pub(crate) struct Extracted {
    pub(crate) vindex: Arc<Vindex>,
    _dir: TempDir,
}

pub(crate) fn extracted(family: &str, recipe: Recipe) -> Extracted {
    extracted_from(&fixtures().join("models").join(family), recipe)
}

pub(crate) fn extracted_from(checkpoint: &Path, recipe: Recipe) -> Extracted {
    extracted_with(checkpoint, recipe, |_| {})
}

/// A vindex of another plan than the checkpoint's own.
pub(crate) fn extracted_with(
    checkpoint: &Path,
    recipe: Recipe,
    change: impl FnOnce(&mut Plan),
) -> Extracted {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("vindex");
    let source = LocalDir::open(checkpoint).unwrap();
    let mut plan = plan(&source, recipe).unwrap();
    change(&mut plan);
    let options = ExtractOptions {
        threads: 1,
        allow_nonfinite: false,
    };
    extract(&source, &plan, &out, &options, &|_| {}).unwrap();
    Extracted {
        vindex: Arc::new(Vindex::open(&out).unwrap()),
        _dir: dir,
    }
}

/// A pass and a cache for it.
pub(crate) struct Engine {
    pub(crate) forward: Forward,
    pub(crate) cache: KvCache,
}

impl Engine {
    pub(crate) fn new(vindex: &Arc<Vindex>, kv_type: KvType, n_threads: usize) -> Engine {
        let pool = Arc::new(Pool::new(n_threads));
        let model = Arc::new(Model::open(Arc::clone(vindex)).unwrap());
        let ffn = Arc::new(Local::new(Arc::clone(vindex), Arc::clone(&pool)).unwrap());
        let cache = KvCache::new(model.config(), kv_type, 64 << 20);
        Engine {
            forward: Forward::new(model, pool, ffn),
            cache,
        }
    }

    /// Logits after each of `tokens`, which are appended in steps of `chunk`.
    pub(crate) fn append(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        chunk: usize,
    ) -> Vec<f32> {
        let mut logits = Vec::new();
        for tokens in tokens.chunks(chunk) {
            let mut works = [Work {
                sequence,
                tokens,
                logits: Wanted::All,
            }];
            logits.extend_from_slice(self.forward.step(&mut works).unwrap());
        }
        logits
    }

    /// Logits after each of `tokens`, in one step of a new sequence.
    pub(crate) fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut sequence = self.cache.sequence();
        self.append(&mut sequence, tokens, tokens.len())
    }

    /// `n` most likely tokens, one after the other.
    pub(crate) fn greedy(&mut self, prompt: &[u32], n: usize) -> Vec<u32> {
        let mut sequence = self.cache.sequence();
        let mut tokens = prompt.to_vec();
        let mut next = prompt.to_vec();
        for _ in 0..n {
            let logits = self.append(&mut sequence, &next, next.len());
            let vocab = logits.len() / next.len();
            let last = &logits[logits.len() - vocab..];
            let best = (0..vocab).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            tokens.push(best as u32);
            next = vec![best as u32];
        }
        tokens
    }
}

/// The bits, for comparisons that no rounding may hide in.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The greatest difference, relative to the standard deviation of `expected`.
pub(crate) fn difference(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let n = expected.len() as f64;
    let mean = expected.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = expected
        .iter()
        .map(|&x| (f64::from(x) - mean).powi(2))
        .sum::<f64>()
        / n;
    let greatest = got
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs()));
    assert!(got.iter().all(|x| x.is_finite()));
    greatest.fold(0.0, f64::max) / variance.sqrt()
}
