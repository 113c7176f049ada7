//! Models of the repository and of `SKULK_GOLDENS`, with their weights in this process and on servers: the rows of every layer, and the logits
//! of the whole pass, must be the same bit for bit, for every family, however the weights are shared out.

#[path = "../../../vindex/tests/support/goldens.rs"]
mod folder;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use engine::wire::{Address, Identity, Remote};
use engine::{FeedForward, Forward, KvCache, KvType, Local, Model, Pool, Wanted, Work};
use tempfile::TempDir;
use vindex::{ExtractOptions, LocalDir, Recipe, Vindex, extract, plan};

use crate::conformance::{conforms_with_dense, refuses};
use crate::oracle::{Running, bits, connect, tcp, unix};
use folder::{Golden, goldens};

/// Layers and experts of each server.
type Shares = Vec<(Range<u32>, Range<u32>)>;

fn extracted(checkpoint: &Path, recipe: Recipe) -> (Arc<Vindex>, TempDir) {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("vindex");
    let source = LocalDir::open(checkpoint).expect("a checkpoint");
    let plan = plan(&source, recipe).expect("a plan");
    let options = ExtractOptions {
        threads: 1,
        allow_nonfinite: false,
    };
    extract(&source, &plan, &out, &options, &|_| {}).expect("a vindex");
    (Arc::new(Vindex::open(&out).expect("a vindex")), dir)
}

/// 1, 2 and 4 servers, by layers and by experts, as far as there are that many; and replicas.
fn shares(identity: &Identity) -> Vec<Shares> {
    let (n_layers, n_experts) = (identity.n_layers, identity.n_experts);
    let cut = |n: u32, parts: u32| -> Vec<Range<u32>> {
        (0..parts)
            .map(|i| n * i / parts..n * (i + 1) / parts)
            .collect()
    };
    let mut all = vec![vec![(0..n_layers, 0..n_experts)]];
    for n in [2, 4] {
        if n_layers >= n {
            all.push(
                cut(n_layers, n)
                    .into_iter()
                    .map(|layers| (layers, 0..n_experts))
                    .collect(),
            );
        }
        if n_experts >= n {
            all.push(
                cut(n_experts, n)
                    .into_iter()
                    .map(|experts| (0..n_layers, experts))
                    .collect(),
            );
        }
    }
    if n_layers >= 2 && n_experts >= 2 {
        let halves = cut(n_layers, 2).into_iter().flat_map(|layers| {
            cut(n_experts, 2)
                .into_iter()
                .map(move |experts| (layers.clone(), experts))
        });
        all.push(halves.collect());
    }
    all.push(vec![(0..n_layers, 0..n_experts); 2]);
    all
}

fn serve(vindex: &Arc<Vindex>, shares: &Shares, at: impl Fn(usize) -> Address) -> Vec<Running> {
    let serve = |(i, (layers, experts)): (usize, &(Range<u32>, Range<u32>))| {
        let pool = Arc::new(Pool::new(1));
        let local = Local::with_ranges(Arc::clone(vindex), pool, layers.clone(), experts.clone());
        let options = engine::wire::ServerOptions {
            model: Identity::of(vindex),
            layers: layers.clone(),
            experts: experts.clone(),
            secret: Default::default(),
            limits: Default::default(),
        };
        Running::start(
            Arc::new(local.expect("a share of the weights")),
            options,
            &at(i),
        )
    };
    shares.iter().enumerate().map(serve).collect()
}

/// Calls `with` with the weights in this process, and with a remote for every way to share them out.
fn every_way(recipe: fn() -> Recipe, with: impl Fn(&str, &Arc<Vindex>, &Arc<Local>, Arc<Remote>)) {
    for Golden { family, model, .. } in goldens() {
        let (vindex, _dir) = extracted(&model, recipe());
        let identity = Identity::of(&vindex);
        let local =
            Arc::new(Local::new(Arc::clone(&vindex), Arc::new(Pool::new(1))).expect("the weights"));
        let folder = tempfile::tempdir().expect("a folder");
        for (i, shares) in shares(&identity).iter().enumerate() {
            for is_unix in [false, true] {
                let at = |server: usize| match is_unix {
                    true => unix(&folder, &format!("{i}-{server}")),
                    false => tcp(),
                };
                let servers = serve(&vindex, shares, at);
                let remote = connect(&servers, identity);
                let what = format!("{family} over {shares:?}, unix {is_unix}");
                with(&what, &vindex, &local, Arc::new(remote));
            }
        }
    }
}

/// Experts that a token visits, and how many first layers have none.
fn routing(vindex: &Vindex) -> (u32, u32) {
    let experts = vindex.index().config.experts;
    experts.map_or((1, 0), |e| (e.n_used, e.n_leading_dense))
}

#[test]
fn weights_in_this_process_pass_the_same_suite() {
    for golden in goldens() {
        let (vindex, _dir) = extracted(&golden.model, Recipe::Q4k);
        let local =
            || Local::new(Arc::clone(&vindex), Arc::new(Pool::new(2))).expect("the weights");
        let (n_used, n_dense) = routing(&vindex);
        let identity = Identity::of(&vindex);
        conforms_with_dense(&local(), &local(), identity, n_used, n_dense);
        refuses(&local(), Identity::of(&vindex));
    }
}

#[test]
fn rows_of_f32_weights() {
    rows_of(|| Recipe::F32);
}

#[test]
fn rows_of_q4k_weights() {
    rows_of(|| Recipe::Q4k);
}

fn rows_of(recipe: fn() -> Recipe) {
    every_way(recipe, |_, vindex, local, remote| {
        let (n_used, n_dense) = routing(vindex);
        let identity = Identity::of(vindex);
        conforms_with_dense(&*remote, &**local, identity, n_used, n_dense);
        refuses(&*remote, Identity::of(vindex));
    });
}

#[test]
fn logits_of_f32_weights() {
    logits_of(|| Recipe::F32);
}

#[test]
fn logits_of_q4k_weights() {
    logits_of(|| Recipe::Q4k);
}

/// A prompt in one step, as a prefill, and then token by token, as decoding does, with several texts in a batch.
fn logits_of(recipe: fn() -> Recipe) {
    every_way(recipe, |what, vindex, local, remote| {
        let here = logits(vindex, Arc::clone(local) as Arc<dyn FeedForward>);
        let there = logits(vindex, remote);
        assert!(bits(&here) == bits(&there), "{what}");
    });
}

fn logits(vindex: &Arc<Vindex>, ffn: Arc<dyn FeedForward>) -> Vec<f32> {
    let model = Arc::new(Model::open(Arc::clone(vindex)).expect("a model"));
    let cache = KvCache::new(model.config(), KvType::F16, 64 << 20);
    let mut forward = Forward::new(model, Arc::new(Pool::new(1)), ffn);
    let mut all = Vec::new();
    let prompt: Vec<u32> = (0..90).map(|i| (i * 37 + 11) % 250).collect();
    let mut first = cache.sequence();
    let mut works = [Work {
        sequence: &mut first,
        tokens: &prompt,
        logits: Wanted::All,
    }];
    all.extend_from_slice(forward.step(&mut works).expect("a prefill"));
    let mut second = cache.sequence();
    for token in 0..8 {
        let mut works = [
            Work {
                sequence: &mut first,
                tokens: &[token * 3 + 1],
                logits: Wanted::Last,
            },
            Work {
                sequence: &mut second,
                tokens: &[token + 7],
                logits: Wanted::Last,
            },
        ];
        all.extend_from_slice(forward.step(&mut works).expect("a step"));
    }
    all
}
