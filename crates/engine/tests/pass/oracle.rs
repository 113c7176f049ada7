//! What no recorded golden has (biases of all projections, linear and YaRN rope) against a plain pass in double precision,
//! which computes each token anew from all before it.

use std::path::Path;

use engine::KvType;
use serde_json::{Value, json};
use vindex::{Activation, Config, Recipe, RopeKind, RopeScaling, Vindex};

use crate::experts::routed;
use crate::mixers::mixed_otherwise;
use crate::support::{Engine, difference, extracted_from, fixtures};

pub(crate) const HIDDEN: usize = 48;
pub(crate) const FFN: usize = 80;
pub(crate) const VOCAB: usize = 512;
pub(crate) const N_LAYERS: usize = 2;

/// Writes a checkpoint of random weights: a small llama with what `changes` say.
pub(crate) fn write_checkpoint(dir: &Path, changes: Value) {
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixtures().join("models/llama").join(name), dir.join(name)).unwrap();
    }
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for l in 0..N_LAYERS {
        let biased = |tensors: &mut Vec<_>, name: &str, key: &str, n_rows: usize, n_cols: usize| {
            tensors.push((
                format!("model.layers.{l}.{name}.weight"),
                vec![n_rows, n_cols],
            ));
            if config[key] == json!(true) {
                tensors.push((format!("model.layers.{l}.{name}.bias"), vec![n_rows]));
            }
        };
        for (name, rows, cols) in [
            ("q", 64, HIDDEN),
            ("k", 32, HIDDEN),
            ("v", 32, HIDDEN),
            ("o", HIDDEN, 64),
        ] {
            biased(
                &mut tensors,
                &format!("self_attn.{name}_proj"),
                "attention_bias",
                rows,
                cols,
            );
        }
        for (name, rows, cols) in [
            ("gate", FFN, HIDDEN),
            ("up", FFN, HIDDEN),
            ("down", HIDDEN, FFN),
        ] {
            biased(
                &mut tensors,
                &format!("mlp.{name}_proj"),
                "mlp_bias",
                rows,
                cols,
            );
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{l}.{name}.weight"), vec![HIDDEN]));
        }
    }
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut state = 1_u64;
    for (name, shape) in tensors {
        let begin = data.len();
        let (scale, offset) = if name.contains("norm") {
            (0.2, 1.0)
        } else {
            (0.5, 0.0)
        };
        for _ in 0..shape.iter().product::<usize>() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let unit = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            data.extend((unit * scale + offset).to_le_bytes());
        }
        header.insert(
            name,
            json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// The values of a tensor.
pub(crate) fn values(vindex: &Vindex, name: &str) -> Vec<f64> {
    let view = vindex
        .tensor(name)
        .unwrap_or_else(|| panic!("no tensor {name}"));
    let mut values = vec![0.0; view.ne.iter().product::<u64>() as usize];
    quant::decode(view.block_type, view.bytes, &mut values);
    values.into_iter().map(f64::from).collect()
}

/// Logits after each of `tokens`.
pub(crate) fn oracle(vindex: &Vindex, tokens: &[u32]) -> Vec<f32> {
    let config = &vindex.index().config;
    let get = |name: &str| values(vindex, name);
    let bias = |name: &str, has: bool, n: usize| if has { get(name) } else { vec![0.0; n] };
    let a = &config.attention;
    let mut x: Vec<Vec<f64>> = tokens
        .iter()
        .map(|&t| get("token_embd.weight")[t as usize * HIDDEN..][..HIDDEN].to_vec())
        .collect();
    let inputs = layer_inputs(vindex, tokens, &x);
    for l in 0..N_LAYERS {
        let name = |part: &str| format!("blk.{l}.{part}");
        let project = |x: &[Vec<f64>], part: &str, n: usize, has: bool| -> Vec<Vec<f64>> {
            let w = get(&name(&format!("{part}.weight")));
            let b = bias(&name(&format!("{part}.bias")), has, n);
            x.iter()
                .map(|x| matrix(&w, x).iter().zip(&b).map(|(x, b)| x + b).collect())
                .collect()
        };
        let normed = norm(&x, &get(&name("attn_norm.weight")), config);
        let attend = || {
            let mut q = project(&normed, "attn_q", 64, a.qkv_bias);
            let mut k = project(&normed, "attn_k", 32, a.qkv_bias);
            let mut v = project(&normed, "attn_v", 32, a.qkv_bias);
            if a.value_norm {
                for value in v.iter_mut().flat_map(|row| row.chunks_exact_mut(16)) {
                    let root = (dot(value, value) / 16.0 + f64::from(config.norm_eps)).sqrt();
                    value.iter_mut().for_each(|x| *x /= root);
                }
            }
            for rows in [&mut q, &mut k] {
                for (position, row) in rows.iter_mut().enumerate() {
                    row.chunks_exact_mut(16)
                        .for_each(|head| turn(config, position as f64, head));
                }
            }
            let mut mixed = vec![vec![0.0; 64]; x.len()];
            for (i, mixed) in mixed.iter_mut().enumerate() {
                for head in 0..4 {
                    let kv = head / 2 * 16;
                    let q = &q[i][head * 16..][..16];
                    let scores: Vec<f64> = k[..=i]
                        .iter()
                        .map(|k| (dot(q, &k[kv..kv + 16]) * f64::from(a.scale)).exp())
                        .collect();
                    let sink = a.sinks.then(|| get(&name("attn_sinks.weight"))[head].exp());
                    let total = scores.iter().sum::<f64>() + sink.unwrap_or(0.0);
                    for (score, v) in scores.iter().zip(&v) {
                        for (mixed, v) in mixed[head * 16..][..16].iter_mut().zip(&v[kv..kv + 16]) {
                            *mixed += score / total * v;
                        }
                    }
                }
            }
            project(&mixed, "attn_output", HIDDEN, a.output_bias)
        };
        let other = mixed_otherwise(vindex, l, &normed);
        let mut delta = other.unwrap_or_else(attend);
        if config.post_norms {
            delta = norm(&delta, &get(&name("post_attention_norm.weight")), config);
        }
        add(&mut x, &delta);
        let normed = norm(&x, &get(&name("ffn_norm.weight")), config);
        let mut delta = if config.is_routed(l as u32) {
            routed(vindex, l, &x, &normed)
        } else {
            let mut gate = project(&normed, "ffn_gate", FFN, config.ffn_bias);
            let up = project(&normed, "ffn_up", FFN, config.ffn_bias);
            for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
                *gate = gated(config, *gate, *up);
            }
            project(&gate, "ffn_down", HIDDEN, config.ffn_bias)
        };
        if config.post_norms {
            delta = norm(&delta, &get(&name("post_ffw_norm.weight")), config);
        }
        add(&mut x, &delta);
        if let Some(own) = config.layer_embeddings {
            let width = own.width as usize;
            let mut narrow = project(&x, "inp_gate", width, false);
            for (narrow, inputs) in narrow.iter_mut().zip(&inputs) {
                for (gate, input) in narrow.iter_mut().zip(&inputs[l * width..]) {
                    *gate = gelu(*gate) * input;
                }
            }
            let delta = project(&narrow, "proj", HIDDEN, false);
            add(
                &mut x,
                &norm(&delta, &get(&name("post_norm.weight")), config),
            );
        }
        if config.layer_scale {
            let scale = get(&name("layer_output_scale.weight"))[0];
            x.iter_mut().flatten().for_each(|x| *x *= scale);
        }
    }
    let normed = norm(&x, &get("output_norm.weight"), config);
    let head = get("token_embd.weight");
    normed
        .iter()
        .flat_map(|x| matrix(&head, x))
        .map(|x| x as f32)
        .collect()
}

