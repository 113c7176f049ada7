//! Weights as they come and as they might: random values of many shapes, made from a seed.

use proptest::prelude::*;

/// A way to draw values.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shape {
    Normal,
    /// Student's t with two degrees of freedom.
    HeavyTail,
    /// Normal, one value in fifty 20 times as large.
    Outliers,
    /// Uniform in -1..1, moved by an offset.
    Uniform {
        offset: f32,
    },
    /// Zeros but for one value in ten.
    Sparse,
    /// One value for each 32.
    Constant,
    /// Few different values.
    Steps {
        n: u32,
    },
}

pub(crate) fn shape() -> impl Strategy<Value = Shape> {
    prop_oneof![
        Just(Shape::Normal),
        Just(Shape::HeavyTail),
        Just(Shape::Outliers),
        (-3.0f32..3.0).prop_map(|offset| Shape::Uniform { offset }),
        Just(Shape::Sparse),
        Just(Shape::Constant),
        (2u32..40).prop_map(|n| Shape::Steps { n }),
    ]
}

/// `n` values of a shape, times `scale`.
pub(crate) fn values(shape: Shape, scale: f32, seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    for _ in 0..20 {
        uniform();
    }
    let mut kept = 0.0;
    (0..n)
        .map(|i| {
            let (u, v) = (uniform(), uniform());
            let radius = (-2.0 * u.ln()).sqrt();
            let normal = radius * (std::f64::consts::TAU * v).cos();
            let x = match shape {
                Shape::Normal => normal,
                Shape::HeavyTail => normal / (-uniform().ln()).sqrt(),
                Shape::Outliers => normal * if uniform() < 0.02 { 20.0 } else { 1.0 },
                Shape::Uniform { offset } => 2.0 * u - 1.0 + f64::from(offset),
                Shape::Sparse => normal * if uniform() < 0.1 { 1.0 } else { 0.0 },
                Shape::Constant => {
                    if i % 32 == 0 {
                        kept = normal;
                    }
                    kept
                }
                Shape::Steps { n } => (u * f64::from(n)).floor() / f64::from(n) - 0.5,
            };
            x as f32 * scale
        })
        .collect()
}
