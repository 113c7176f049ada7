//! Weights and bytes per second of each block type on each instruction set, on one core; then the narrow numbers of
//! checkpoints on their way to BF16.
//!
//! `cargo bench -p quant [-- TYPE...]`. A weight counts 4 bytes on the f32 side and its share of a block on the other;
//! GB/s is of both together. Compare with the line that tells how fast this core copies memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use quant::{BlockType, Narrow, decode_with, dequantize_with, encode_with, isas};

/// 4 MiB of f32: rows of a layer, beyond the L2 cache.
const N: usize = 1 << 20;
const TIME_MIN: Duration = Duration::from_millis(300);

fn main() {
    // Cargo passes flags such as --bench: only names of types select.
    let chosen: Vec<BlockType> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let values = normal_weights();
    let mut copy = vec![0.0; N];
    let per_s = calls_per_second(|| black_box(&mut copy).copy_from_slice(black_box(&values)));
    println!(
        "copy f32: {:.1} GB/s read and written",
        per_s * (N * 8) as f64 / 1e9
    );
    println!("| type | instructions | encode M weights/s | GB/s | decode M weights/s | GB/s |");
    println!("|---|---|---:|---:|---:|---:|");
    for block_type in BlockType::ALL {
        if !chosen.is_empty() && !chosen.contains(&block_type) {
            continue;
        }
        let Some(n_bytes) = block_type.row_bytes(N) else {
            continue;
        };
        let mut blocks = vec![0; n_bytes];
        let mut decoded = vec![0.0; N];
        for isa in isas() {
            let encode = calls_per_second(|| {
                encode_with(isa, block_type, black_box(&values), black_box(&mut blocks))
            });
            let decode = calls_per_second(|| {
                decode_with(isa, block_type, black_box(&blocks), black_box(&mut decoded))
            });
            let gb = (4 * N + n_bytes) as f64 / 1e9;
            let weights = N as f64 / 1e6;
            println!(
                "| {block_type} | {isa:?} | {:.0} | {:.1} | {:.0} | {:.1} |",
                encode * weights,
                encode * gb,
                decode * weights,
                decode * gb
            );
        }
    }
    if chosen.is_empty() {
        narrow();
    }
}

/// Codes to f32 by scales of 128 values each, then to BF16, in pieces that stay in cache: GB/s of codes read.
fn narrow() {
    const PIECE: usize = 4096;
    println!("| narrow | instructions | GB/s of codes, to BF16 |");
    println!("|---|---|---:|");
    let codes: Vec<u8> = (0..N).map(|i| ((i * 131) >> 3) as u8).collect();
    let scales = vec![0.01f32; PIECE / 128];
    for narrow in Narrow::ALL {
        let n_bytes = PIECE / narrow.values_per_byte();
        for isa in isas() {
            let mut values = vec![0.0; PIECE];
            let mut rounded = vec![0; 2 * PIECE];
            let per_s = calls_per_second(|| {
                for codes in black_box(&codes).chunks_exact(n_bytes) {
                    dequantize_with(isa, narrow, codes, 128, black_box(&scales), &mut values);
                    encode_with(isa, BlockType::BF16, &values, black_box(&mut rounded));
                }
            });
            println!("| {narrow:?} | {isa:?} | {:.2} |", per_s * N as f64 / 1e9);
        }
    }
}

/// Calls of `f` in a second: the best of three measurements.
fn calls_per_second(mut f: impl FnMut()) -> f64 {
    f();
    let mut best = 0.0f64;
    for _ in 0..3 {
        let start = Instant::now();
        let mut n_calls = 0;
        while start.elapsed() < TIME_MIN / 3 || n_calls == 0 {
            f();
            n_calls += 1;
        }
        best = best.max(f64::from(n_calls) / start.elapsed().as_secs_f64());
    }
    best
}

/// Values as trained weights have them: near normal, about 0.02 wide.
fn normal_weights() -> Vec<f32> {
    let mut state = 88_172_645_463_325_252u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..N)
        .map(|_| 0.02 * (0..12).map(|_| uniform()).sum::<f32>())
        .collect()
}
