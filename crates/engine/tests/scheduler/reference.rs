//! The heads of Qwen3-Next, Qwen3.5 and DeepSeek-V3 once more, from their published descriptions, row by row in double
//! precision: `modeling_qwen3_next.py` of transformers for the gated attention, its partial rope, norms around zero and
//! the shared expert; the DeepSeek-V3 report (arXiv 2412.19437, sections 2.1 and 2.2) and the `modeling_deepseek.py` beside
//! its weights for latent attention, YaRN, the choice of experts and the order of `eh_proj`.

use super::sidecar::Sidecar;

/// What the configuration of the checkpoint says.
pub(super) struct Numbers {
    pub(super) eps: f64,
    pub(super) rope_base: f64,
    /// Elements that are turned.
    pub(super) n_turned: usize,
    /// Experts that a token visits.
    pub(super) n_used: usize,
    pub(super) deepseek: Option<DeepSeek>,
}

pub(super) struct DeepSeek {
    pub(super) n_heads: usize,
    pub(super) yarn_factor: f64,
    pub(super) original_context: f64,
    pub(super) n_groups: usize,
    pub(super) n_groups_used: usize,
    pub(super) routed_scale: f64,
}

type Row = Vec<f64>;

/// The stream and the normed stream of each pair.
pub(super) fn run(
    file: &Sidecar,
    numbers: &Numbers,
    hidden: &[Row],
    embedded: &[Row],
) -> (Vec<Row>, Vec<Row>) {
    let layers = file.metadata["skulk.layout"] == "layers";
    let names = match layers {
        false => [
            "mtp.pre_fc_norm_embedding.weight",
            "mtp.pre_fc_norm_hidden.weight",
            "mtp.fc.weight",
            "mtp.norm.weight",
            "mtp.layers.0.",
        ],
        true => [
            "mtp.0.enorm.weight",
            "mtp.0.hnorm.weight",
            "mtp.0.eh_proj.weight",
            "mtp.0.shared_head.norm.weight",
            "mtp.0.",
        ],
    };
    let head = Reference {
        file,
        numbers,
        block: names[4],
        plus: match file.metadata["skulk.norm_convention"].as_str() {
            "zero_centered" => 1.0,
            _ => 0.0,
        },
    };
    let embed_first = file.metadata["skulk.concat_order"] == "embed_first";
    let mut x: Vec<Row> = hidden
        .iter()
        .zip(embedded)
        .map(|(hidden, embedded)| {
            let (e, h) = (head.norm(embedded, names[0]), head.norm(hidden, names[1]));
            let both = if embed_first { [e, h] } else { [h, e] }.concat();
            head.product(&both, names[2])
        })
        .collect();
    let normed = head.norms(&x, &format!("{}input_layernorm.weight", head.block));
    let mixed = match numbers.deepseek {
        None => head.gated_attention(&normed),
        Some(ref deepseek) => head.latent_attention(&normed, deepseek),
    };
    x.iter_mut().zip(&mixed).for_each(|(x, y)| plus(x, y, 1.0));
    let normed = head.norms(
        &x,
        &format!("{}post_attention_layernorm.weight", head.block),
    );
    for (x, normed) in x.iter_mut().zip(&normed) {
        plus(x, &head.feed_forward(normed), 1.0);
    }
    let last = head.norms(&x, names[3]);
    (x, last)
}

struct Reference<'a> {
    file: &'a Sidecar,
    numbers: &'a Numbers,
    block: &'a str,
    plus: f64,
}

