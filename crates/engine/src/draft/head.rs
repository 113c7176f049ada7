//! A head that was trained with its model to predict one token more (Gloeckle et al. 2024; DeepSeek-V3, section 2.2).
//!
//! A head takes, for each position `t`, the model's residual stream there before the final norm and the token at `t + 1`,
//! and predicts the token at `t + 2`:
//!
//! ```text
//! x      = projection · [norm(embedding of the token at t+1), norm(hidden state at t)]     or the other way round
//! y      = one decoder block over all x so far, with keys and values of its own, rope position t
//! logits = the model's output head · norm(y)
//! ```
//!
//! Deeper guesses take `y` as the hidden state and the guess as the token. Tensors are found by the names of
//! docs/sidecars.md; the sizes of heads are told by the shapes, the rest by [`HeadNumbers`]. The block is Qwen's (queries
//! with or without a gate, heads normed or not) or DeepSeek's (latent attention); its feed-forward part is dense or routed.
//! Of several heads the first is used, for all depths.
//!
//! Invariant: a [`Head`] that was opened has all tensors in shapes that fit each other and the model. Left out: the
//! embeddings and the output head, which are the model's; computing (`pass.rs`), and whose turn it is.

mod pass;
mod sidecar;

use std::path::Path;

use quant::{BlockType, GateActivation, Matrix};
use vindex::{Activation, Config, Experts, Gating, Rope as RopeConfig, RopeKind};

use crate::model::HEAD_MAX;
use crate::rope::Rope;
pub use pass::{HeadPass, HeadWork};
pub use sidecar::HeadError;
use sidecar::Sidecar;

/// What a head needs to know of its model beside the tensors.
#[derive(Clone, Debug)]
pub struct HeadNumbers {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens.
    pub vocab: usize,
    /// Added to the mean square in norms.
    pub norm_eps: f32,
    /// The gate's nonlinearity.
    pub activation: Activation,
    /// Width of a query or key head, where the head has no norm that tells it.
    pub key_length: usize,
    /// Scores are multiplied by this; `None`: by one over the root of the key's width.
    pub attention_scale: Option<f32>,
    /// Positions. The kind is not looked at: it is the checkpoint's, not the vindex's.
    pub rope: RopeConfig,
    /// How tokens visit experts, for heads that have some.
    pub routing: Option<Routing>,
    /// `owner/name` of the checkpoint, where it is known.
    pub source_repo: Option<String>,
}

/// How tokens visit experts.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Experts that a token visits.
    pub n_used: usize,
    /// A sigmoid turns logits into weights, as in DeepSeek-V3, and the bias is for choosing alone; else a softmax does.
    pub sigmoid: bool,
    /// Weights are divided by their sum.
    pub normalise: bool,
    /// And multiplied by this.
    pub scale: f32,
    /// Groups of experts, and how many of them a token visits: those whose two best experts are best.
    pub groups: (usize, usize),
}

impl HeadNumbers {
    /// Those of the model with this configuration.
    pub fn of(config: &Config, source_repo: Option<String>) -> HeadNumbers {
        let routing = |e: Experts| Routing {
            n_used: e.n_used as usize,
            sigmoid: e.gating == Gating::Sigmoid,
            normalise: e.normalise,
            scale: e.scale,
            groups: e
                .groups
                .map_or((1, 1), |g| (g.n as usize, g.n_used as usize)),
        };
        HeadNumbers {
            hidden: config.hidden as usize,
            vocab: config.vocab as usize,
            norm_eps: config.norm_eps,
            activation: config.activation,
            key_length: config.attention.key_length as usize,
            attention_scale: Some(config.attention.scale),
            rope: config.rope.clone(),
            routing: config.experts.map(routing),
            source_repo,
        }
    }
}

