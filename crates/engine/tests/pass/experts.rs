//! Layers with experts of every kind, and what else a configuration can say of a layer, against the pass in double
//! precision; and the same layers from several holders of their experts, bit for bit.

use std::path::Path;
use std::sync::Arc;

use engine::{
    Batch, FeedForward, FfnError, Forward, KvCache, KvType, Local, Model, Pool, Wanted, Work,
};
use quant::BlockType;
use serde_json::json;
use vindex::{
    Activation, Component, Experts, Gating, Groups, LayerEmbeddings, Plan, PlannedTensor, Recipe,
    Shared, Values, Vindex,
};

use crate::oracle::{
    FFN, HIDDEN, N_LAYERS, VOCAB, dot, gated, matrix, norm, oracle, sigmoid, values,
    write_checkpoint,
};
use crate::support::{Engine, Extracted, bits, difference, extracted_with};

const N: u32 = 8;
const EXPERT_FFN: usize = 40;

/// What the experts of a layer add: one delta a row.
pub(crate) fn routed(
    vindex: &Vindex,
    l: usize,
    x: &[Vec<f64>],
    normed: &[Vec<f64>],
) -> Vec<Vec<f64>> {
    let config = &vindex.index().config;
    let e = config.experts.unwrap();
    let get = |part: &str| values(vindex, &format!("blk.{l}.{part}"));
    let own = |part: &str, expert: usize| {
        let all = get(part);
        let n = all.len() / e.n as usize;
        all[expert * n..][..n].to_vec()
    };
    let biased = |part: &str, expert: usize, mut row: Vec<f64>| {
        if e.bias {
            let bias = own(&format!("{part}.bias"), expert);
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        row
    };
    let is_fused = vindex
        .expert(&format!("blk.{l}.ffn_gate_up_exps.weight"), 0)
        .is_some();
    let of_expert = |expert: usize, x: &[f64]| {
        let (gate, up) = if is_fused {
            let both = matrix(&own("ffn_gate_up_exps.weight", expert), x);
            let (gate, up) = both.split_at(e.ffn as usize);
            (gate.to_vec(), up.to_vec())
        } else {
            let product = |part: &str| {
                let w = own(&format!("{part}.weight"), expert);
                biased(part, expert, matrix(&w, x))
            };
            (product("ffn_gate_exps"), product("ffn_up_exps"))
        };
        let pairs = gate.iter().zip(&up);
        let middle: Vec<f64> = pairs.map(|(g, u)| gated(config, *g, *u)).collect();
        let down = matrix(&own("ffn_down_exps.weight", expert), &middle);
        biased("ffn_down_exps", expert, down)
    };
    let dense = |suffix: &str, x: &[f64]| {
        let w = |part: &str| get(&format!("ffn_{part}{suffix}.weight"));
        let (gate, up) = (matrix(&w("gate"), x), matrix(&w("up"), x));
        let pairs = gate.iter().zip(&up);
        let middle: Vec<f64> = pairs.map(|(g, u)| gated(config, *g, *u)).collect();
        matrix(&w("down"), &middle)
    };
    let one = |row: Vec<f64>, weight: &str| norm(&[row], &get(weight), config).concat();
    let row = |(x, normed): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
        let (mut seen, mut entering) = (normed.clone(), normed.clone());
        if e.dense_branch {
            seen = one(x.clone(), "ffn_gate_inp.scale");
            seen.iter_mut().for_each(|x| *x /= (HIDDEN as f64).sqrt());
            entering = one(x.clone(), "pre_ffw_norm_2.weight");
        }
        let mut logits = matrix(&get("ffn_gate_inp.weight"), &seen);
        if e.router_bias {
            let bias = get("ffn_gate_inp.bias");
            logits.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        let total: f64 = logits.iter().map(|x| x.exp()).sum();
        let scores: Vec<f64> = logits
            .iter()
            .map(|x| match e.gating {
                Gating::Softmax => x.exp() / total,
                Gating::Sigmoid => sigmoid(*x),
            })
            .collect();
        let mut choice = scores.clone();
        if e.choice_bias {
            let bias = get("exp_probs_b.bias");
            choice.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        let best = |choice: &[f64], n: usize| {
            let mut order: Vec<usize> = (0..choice.len()).collect();
            order.sort_by(|a, b| choice[*b].total_cmp(&choice[*a]));
            order.truncate(n);
            order
        };
        if let Some(groups) = e.groups {
            let size = (e.n / groups.n) as usize;
            let goodness = |group: &[f64]| best(group, 2).iter().map(|i| group[*i]).sum::<f64>();
            let goodness: Vec<f64> = choice.chunks(size).map(goodness).collect();
            let left = best(&goodness, groups.n_used as usize);
            for (i, x) in choice.iter_mut().enumerate() {
                if !left.contains(&(i / size)) {
                    *x = f64::NEG_INFINITY;
                }
            }
        }
        let chosen = best(&choice, e.n_used as usize);
        let sum: f64 = chosen.iter().map(|i| scores[*i]).sum();
        let mut delta = vec![0.0; HIDDEN];
        for expert in chosen {
            let mut weight = scores[expert] * f64::from(e.scale);
            if e.normalise {
                weight /= sum;
            }
            if e.dense_branch {
                weight *= get("ffn_down_exps.scale")[expert];
            }
            let result = of_expert(expert, &entering);
            delta
                .iter_mut()
                .zip(result)
                .for_each(|(d, x)| *d += weight * x);
        }
        let mut beside = vec![0.0; HIDDEN];
        if let Some(shared) = e.shared {
            let weight = match shared.gated {
                true => sigmoid(dot(&get("ffn_gate_inp_shexp.weight"), normed)),
                false => 1.0,
            };
            beside = dense("_shexp", normed).iter().map(|x| weight * x).collect();
        }
        if e.dense_branch {
            delta = one(delta, "post_ffw_norm_2.weight");
            beside = one(dense("", normed), "post_ffw_norm_1.weight");
        }
        delta.iter().zip(beside).map(|(a, b)| a + b).collect()
    };
    x.iter().zip(normed).map(row).collect()
}

/// A plan that gets tensors of random values.
pub(crate) struct Changed<'a> {
    pub(crate) plan: &'a mut Plan,
    pub(crate) state: u64,
}

impl Changed<'_> {
    /// Values between `offset - scale` and `offset + scale`.
    pub(crate) fn put(
        &mut self,
        to: Component,
        name: &str,
        ne: &[usize],
        (offset, scale): (f32, f32),
    ) {
        let n = ne.iter().product::<usize>();
        let mut next = || {
            self.state = self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let values = (0..n).map(|_| offset + scale * next()).collect();
        let part = self
            .plan
            .parts
            .iter_mut()
            .find(|p| p.component == to)
            .unwrap();
        part.tensors.retain(|tensor| tensor.name != name);
        part.tensors.push(PlannedTensor {
            name: name.to_owned(),
            ne: ne.iter().map(|&n| n as u64).collect(),
            block_type: BlockType::F32,
            values: Values::Computed { values },
        });
    }

    /// Makes the layers from `experts.n_leading_dense` on routed.
    fn route(&mut self, experts: Experts, is_fused: bool) {
        self.plan.config.experts = Some(experts);
        for layer in experts.n_leading_dense..N_LAYERS as u32 {
            let (att, ff) = (
                Component::Attention { layer },
                Component::FeedForward { layer },
            );
            let name = |part: &str| format!("blk.{layer}.{part}");
            let n = experts.n as usize;
            let (even, norm) = ((0.0, 0.5), (1.0, 0.2));
            if !experts.dense_branch {
                let part = self.plan.parts.iter_mut().find(|p| p.component == ff);
                part.unwrap().tensors.clear();
            }
            self.put(att, &name("ffn_gate_inp.weight"), &[HIDDEN, n], even);
            if experts.router_bias {
                self.put(att, &name("ffn_gate_inp.bias"), &[n], even);
            }
            if experts.choice_bias {
                self.put(att, &name("exp_probs_b.bias"), &[n], (0.0, 0.3));
            }
            let (wide, tall) = ([HIDDEN, EXPERT_FFN, n], [EXPERT_FFN, HIDDEN, n]);
            if is_fused {
                let both = [HIDDEN, 2 * EXPERT_FFN, n];
                self.put(ff, &name("ffn_gate_up_exps.weight"), &both, even);
            } else {
                // Wide enough to be clamped where gates are.
                self.put(ff, &name("ffn_gate_exps.weight"), &wide, (0.0, 1.5));
                self.put(ff, &name("ffn_up_exps.weight"), &wide, (0.0, 1.5));
            }
            self.put(ff, &name("ffn_down_exps.weight"), &tall, even);
            if experts.bias {
                self.put(ff, &name("ffn_gate_exps.bias"), &[EXPERT_FFN, n], even);
                self.put(ff, &name("ffn_up_exps.bias"), &[EXPERT_FFN, n], even);
                self.put(ff, &name("ffn_down_exps.bias"), &[HIDDEN, n], even);
            }
            if let Some(shared) = experts.shared {
                let ffn = shared.ffn as usize;
                self.put(ff, &name("ffn_gate_shexp.weight"), &[HIDDEN, ffn], even);
                self.put(ff, &name("ffn_up_shexp.weight"), &[HIDDEN, ffn], even);
                self.put(ff, &name("ffn_down_shexp.weight"), &[ffn, HIDDEN], even);
                if shared.gated {
                    self.put(att, &name("ffn_gate_inp_shexp.weight"), &[HIDDEN, 1], even);
                }
            }
            if experts.dense_branch {
                self.put(att, &name("ffn_gate_inp.scale"), &[HIDDEN], (6.0, 1.0));
                self.put(att, &name("ffn_down_exps.scale"), &[n], (1.0, 0.5));
                for part in ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"] {
                    self.put(att, &name(&format!("{part}.weight")), &[HIDDEN], norm);
                }
            }
        }
    }

    /// What is no matter of experts.
    fn adorn(&mut self) {
        let config = &mut self.plan.config;
        config.post_norms = true;
        config.layer_scale = true;
        config.attention.sinks = true;
        config.attention.value_norm = true;
        let width = 12;
        config.layer_embeddings = Some(LayerEmbeddings { width });
        let (width, wide) = (width as usize, width as usize * N_LAYERS);
        let (norm, even) = ((1.0, 0.2), (0.0, 0.5));
        let emb = Component::Embeddings;
        self.put(emb, "per_layer_token_embd.weight", &[wide, VOCAB], even);
        self.put(emb, "per_layer_model_proj.weight", &[HIDDEN, wide], even);
        self.put(emb, "per_layer_proj_norm.weight", &[width], norm);
        for layer in 0..N_LAYERS as u32 {
            let att = Component::Attention { layer };
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            for part in ["post_attention_norm", "post_ffw_norm", "post_norm"] {
                self.put(att, &name(part), &[HIDDEN], norm);
            }
            self.put(att, &name("layer_output_scale"), &[1], (0.7, 0.2));
            self.put(att, &name("attn_sinks"), &[4], (1.0, 2.0));
            self.put(att, &name("inp_gate"), &[HIDDEN, width], even);
            self.put(att, &name("proj"), &[width, HIDDEN], even);
        }
    }
}

