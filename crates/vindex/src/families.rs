//! One table: for each family of models, how its checkpoint becomes GGUF.
//!
//! A row says the classes of `config.json` it is for, the GGUF architecture, the name map with shapes, and the
//! quirks that no configuration file tells. Names, folds and defaults are those of llama.cpp's converter and of
//! the `transformers` configuration classes. Invariant: after extraction nothing asks for the family again;
//! whatever a forward pass must know is a number in `Config`.

mod classic;
mod dims;
mod gemma4;
mod gpt_oss;
mod hybrid;
mod latent;
mod maps;

use crate::config::{Activation, Config, RopeKind};
use crate::config_json::ConfigJson;
use crate::error::Error;

pub(crate) use dims::{Dim, Fold, Need, When};

/// One family of models.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    /// `architectures` of `config.json`.
    pub(crate) classes: &'static [&'static str],
    /// GGUF `general.architecture`.
    pub(crate) architecture: &'static str,
    /// The name map, in the order of the files.
    pub(crate) rows: &'static [&'static [Row]],
    /// Row order of queries and keys in the vindex; `Interleaved` means that they are permuted on the way.
    pub(crate) rope: RopeKind,
    /// Norms are stored around zero, and one is added on the way.
    pub(crate) norms_around_zero: bool,
    pub(crate) activation: Activation,
    /// Embeddings are multiplied by the root of the width.
    pub(crate) scales_embeddings: bool,
    pub(crate) post_norms: bool,
    pub(crate) qk_norm: bool,
    pub(crate) bias: Bias,
    pub(crate) window: Window,
    pub(crate) experts: Option<ExpertKeys>,
    pub(crate) defaults: Defaults,
    pub(crate) writes: Writes,
    /// Experts may come in blocks of MXFP4 (`quant_method` mxfp4), which are kept.
    pub(crate) keeps_mxfp4: bool,
    /// What else the family's `config.json` says: from the numbers that all families have to those of this one.
    pub(crate) numbers: fn(&ConfigJson, Config) -> Result<Config, Error>,
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bias {
    None,
    /// Queries, keys and values.
    Qkv,
    /// All four when `attention_bias`; the feed-forward matrices when `mlp_bias`.
    Configured,
}

/// Which layers see only a sliding window, where `layer_types` does not say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// No layer, whatever the configuration has.
    None,
    All,
    /// From `max_window_layers` (28 where that is absent) on, when `use_sliding_window`.
    Upper,
    /// All, when `use_sliding_window`.
    AllIfUsed,
    /// All but each n-th, n being `sliding_window_pattern` or this.
    AllButEach(u32),
}

