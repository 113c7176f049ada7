//! Layers that mix otherwise than by keys and values of each head: against their formulas in double precision, in widths
//! that no vector register likes; and the bits of any cut of a text, beside others, shared and shortened.

use engine::{KvType, Sequence, Wanted, Work};
use serde_json::json;
use vindex::{Component, DeltaNet, Latent, Recipe, Vindex};

use crate::cache::tokens;
use crate::experts::Changed;
use crate::oracle::{
    HIDDEN, N_LAYERS, dot, matrix, norm, oracle, sigmoid, turn, values, write_checkpoint,
};
use crate::support::{Engine, Extracted, bits, difference, extracted_with};

/// What layer `l` adds, after its output projection, where it is no plain attention.
pub(crate) fn mixed_otherwise(
    vindex: &Vindex,
    l: usize,
    normed: &[Vec<f64>],
) -> Option<Vec<Vec<f64>>> {
    let config = &vindex.index().config;
    match (&config.delta_net, config.attention.latent) {
        (Some(net), _) if config.is_recurrent(l as u32) => Some(delta_net(vindex, net, l, normed)),
        (_, Some(latent)) => Some(attend(vindex, latent, l, normed)),
        _ => None,
    }
}

/// As `vindex::DeltaNet` says it.
fn delta_net(vindex: &Vindex, net: &DeltaNet, l: usize, normed: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let config = &vindex.index().config;
    let get = |part: &str| values(vindex, &format!("blk.{l}.{part}"));
    let (n_k, n_v) = (net.n_key_heads as usize, net.n_value_heads as usize);
    let (d_k, d_v) = (net.key_length as usize, net.value_length as usize);
    let (group, kernel) = (n_v / n_k, net.conv_kernel as usize);
    let (conv, w_qkv) = (get("ssm_conv1d.weight"), get("attn_qkv.weight"));
    let raw: Vec<Vec<f64>> = normed.iter().map(|x| matrix(&w_qkv, x)).collect();
    let mut states = vec![vec![vec![0.0; d_v]; d_k]; n_v];
    let mut out = Vec::new();
    for (t, x) in normed.iter().enumerate() {
        let channel = |c: usize| {
            let weights = &conv[c * kernel..][..kernel];
            let terms = weights.iter().enumerate().map(|(i, w)| {
                let at = (t + i + 1).checked_sub(kernel);
                at.map_or(0.0, |at| w * raw[at][c])
            });
            let sum: f64 = terms.sum();
            sum * sigmoid(sum)
        };
        let qkv: Vec<f64> = (0..raw[t].len()).map(channel).collect();
        let z = matrix(&get("attn_gate.weight"), x);
        let mut mixed = Vec::new();
        for v in 0..n_v {
            let (key_head, i) = match net.tiled {
                true => (v % n_k, v / n_k),
                false => (v / group, v % group),
            };
            let (a, b) = if net.fused_ba {
                let both = matrix(&get("ssm_ba.weight"), x);
                let of_head = &both[2 * group * key_head..][..2 * group];
                (of_head[group + i], of_head[i])
            } else {
                let one = |part: &str| matrix(&get(part), x)[v];
                (one("ssm_alpha.weight"), one("ssm_beta.weight"))
            };
            let step = (1.0 + (a + get("ssm_dt.bias")[v]).exp()).ln();
            let (decay, beta) = ((get("ssm_a")[v] * step).exp(), sigmoid(b));
            let head = |start: usize| {
                let head = &qkv[start + key_head * d_k..][..d_k];
                let root = (dot(head, head) + 1e-6).sqrt();
                head.iter().map(|x| x / root).collect::<Vec<f64>>()
            };
            let (q, k) = (head(0), head(n_k * d_k));
            let value = &qkv[2 * n_k * d_k + v * d_v..][..d_v];
            let state = &mut states[v];
            let mut result = vec![0.0; d_v];
            for j in 0..d_v {
                state.iter_mut().for_each(|row| row[j] *= decay);
                let recalled: f64 = state.iter().zip(&k).map(|(row, k)| row[j] * k).sum();
                for (row, k) in state.iter_mut().zip(&k) {
                    row[j] += k * beta * (value[j] - recalled);
                }
                let asked: f64 = state.iter().zip(&q).map(|(row, q)| row[j] * q).sum();
                result[j] = asked / (d_k as f64).sqrt();
            }
            let result = norm(&[result], &get("ssm_norm.weight"), config).concat();
            let z = &z[v * d_v..][..d_v];
            mixed.extend(result.iter().zip(z).map(|(x, z)| x * z * sigmoid(*z)));
        }
        out.push(matrix(&get("ssm_out.weight"), &mixed));
    }
    out
}

