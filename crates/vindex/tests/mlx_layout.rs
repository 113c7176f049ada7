//! Checkpoints as MLX's converters lay them out: other names, experts stacked, convolutions turned, norms with their one
//! added already. The vindex of such a checkpoint is the vindex of the original, to the last bit.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use support::{checkpoint_dir, extracted_from};
use vindex::{INDEX_FILE, Recipe};

/// A tensor of a checkpoint.
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

fn read(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let file = fs::read(&path).unwrap();
        let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&file[8..end]).unwrap();
        for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
            let offset = |i: usize| end + entry["data_offsets"][i].as_u64().unwrap() as usize;
            let tensor = Tensor {
                dtype: entry["dtype"].as_str().unwrap().to_owned(),
                shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
                bytes: file[offset(0)..offset(1)].to_vec(),
            };
            tensors.insert(name.clone(), tensor);
        }
    }
    tensors
}

/// Writes a copy of the checkpoint in `from` with these tensors in one file.
fn write(from: &Path, tensors: &BTreeMap<String, Tensor>, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !name.contains("safetensors") {
            fs::copy(entry.path(), to.join(name)).unwrap();
        }
    }
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    fs::write(to.join("model.safetensors"), file).unwrap();
}

/// The experts of each layer in one tensor for each matrix, under `switch_mlp`.
fn stack(tensors: &mut BTreeMap<String, Tensor>) {
    let names: Vec<String> = tensors.keys().cloned().collect();
    for name in names {
        if let Some((layer, "0", matrix)) = expert(&name) {
            let one = |e: usize| format!("{layer}.experts.{e}.{matrix}");
            let mut stacked = tensors.remove(&one(0)).unwrap();
            let mut n = 1;
            while let Some(next) = tensors.remove(&one(n)) {
                stacked.bytes.extend(next.bytes);
                n += 1;
            }
            stacked.shape.insert(0, n as u64);
            tensors.insert(format!("{layer}.switch_mlp.{matrix}"), stacked);
        } else if let Some(layer) = name.strip_suffix(".experts.gate_up_proj") {
            let both = tensors.remove(&name).unwrap();
            let half_bytes = both.bytes.len() / both.shape[0] as usize / 2;
            for (half, matrix) in ["gate_proj", "up_proj"].iter().enumerate() {
                let pieces = both.bytes.chunks_exact(half_bytes).skip(half).step_by(2);
                let tensor = Tensor {
                    dtype: both.dtype.clone(),
                    shape: vec![both.shape[0], both.shape[1] / 2, both.shape[2]],
                    bytes: pieces.flatten().copied().collect(),
                };
                tensors.insert(format!("{layer}.switch_mlp.{matrix}.weight"), tensor);
            }
        } else if let Some(layer) = name.strip_suffix(".experts.down_proj") {
            let down = tensors.remove(&name).unwrap();
            tensors.insert(format!("{layer}.switch_mlp.down_proj.weight"), down);
        }
    }
}

fn expert(name: &str) -> Option<(&str, &str, &str)> {
    let (layer, rest) = name.split_once(".experts.")?;
    let (number, matrix) = rest.split_once('.')?;
    Some((layer, number, matrix))
}

/// As for delta nets: convolutions with the kernel before the channels, one added to norms around zero, heads that
/// predict tokens left out.
fn turn(tensors: &mut BTreeMap<String, Tensor>) {
    tensors.retain(|name, _| !name.starts_with("mtp."));
    for (name, tensor) in tensors.iter_mut() {
        if name.ends_with(".conv1d.weight") {
            tensor.shape.swap(1, 2);
        }
        let is_norm = name.ends_with("norm.weight") && !name.contains("linear_attn");
        if is_norm {
            assert_eq!(tensor.dtype, "BF16");
            let values = tensor
                .bytes
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16) + 1.0);
            tensor.bytes = values.flat_map(f32::to_le_bytes).collect();
            tensor.dtype = "F32".to_owned();
        }
    }
}

fn same_vindex(
    family: &str,
    convert: impl FnOnce(&mut BTreeMap<String, Tensor>),
    leave_heads: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let original = checkpoint_dir(family);
    let mut tensors = read(&original);
    if leave_heads {
        tensors.retain(|name, _| !name.starts_with("mtp."));
    }
    // The name of the directory is the model's.
    write(
        &original,
        &tensors,
        &dir.path().join("original").join(family),
    );
    convert(&mut tensors);
    let converted: BTreeMap<String, Tensor> = tensors
        .into_iter()
        .map(
            |(name, tensor)| match name.strip_prefix("model.language_model.") {
                Some(rest) => (format!("language_model.model.{rest}"), tensor),
                None if leave_heads => (format!("language_model.{name}"), tensor),
                None => (name, tensor),
            },
        )
        .filter(|(name, _)| !name.contains("visual"))
        .collect();
    write(
        &original,
        &converted,
        &dir.path().join("converted").join(family),
    );
    let index = |which: &str| {
        let out = dir.path().join(format!("{which}.vindex"));
        extracted_from(&dir.path().join(which).join(family), Recipe::F32, &out);
        fs::read_to_string(out.join(INDEX_FILE)).unwrap()
    };
    let (original, converted) = (index("original"), index("converted"));
    let differing = original
        .lines()
        .zip(converted.lines())
        .find(|(o, c)| o != c);
    assert_eq!(differing, None, "{family}");
    assert_eq!(original.len(), converted.len(), "{family}");
}

#[test]
fn experts_that_are_stacked_under_another_name_are_the_same_experts() {
    same_vindex("qwen3_moe", stack, false);
}

#[test]
fn turned_convolutions_and_shifted_norms_are_the_same_delta_nets() {
    let convert = |tensors: &mut BTreeMap<String, Tensor>| {
        stack(tensors);
        turn(tensors);
    };
    same_vindex("qwen3_5", convert, true);
}