/// What layers have of the tokens' own embeddings, as `LayerEmbeddings` says it.
fn layer_inputs(vindex: &Vindex, tokens: &[u32], x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let config = &vindex.index().config;
    let Some(own) = config.layer_embeddings else {
        return Vec::new();
    };
    let width = own.width as usize;
    let get = |name: &str| values(vindex, name);
    let embeddings = get("per_layer_token_embd.weight");
    let w = get("per_layer_model_proj.weight");
    let weight = get("per_layer_proj_norm.weight");
    let row = |(x, token): (&Vec<f64>, &u32)| {
        let projected = matrix(&w, x);
        let scaled = projected.iter().map(|x| x / (HIDDEN as f64).sqrt());
        let scaled: Vec<f64> = scaled.collect();
        let chunks: Vec<Vec<f64>> = scaled.chunks_exact(width).map(<[f64]>::to_vec).collect();
        let normed = norm(&chunks, &weight, config).concat();
        let own = &embeddings[*token as usize * normed.len()..];
        let sum = |(a, b): (&f64, &f64)| (a + (width as f64).sqrt() * b) / 2.0f64.sqrt();
        normed.iter().zip(own).map(sum).collect()
    };
    x.iter().zip(tokens).map(row).collect()
}

pub(crate) fn gelu(x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    x * sigmoid(2.0 * u)
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// What a gate makes of up.
pub(crate) fn gated(config: &Config, gate: f64, up: f64) -> f64 {
    match config.activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => gelu(gate) * up,
        Activation::SwigluClamped => {
            let gate = gate.min(7.0);
            (up.clamp(-7.0, 7.0) + 1.0) * gate * sigmoid(1.702 * gate)
        }
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn matrix(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

pub(crate) fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut()
        .flatten()
        .zip(y.iter().flatten())
        .for_each(|(x, y)| *x += y);
}

pub(crate) fn norm(x: &[Vec<f64>], weight: &[f64], config: &Config) -> Vec<Vec<f64>> {
    let row = |x: &Vec<f64>| {
        let scale = (dot(x, x) / x.len() as f64 + f64::from(config.norm_eps)).sqrt();
        x.iter().zip(weight).map(|(x, w)| x / scale * w).collect()
    };
    x.iter().map(row).collect()
}

/// As the papers define it: linear (Chen et al. 2023), YaRN (Peng et al. 2023, with the ramp over pairs of its code).
pub(crate) fn turn(config: &Config, position: f64, head: &mut [f64]) {
    let rope = &config.rope;
    assert_eq!(rope.kind, RopeKind::Interleaved);
    let n = f64::from(rope.n_dims);
    for i in 0..rope.n_dims as usize / 2 {
        let mut frequency = f64::from(rope.base).powf(-2.0 * i as f64 / n);
        let mut magnitude = 1.0;
        match rope.scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => frequency /= f64::from(factor),
            Some(RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                fractional: _,
            }) => {
                let factor = f64::from(factor);
                let pair = |turns: f32| {
                    let wavelength = f64::from(original_context) / f64::from(turns);
                    n * (wavelength / std::f64::consts::TAU).ln()
                        / (2.0 * f64::from(rope.base).ln())
                };
                let (low, high) = (
                    pair(beta_fast).floor().max(0.0),
                    pair(beta_slow).ceil().min(n - 1.0),
                );
                let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency = frequency * (1.0 - stretched) + frequency / factor * stretched;
                magnitude = attention_factor.map_or(0.1 * factor.ln() + 1.0, f64::from);
            }
            Some(RopeScaling::FrequencyFactors) => panic!("the goldens have it"),
        }
        let (sin, cos) = (position * frequency).sin_cos();
        let (x, y) = (head[2 * i], head[2 * i + 1]);
        head[2 * i] = (x * cos - y * sin) * magnitude;
        head[2 * i + 1] = (x * sin + y * cos) * magnitude;
    }
}

#[test]
fn biases_and_stretched_ropes() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    let mut yarn_of_its_own = yarn.clone();
    yarn_of_its_own["attention_factor"] = json!(1.3);
    yarn_of_its_own["beta_fast"] = json!(8.0);
    let cases = [
        json!({}),
        json!({"attention_bias": true}),
        json!({"mlp_bias": true}),
        json!({"attention_bias": true, "mlp_bias": true, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        json!({"rope_scaling": yarn}),
        json!({"rope_scaling": yarn_of_its_own}),
    ];
    let tokens: Vec<u32> = (0..80).map(|i| (i * i * 7 + i * 13) % 512).collect();
    let mut seen = Vec::new();
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), case.clone());
        let model = extracted_from(dir.path(), Recipe::F32);
        let expected = oracle(&model.vindex, &tokens);
        let got = Engine::new(&model.vindex, KvType::F32, 2).logits(&tokens);
        let differs = difference(&got, &expected);
        assert!(differs < 1e-4, "{case}: {differs:e}");
        assert!(!seen.contains(&expected), "{case} changes something");
        seen.push(expected);
    }
}
