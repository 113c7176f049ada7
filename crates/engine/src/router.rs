//! Which experts a row visits, and with what weights: the router of a layer and what it is made of.
//!
//! Invariant: ties go to the expert or the group with the lower number, so that a choice does not depend on how it is
//! searched. Leaves out the products, and the experts.

use vindex::{Config, Experts, Gating, Groups, Vindex};

use crate::ffn::beside;
use crate::weights::{ModelError, Weight, vector};

/// What DeepSeek-V3's own code adds to a sum of sigmoids before it divides by it.
const SIGMOID_SUM_MIN: f32 = 1e-20;

/// The router of a layer.
#[derive(Debug)]
pub(crate) struct Router {
    /// `(n_experts, hidden)`.
    pub(crate) w: Weight,
    pub(crate) choice: Choice,
    /// `(1, hidden)`: the sigmoid of its product is the weight of the shared expert, which else is 1.
    pub(crate) shared_gate: Option<Weight>,
    pub(crate) branch: Option<Branch>,
}

/// How logits become experts and weights. Vectors are `(n_experts)`.
#[derive(Debug)]
pub(crate) struct Choice {
    experts: Experts,
    /// Added to the logits.
    bias: Option<Vec<f32>>,
    /// Added to the weights for choosing.
    choice_bias: Option<Vec<f32>>,
    /// What the weights of the chosen ones are multiplied by in the end.
    expert_scale: Option<Vec<f32>>,
}

/// What a layer has where a dense branch is beside the experts: these and the router get the residual stream through
/// norms of their own.
#[derive(Debug)]
pub(crate) struct Branch {
    /// `(hidden)`: weight of the norm before the router, `1 / sqrt(hidden)` included.
    pub(crate) router_norm: Vec<f32>,
    /// `(hidden)`: of the norm before the experts.
    pub(crate) experts_norm: Vec<f32>,
    /// `(hidden)`: of the norm after the experts' sum.
    pub(crate) after_experts: Vec<f32>,
    /// `(hidden)`: of the norm after the dense branch.
    pub(crate) after_dense: Vec<f32>,
}

/// What cannot be chosen from: a sentence about it.
pub(crate) fn wrong(e: &Experts) -> Option<String> {
    let (n, n_used) = (e.n, e.n_used);
    if n_used == 0 || n_used > n || n == u32::MAX {
        return Some(format!("tokens visit {n_used} of {n} experts"));
    }
    if e.shared.is_some() && e.dense_branch {
        return Some("shared experts beside a dense branch are not computed".to_owned());
    }
    let groups = e.groups?;
    let is_wrong = groups.n == 0
        || !n.is_multiple_of(groups.n)
        || groups.n_used > groups.n
        || n / groups.n * groups.n_used < n_used;
    is_wrong.then(|| {
        let Groups {
            n: of,
            n_used: some,
        } = groups;
        format!("tokens visit {n_used} of {n} experts in {some} of {of} groups")
    })
}

impl Router {
    /// Finds the tensors of layer `l`; `None` where it is dense.
    pub(crate) fn open(v: &Vindex, config: &Config, l: u32) -> Result<Option<Router>, ModelError> {
        let Some(experts) = config.experts.filter(|_| config.is_routed(l)) else {
            return Ok(None);
        };
        let (n, hidden) = (experts.n, config.hidden);
        let name = |part: &str| format!("blk.{l}.{part}");
        let vector = |part: &str, n| vector(v, &name(part), n);
        let weight = |part: &str, n_rows| Weight::find(v, name(part), n_rows, hidden);
        let optional = |has: bool, part: &str| has.then(|| vector(part, n)).transpose();
        Ok(Some(Router {
            w: weight("ffn_gate_inp.weight", n)?,
            choice: Choice {
                experts,
                bias: optional(experts.router_bias, "ffn_gate_inp.bias")?,
                choice_bias: optional(experts.choice_bias, "exp_probs_b.bias")?,
                expert_scale: optional(experts.dense_branch, "ffn_down_exps.scale")?,
            },
            shared_gate: match experts.shared {
                Some(shared) if shared.gated => Some(weight("ffn_gate_inp_shexp.weight", 1)?),
                _ => None,
            },
            branch: match experts.dense_branch {
                true => Some(Branch {
                    router_norm: {
                        let mut scale = vector("ffn_gate_inp.scale", hidden)?;
                        let root = (hidden as f32).sqrt();
                        scale.iter_mut().for_each(|scale| *scale /= root);
                        scale
                    },
                    experts_norm: vector("pre_ffw_norm_2.weight", hidden)?,
                    after_experts: vector("post_ffw_norm_2.weight", hidden)?,
                    after_dense: vector("post_ffw_norm_1.weight", hidden)?,
                }),
                false => None,
            },
        }))
    }

