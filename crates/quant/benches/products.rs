//! Speed of products: GB/s of blocks for one row of activations, beside what reading alone does in the same run, and
//! GOP/s (a multiplication and an addition are two) for many rows.
//!
//! `cargo bench -p quant --bench products [-- TYPE|ISA...]`, such as `-- Q4_K Avx512Vnni`. Each figure is that of the fastest of
//! many calls, because a machine in use only ever slows one down.

use std::hint::black_box;
use std::time::{Duration, Instant};

use quant::{
    Activations, BlockType, Columns, Isa, Matrix, accumulate_rows_with, encode, isas, multiply_with,
};

/// Columns of the matrices: those of a layer of a middling model.
const N_COLS: usize = 4096;
/// Bytes of the matrices for one row of activations: several times the last cache.
const N_BYTES: usize = 96 << 20;
/// Bytes of such a matrix that are timed at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Rows of the matrices for many rows of activations, which stay in cache as they do between their uses in a layer.
const N_ROWS: usize = 256;
const N_ACTIVATIONS: [usize; 5] = [1, 4, 8, 64, 256];
const TIME_MIN: Duration = Duration::from_millis(400);
const N_CALLS_MIN: usize = 10;

fn main() {
    // Cargo passes flags such as --bench: only names of types and instruction sets select.
    let types: Vec<BlockType> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let chosen_isas: Vec<Isa> = isas()
        .into_iter()
        .filter(|isa| std::env::args().any(|a| a == format!("{isa:?}")))
        .collect();
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = vec![1u8; N_BYTES];
    let n_chunks = N_BYTES / CHUNK_BYTES;
    let read_chunk = |chunk: usize| read(&memory[chunk * CHUNK_BYTES..][..CHUNK_BYTES]);
    let one = CHUNK_BYTES as f64 * chunks_per_second(1, n_chunks, read_chunk) / 1e9;
    let all = CHUNK_BYTES as f64 * chunks_per_second(n_threads, n_chunks, read_chunk) / 1e9;
    drop(memory);
    println!("reading: {one:.1} GB/s with one thread, {all:.1} GB/s with {n_threads}");
    print!("| type | instructions | 1 thread GB/s | share | {n_threads} threads GB/s | share |");
    for n in N_ACTIVATIONS {
        print!(" {n} rows GOP/s |");
    }
    println!(
        "\n|---|---|---:|---:|---:|---:|{}",
        "---:|".repeat(N_ACTIVATIONS.len())
    );
    for block_type in BlockType::ALL {
        if !types.is_empty() && !types.contains(&block_type) {
            continue;
        }
        let row = encoded_row(block_type);
        let large = row.repeat(N_BYTES / row.len());
        for isa in isas() {
            if !chosen_isas.is_empty() && !chosen_isas.contains(&isa) {
                continue;
            }
            let n_rows = large.len() / row.len();
            let w = matrix(block_type, n_rows, &large);
            let mut activations = Activations::new();
            activations.fill(&values(N_COLS, 1.0), N_COLS, &[block_type]);
            let rows_each = (CHUNK_BYTES / row.len()).next_multiple_of(16);
            let multiply_chunk = |chunk: usize| {
                let rows = chunk * rows_each..(chunk + 1) * rows_each;
                let mut out = [0.0; 4096];
                let out = &mut out[..rows_each];
                multiply_with(
                    isa,
                    &w,
                    rows,
                    activations.all(),
                    Columns::new(out, rows_each),
                );
                black_box(out);
            };
            let chunk_gb = (rows_each * row.len()) as f64 / 1e9;
            let n_chunks = n_rows / rows_each;
            let a = chunk_gb * chunks_per_second(1, n_chunks, multiply_chunk);
            let b = chunk_gb * chunks_per_second(n_threads, n_chunks, multiply_chunk);
            print!(
                "| {block_type} | {isa:?} | {a:.1} | {:.0} % | {b:.1} | {:.0} % |",
                100.0 * a / one,
                100.0 * b / all
            );
            let w = matrix(block_type, N_ROWS, &large[..N_ROWS * row.len()]);
            for n in N_ACTIVATIONS {
                activations.fill(&values(n * N_COLS, 1.0), N_COLS, &[block_type]);
                let mut out = vec![0.0; n * N_ROWS];
                let per_s = per_second(|| product(isa, &w, &activations, &mut out));
                print!(" {:.0} |", per_s * (2 * n * N_ROWS * N_COLS) as f64 / 1e9);
            }
            println!();
        }
    }
    if types.is_empty() || types.contains(&BlockType::F16) {
        attention(&chosen_isas);
    }
}

