//! Files with heads: the one of `models/kjv`, those of `fixtures/heads`, and such as are wrong on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A safetensors file in memory.
#[derive(Clone)]
pub(super) struct Sidecar {
    /// Type, shape and bytes.
    pub(super) tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
    pub(super) metadata: BTreeMap<String, String>,
}

pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Sidecar {
    pub(super) fn read(path: &Path) -> Sidecar {
        let bytes = std::fs::read(path).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (header, data) = bytes[8..].split_at(n);
        let mut header: Map<String, Value> = serde_json::from_slice(header).unwrap();
        let metadata = header.remove("__metadata__").unwrap_or_default();
        let tensors = header.into_iter().map(|(name, entry)| {
            let offsets: [usize; 2] =
                serde_json::from_value(entry["data_offsets"].clone()).unwrap();
            let shape = serde_json::from_value(entry["shape"].clone()).unwrap();
            let dtype = entry["dtype"].as_str().unwrap().to_owned();
            (name, (dtype, shape, data[offsets[0]..offsets[1]].to_vec()))
        });
        Sidecar {
            tensors: tensors.collect(),
            metadata: serde_json::from_value(metadata).unwrap_or_default(),
        }
    }

    /// The head of the model in `models/kjv`.
    pub(super) fn kjv() -> Sidecar {
        let shard = root().join("models/kjv/model-00002-of-00002.safetensors");
        let mut sidecar = Sidecar::read(&shard);
        sidecar.tensors.retain(|name, _| name.starts_with("mtp."));
        sidecar.metadata = [
            ("skulk.format", "mtp/1"),
            ("skulk.layout", "block"),
            ("skulk.norm_convention", "actual_scale"),
            ("skulk.concat_order", "embed_first"),
            ("skulk.hidden_state", "before_final_norm"),
            ("skulk.hidden_size", "256"),
            ("skulk.vocab_size", "2048"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        sidecar
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!(self.metadata));
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(
                name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
            );
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        file
    }

    /// Writes it into `dir`.
    pub(super) fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("mtp.safetensors");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    /// A tensor's numbers, and its shape.
    pub(super) fn values(&self, name: &str) -> (Vec<f64>, Vec<usize>) {
        let (dtype, shape, bytes) = &self.tensors[name];
        let values = match dtype.as_str() {
            "BF16" => bytes
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .map(f64::from)
                .collect(),
            "F32" => bytes
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            other => panic!("{other}"),
        };
        (values, shape.clone())
    }
}