    /// The matrices.
    pub(crate) fn weights(&self) -> impl Iterator<Item = &Weight> {
        [&self.w].into_iter().chain(&self.shared_gate)
    }

    /// Experts that are chosen for a row.
    pub(crate) fn n_chosen(&self) -> usize {
        self.choice.experts.n_used as usize
    }

    /// The expert that every row visits beside them.
    pub(crate) fn beside(&self) -> Option<u32> {
        beside(&self.choice.experts)
    }

    /// Experts that a row visits.
    pub(crate) fn n_visited(&self) -> usize {
        self.n_chosen() + usize::from(self.beside().is_some())
    }
}

impl Choice {
    /// Chooses experts for one row. `logits` and `choice`, `(n_experts)`, are destroyed; `experts` and `weights`,
    /// `(n_chosen)`, are filled with the most likely expert first.
    pub(crate) fn choose(
        &self,
        logits: &mut [f32],
        choice: &mut [f32],
        experts: &mut [u32],
        weights: &mut [f32],
    ) {
        if let Some(bias) = &self.bias {
            logits.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
        let config = &self.experts;
        match config.gating {
            Gating::Softmax => quant::softmax_in_place(logits),
            Gating::Sigmoid => {
                for logit in logits.iter_mut() {
                    *logit = sigmoid(*logit);
                }
            }
        }
        choice.copy_from_slice(logits);
        if let Some(bias) = &self.choice_bias {
            choice.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
        if let Some(groups) = config.groups {
            leave_the_best_groups(groups, choice);
        }
        for (expert, weight) in experts.iter_mut().zip(weights.iter_mut()) {
            let best = take_best(choice);
            (*expert, *weight) = (best as u32, logits[best]);
        }
        if config.normalise {
            let least = match config.gating {
                Gating::Softmax => 0.0,
                Gating::Sigmoid => SIGMOID_SUM_MIN,
            };
            let sum = weights.iter().sum::<f32>() + least;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        if config.scale != 1.0 {
            weights.iter_mut().for_each(|w| *w *= config.scale);
        }
        if let Some(scale) = &self.expert_scale {
            for (expert, weight) in experts.iter().zip(weights) {
                *weight *= scale[*expert as usize];
            }
        }
    }
}

/// `1 / (1 + e^-x)`.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Where the greatest of `values` is, which then is the least.
fn take_best(values: &mut [f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    values[best] = f32::NEG_INFINITY;
    best
}

/// The values of experts that are not in one of the best groups become the least.
fn leave_the_best_groups(groups: Groups, choice: &mut [f32]) {
    let n = groups.n as usize;
    let size = choice.len() / n;
    let mut goodness: Vec<f32> = choice
        .chunks_exact(size)
        .map(|group| {
            let mut best = [f32::NEG_INFINITY; 2];
            for &value in group {
                if value > best[0] {
                    best = [value, best[0]];
                } else if value > best[1] {
                    best[1] = value;
                }
            }
            if size == 1 {
                best[0]
            } else {
                best[0] + best[1]
            }
        })
        .collect();
    let mut is_left = vec![false; n];
    for _ in 0..groups.n_used {
        is_left[take_best(&mut goodness)] = true;
    }
    for (group, is_left) in choice.chunks_exact_mut(size).zip(is_left) {
        if !is_left {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(experts: Experts) -> Choice {
        Choice {
            experts,
            bias: None,
            choice_bias: None,
            expert_scale: None,
        }
    }

    fn experts(n: u32, n_used: u32, gating: Gating) -> Experts {
        Experts {
            n_used,
            normalise: true,
            ..Experts::new(n, gating)
        }
    }

    fn chosen<const N: usize>(choice: &Choice, logits: &[f32]) -> ([u32; N], [f32; N]) {
        let (mut experts, mut weights) = ([0; N], [0.0; N]);
        let (mut logits, mut left) = (logits.to_vec(), logits.to_vec());
        choice.choose(&mut logits, &mut left, &mut experts, &mut weights);
        (experts, weights)
    }

    fn close(got: &[f32], expected: &[f64]) {
        let pairs = got.iter().zip(expected);
        let all = pairs.fold(true, |all, (a, b)| all && (f64::from(*a) - b).abs() < 1e-6);
        assert!(all && got.len() == expected.len(), "{got:?}, {expected:?}");
    }

    #[test]
    fn the_likeliest_come_first_and_ties_go_to_the_lower_number() {
        let choice = choice(experts(5, 3, Gating::Softmax));
        let (experts, weights) = chosen::<3>(&choice, &[1.0, 2.0, 0.0, 2.0, 1.0]);
        assert_eq!(experts, [1, 3, 0]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(weights[0] == weights[1] && weights[1] > weights[2]);
    }

    #[test]
    fn a_bias_of_the_choice_does_not_weigh_and_a_scale_does() {
        let mut choice = choice(experts(4, 2, Gating::Sigmoid));
        choice.choice_bias = Some(vec![0.0, 0.0, 0.9, 0.0]);
        choice.experts.scale = 2.5;
        let (experts, weights) = chosen::<2>(&choice, &[0.5, 2.0, -1.0, 0.0]);
        assert_eq!(experts, [2, 1]);
        let s = |x: f64| 1.0 / (1.0 + (-x).exp());
        let sum = s(-1.0) + s(2.0);
        close(&weights, &[2.5 * s(-1.0) / sum, 2.5 * s(2.0) / sum]);
        choice.experts.normalise = false;
        choice.expert_scale = Some(vec![1.0, 0.5, 3.0, 1.0]);
        let (_, weights) = chosen::<2>(&choice, &[0.5, 2.0, -1.0, 0.0]);
        close(&weights, &[2.5 * s(-1.0) * 3.0, 2.5 * s(2.0) * 0.5]);
    }

    #[test]
    fn a_bias_of_the_router_chooses_and_weighs() {
        let mut choice = choice(experts(3, 2, Gating::Softmax));
        choice.bias = Some(vec![0.0, 1.0, 3.0]);
        let (experts, weights) = chosen::<2>(&choice, &[0.5, 0.25, -1.0]);
        assert_eq!(experts, [2, 1]);
        let (a, b) = (2.0f64.exp(), 1.25f64.exp());
        close(&weights, &[a / (a + b), b / (a + b)]);
    }

    #[test]
    fn experts_come_from_the_groups_whose_two_best_are_best_together() {
        let mut choice = choice(experts(6, 3, Gating::Sigmoid));
        choice.experts.groups = Some(Groups { n: 3, n_used: 2 });
        // The first group has the best expert and is the worst.
        let (experts, _) = chosen::<3>(&choice, &[3.0, -9.0, 1.0, 0.9, 0.8, 0.7]);
        assert_eq!(experts, [2, 3, 4]);
        // Groups as good as each other: the first ones.
        let (experts, _) = chosen::<3>(&choice, &[1.0; 6]);
        assert_eq!(experts, [0, 1, 2]);
        choice.experts.groups = Some(Groups { n: 6, n_used: 3 });
        let (experts, _) = chosen::<3>(&choice, &[1.0, -2.0, 3.0, 0.0, -1.0, 2.0]);
        assert_eq!(experts, [2, 5, 0]);
    }
}
