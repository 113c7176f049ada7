//! Which block type each tensor gets.
//!
//! Invariant: the type depends only on the recipe, the tensor's GGUF name and its shape, so that the same
//! checkpoint gives the same bytes everywhere. The encoders themselves are in `quant`.

use std::fmt;
use std::str::FromStr;

use quant::BlockType;
use serde::{Deserialize, Serialize};

/// How the weights of a vindex are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// Every tensor F32.
    F32,
    /// Matrices BF16.
    Bf16,
    /// Matrices F16.
    F16,
    /// Matrices Q8_0.
    Q8_0,
    /// Matrices Q4_K, the sensitive ones (`attn_v`, `ffn_down`, embeddings, output head) Q6_K.
    Q4k,
    /// Every tensor as the GGUF file has it that the vindex was made from, byte for byte.
    Kept,
}

impl Recipe {
    /// Every recipe that decides types, from the largest output to the smallest.
    pub const ALL: [Recipe; 5] = [
        Recipe::F32,
        Recipe::Bf16,
        Recipe::F16,
        Recipe::Q8_0,
        Recipe::Q4k,
    ];

    /// As `--quant` takes it and as `index.json` records it.
    pub const fn name(self) -> &'static str {
        match self {
            Recipe::F32 => "f32",
            Recipe::Bf16 => "bf16",
            Recipe::F16 => "f16",
            Recipe::Q8_0 => "q8_0",
            Recipe::Q4k => "q4k",
            Recipe::Kept => "kept",
        }
    }

    /// Value of the GGUF key `general.file_type` (llama.cpp's `llama_ftype`: 15 is `MOSTLY_Q4_K_M`); 1024, a guess in
    /// llama.cpp's terms, where blocks are kept and the file they are from has told.
    pub const fn file_type(self) -> u32 {
        match self {
            Recipe::F32 => 0,
            Recipe::F16 => 1,
            Recipe::Q8_0 => 7,
            Recipe::Q4k => 15,
            Recipe::Bf16 => 32,
            Recipe::Kept => 1024,
        }
    }

    /// The block type of the tensor called `name` in GGUF, of shape `ne` (row length first).
    ///
    /// Vectors, norms, routers and what else is small and sensitive stay F32 in every recipe. A row that is not a whole number of blocks
    /// falls back to a smaller block: Q8_0 (32 values), then F16 (1 value). What is kept has its type already; what would
    /// have to be made beside it is F32.
    pub fn block_type(self, name: &str, ne: &[u64]) -> BlockType {
        if ne.len() < 2 || stays_f32(name) {
            return BlockType::F32;
        }
        let wanted = match self {
            Recipe::F32 | Recipe::Kept => BlockType::F32,
            Recipe::Bf16 => BlockType::BF16,
            Recipe::F16 => BlockType::F16,
            Recipe::Q8_0 => BlockType::Q8_0,
            Recipe::Q4k if is_sensitive(name) => BlockType::Q6_K,
            Recipe::Q4k => BlockType::Q4_K,
        };
        let whole = |t: BlockType| ne[0].is_multiple_of(t.block_len() as u64);
        [wanted, BlockType::Q8_0]
            .into_iter()
            .find(|&t| whole(t))
            .unwrap_or(BlockType::F16)
    }

    /// Whether it has blocks whose errors statistics can weigh.
    pub const fn is_weighed(self) -> bool {
        matches!(self, Recipe::Q4k)
    }

    /// As [`Recipe::block_type`], for a model of `n_layers` whose errors are weighed by statistics, and whose output head is
    /// the embeddings when it `is_tied`.
    ///
    /// Spends about the bytes of llama.cpp's Q4_K_M where, measured by the divergence of what the model foresees from what
    /// it foresees unquantised, a byte does most: the fifth bit of a down projection, of keys and of what attention gives,
    /// rather than the sixth of down projections; embeddings that are only looked up take four bits.
    pub fn calibrated_block_type(
        self,
        name: &str,
        ne: &[u64],
        n_layers: u32,
        is_tied: bool,
    ) -> BlockType {
        let plain = self.block_type(name, ne);
        if !matches!(plain, BlockType::Q4_K | BlockType::Q6_K) {
            return plain;
        }
        let layer = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'));
        let layer: Option<u32> = layer.and_then(|(layer, _)| layer.parse().ok());
        // The first and the last eighth change most of what goes through.
        let eighth = u64::from(n_layers) / 8;
        let is_outer = layer.is_some_and(|layer| {
            let layer = u64::from(layer);
            layer < eighth || layer >= 7 * u64::from(n_layers) / 8
        });
        match kind(name) {
            "token_embd" if !is_tied => BlockType::Q4_K,
            "attn_k" | "attn_output" => BlockType::Q5_K,
            kind if kind.starts_with("ffn_down") => BlockType::Q5_K,
            kind if kind.starts_with("ffn_gate") && is_outer => BlockType::Q5_K,
            _ => plain,
        }
    }
}

/// Norms; biases and scales of experts; routers; and of a delta net the convolution and what decides about decay.
fn stays_f32(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".weight") else {
        return true;
    };
    let kind = stem.rsplit('.').next().unwrap_or(stem);
    stem.ends_with("_norm")
        || matches!(
            kind,
            "ffn_gate_inp"
                | "ffn_gate_inp_shexp"
                | "ssm_conv1d"
                | "ssm_alpha"
                | "ssm_beta"
                | "ssm_ba"
        )
}

/// Tensors that lose most from four bits: values, down projections, embeddings, output head.
fn is_sensitive(name: &str) -> bool {
    matches!(
        kind(name),
        "attn_v"
            | "ffn_down"
            | "ffn_down_exps"
            | "ffn_down_shexp"
            | "token_embd"
            | "per_layer_token_embd"
            | "output"
    )
}

/// A tensor's name without its layer and `.weight`.
fn kind(name: &str) -> &str {
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    stem.rsplit('.').next().unwrap_or(stem)
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no recipe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown recipe {0:?}; use f32, bf16, f16, q8_0 or q4k")]
pub struct UnknownRecipe(pub String);

impl FromStr for Recipe {
    type Err = UnknownRecipe;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Recipe::ALL
            .into_iter()
            .find(|r| r.name() == s)
            .ok_or_else(|| UnknownRecipe(s.to_owned()))
    }
}
