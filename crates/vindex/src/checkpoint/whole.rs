//! Tensors of a checkpoint that are several: codes with their scales, as FP8 checkpoints and those of MLX have them, made one
//! tensor of the shape of its values.
//!
//! Invariant: whoever asks the checkpoint afterwards sees one tensor for each weight, under the name that the unquantised
//! checkpoint has; what must be read for its values is told by [`Coded`]. Reading them is `extract/coded.rs`'s work.
//!
//! ```text
//! FP8   X.weight  F8_E4M3 or F8_E5M2        X.weight_scale_inv or X.weight_scale: one for a tile, a row or all
//! MLX   X.weight  U32: codes of 2 to 8 bits, one after another from the lowest bit on
//!       X.scales, X.biases: one for each group of a row;  value = scale * code + bias
//! ```

use std::collections::BTreeMap;

use quant::{BlockType, Narrow};
use serde_json::{Map, Value};

use super::{Checkpoint, Dtype, SourceTensor};
use crate::error::Error;
use crate::grid::Grid;

/// Codes that become values by other tensors.
#[derive(Clone, Debug)]
pub(crate) enum Coded {
    /// A byte a value, times a scale.
    Scaled {
        narrow: Narrow,
        grid: Grid,
        scales: SourceTensor,
        scale_type: BlockType,
    },
    /// A few bits a value, times the scale of its group, plus the group's bias.
    Affine {
        bits: u32,
        /// Values of a row that share a scale.
        group: u64,
        scales: SourceTensor,
        biases: SourceTensor,
        /// Of scales and biases.
        scale_type: BlockType,
    },
}

/// What a configuration says of how weights are stored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quantization {
    /// Sides of the tiles that share a scale (`weight_block_size`).
    tile: Option<[u64; 2]>,
    /// MLX's `quantization`: bits and group size, and those of modules that differ.
    affine: Option<(u32, u64)>,
    modules: BTreeMap<String, (u32, u64)>,
}

impl Quantization {
    /// From `quantization_config` and, as MLX has it, `quantization`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a method that is not read.
    pub(crate) fn of(config: Option<&Value>, mlx: Option<&Value>) -> Result<Self, Error> {
        let mut found = Quantization::default();
        if let Some(mlx) = mlx.and_then(Value::as_object) {
            let mode = mlx.get("mode").and_then(Value::as_str);
            if mode.is_some_and(|mode| mode != "affine") {
                return unsupported(format!(
                    "quantization of MLX's mode {:?}; affine is read",
                    mode.unwrap_or_default()
                ));
            }
            found.affine = affine(mlx);
            let modules = mlx
                .iter()
                .filter_map(|(name, value)| Some((name.clone(), affine(value.as_object()?)?)));
            found.modules = modules.collect();
            return Ok(found);
        }
        let tile = config.and_then(|c| c.get("weight_block_size")?.as_array());
        found.tile = tile.and_then(|tile| match tile.as_slice() {
            [rows, cols] => Some([rows.as_u64()?, cols.as_u64()?]),
            _ => None,
        });
        Ok(found)
    }

    fn affine_of(&self, module: &str) -> Option<(u32, u64)> {
        self.modules.get(module).copied().or(self.affine)
    }
}

fn affine(of: &Map<String, Value>) -> Option<(u32, u64)> {
    let number = |key: &str| of.get(key).and_then(Value::as_u64);
    Some((u32::try_from(number("bits")?).ok()?, number("group_size")?))
}

impl Checkpoint {
    /// The same with one tensor for each weight.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when codes and scales do not fit together, [`Error::Unsupported`] for codes that are not read.
    pub(crate) fn whole(mut self, quantization: &Quantization) -> Result<Checkpoint, Error> {
        let names: Vec<String> = self.tensors.keys().cloned().collect();
        for name in &names {
            let Some(module) = name.strip_suffix(".weight") else {
                continue;
            };
            let Some(tensor) = self.tensors.get(name).cloned() else {
                continue;
            };
            let beside = |end: &str| format!("{module}.{end}");
            let dtype = tensor.dtype.to_string();
            let (scales, biases) = (beside("scales"), beside("biases"));
            let is_affine = self.tensors.contains_key(&scales)
                && self.tensors.contains_key(&biases)
                && quantization.affine_of(module).is_some();
            if tensor.dtype == Dtype::Unread {
                // Nothing but names is known.
                if is_affine {
                    self.tensors.remove(&scales);
                    self.tensors.remove(&biases);
                }
                for end in ["weight_scale_inv", "weight_scale", "input_scale"] {
                    self.tensors.remove(&beside(end));
                }
                continue;
            }
            let (shape, coded) = match dtype.as_str() {
                "U32" if is_affine => {
                    let companions = (self.taken(&scales), self.taken(&biases));
                    let (Some(scales), Some(biases)) = companions else {
                        continue;
                    };
                    affine_tensor(name, module, &tensor, scales, biases, quantization)?
                }
                "F8_E4M3" | "F8_E5M2" => {
                    let narrow = match dtype.as_str() {
                        "F8_E4M3" => Narrow::E4M3,
                        _ => Narrow::E5M2,
                    };
                    // Scales of activations are for those who multiply codes.
                    self.tensors.remove(&beside("input_scale"));
                    let names = [beside("weight_scale_inv"), beside("weight_scale")];
                    let Some(scales) = names.iter().find_map(|name| self.taken(name)) else {
                        return Err(bad(
                            &tensor,
                            format!(
                                "tensor {name} is {dtype} and has no scales ({} or {})",
                                names[0], names[1]
                            ),
                        ));
                    };
                    scaled_tensor(name, narrow, &tensor, scales, quantization)?
                }
                _ => continue,
            };
            let whole = SourceTensor {
                dtype: Dtype::Coded,
                shape,
                ..tensor
            };
            self.tensors.insert(name.clone(), whole);
            self.coded.insert(name.clone(), coded);
        }
        Ok(self)
    }

