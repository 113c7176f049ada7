//! What enters the matrices, as collectors are told it.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{Collector, ColumnSums, Forward, KvCache, KvType, Local, Model, Pool, Wanted, Work};
use vindex::{Recipe, Vindex};

use crate::support::extracted;

/// One of each kind: plain, untied with biases, window and soft caps and four norms, routed.
const FAMILIES: [&str; 6] = [
    "llama3",
    "qwen2",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
];

/// What is collected of `texts`, each in steps of `chunk` tokens.
fn collected(
    vindex: &Arc<Vindex>,
    texts: &[Vec<u32>],
    chunk: usize,
    n_threads: usize,
) -> BTreeMap<String, ColumnSums> {
    let collector = Arc::new(Collector::default());
    let pool = Arc::new(Pool::new(n_threads));
    let model = Arc::new(Model::open(Arc::clone(vindex)).unwrap());
    let local = Local::new(Arc::clone(vindex), Arc::clone(&pool)).unwrap();
    let ffn = Arc::new(local.collecting(Arc::clone(&collector)));
    let cache = KvCache::new(model.config(), KvType::F32, 64 << 20);
    let mut forward = Forward::new(model, pool, ffn).collecting(Arc::clone(&collector));
    for text in texts {
        let mut sequence = cache.sequence();
        for tokens in text.chunks(chunk) {
            let mut works = [Work {
                sequence: &mut sequence,
                tokens,
                logits: Wanted::All,
            }];
            forward.step(&mut works).unwrap();
        }
    }
    collector.take()
}

fn texts() -> Vec<Vec<u32>> {
    let text = |n: u32, seed: u32| (0..n).map(|i| (i * 37 + i * i * seed) % 500).collect();
    vec![text(70, 3), text(33, 5)]
}

#[test]
fn every_matrix_is_seen_by_each_row_that_enters_it() {
    for family in FAMILIES {
        let model = extracted(family, Recipe::F32);
        let index = model.vindex.index();
        let seen = collected(&model.vindex, &texts(), 512, 1);
        let n_rows: u64 = texts().iter().map(|text| text.len() as u64).sum();
        let matrices = index.tensors.iter().filter(|tensor| {
            let is_looked_up = tensor.name == "token_embd.weight" && !index.config.tied_embeddings;
            tensor.ne.len() > 1 && !tensor.name.contains("ffn_gate_inp") && !is_looked_up
        });
        let mut n_matrices = 0;
        for tensor in matrices {
            let sums = seen
                .get(&tensor.name)
                .unwrap_or_else(|| panic!("{family}: {} is not seen", tensor.name));
            let n_stacked = tensor.ne.get(2).map_or(1, |&n| n as usize);
            assert_eq!(
                sums.n_cols as u64, tensor.ne[0],
                "{family}: {}",
                tensor.name
            );
            assert_eq!(sums.counts.len(), n_stacked, "{family}: {}", tensor.name);
            assert_eq!(sums.squares.len(), n_stacked * sums.n_cols);
            let n_visits = match index.config.experts {
                Some(experts) if n_stacked > 1 => u64::from(experts.n_used),
                _ => 1,
            };
            let expected = n_rows * n_visits;
            assert_eq!(sums.counts.iter().sum::<u64>(), expected, "{}", tensor.name);
            let is_positive = sums.squares.iter().any(|&sum| sum > 0.0);
            assert!(is_positive && sums.squares.iter().all(|sum| sum.is_finite()));
            n_matrices += 1;
        }
        assert_eq!(seen.len(), n_matrices, "{family}");
    }
}

#[test]
fn the_first_layer_sees_normed_embeddings() {
    let model = extracted("llama3", Recipe::F32);
    let vindex = &model.vindex;
    let seen = collected(vindex, &texts(), 512, 1);
    let floats = |name: &str| -> Vec<f32> {
        let bytes = vindex.tensor(name).unwrap().bytes;
        let floats = bytes.as_chunks().0.iter();
        floats.map(|b| f32::from_le_bytes(*b)).collect()
    };
    let (embeddings, norm) = (
        floats("token_embd.weight"),
        floats("blk.0.attn_norm.weight"),
    );
    let hidden = norm.len();
    let mut expected = vec![0.0_f64; hidden];
    for token in texts().concat() {
        let row = &embeddings[token as usize * hidden..][..hidden];
        let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let mean = squares / hidden as f64 + f64::from(vindex.index().config.norm_eps);
        for ((sum, &x), &w) in expected.iter_mut().zip(row).zip(&norm) {
            *sum += (f64::from(x) * f64::from(w)).powi(2) / mean;
        }
    }
    for name in ["attn_q", "attn_k", "attn_v"] {
        let got = &seen[&format!("blk.0.{name}.weight")].squares;
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got / expected - 1.0).abs() < 1e-5, "{got} {expected}");
        }
    }
}

#[test]
fn neither_threads_nor_steps_change_a_bit() {
    for family in FAMILIES {
        let model = extracted(family, Recipe::F32);
        let expected = collected(&model.vindex, &texts(), 512, 1);
        for (chunk, n_threads) in [(512, 3), (7, 2)] {
            let got = collected(&model.vindex, &texts(), chunk, n_threads);
            assert!(got == expected, "{family}: {chunk} {n_threads}");
        }
    }
}