/// Where `config.json` has the numbers of the experts.
#[derive(Clone, Copy)]
pub(crate) struct ExpertKeys {
    /// The count has two names, and `transformers` writes either.
    pub(crate) n: [&'static str; 2],
    pub(crate) ffn: &'static str,
    /// Whether the weights of the visited experts add up to one, and what the class takes where the file is silent. None:
    /// they always do.
    pub(crate) normalise: Option<(&'static str, bool)>,
}

/// What the `transformers` configuration class fills in where `config.json` is silent.
#[derive(Clone, Copy)]
pub(crate) struct Defaults {
    /// None: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<u32>,
    pub(crate) rope_base: f64,
    /// None: sliding layers have no base of their own.
    pub(crate) rope_base_sliding: Option<f64>,
    pub(crate) tied: bool,
    pub(crate) norm_eps: f64,
    pub(crate) n_heads: Option<u32>,
    pub(crate) n_kv_heads: Option<u32>,
    pub(crate) context: Option<u32>,
    pub(crate) vocab: Option<u32>,
    /// None: the scale of attention is that of the key length.
    pub(crate) query_pre_attn_scalar: Option<f64>,
    pub(crate) attention_softcap: Option<f64>,
    pub(crate) logit_softcap: Option<f64>,
    pub(crate) sliding_window: Option<u32>,
    /// Which part of a head is rotated where `partial_rotary_factor` does not say; None: all, and it may say nothing else.
    pub(crate) rotated: Option<f64>,
}

/// Which optional metadata keys the converter writes for the family.
#[derive(Clone, Copy)]
pub(crate) struct Writes {
    /// `attention.key_length` and `value_length`: always, or only when `config.json` has `head_dim`.
    pub(crate) head_dim_always: bool,
    /// `vocab_size` and `rope.dimension_count`.
    pub(crate) llama_keys: bool,
    /// `rope.freq_base` even where it is llama.cpp's own default of 10000.
    pub(crate) rope_base_always: bool,
    /// `add_space_prefix` false: SentencePiece texts are taken as they are.
    pub(crate) no_space_prefix: bool,
    /// `expert_feed_forward_length`.
    pub(crate) expert_ffn: bool,
    /// `rope.dimension_sections`.
    pub(crate) rope_sections: bool,
    /// `full_attention_interval`, where the converter writes another number than the configuration has.
    pub(crate) attention_interval: Option<u32>,
    /// The tokenizer is of Gemma 4's kind: merged by rank over characters.
    pub(crate) gemma4_tokenizer: bool,
}

/// One line of a name map. Lines with the same target are alternatives, of which a checkpoint has one.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// Name in the checkpoint; `{l}` is the layer, `{e}` the expert. A block after the model's layers, `{l}` being n after
    /// them, has its tensors under `mtp.layers.n.` instead of `model.layers.{l}.`.
    pub(crate) source: &'static str,
    /// Name in GGUF; the part before it (`blk.{l}.`) is implied by `{l}` in the source.
    pub(crate) target: &'static str,
    /// Which part of the vindex.
    pub(crate) place: Place,
    /// Shape in the checkpoint, slowest dimension first.
    pub(crate) shape: &'static [Dim],
    pub(crate) fold: Fold,
    pub(crate) when: When,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Embeddings,
    Attention,
    FeedForward,
    /// The first block that predicts a further token.
    NextN,
}

impl Family {
    /// The row for a class of `config.json`.
    pub(crate) fn of_class(class: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.classes.contains(&class))
    }

    /// A row for a GGUF architecture, whose feed-forward layers are routed or not.
    pub(crate) fn of_architecture(architecture: &str, is_routed: bool) -> Option<&'static Family> {
        let of_architecture = || FAMILIES.iter().filter(|f| f.architecture == architecture);
        of_architecture()
            .find(|f| f.experts.is_some() == is_routed)
            .or_else(|| of_architecture().next())
    }

    /// Every GGUF architecture the table has a row for.
    pub(crate) fn architectures() -> Vec<&'static str> {
        let mut all: Vec<&str> = FAMILIES.iter().map(|f| f.architecture).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Every class the table has a row for.
    pub(crate) fn classes() -> Vec<&'static str> {
        FAMILIES.iter().flat_map(|f| f.classes).copied().collect()
    }

    /// The lines of the name map in the order of the files, alternatives together.
    pub(crate) fn lines(&self) -> Vec<Vec<&'static Row>> {
        let mut lines: Vec<Vec<&'static Row>> = Vec::new();
        for row in self.rows.iter().flat_map(|rows| rows.iter()) {
            match lines.iter_mut().find(|line| line[0].target == row.target) {
                Some(line) => line.push(row),
                None => lines.push(vec![row]),
            }
        }
        lines
    }
}

/// Every family there is.
const FAMILIES: &[Family] = &[
    classic::LLAMA,
    classic::MISTRAL,
    classic::MIXTRAL,
    classic::QWEN2,
    classic::QWEN3,
    classic::QWEN3_MOE,
    classic::GEMMA2,
    classic::GEMMA3,
    hybrid::QWEN3_5,
    hybrid::QWEN3_5_MOE,
    hybrid::QWEN3_NEXT,
    gemma4::GEMMA4,
    gpt_oss::GPT_OSS,
    latent::DEEPSEEK_V3,
];
