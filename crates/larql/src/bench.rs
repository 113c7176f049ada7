//! `bench`: how fast a model decodes and takes in a prompt here, beside how fast this machine reads memory.
//!
//! Decoding reads every weight once for each token, so that its bound is the bandwidth of memory; the figure that counts
//! is their ratio.
//!
//! Invariant: both are measured in the same run, on the same number of threads. Timings are the best of [`N_RUNS`].

use std::hint::black_box;
use std::time::{Duration, Instant};

use engine::Sequence;
use engine::wire::Remote;
use terminal::Failure;

use crate::cli::Bench;
use crate::context::Context;
use crate::pass::Pass;

const N_RUNS: usize = 3;

const N_PINGS: usize = 200;

/// Bytes that each thread reads to measure the bandwidth: more than caches hold.
const READ_BYTES: usize = 256 << 20;

/// Measures and tells.
pub(crate) fn bench(args: &Bench, context: &Context) -> Result<(), Failure> {
    let mut pass = Pass::open(&args.dir, &args.computing, context)?;
    let n_threads = pass.n_threads;
    let config = pass.model().config();
    let (n_prompt, n_tokens) = (args.prompt.get(), args.tokens.get());
    if n_prompt + n_tokens > config.context as usize {
        return Err(Failure::new(format!(
            "{n_prompt} + {n_tokens} tokens are beyond the model's context of {}",
            config.context
        )));
    }
    let n_streams = args.streams.get();
    let vocab = config.vocab as usize;
    let token = |stream: usize, i: usize| ((stream * 104_729 + i * 7919) % vocab) as u32;

    let (mut prefill, mut decode) = (Duration::MAX, Duration::MAX);
    let mut sequences: Vec<Sequence> = Vec::new();
    for _ in 0..N_RUNS {
        sequences.clear();
        for stream in 0..n_streams {
            let prompt: Vec<u32> = (0..n_prompt).map(|i| token(stream, i)).collect();
            let mut sequence = pass.sequence(n_prompt + n_tokens);
            let begun = Instant::now();
            pass.append(&mut sequence, &prompt)?;
            prefill = prefill.min(begun.elapsed());
            sequences.push(sequence);
        }
        let begun = Instant::now();
        for i in 0..n_tokens {
            let next: Vec<u32> = (0..n_streams)
                .map(|stream| token(stream, n_prompt + i))
                .collect();
            pass.step_side_by_side(&mut sequences, &next)?;
        }
        decode = decode.min(begun.elapsed());
    }
    let bandwidth = bandwidth_gb_s(n_threads);
    let remote = pass.remote.as_deref();
    let round_trip_us = remote.map(round_trip_us).transpose()?;
    let model = pass.model();
    let bytes_per_token = model.attention_bytes() + model.feed_forward_bytes();
    let n_decoded = n_streams * n_tokens;
    let decode_tok_s = n_decoded as f64 / decode.as_secs_f64();
    let prefill_tok_s = n_prompt as f64 / prefill.as_secs_f64();
    // The weights are read once for all streams.
    let weights_gb_s = decode_tok_s / n_streams as f64 * bytes_per_token as f64 / 1e9;
    context.output.text(format_args!(
        "decode {decode_tok_s:.1} tokens/s, {n_streams} side by side: {weights_gb_s:.1} GB/s of weights, {:.0} % of the {bandwidth:.1} GB/s that \
         {n_threads} threads read here\nprefill {prefill_tok_s:.1} tokens/s, {n_prompt} tokens",
        100.0 * weights_gb_s / bandwidth
    ))?;
    context.output.value(&serde_json::json!({
        "decode_tok_s": decode_tok_s,
        "prefill_tok_s": prefill_tok_s,
        "weights_gb_s": weights_gb_s,
        "bandwidth_gb_s": bandwidth,
        "bytes_per_token": bytes_per_token,
        "round_trip_us": round_trip_us,
        "threads": n_threads,
        "prompt": n_prompt,
        "tokens": n_tokens,
        "streams": n_streams,
    }))
}

/// Microseconds of an empty question and its answer: the best of [`N_PINGS`] of each weight server, and of these the
/// longest, because a layer waits for all.
fn round_trip_us(remote: &Remote) -> Result<f64, Failure> {
    let mut longest = Duration::ZERO;
    for (peer, stats) in remote.stats().peers.iter().enumerate() {
        let mut best = Duration::MAX;
        for _ in 0..N_PINGS {
            let ping = remote.ping(peer);
            best = best.min(ping.map_err(|reason| {
                Failure::new(format!("{} does not answer: {reason}", stats.address))
            })?);
        }
        longest = longest.max(best);
    }
    Ok(longest.as_secs_f64() * 1e6)
}

/// Bytes read a second, in GB, when each thread sums a block of its own; the best of [`N_RUNS`].
fn bandwidth_gb_s(n_threads: usize) -> f64 {
    let n_words = READ_BYTES / 8;
    let blocks: Vec<Vec<u64>> = (0..n_threads)
        .map(|i| vec![i as u64 + 1; n_words])
        .collect();
    let sum = |block: &[u64]| {
        block
            .iter()
            .fold(0_u64, |sum, &word| sum.wrapping_add(word))
    };
    let runs = (0..N_RUNS).map(|_| {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for block in &blocks {
                scope.spawn(|| black_box(sum(block)));
            }
        });
        begun.elapsed()
    });
    let best = runs.min().unwrap_or(Duration::MAX);
    (n_threads * READ_BYTES) as f64 / best.as_secs_f64() / 1e9
}