fn experts(n_used: u32, gating: Gating) -> Experts {
    Experts {
        n_used,
        ffn: EXPERT_FFN as u32,
        ..Experts::new(N, gating)
    }
}

/// A model of each kind, from one small llama.
fn models() -> Vec<(&'static str, Extracted)> {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), json!({}));
    let checkpoint: &Path = dir.path();
    let with = |change: &dyn Fn(&mut Changed<'_>)| {
        extracted_with(checkpoint, Recipe::F32, |plan| {
            change(&mut Changed { plan, state: 7 });
        })
    };
    vec![
        (
            "shared with a gate",
            with(&|c| {
                let shared = Some(Shared {
                    ffn: 24,
                    gated: true,
                });
                let experts = Experts {
                    shared,
                    normalise: true,
                    ..experts(2, Gating::Softmax)
                };
                c.route(experts, false);
            }),
        ),
        (
            "groups, a dense layer before",
            with(&|c| {
                let experts = Experts {
                    shared: Some(Shared {
                        ffn: 56,
                        gated: false,
                    }),
                    normalise: true,
                    scale: 2.5,
                    groups: Some(Groups { n: 4, n_used: 2 }),
                    choice_bias: true,
                    n_leading_dense: 1,
                    ..experts(3, Gating::Sigmoid)
                };
                c.route(experts, false);
            }),
        ),
        (
            "biases and clamps",
            with(&|c| {
                c.plan.config.activation = Activation::SwigluClamped;
                let experts = Experts {
                    normalise: true,
                    router_bias: true,
                    bias: true,
                    ..experts(4, Gating::Softmax)
                };
                c.route(experts, false);
            }),
        ),
        (
            "a dense branch",
            with(&|c| {
                c.plan.config.activation = Activation::GeluTanh;
                let experts = Experts {
                    normalise: true,
                    dense_branch: true,
                    ..experts(2, Gating::Softmax)
                };
                c.route(experts, true);
                c.adorn();
            }),
        ),
        (
            "weights as they are",
            with(&|c| c.route(experts(8, Gating::Sigmoid), true)),
        ),
        ("no experts", with(&|c| c.adorn())),
    ]
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + i * 13) % 512).collect()
}