/// A head that can be computed with.
#[derive(Debug)]
pub struct Head {
    hidden: usize,
    norm_eps: f32,
    activation: GateActivation,
    embed_first: bool,
    /// `(hidden, 2 * hidden)`.
    projection: Own,
    /// `(hidden)` each: of embeddings, of hidden states; before attention, before feed-forward, at the end.
    norm_embedding: Vec<f32>,
    norm_hidden: Vec<f32>,
    attn_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    final_norm: Vec<f32>,
    attention: Attention,
    /// `(hidden, n_heads * value_length)`.
    mixed: Own,
    n_heads: usize,
    n_kv_heads: usize,
    key_length: usize,
    value_length: usize,
    scale: f32,
    rope: Rope,
    feed_forward: FeedForward,
    /// `(vocab, hidden)`, where the head has its own.
    embeddings: Option<Own>,
    output: Option<Own>,
}

#[derive(Debug)]
enum Attention {
    /// Each of queries, keys and values is a product.
    Full {
        /// `(n_heads * key_length, hidden)`, or twice as many rows: of each head the query, then its gate.
        q: Own,
        is_gated: bool,
        k: Own,
        v: Own,
        /// `(key_length)` each.
        qk_norm: Option<[Vec<f32>; 2]>,
        qkv_bias: Option<[Vec<f32>; 3]>,
    },
    /// Multi-head latent attention (DeepSeek-V2, section 2.1), with keys and values written out.
    Latent {
        /// `(rank, hidden)` and the norm of its products; without it `q` is `(…, hidden)`.
        q_a: Option<(Own, Vec<f32>)>,
        /// `(n_heads * (n_plain + n_turned), rank)`.
        q: Own,
        /// `(kv_rank + n_turned, hidden)`: what keys and values are made of, and the turned part of all keys.
        kv_a: Own,
        kv_norm: Vec<f32>,
        /// `(n_heads * (n_plain + value_length), kv_rank)`.
        kv_b: Own,
        /// Leading elements of a head that are not turned; the others are.
        n_plain: usize,
    },
}

#[derive(Debug)]
enum FeedForward {
    Dense(Gated),
    Routed {
        /// `(n_experts, hidden)`.
        router: Own,
        /// `(n_experts)`.
        bias: Option<Vec<f32>>,
        experts: Vec<Gated>,
        /// An expert that every row visits, and the `(1, hidden)` that says how much of it is taken.
        shared: Option<(Gated, Option<Own>)>,
        routing: Routing,
    },
}

#[derive(Debug)]
struct Gated {
    /// `(ffn, hidden)` each.
    gate: Own,
    up: Own,
    /// `(hidden, ffn)`.
    down: Own,
}

/// A matrix in memory.
#[derive(Debug)]
struct Own {
    block_type: BlockType,
    n_rows: usize,
    n_cols: usize,
    bytes: Vec<u8>,
}

impl Own {
    /// In blocks of `block_type`, or in smaller ones where a row is not whole blocks of it.
    fn new(block_type: BlockType, values: &[f32], n_rows: usize, n_cols: usize) -> Own {
        let fits = |b: &BlockType| b.row_bytes(n_cols).is_some();
        let block_type = [block_type, BlockType::Q8_0].into_iter().find(fits);
        let block_type = block_type.unwrap_or(BlockType::F32);
        let row_bytes = block_type.row_bytes(n_cols).unwrap_or(4 * n_cols);
        let mut bytes = vec![0; n_rows * row_bytes];
        quant::encode(block_type, values, &mut bytes);
        Own {
            block_type,
            n_rows,
            n_cols,
            bytes,
        }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix {
            block_type: self.block_type,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
            bytes: &self.bytes,
        }
    }
}

/// Where the tensors of a layout are.
struct Names {
    projection: String,
    norm_embedding: String,
    norm_hidden: String,
    final_norm: String,
    block: String,
    embeddings: String,
    output: String,
}

