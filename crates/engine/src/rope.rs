//! Rotary positions: the angles of a position, and turning a head by them.
//!
//! Angles follow `transformers` (`modeling_rope_utils.py`), which is what the models were trained or checked with: the
//! frequency of a pair is an f32, and so is its product with the position; sine and cosine are taken in double precision
//! and rounded, so that every machine gets the same bits.
//!
//! Invariant: a head's result depends on its values and its position alone.

use vindex::{RopeKind, RopeScaling};

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    kind: RopeKind,
    /// One for each pair of elements.
    frequencies: Vec<f32>,
    /// Of layers with a sliding window, where they are others.
    frequencies_sliding: Option<Vec<f32>>,
    /// What sines and cosines are multiplied by, except in `frequencies_sliding`.
    magnitude: f32,
}

impl Rope {
    /// `factors` are those of [`RopeScaling::FrequencyFactors`].
    pub(crate) fn new(rope: &vindex::Rope, factors: Option<&[f32]>) -> Rope {
        let n_dims = rope.n_dims;
        let plain = |n_dims: u32, base: f32| -> Vec<f32> {
            let pairs = 0..n_dims / 2;
            pairs
                .map(|i| {
                    let exponent = (2 * i) as f32 / n_dims as f32;
                    1.0 / f64::from(base).powf(exponent.into()) as f32
                })
                .collect()
        };
        let mut frequencies = plain(n_dims, rope.base);
        let mut magnitude = 1.0;
        match rope.scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => {
                frequencies.iter_mut().for_each(|f| *f /= factor);
            }
            Some(RopeScaling::FrequencyFactors) => {
                let factors = factors.unwrap_or_default();
                frequencies
                    .iter_mut()
                    .zip(factors)
                    .for_each(|(f, factor)| *f /= factor);
            }
            Some(RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                fractional,
            }) => {
                // The pair that turns so many times over the original context.
                let pair = |rotations: f32| {
                    let context = f64::from(original_context);
                    let turns = context / (f64::from(rotations) * std::f64::consts::TAU);
                    f64::from(n_dims) * turns.ln() / (2.0 * f64::from(rope.base).ln())
                };
                let (low, high) = match fractional {
                    true => (pair(beta_fast), pair(beta_slow)),
                    false => (pair(beta_fast).floor(), pair(beta_slow).ceil()),
                };
                let (low, high) = (low.max(0.0), high.min(f64::from(n_dims - 1)));
                let width = if high == low { 0.001 } else { high - low };
                for (i, f) in frequencies.iter_mut().enumerate() {
                    let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0) as f32;
                    *f = *f / factor * ramp + *f * (1.0 - ramp);
                }
                magnitude = attention_factor.unwrap_or_else(|| match factor {
                    f if f <= 1.0 => 1.0,
                    f => (0.1 * f64::from(f).ln() + 1.0) as f32,
                });
            }
        }
        Rope {
            kind: rope.kind,
            frequencies,
            frequencies_sliding: (rope.base_sliding.is_some() || rope.n_dims_sliding.is_some())
                .then(|| {
                    plain(
                        rope.n_dims_sliding.unwrap_or(n_dims),
                        rope.base_sliding.unwrap_or(rope.base),
                    )
                }),
            magnitude,
        }
    }

    /// Pairs that are turned, in layers that slide or in others.
    pub(crate) fn n_pairs(&self, is_sliding: bool) -> usize {
        match &self.frequencies_sliding {
            Some(sliding) if is_sliding => sliding.len(),
            _ => self.frequencies.len(),
        }
    }

    /// Whether layers with a sliding window have angles of their own.
    pub(crate) fn has_sliding(&self) -> bool {
        self.frequencies_sliding.is_some()
    }

    /// Fills `angles`, `(n_pairs, 2)`: cosine and sine of each pair at `position`.
    pub(crate) fn angles(&self, position: usize, is_sliding: bool, angles: &mut [[f32; 2]]) {
        let (frequencies, magnitude) = match &self.frequencies_sliding {
            Some(sliding) if is_sliding => (sliding, 1.0),
            _ => (&self.frequencies, self.magnitude),
        };
        for (angle, frequency) in angles.iter_mut().zip(frequencies) {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            *angle = [cos as f32 * magnitude, sin as f32 * magnitude];
        }
    }

    /// Turns the leading elements of `head`.
    pub(crate) fn turn(&self, angles: &[[f32; 2]], head: &mut [f32]) {
        let turned = &mut head[..2 * angles.len()];
        match self.kind {
            RopeKind::Interleaved => {
                for (pair, [cos, sin]) in turned.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    let [x, y] = *pair;
                    *pair = [x * cos - y * sin, y * cos + x * sin];
                }
            }
            RopeKind::Neox => {
                let (low, high) = turned.split_at_mut(angles.len());
                for ((low, high), [cos, sin]) in low.iter_mut().zip(high).zip(angles) {
                    let (x, y) = (*low, *high);
                    (*low, *high) = (x * cos - y * sin, y * cos + x * sin);
                }
            }
        }
    }
}