/// As DeepSeek-V2 says it, with keys and values of each head written out.
fn attend(vindex: &Vindex, latent: Latent, l: usize, normed: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let config = &vindex.index().config;
    let a = &config.attention;
    let get = |part: &str| values(vindex, &format!("blk.{l}.{part}.weight"));
    let (n_heads, rank) = (a.n_heads as usize, a.value_length as usize);
    let (n_plain, n_rotated) = (latent.n_plain as usize, config.rope.n_dims as usize);
    let one = |row: Vec<f64>, weight: &str| norm(&[row], &get(weight), config).concat();
    let row = |(position, x): (usize, &Vec<f64>)| {
        let mut q = match latent.q_rank {
            None => matrix(&get("attn_q"), x),
            Some(_) => {
                let low = one(matrix(&get("attn_q_a"), x), "attn_q_a_norm");
                matrix(&get("attn_q_b"), &low)
            }
        };
        for head in q.chunks_exact_mut(n_plain + n_rotated) {
            turn(config, position as f64, &mut head[n_plain..]);
        }
        let both = matrix(&get("attn_kv_a_mqa"), x);
        let compressed = one(both[..rank].to_vec(), "attn_kv_a_norm");
        let mut rotated = both[rank..].to_vec();
        turn(config, position as f64, &mut rotated);
        (q, compressed, rotated)
    };
    let rows: Vec<_> = normed.iter().enumerate().map(row).collect();
    let (k_b, v_b) = (get("attn_k_b"), get("attn_v_b"));
    let value_length = latent.value_length as usize;
    let mix = |t: usize| {
        let mut mixed = Vec::new();
        for h in 0..n_heads {
            let q = &rows[t].0[h * (n_plain + n_rotated)..][..n_plain + n_rotated];
            let k_b = &k_b[h * rank * n_plain..][..rank * n_plain];
            let v_b = &v_b[h * value_length * rank..][..value_length * rank];
            let score = |(_, compressed, rotated): &(Vec<f64>, Vec<f64>, Vec<f64>)| {
                // The head's plain key is the transposed matrix times what is compressed.
                let plain: Vec<f64> = (0..n_plain)
                    .map(|i| {
                        (0..rank)
                            .map(|r| k_b[r * n_plain + i] * compressed[r])
                            .sum()
                    })
                    .collect();
                let score = dot(&q[..n_plain], &plain) + dot(&q[n_plain..], rotated);
                (score * f64::from(a.scale)).exp()
            };
            let scores: Vec<f64> = rows[..=t].iter().map(score).collect();
            let total: f64 = scores.iter().sum();
            let mut result = vec![0.0; value_length];
            for (score, (_, compressed, _)) in scores.iter().zip(&rows) {
                let value = matrix(v_b, compressed);
                let pairs = result.iter_mut().zip(value);
                pairs.for_each(|(result, v)| *result += score / total * v);
            }
            mixed.extend(result);
        }
        matrix(&get("attn_output"), &mixed)
    };
    (0..rows.len()).map(mix).collect()
}