impl Names {
    fn of(layout: &str) -> Option<Names> {
        let names =
            |projection: &str, embedding: &str, hidden: &str, norm: &str, block: &str| Names {
                projection: projection.to_owned(),
                norm_embedding: embedding.to_owned(),
                norm_hidden: hidden.to_owned(),
                final_norm: norm.to_owned(),
                block: block.to_owned(),
                embeddings: format!("{block}embed_tokens.weight"),
                output: format!("{block}shared_head.head.weight"),
            };
        match layout {
            "block" => Some(names(
                "mtp.fc.weight",
                "mtp.pre_fc_norm_embedding.weight",
                "mtp.pre_fc_norm_hidden.weight",
                "mtp.norm.weight",
                "mtp.layers.0.",
            )),
            "layers" => Some(names(
                "mtp.0.eh_proj.weight",
                "mtp.0.enorm.weight",
                "mtp.0.hnorm.weight",
                "mtp.0.shared_head.norm.weight",
                "mtp.0.",
            )),
            _ => None,
        }
    }
}

impl Head {
    /// Opens the head in the file `path` for the model with these numbers. Its matrices are kept in blocks of
    /// `block_type`, where their rows are whole blocks. Reads all of the file that is used, once.
    ///
    /// # Errors
    /// [`HeadError`] when it is another model's, or lacks something, or has something that is not computed.
    pub fn open(
        path: &Path,
        numbers: &HeadNumbers,
        block_type: BlockType,
    ) -> Result<Head, HeadError> {
        let file = Sidecar::open(path)?;
        let layout = file.said("skulk.layout")?;
        let names = Names::of(layout).ok_or_else(|| HeadError::Layout {
            got: layout.to_owned(),
        })?;
        belongs(&file, numbers)?;
        let embed_first = match file.said("skulk.concat_order")? {
            "embed_first" => true,
            "hidden_first" => false,
            other => return Err(HeadError::Unsupported(format!("concat order {other:?}"))),
        };
        let norm_plus = match file.said("skulk.norm_convention")? {
            "zero_centered" => 1.0,
            "actual_scale" => 0.0,
            other => return Err(HeadError::Unsupported(format!("norms are {other:?}"))),
        };
        if let Some(other) = file.metadata("skulk.hidden_state")
            && other != "before_final_norm"
        {
            return Err(HeadError::Unsupported(format!("hidden states {other:?}")));
        }
        let hidden = numbers.hidden;
        let mut reader = Reader {
            file,
            norm_plus,
            block_type,
            block: names.block,
        };
        let (attention, shape) = reader.attention(numbers)?;
        let norm = |reader: &mut Reader, name: &str| reader.norm(name, hidden);
        let ffn = format!("{}post_attention_layernorm.weight", reader.block);
        let attn = format!("{}input_layernorm.weight", reader.block);
        Ok(Head {
            hidden,
            norm_eps: numbers.norm_eps,
            activation: match numbers.activation {
                Activation::Silu => GateActivation::Silu,
                Activation::GeluTanh => GateActivation::GeluTanh,
                Activation::SwigluClamped => {
                    return Err(HeadError::Layout {
                        got: "clamped gates".to_owned(),
                    });
                }
            },
            embed_first,
            projection: reader.matrix(&names.projection, hidden, 2 * hidden)?,
            norm_embedding: norm(&mut reader, &names.norm_embedding)?,
            norm_hidden: norm(&mut reader, &names.norm_hidden)?,
            attn_norm: norm(&mut reader, &attn)?,
            ffn_norm: norm(&mut reader, &ffn)?,
            final_norm: norm(&mut reader, &names.final_norm)?,
            attention,
            mixed: {
                let name = format!("{}self_attn.o_proj.weight", reader.block);
                reader.matrix(&name, hidden, shape.n_heads * shape.value_length)?
            },
            n_heads: shape.n_heads,
            n_kv_heads: shape.n_kv_heads,
            key_length: shape.key_length,
            value_length: shape.value_length,
            scale: shape.scale,
            rope: shape.rope,
            feed_forward: reader.feed_forward(numbers)?,
            embeddings: reader.optional(&names.embeddings, numbers.vocab, hidden)?,
            output: reader.optional(&names.output, numbers.vocab, hidden)?,
        })
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Embeddings of its own, `(vocab, hidden)`.
    pub(crate) fn embeddings(&self) -> Option<Matrix<'_>> {
        self.embeddings.as_ref().map(Own::matrix)
    }