/// A head of attention over a cache of f16 that stays in the second cache: 8 queries, 128 values, 1024 places.
fn attention(chosen_isas: &[Isa]) {
    const N_PLACES: usize = 1024;
    const HEAD: usize = 128;
    const N_QUERIES: usize = 8;
    let mut bytes = vec![0; N_PLACES * HEAD * 2];
    encode(BlockType::F16, &values(N_PLACES * HEAD, 1.0), &mut bytes);
    let w = Matrix {
        block_type: BlockType::F16,
        n_rows: N_PLACES,
        n_cols: HEAD,
        bytes: &bytes,
    };
    let mut activations = Activations::new();
    activations.fill(&values(N_QUERIES * HEAD, 1.0), HEAD, &[BlockType::F16]);
    let weights = values(N_PLACES, 0.001);
    for isa in isas() {
        if !chosen_isas.is_empty() && !chosen_isas.contains(&isa) {
            continue;
        }
        let mut scores = vec![0.0; N_QUERIES * N_PLACES];
        let keys = per_second(|| product(isa, &w, &activations, &mut scores));
        let mut out = vec![0.0; HEAD];
        let values = per_second(|| accumulate_rows_with(isa, &w, &weights, black_box(&mut out)));
        println!(
            "attention, {isa:?}: keys {:.0} GOP/s with {N_QUERIES} queries, values {:.0} GOP/s",
            keys * (2 * N_QUERIES * N_PLACES * HEAD) as f64 / 1e9,
            values * (2 * N_PLACES * HEAD) as f64 / 1e9
        );
    }
}

fn matrix(block_type: BlockType, n_rows: usize, bytes: &[u8]) -> Matrix<'_> {
    Matrix {
        block_type,
        n_rows,
        n_cols: bytes.len() / n_rows / block_type.block_bytes() * block_type.block_len(),
        bytes,
    }
}

/// One product of the whole matrix.
fn product(isa: Isa, w: &Matrix<'_>, x: &Activations, out: &mut [f32]) {
    let out = Columns::new(black_box(out), w.n_rows);
    multiply_with(isa, w, 0..w.n_rows, x.all(), out);
}

/// Reads all of `memory`.
fn read(memory: &[u8]) {
    let words = memory.as_chunks::<64>().0;
    let sum = words.iter().fold([0u64; 8], |mut sum, line| {
        for (sum, word) in sum.iter_mut().zip(line.as_chunks().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
        sum
    });
    black_box(sum);
}

/// Chunks a second of all threads together, each going through its share of `n_chunks` chunks again and again: a chunk is
/// so long gone when its turn comes that it is read from memory, and so short that many are not interrupted. The rate of
/// a thread is that of the fastest tenth of its chunks.
fn chunks_per_second(n_threads: usize, n_chunks: usize, f: impl Fn(usize) + Sync) -> f64 {
    let share = n_chunks / n_threads;
    let f = &f;
    let one = move |thread: usize| {
        let mut times = Vec::new();
        let begin = Instant::now();
        while begin.elapsed() < TIME_MIN || times.len() < 2 * share {
            for chunk in 0..share {
                let start = Instant::now();
                f(thread * share + chunk);
                times.push(start.elapsed());
            }
        }
        times.sort();
        1.0 / times[times.len() / 10].as_secs_f64()
    };
    std::thread::scope(|threads| {
        let all: Vec<_> = (0..n_threads)
            .map(|thread| threads.spawn(move || one(thread)))
            .collect();
        all.into_iter()
            .map(|thread| thread.join().expect("a thread measures"))
            .sum()
    })
}

/// Calls of `f` in a second, by the fastest call: calls are so short that some of them are not interrupted.
fn per_second(mut f: impl FnMut()) -> f64 {
    let mut shortest = Duration::MAX;
    let begin = Instant::now();
    let mut n_calls = 0;
    while n_calls < N_CALLS_MIN || begin.elapsed() < TIME_MIN {
        let start = Instant::now();
        f();
        shortest = shortest.min(start.elapsed());
        n_calls += 1;
    }
    1.0 / shortest.as_secs_f64()
}

fn encoded_row(block_type: BlockType) -> Vec<u8> {
    let n_bytes = block_type.row_bytes(N_COLS).expect("a row is whole blocks");
    let mut row = vec![0; n_bytes];
    encode(block_type, &values(N_COLS, 0.02), &mut row);
    row
}

/// Values as trained weights have them: near normal, about `width` wide.
fn values(n: usize, width: f32) -> Vec<f32> {
    let mut state = 88_172_645_463_325_252u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| width * (0..12).map(|_| uniform()).sum::<f32>())
        .collect()
}