#[test]
fn every_kind_of_layer_is_its_definition() {
    assert_ne!(FFN, EXPERT_FFN);
    let mut seen = Vec::new();
    for (what, model) in models() {
        let tokens = tokens(70);
        let expected = oracle(&model.vindex, &tokens);
        let got = Engine::new(&model.vindex, KvType::F32, 2).logits(&tokens);
        let differs = difference(&got, &expected);
        assert!(differs < 1e-4, "{what}: {differs:e}");
        assert!(!seen.contains(&expected), "{what} changes something");
        seen.push(expected);
    }
}

/// Asks for each visit whoever holds its expert.
struct Holders {
    n_experts: u32,
    holders: Vec<Local>,
}

impl FeedForward for Holders {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        for (visit, out) in batch.visits.iter().zip(out.chunks_exact_mut(HIDDEN)) {
            let held_with = if visit.expert < self.n_experts {
                visit.expert
            } else {
                0
            };
            let holds = |local: &&Local| {
                local.experts().contains(&held_with) && local.layers().contains(&layer)
            };
            let visits = std::slice::from_ref(visit);
            let holder = self.holders.iter().find(holds).unwrap();
            holder.forward(layer, Batch { visits, ..batch }, out)?;
        }
        Ok(())
    }
}

#[test]
fn who_holds_what_changes_no_bit() {
    for (what, model) in models() {
        let vindex = &model.vindex;
        let logits = |ffn: Arc<dyn FeedForward>| {
            let model = Arc::new(Model::open(Arc::clone(vindex)).unwrap());
            let cache = KvCache::new(model.config(), KvType::F16, 1 << 20);
            let mut forward = Forward::new(model, Arc::new(Pool::new(2)), ffn);
            let mut sequence = cache.sequence();
            let mut works = [Work {
                sequence: &mut sequence,
                tokens: &tokens(33),
                logits: Wanted::All,
            }];
            bits(forward.step(&mut works).unwrap())
        };
        let n_layers = N_LAYERS as u32;
        let n_experts = vindex.index().config.experts.map_or(1, |e| e.n);
        let whole = logits(Arc::new(
            Local::new(Arc::clone(vindex), Arc::new(Pool::new(2))).unwrap(),
        ));
        for cut in [n_experts, n_experts.div_ceil(3), 1] {
            let ranges = [0..cut, cut..n_experts].into_iter();
            let ranges = ranges.filter(|range| !range.is_empty());
            let pieces = ranges.flat_map(|experts| {
                let layers = [0..1, 1..n_layers];
                layers.map(move |layers| (layers, experts.clone()))
            });
            let holder = |(layers, experts)| {
                let pool = Arc::new(Pool::new(1));
                Local::with_ranges(Arc::clone(vindex), pool, layers, experts).unwrap()
            };
            let holders = pieces.map(holder).collect();
            let holders = Holders { n_experts, holders };
            assert!(logits(Arc::new(holders)) == whole, "{what}, cut at {cut}");
        }
    }
}

