//! `perplexity`: how well a model foresees a text, by the protocol of llama.cpp's `llama-perplexity`.
//!
//! The whole text (less a line feed at its end) is encoded once, with the token that begins a text where the model wants
//! one, and cut into windows of N tokens; what is left over is not used. The first token of each window becomes the one
//! that begins a text, where the model wants one. A window is computed by itself, and of its predictions those after the
//! tokens N/2 to N-2 count, so that each has at least N/2 tokens before it. The figure is `exp` of the mean negative
//! log-likelihood.
//!
//! Invariant: sums are in double precision and in the order of the text, so that threads change nothing.

use std::time::Instant;

use engine::{Tokenizer, Wanted};
use terminal::Failure;

use crate::cli::Perplexity;
use crate::context::Context;
use crate::pass::Pass;

/// Tokens of which the logits are in memory at once.
const CHUNK: usize = 64;

/// Measures and tells.
pub(crate) fn perplexity(args: &Perplexity, context: &Context) -> Result<(), Failure> {
    let window = args.window.get();
    let mut pass = Pass::open(&args.dir, &args.computing, context)?;
    let text = std::fs::read_to_string(&args.text)
        .map_err(|error| Failure::io("cannot read", &args.text, error))?;
    let tokenizer = Tokenizer::of(pass.model().vindex()).map_err(Failure::of(format!(
        "cannot read the tokenizer of {}",
        args.dir.display()
    )))?;
    let encode = |text: &str| {
        tokenizer
            .encode(text, true)
            .map_err(Failure::of("cannot encode the text"))
    };
    let tokens = encode(text.strip_suffix('\n').unwrap_or(&text))?;
    let begins = encode("")?.first().copied();
    let context_len = pass.model().config().context as usize;
    if window < 4 || window > context_len {
        return Err(Failure::new(format!(
            "a window of {window} tokens is outside 4 to {context_len}, the model's context"
        )));
    }
    if tokens.len() < window {
        return Err(Failure::new(format!(
            "the text has {} tokens, less than a window of {window}",
            tokens.len()
        ))
        .hint("take a longer text, or a smaller --window"));
    }
    let begun = Instant::now();
    let vocab = pass.model().config().vocab as usize;
    let (mut sum, mut sum_of_squares, mut n_scored) = (0.0, 0.0, 0_usize);
    let n_windows = tokens.len() / window;
    for tokens in tokens.chunks_exact(window) {
        let mut tokens = tokens.to_vec();
        if let Some(begins) = begins {
            tokens[0] = begins;
        }
        let first = window / 2;
        let mut sequence = pass.sequence(window);
        let (unscored, scored) = tokens[..window - 1].split_at(first);
        pass.step(&mut sequence, unscored, Wanted::Nothing)?;
        for (i, chunk) in scored.chunks(CHUNK).enumerate() {
            let logits = pass.step(&mut sequence, chunk, Wanted::All)?;
            let nexts = &tokens[first + i * CHUNK + 1..];
            for (logits, &next) in logits.chunks_exact(vocab).zip(nexts) {
                let loss = -log_likelihood(logits, next);
                sum += loss;
                sum_of_squares += loss * loss;
                n_scored += 1;
            }
        }
    }
    let n = n_scored as f64;
    let mean = sum / n;
    let perplexity = mean.exp();
    // Of the mean, carried over to its exponential.
    let variance = (sum_of_squares / n - mean * mean).max(0.0);
    let error = (variance / (n - 1.0).max(1.0)).sqrt() * perplexity;
    context.output.text(format_args!(
        "perplexity {perplexity:.4} +/- {error:.4} over {n_scored} tokens in {n_windows} windows of {window}, {:.1} s",
        begun.elapsed().as_secs_f64()
    ))?;
    context.output.value(&serde_json::json!({
        "perplexity": perplexity, "standard_error": error, "mean_loss": mean, "n_scored": n_scored,
        "n_windows": n_windows, "window": window, "n_tokens": tokens.len(),
        "seconds": begun.elapsed().as_secs_f64(),
    }))
}

/// Natural logarithm of the probability of `token` under `logits`.
fn log_likelihood(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from(logit - max).exp())
        .sum();
    f64::from(logits[token as usize] - max) - sum.ln()
}