/// Layers from `first` on become delta nets.
fn with_delta_net(changed: &mut Changed<'_>, first: usize, net: &DeltaNet) {
    let layers = (0..N_LAYERS).map(|l| l >= first).collect();
    changed.plan.config.delta_net = Some(DeltaNet {
        layers,
        ..net.clone()
    });
    let (n_k, n_v) = (net.n_key_heads as usize, net.n_value_heads as usize);
    let (d_k, d_v) = (net.key_length as usize, net.value_length as usize);
    let channels = 2 * n_k * d_k + n_v * d_v;
    let (even, kernel) = ((0.0, 0.5), net.conv_kernel as usize);
    for layer in first..N_LAYERS {
        let att = Component::Attention {
            layer: layer as u32,
        };
        let mut put = |part: &str, ne: &[usize], range| {
            changed.put(att, &format!("blk.{layer}.{part}"), ne, range);
        };
        put("attn_qkv.weight", &[HIDDEN, channels], even);
        put("attn_gate.weight", &[HIDDEN, n_v * d_v], even);
        if net.fused_ba {
            put("ssm_ba.weight", &[HIDDEN, 2 * n_v], even);
        } else {
            put("ssm_alpha.weight", &[HIDDEN, n_v], even);
            put("ssm_beta.weight", &[HIDDEN, n_v], even);
        }
        put("ssm_conv1d.weight", &[kernel, channels], even);
        put("ssm_dt.bias", &[n_v], even);
        put("ssm_a", &[n_v], (-0.3, 0.25));
        put("ssm_norm.weight", &[d_v], (1.0, 0.2));
        put("ssm_out.weight", &[n_v * d_v, HIDDEN], even);
    }
}

fn with_latent(changed: &mut Changed<'_>, rank: u32, n_rotated: u32, latent: Latent) {
    let config = &mut changed.plan.config;
    let n_heads = config.attention.n_heads as usize;
    config.rope.n_dims = n_rotated;
    config.attention.n_kv_heads = 1;
    config.attention.key_length = rank + n_rotated;
    config.attention.value_length = rank;
    config.attention.scale = 0.2;
    config.attention.latent = Some(latent);
    let (rank, n_rotated) = (rank as usize, n_rotated as usize);
    let (n_plain, value_length) = (latent.n_plain as usize, latent.value_length as usize);
    let queries = n_heads * (n_plain + n_rotated);
    let (even, norm) = ((0.0, 0.4), (1.0, 0.2));
    for layer in 0..N_LAYERS {
        let att = Component::Attention {
            layer: layer as u32,
        };
        let mut put = |part: &str, ne: &[usize], range| {
            changed.put(att, &format!("blk.{layer}.{part}.weight"), ne, range);
        };
        match latent.q_rank {
            None => put("attn_q", &[HIDDEN, queries], even),
            Some(q_rank) => {
                put("attn_q_a", &[HIDDEN, q_rank as usize], even);
                put("attn_q_a_norm", &[q_rank as usize], norm);
                put("attn_q_b", &[q_rank as usize, queries], even);
            }
        }
        put("attn_kv_a_mqa", &[HIDDEN, rank + n_rotated], even);
        put("attn_kv_a_norm", &[rank], norm);
        put("attn_k_b", &[n_plain, rank, n_heads], even);
        put("attn_v_b", &[rank, value_length, n_heads], even);
        put("attn_output", &[n_heads * value_length, HIDDEN], even);
    }
}

/// A model of each kind, from one small llama.
fn models() -> Vec<(&'static str, Extracted)> {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), json!({}));
    let with = |change: &dyn Fn(&mut Changed<'_>)| {
        extracted_with(dir.path(), Recipe::F32, |plan| {
            change(&mut Changed { plan, state: 7 });
        })
    };
    let net = DeltaNet {
        layers: Vec::new(),
        n_key_heads: 2,
        n_value_heads: 6,
        key_length: 21,
        value_length: 24,
        conv_kernel: 3,
        tiled: true,
        fused_ba: false,
    };
    let fused = DeltaNet {
        n_key_heads: 3,
        key_length: 9,
        value_length: 40,
        conv_kernel: 5,
        tiled: false,
        fused_ba: true,
        ..net.clone()
    };
    let latent = |q_rank| Latent {
        q_rank,
        n_plain: 12,
        value_length: 20,
    };
    vec![
        (
            "a net behind attention",
            with(&|c| with_delta_net(c, 1, &net)),
        ),
        ("nets alone", with(&|c| with_delta_net(c, 0, &fused))),
        (
            "a convolution of nothing",
            with(&|c| {
                let conv_kernel = 1;
                let net = DeltaNet {
                    conv_kernel,
                    ..net.clone()
                };
                with_delta_net(c, 1, &net);
            }),
        ),
        ("latent", with(&|c| with_latent(c, 24, 8, latent(None)))),
        (
            "latent, with compressed queries",
            with(&|c| with_latent(c, 40, 10, latent(Some(28)))),
        ),
    ]
}

