//! Which experts a row visits, and with what weights.
//!
//! Invariant: ties go to the expert with the lower number, so that a choice does not depend on how it is searched.

use vindex::{Experts, Gating};

/// Chooses experts for one row. `logits`, `(n_experts)`, are destroyed; `experts` and `weights`, `(n_used)`, are filled
/// with the most likely expert first.
pub(crate) fn route(
    config: &Experts,
    logits: &mut [f32],
    experts: &mut [u32],
    weights: &mut [f32],
) {
    match config.gating {
        Gating::Softmax => quant::softmax_in_place(logits),
        Gating::Sigmoid => {
            for logit in logits.iter_mut() {
                *logit = 1.0 / (1.0 + (-*logit).exp());
            }
        }
    }
    for (expert, weight) in experts.iter_mut().zip(weights.iter_mut()) {
        let mut best = 0;
        for (i, probability) in logits.iter().enumerate() {
            if *probability > logits[best] {
                best = i;
            }
        }
        (*expert, *weight) = (best as u32, logits[best]);
        logits[best] = f32::NEG_INFINITY;
    }
    if config.normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_ties_go_to_the_lower_number() {
        let config = Experts {
            n: 5,
            n_used: 3,
            ffn: 1,
            gating: Gating::Softmax,
            normalise: true,
            scale: 1.0,
            groups: None,
            choice_bias: false,
            router_bias: false,
            bias: false,
            n_leading_dense: 0,
            shared: None,
            dense_branch: false,
        };
        let mut logits = [1.0, 2.0, 0.0, 2.0, 1.0];
        let (mut experts, mut weights) = ([0; 3], [0.0; 3]);
        route(&config, &mut logits, &mut experts, &mut weights);
        assert_eq!(experts, [1, 3, 0]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(weights[0] == weights[1] && weights[1] > weights[2]);
    }
}