    /// What a tensor's codes need, where it is one of codes.
    pub(crate) fn coded(&self, name: &str) -> Option<&Coded> {
        self.coded.get(name)
    }

    fn taken(&mut self, name: &str) -> Option<SourceTensor> {
        self.tensors.remove(name)
    }
}

fn scaled_tensor(
    name: &str,
    narrow: Narrow,
    tensor: &SourceTensor,
    scales: SourceTensor,
    quantization: &Quantization,
) -> Result<(Vec<u64>, Coded), Error> {
    let scale_type = float(&scales, name)?;
    let shape = tensor.shape.clone();
    let grid = Grid::of(&shape, &scales.shape, quantization.tile);
    // A grid over a vector as a whole would be one row of any length.
    let grid = grid.filter(|grid| shape.last() == Some(&grid.cols));
    let Some(grid) = grid else {
        return Err(bad(
            tensor,
            format!(
                "the scales of {name}, of shape {:?}, do not spread over its shape {shape:?}",
                scales.shape
            ),
        ));
    };
    Ok((
        shape,
        Coded::Scaled {
            narrow,
            grid,
            scales,
            scale_type,
        },
    ))
}

fn affine_tensor(
    name: &str,
    module: &str,
    tensor: &SourceTensor,
    scales: SourceTensor,
    biases: SourceTensor,
    quantization: &Quantization,
) -> Result<(Vec<u64>, Coded), Error> {
    let Some((bits, group)) = quantization.affine_of(module) else {
        return unsupported(format!(
            "{name} is packed and the configuration does not say how"
        ));
    };
    if ![2, 3, 4, 5, 6, 8].contains(&bits) || ![32, 64, 128].contains(&group) {
        return unsupported(format!(
            "{name} has codes of {bits} bits in groups of {group}"
        ));
    }
    let scale_type = float(&scales, name)?;
    let mut shape = tensor.shape.clone();
    let cols = scales.shape.last().and_then(|n| n.checked_mul(group));
    let fits = match (shape.last_mut(), cols) {
        (Some(words), Some(cols)) => {
            let is_whole = words.checked_mul(32) == cols.checked_mul(bits.into());
            *words = cols;
            is_whole && cols > 0
        }
        _ => false,
    };
    let rows_agree =
        shape.split_last().map(|(_, rows)| rows) == scales.shape.split_last().map(|(_, rows)| rows);
    if !fits || !rows_agree || biases.shape != scales.shape || biases.dtype != scales.dtype {
        return Err(bad(
            tensor,
            format!(
                "tensor {name} of shape {:?} has scales {:?} and biases {:?}, which are not those of codes of {bits} bits in \
             groups of {group}",
                tensor.shape, scales.shape, biases.shape
            ),
        ));
    }
    Ok((
        shape,
        Coded::Affine {
            bits,
            group,
            scales,
            biases,
            scale_type,
        },
    ))
}

fn float(scales: &SourceTensor, of: &str) -> Result<BlockType, Error> {
    match scales.dtype {
        Dtype::F32 => Ok(BlockType::F32),
        Dtype::F16 => Ok(BlockType::F16),
        Dtype::BF16 => Ok(BlockType::BF16),
        other => unsupported(format!("the scales of {of} are stored as {other}")),
    }
}

fn bad(tensor: &SourceTensor, reason: String) -> Error {
    Error::Checkpoint {
        file: tensor.file.clone(),
        reason,
    }
}

fn unsupported<T>(what: String) -> Result<T, Error> {
    Err(Error::Unsupported { what })
}