#[test]
fn a_token_reads_what_it_visits() {
    let of = |wanted: &str| {
        let (_, model) = models()
            .into_iter()
            .find(|(what, _)| *what == wanted)
            .unwrap();
        let bytes = Model::open(Arc::clone(&model.vindex)).unwrap();
        let index = model.vindex.index();
        let named = |part: &str| -> u64 {
            let own = index.tensors.iter().filter(|t| t.name.contains(part));
            own.map(|t| t.size_bytes).sum()
        };
        (
            bytes.feed_forward_bytes(),
            bytes.attention_bytes(),
            named("per_layer_token_embd"),
        )
    };
    // Three matrices of f32.
    let matrices = |ffn: usize| (3 * HIDDEN * ffn * 4) as u64;
    let chosen = matrices(EXPERT_FFN);
    assert_eq!(
        of("shared with a gate").0,
        2 * (2 * chosen + matrices(24)),
        "two layers of two experts and a shared one"
    );
    assert_eq!(
        of("groups, a dense layer before").0,
        matrices(FFN) + 3 * chosen + matrices(56)
    );
    assert_eq!(of("a dense branch").0, 2 * (2 * chosen + matrices(FFN)));
    let (ffn, attention, looked_up) = of("no experts");
    assert_eq!(ffn, 2 * matrices(FFN));
    // Heads of 64 and 32 values, the output head, and what layers make of embeddings of their own; these are looked up.
    let plain = 2 * HIDDEN * (64 + 32 + 32 + 64) + VOCAB * HIDDEN;
    let own = 2 * 2 * 12 * HIDDEN + 2 * 12 * HIDDEN;
    assert_eq!(attention, 4 * (plain + own) as u64);
    assert!(looked_up > 0);
}