impl Reference<'_> {
    fn product(&self, x: &[f64], name: &str) -> Row {
        let (w, shape) = self.file.values(name);
        assert_eq!(shape[1], x.len(), "{name}");
        w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
    }

    fn products(&self, rows: &[Row], name: &str) -> Vec<Row> {
        let name = format!("{}self_attn.{name}.weight", self.block);
        rows.iter().map(|x| self.product(x, &name)).collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Row {
        let (weight, _) = self.file.values(name);
        let mean = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean + self.numbers.eps).sqrt();
        let weights = weight.iter().map(|w| w + self.plus);
        x.iter().zip(weights).map(|(x, w)| x * scale * w).collect()
    }

    fn norms(&self, rows: &[Row], name: &str) -> Vec<Row> {
        rows.iter().map(|x| self.norm(x, name)).collect()
    }

    fn attention_norm(&self, x: &[f64], name: &str) -> Row {
        self.norm(x, &format!("{}self_attn.{name}.weight", self.block))
    }

    fn gated_attention(&self, rows: &[Row]) -> Vec<Row> {
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| self.products(rows, name));
        let (_, shape) = self
            .file
            .values(&format!("{}self_attn.q_norm.weight", self.block));
        let length = shape[0];
        let n_heads = q[0].len() / (2 * length);
        let group = n_heads / (k[0].len() / length);
        let turned = |x: &[f64], name: &str, position: usize| {
            let mut x = self.attention_norm(x, name);
            let half = self.numbers.n_turned / 2;
            for i in 0..half {
                let exponent = 2.0 * i as f64 / self.numbers.n_turned as f64;
                let (sin, cos) =
                    (position as f64 / self.numbers.rope_base.powf(exponent)).sin_cos();
                let (a, b) = (x[i], x[i + half]);
                x[i] = a * cos - b * sin;
                x[i + half] = b * cos + a * sin;
            }
            x
        };
        let mixed: Vec<Row> = (0..rows.len())
            .map(|t| {
                (0..n_heads)
                    .flat_map(|h| {
                        let own = &q[t][2 * h * length..];
                        let (query, gate) = (&own[..length], &own[length..2 * length]);
                        let query = turned(query, "q_norm", t);
                        let of = h / group * length;
                        let keys = (0..=t).map(|s| turned(&k[s][of..of + length], "k_norm", s));
                        let scores = keys.map(|key| dot(&query, &key) / (length as f64).sqrt());
                        let mut out = vec![0.0; length];
                        for (s, p) in softmax(scores.collect()).into_iter().enumerate() {
                            plus(&mut out, &v[s][of..of + length], p);
                        }
                        let gated = out.iter().zip(gate).map(|(x, g)| x * sigmoid(*g));
                        gated.collect::<Row>()
                    })
                    .collect()
            })
            .collect();
        self.products(&mixed, "o_proj")
    }

    fn latent_attention(&self, rows: &[Row], numbers: &DeepSeek) -> Vec<Row> {
        let low = self.products(rows, "q_a_proj");
        let low: Vec<Row> = low
            .iter()
            .map(|x| self.attention_norm(x, "q_a_layernorm"))
            .collect();
        let q = self.products(&low, "q_b_proj");
        let joint = self.products(rows, "kv_a_proj_with_mqa");
        let n_turned = self.numbers.n_turned;
        let rank = joint[0].len() - n_turned;
        let latent: Vec<Row> = joint
            .iter()
            .map(|x| self.attention_norm(&x[..rank], "kv_a_layernorm"))
            .collect();
        let kv = self.products(&latent, "kv_b_proj");
        let n_heads = numbers.n_heads;
        let length = q[0].len() / n_heads;
        let n_plain = length - n_turned;
        let kv_length = kv[0].len() / n_heads;
        let frequencies = yarn(numbers, n_turned, self.numbers.rope_base);
        let turned = |x: &[f64], position: usize| -> Row {
            let pairs = x.chunks_exact(2).zip(&frequencies);
            pairs
                .flat_map(|(pair, frequency)| {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    [pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin]
                })
                .collect()
        };
        let stretch = 0.1 * numbers.yarn_factor.ln() + 1.0;
        let scale = stretch * stretch / (length as f64).sqrt();
        let mixed: Vec<Row> = (0..rows.len())
            .map(|t| {
                (0..n_heads)
                    .flat_map(|h| {
                        let query = &q[t][h * length..][..length];
                        let query_turned = turned(&query[n_plain..], t);
                        let scores = (0..=t).map(|s| {
                            let key = &kv[s][h * kv_length..][..n_plain];
                            let key_turned = turned(&joint[s][rank..], s);
                            scale * (dot(&query[..n_plain], key) + dot(&query_turned, &key_turned))
                        });
                        let mut out = vec![0.0; kv_length - n_plain];
                        for (s, p) in softmax(scores.collect()).into_iter().enumerate() {
                            let value = &kv[s][h * kv_length + n_plain..(h + 1) * kv_length];
                            plus(&mut out, value, p);
                        }
                        out
                    })
                    .collect()
            })
            .collect();
        self.products(&mixed, "o_proj")
    }

    fn feed_forward(&self, x: &[f64]) -> Row {
        let gated = |part: &str| {
            let of = |name: &str| format!("{}mlp.{part}{name}.weight", self.block);
            let (gate, up) = (
                self.product(x, &of("gate_proj")),
                self.product(x, &of("up_proj")),
            );
            let middle: Row = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| g * sigmoid(*g) * u)
                .collect();
            self.product(&middle, &of("down_proj"))
        };
        let has = |name: &str| {
            self.file
                .tensors
                .contains_key(&format!("{}mlp.{name}", self.block))
        };
        if !has("gate.weight") {
            return gated("");
        }
        let logits = self.product(x, &format!("{}mlp.gate.weight", self.block));
        let weights: Row = match &self.numbers.deepseek {
            None => softmax(logits),
            Some(_) => logits.into_iter().map(sigmoid).collect(),
        };
        let mut chances = weights.clone();
        let mut scale = 1.0;
        if let Some(deepseek) = &self.numbers.deepseek {
            let bias = format!("{}mlp.gate.e_score_correction_bias", self.block);
            plus(&mut chances, &self.file.values(&bias).0, 1.0);
            let of_group = chances.len() / deepseek.n_groups;
            let mut groups: Vec<(f64, usize)> = (0..deepseek.n_groups)
                .map(|g| {
                    let mut own = chances[g * of_group..][..of_group].to_vec();
                    own.sort_by(f64::total_cmp);
                    (own.iter().rev().take(2).sum(), g)
                })
                .collect();
            groups.sort_by(|a, b| b.0.total_cmp(&a.0));
            for (_, g) in &groups[deepseek.n_groups_used..] {
                chances[g * of_group..][..of_group].fill(f64::NEG_INFINITY);
            }
            scale = deepseek.routed_scale;
        }
        let mut order: Vec<usize> = (0..chances.len()).collect();
        order.sort_by(|&a, &b| chances[b].total_cmp(&chances[a]));
        order.truncate(self.numbers.n_used);
        let sum: f64 = order.iter().map(|&e| weights[e]).sum();
        let mut out = vec![0.0; x.len()];
        for e in order {
            plus(
                &mut out,
                &gated(&format!("experts.{e}.")),
                scale * weights[e] / sum,
            );
        }
        match self.numbers.deepseek {
            Some(_) => plus(&mut out, &gated("shared_experts."), 1.0),
            None => {
                let gate = self.product(x, &format!("{}mlp.shared_expert_gate.weight", self.block));
                plus(&mut out, &gated("shared_expert."), sigmoid(gate[0]));
            }
        }
        out
    }
}

/// Frequencies of the pairs, stretched by YaRN (arXiv 2309.00071) with 32 and 1 rotations as its bounds.
fn yarn(numbers: &DeepSeek, n: usize, base: f64) -> Row {
    let bound = |rotations: f64| {
        let turns = numbers.original_context / (rotations * std::f64::consts::TAU);
        n as f64 * turns.ln() / (2.0 * base.ln())
    };
    let low = bound(32.0).floor().max(0.0);
    let high = bound(1.0).ceil().min(n as f64 - 1.0);
    (0..n / 2)
        .map(|i| {
            let frequency = base.powf(-2.0 * i as f64 / n as f64);
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / numbers.yarn_factor * ramp + frequency * (1.0 - ramp)
        })
        .collect()
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn plus(sum: &mut [f64], term: &[f64], factor: f64) {
    sum.iter_mut().zip(term).for_each(|(s, t)| *s += factor * t);
}

fn softmax(mut values: Row) -> Row {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = values.iter().sum();
    values.iter().map(|x| x / sum).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