#[test]
fn mixers_are_their_formulas_however_a_text_is_cut() {
    let all = tokens(150, 11);
    for (name, model) in models() {
        let mut engine = Engine::new(&model.vindex, KvType::F32, 2);
        let got = engine.logits(&all);
        let differs = difference(&got, &oracle(&model.vindex, &all));
        assert!(differs < 1e-4, "{name}: {differs:e}");
        let mut half = Engine::new(&model.vindex, KvType::F16, 1);
        let in_half = half.logits(&all);
        // Weights of this size make scores of which a rounded key changes much.
        let differs = difference(&in_half, &got);
        assert!(differs < 5e-2, "{name}, half: {differs:e}");
        for (engine, expected) in [(&mut engine, &got), (&mut half, &in_half)] {
            for chunk in [1, 2, 9, 10, 64, 149] {
                let mut sequence = engine.cache.sequence();
                let got = engine.append(&mut sequence, &all, chunk);
                assert!(bits(&got) == bits(expected), "{name} in chunks of {chunk}");
            }
        }
    }
}

#[test]
fn sixteen_texts_beside_each_other_are_each_alone() {
    for (name, model) in models() {
        let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
        for n_texts in [2, 5, 16] {
            let texts: Vec<Vec<u32>> = (0..n_texts).map(|i| tokens(20 + 9 * i, i)).collect();
            let alone: Vec<Vec<f32>> = texts.iter().map(|text| engine.logits(text)).collect();
            let mut sequences: Vec<Sequence> =
                texts.iter().map(|_| engine.cache.sequence()).collect();
            let mut got = vec![Vec::new(); n_texts];
            // Steps of several widths, each text with another one.
            let mut step = 0;
            while sequences.iter().zip(&texts).any(|(s, t)| s.len() < t.len()) {
                let mut works = Vec::new();
                let mut widths = vec![0; n_texts];
                for (i, sequence) in sequences.iter_mut().enumerate() {
                    let n = [1, 4, 11, 2][(i + step) % 4].min(texts[i].len() - sequence.len());
                    if n > 0 {
                        widths[i] = n;
                        let tokens = &texts[i][sequence.len()..][..n];
                        works.push(Work {
                            sequence,
                            tokens,
                            logits: Wanted::All,
                        });
                    }
                }
                let mut logits = engine.forward.step(&mut works).unwrap();
                for (got, n) in got.iter_mut().zip(widths) {
                    let rows = logits.split_off(..n * alone[0].len() / texts[0].len());
                    got.extend_from_slice(rows.unwrap());
                }
                step += 1;
            }
            for (got, alone) in got.iter().zip(&alone) {
                assert!(bits(got) == bits(alone), "{name}, {n_texts} texts");
            }
        }
    }
}

#[test]
fn forks_and_shortened_texts_are_computed_anew_alike() {
    let all = tokens(140, 3);
    for (name, model) in models() {
        let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
        let expected = engine.logits(&all);
        let vocab = expected.len() / all.len();
        let mut sequence = engine.cache.sequence();
        engine.append(&mut sequence, &all[..130], 40);
        engine.append(&mut sequence, &all[130..136], 6);
        for len in [136, 133, 129, 128, 70, 64, 1] {
            let mut fork = sequence.fork(len);
            let begin = fork.len();
            assert!(begin + 64 > len && begin <= len, "{name}: {begin} of {len}");
            let got = engine.append(&mut fork, &all[begin..], 7);
            assert!(bits(&got) == bits(&expected[begin * vocab..]), "{name}");
        }
        for len in [134, 131, 100, 30] {
            sequence.truncate(len);
            let begin = sequence.len();
            let got = engine.append(&mut sequence, &all[begin..begin + 5], 5);
            assert!(
                bits(&got) == bits(&expected[begin * vocab..][..5 * vocab]),
                "{name}"
            );
        }
    }
}
