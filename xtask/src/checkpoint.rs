//! Writes a random checkpoint with the shape of a real model, for benches. Invariant: the same bytes on every
//! machine (a fixed generator). Leaves out sense: the model speaks noise.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::build::{Done, root};

/// Numbers of Qwen3-0.6B.
const HIDDEN: usize = 1024;
const FFN: usize = 3072;
const N_LAYERS: usize = 28;
const N_HEADS: usize = 16;
const N_KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const VOCAB: usize = 151_936;

/// Writes config, tokenizer and `model.safetensors` (BF16, 1.2 GB) into `folder` unless they are there.
/// Returns the number of weights.
pub(crate) fn qwen3_0_6b(folder: &Path) -> Done<u64> {
    let tensors = tensors();
    let n_weights: u64 = tensors
        .iter()
        .map(|(_, shape)| elements(shape) as u64)
        .sum();
    let target = folder.join("model.safetensors");
    if target.exists() {
        return Ok(n_weights);
    }
    std::fs::create_dir_all(folder).map_err(|error| said(folder, &error))?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let source = root().join("models/kjv").join(name);
        std::fs::copy(&source, folder.join(name)).map_err(|error| said(&source, &error))?;
    }
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "attention_bias": false, "head_dim": HEAD_DIM, "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "max_position_embeddings": 40960, "num_attention_heads": N_HEADS,
        "num_hidden_layers": N_LAYERS, "num_key_value_heads": N_KV_HEADS, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1_000_000, "sliding_window": null, "use_sliding_window": false,
        "tie_word_embeddings": true, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0,
    });
    let config_path = folder.join("config.json");
    std::fs::write(&config_path, config.to_string()).map_err(|error| said(&config_path, &error))?;

    let beside = folder.join("model.safetensors.incomplete");
    write(&beside, &tensors).map_err(|error| said(&beside, &error))?;
    std::fs::rename(&beside, &target).map_err(|error| said(&target, &error))?;
    Ok(n_weights)
}

fn write(path: &Path, tensors: &[(String, Vec<usize>)]) -> std::io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + 2 * elements(shape);
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (name, shape) in tensors {
        let scale = if name.ends_with("norm.weight") {
            0.0
        } else {
            0.02
        };
        for _ in 0..elements(shape) {
            let value = if scale == 0.0 {
                1.0
            } else {
                scale * random.normal()
            };
            file.write_all(&((value.to_bits() >> 16) as u16).to_le_bytes())?;
        }
    }
    file.into_inner()?.sync_all()
}

/// Names and shapes of the checkpoint, rows first as PyTorch has them.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
    for layer in 0..N_LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.k_norm", vec![HEAD_DIM]),
            ("self_attn.k_proj", vec![N_KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, N_HEADS * HEAD_DIM]),
            ("self_attn.q_norm", vec![HEAD_DIM]),
            ("self_attn.q_proj", vec![N_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![N_KV_HEADS * HEAD_DIM, HIDDEN]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    tensors
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn said(path: &Path, error: &std::io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// SplitMix64 (Steele, Lea, Flood 2014), summed into something near enough to a normal distribution.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Sum of eight uniform 16-bit numbers, centred, variance 1 (Irwin and Hall).
    fn normal(&mut self) -> f32 {
        let (first, second) = (self.next(), self.next());
        let sum: u64 = (0..4)
            .map(|lane| ((first >> (16 * lane)) & 0xffff) + ((second >> (16 * lane)) & 0xffff))
            .sum();
        (sum as f32 / 65_535.0 - 4.0) / (8.0_f32 / 12.0).sqrt()
    }
}