    /// An output head of its own, `(vocab, hidden)`.
    pub(crate) fn output(&self) -> Option<Matrix<'_>> {
        self.output.as_ref().map(Own::matrix)
    }
}

/// Refuses the head of another model, by what the file says of it.
fn belongs(file: &Sidecar, numbers: &HeadNumbers) -> Result<(), HeadError> {
    let other = |what, expected: String, got: &str| {
        Err(HeadError::OtherModel {
            what,
            expected,
            got: got.to_owned(),
        })
    };
    for (key, what, expected) in [
        ("skulk.hidden_size", "hidden size", numbers.hidden),
        ("skulk.vocab_size", "vocabulary", numbers.vocab),
    ] {
        if let Some(got) = file.metadata(key)
            && got.parse() != Ok(expected)
        {
            return other(what, expected.to_string(), got);
        }
    }
    // Of directories only the path is known, which says nothing.
    let is_repo = |name: &str| {
        let mut parts = name.split('/');
        parts
            .by_ref()
            .take(2)
            .filter(|part| !part.is_empty())
            .count()
            == 2
            && parts.next().is_none()
    };
    if let (Some(got), Some(expected)) = (file.metadata("skulk.source_repo"), &numbers.source_repo)
        && file.metadata("skulk.source_commit").is_some()
        && is_repo(got)
        && got != expected
    {
        return other("source", expected.clone(), got);
    }
    Ok(())
}

struct Shape {
    n_heads: usize,
    n_kv_heads: usize,
    key_length: usize,
    value_length: usize,
    scale: f32,
    rope: Rope,
}

/// Reads tensors as the head keeps them.
struct Reader {
    file: Sidecar,
    /// Added to the weights of norms.
    norm_plus: f32,
    block_type: BlockType,
    /// What the names of the block begin with.
    block: String,
}

impl Reader {
    fn matrix(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<Own, HeadError> {
        let values = self.file.read(name, &[n_rows, n_cols])?;
        Ok(Own::new(self.block_type, &values, n_rows, n_cols))
    }

    fn optional(
        &mut self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Option<Own>, HeadError> {
        match self.file.has(name) {
            true => self.matrix(name, n_rows, n_cols).map(Some),
            false => Ok(None),
        }
    }

    fn norm(&mut self, name: &str, n: usize) -> Result<Vec<f32>, HeadError> {
        let mut values = self.file.read(name, &[n])?;
        values.iter_mut().for_each(|x| *x += self.norm_plus);
        Ok(values)
    }

    fn attention(&mut self, numbers: &HeadNumbers) -> Result<(Attention, Shape), HeadError> {
        let name = |block: &str, part: &str| format!("{block}self_attn.{part}");
        match self
            .file
            .has(&name(&self.block, "kv_a_proj_with_mqa.weight"))
        {
            true => self.latent_attention(numbers),
            false => self.full_attention(numbers),
        }
    }

    fn full_attention(&mut self, numbers: &HeadNumbers) -> Result<(Attention, Shape), HeadError> {
        let block = self.block.clone();
        let name = |part: &str| format!("{block}self_attn.{part}");
        let hidden = numbers.hidden;
        let is_normed = self.file.has(&name("q_norm.weight"));
        let length = match is_normed {
            true => self.file.shape(&name("q_norm.weight"))?[0],
            false => numbers.key_length,
        };
        let mixed = self.file.shape(&name("o_proj.weight"))?[1];
        let [q_rows, _] = self.file.shape(&name("q_proj.weight"))?;
        let [k_rows, _] = self.file.shape(&name("k_proj.weight"))?;
        let unfit = || {
            Err(HeadError::Unsupported(format!(
                "its attention has {q_rows} queries, {k_rows} keys and {mixed} mixed values in heads of {length}"
            )))
        };
        let multiple = |n: usize, of: usize| of > 0 && n > 0 && n.is_multiple_of(of);
        if !multiple(mixed, length) || !multiple(k_rows, length) || length > HEAD_MAX {
            return unfit();
        }
        let (n_heads, n_kv_heads) = (mixed / length, k_rows / length);
        let is_gated = q_rows == 2 * mixed;
        if !multiple(n_heads, n_kv_heads) || (q_rows != mixed && !is_gated) {
            return unfit();
        }
        let mut rope = numbers.rope.clone();
        rope.kind = RopeKind::Neox;
        let shape = self.shape(numbers, rope, (n_heads, n_kv_heads), (length, length))?;
        let qkv_bias = match self.file.has(&name("q_proj.bias")) {
            false => None,
            true if is_gated => {
                return Err(HeadError::Unsupported(
                    "queries with gate and bias".to_owned(),
                ));
            }
            true => Some([
                self.file.read(&name("q_proj.bias"), &[q_rows])?,
                self.file.read(&name("k_proj.bias"), &[k_rows])?,
                self.file.read(&name("v_proj.bias"), &[k_rows])?,
            ]),
        };
        let attention = Attention::Full {
            q: self.matrix(&name("q_proj.weight"), q_rows, hidden)?,
            is_gated,
            k: self.matrix(&name("k_proj.weight"), k_rows, hidden)?,
            v: self.matrix(&name("v_proj.weight"), k_rows, hidden)?,
            qk_norm: match is_normed {
                true => Some([
                    self.norm(&name("q_norm.weight"), length)?,
                    self.norm(&name("k_norm.weight"), length)?,
                ]),
                false => None,
            },
            qkv_bias,
        };
        Ok((attention, shape))
    }

    fn latent_attention(&mut self, numbers: &HeadNumbers) -> Result<(Attention, Shape), HeadError> {
        let block = self.block.clone();
        let name = |part: &str| format!("{block}self_attn.{part}");
        let hidden = numbers.hidden;
        let is_low_rank = self.file.has(&name("q_a_proj.weight"));
        let q_name = name(if is_low_rank {
            "q_b_proj.weight"
        } else {
            "q_proj.weight"
        });
        let mixed = self.file.shape(&name("o_proj.weight"))?[1];
        let [q_rows, q_cols] = self.file.shape(&q_name)?;
        let [kv_rows, kv_rank] = self.file.shape(&name("kv_b_proj.weight"))?;
        let [kv_a_rows, _] = self.file.shape(&name("kv_a_proj_with_mqa.weight"))?;
        // n_heads * (plain + value) and n_heads * (plain + turned) and n_heads * value and turned.
        let plain = kv_rows.checked_sub(mixed);
        let turned = kv_a_rows.checked_sub(kv_rank).filter(|&n| n > 0);
        let sizes = plain.zip(turned).and_then(|(plain, turned)| {
            let n_heads = q_rows.checked_sub(plain)? / turned;
            let fits = n_heads > 0
                && plain.is_multiple_of(n_heads)
                && mixed.is_multiple_of(n_heads)
                && q_rows == n_heads * turned + plain;
            fits.then(|| (n_heads, plain / n_heads, turned, mixed / n_heads))
        });
        let Some((n_heads, n_plain, n_turned, value_length)) = sizes else {
            return Err(HeadError::Unsupported(format!(
                "its latent attention has {q_rows} queries, {kv_rows} keys and values of {kv_a_rows}, and {mixed} mixed \
                 values"
            )));
        };
        let mut rope = numbers.rope.clone();
        rope.kind = RopeKind::Interleaved;
        rope.n_dims = n_turned as u32;
        let key_length = n_plain + n_turned;
        let heads = (n_heads, n_heads);
        let shape = self.shape(numbers, rope, heads, (key_length, value_length))?;
        let q_a = match is_low_rank {
            true => Some((
                self.matrix(&name("q_a_proj.weight"), q_cols, hidden)?,
                self.norm(&name("q_a_layernorm.weight"), q_cols)?,
            )),
            false => None,
        };
        let attention = Attention::Latent {
            q: self.matrix(&q_name, q_rows, if is_low_rank { q_cols } else { hidden })?,
            q_a,
            kv_a: self.matrix(&name("kv_a_proj_with_mqa.weight"), kv_a_rows, hidden)?,
            kv_norm: self.norm(&name("kv_a_layernorm.weight"), kv_rank)?,
            kv_b: self.matrix(&name("kv_b_proj.weight"), kv_rows, kv_rank)?,
            n_plain,
        };
        Ok((attention, shape))
    }

    fn shape(
        &self,
        numbers: &HeadNumbers,
        rope: RopeConfig,
        (n_heads, n_kv_heads): (usize, usize),
        (key_length, value_length): (usize, usize),
    ) -> Result<Shape, HeadError> {
        let unsupported = |what: String| Err(HeadError::Unsupported(what));
        if rope.n_dims as usize > key_length || !rope.n_dims.is_multiple_of(2) {
            return unsupported(format!("rope turns {} of {key_length}", rope.n_dims));
        }
        if key_length.max(value_length) > HEAD_MAX {
            return unsupported(format!("its heads are wider than {HEAD_MAX}"));
        }
        if rope.scaling == Some(vindex::RopeScaling::FrequencyFactors) {
            return unsupported("its model's rope has a factor for each frequency".to_owned());
        }
        let scale = numbers.attention_scale;
        Ok(Shape {
            n_heads,
            n_kv_heads,
            key_length,
            value_length,
            scale: scale.unwrap_or(1.0 / (key_length as f32).sqrt()),
            rope: Rope::new(&rope, None),
        })
    }

    fn feed_forward(&mut self, numbers: &HeadNumbers) -> Result<FeedForward, HeadError> {
        let block = self.block.clone();
        let name = |part: &str| format!("{block}mlp.{part}");
        let hidden = numbers.hidden;
        if !self.file.has(&name("gate.weight")) {
            return Ok(FeedForward::Dense(self.gated(&name(""), hidden)?));
        }
        let Some(routing) = numbers.routing else {
            let reason = "it has experts, and the model does not tell how many a token visits";
            return Err(HeadError::Unsupported(reason.to_owned()));
        };
        let [n_experts, _] = self.file.shape(&name("gate.weight"))?;
        let (n_groups, n_groups_used) = routing.groups;
        let is_grouped = n_groups > 0
            && n_experts.is_multiple_of(n_groups)
            && (1..=n_groups).contains(&n_groups_used);
        if !is_grouped
            || routing.n_used == 0
            || routing.n_used > n_experts / n_groups * n_groups_used
        {
            return Err(HeadError::Unsupported(format!(
                "tokens visit {} of {n_experts} experts in {n_groups_used} of {n_groups} groups",
                routing.n_used
            )));
        }
        let bias = name("gate.e_score_correction_bias");
        let bias = match self.file.has(&bias) {
            true => Some(self.file.read(&bias, &[n_experts])?),
            false => None,
        };
        let experts: Result<Vec<Gated>, HeadError> = (0..n_experts)
            .map(|e| self.gated(&name(&format!("experts.{e}.")), hidden))
            .collect();
        let shared = ["shared_experts.", "shared_expert."].map(name);
        let shared = shared
            .into_iter()
            .find(|part| self.file.has(&format!("{part}gate_proj.weight")));
        let shared = match shared {
            None => None,
            Some(part) => {
                let gate = self.optional(&name("shared_expert_gate.weight"), 1, hidden)?;
                Some((self.gated(&part, hidden)?, gate))
            }
        };
        Ok(FeedForward::Routed {
            // Routers are small, and a rounding may choose another expert.
            router: {
                let values = self.file.read(&name("gate.weight"), &[n_experts, hidden])?;
                Own::new(BlockType::F32, &values, n_experts, hidden)
            },
            bias,
            experts: experts?,
            shared,
            routing,
        })
    }

    fn gated(&mut self, part: &str, hidden: usize) -> Result<Gated, HeadError> {
        let name = |matrix: &str| format!("{part}{matrix}.weight");
        let [ffn, _] = self.file.shape(&name("gate_proj"))?;
        Ok(Gated {
            gate: self.matrix(&name("gate_proj"), ffn, hidden)?,
            up: self.matrix(&name("up_proj"), ffn, hidden)?,
            down: self.matrix(&name("down_proj"), hidden, ffn)?,
        })
    }
}
