//! How long a publication takes and what memory it needs, before a byte of weights is read.
//!
//! Invariant: what this machine does is measured here, in some milliseconds; what its line does is not known, so bytes
//! over the network are told with the time that they take at [`LINK_BYTES_PER_S`]. Waiting for a Hub is left out.

use std::hint::black_box;
use std::time::{Duration, Instant};

use quant::BlockType;
use serde::Serialize;
use vindex::{Census, EXTRACTION_MEMORY_BYTES_MAX};

/// One gigabit a second.
const LINK_BYTES_PER_S: f64 = 125e6;
/// Values that are encoded to see how fast that is: longer than a row, short enough not to be noticed.
const SAMPLE_VALUES: usize = 1 << 17;
const SAMPLES: usize = 3;

/// What a publication takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Estimate {
    /// Most memory of the extraction itself, files that the system keeps in memory left out.
    pub(crate) memory_bytes_max: u64,
    /// Weights that are encoded.
    pub(crate) n_weights: u64,
    pub(crate) n_threads: usize,
    /// At the speed that this machine encoded a sample with.
    pub(crate) encode_s: f64,
    /// `None` when the source's size is not known.
    pub(crate) fetch_bytes: Option<u64>,
    pub(crate) send_bytes: u64,
}

impl Estimate {
    /// Of extracting and publishing tensors of these types, from `fetch_bytes` of a source that is elsewhere.
    pub(crate) fn of(census: &Census, fetch_bytes: Option<u64>, send_bytes: u64) -> Estimate {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut encode_s = 0.0;
        let mut n_weights = 0;
        for (name, kind) in census {
            let Ok(block_type) = name.parse::<BlockType>() else {
                continue;
            };
            let n_blocks = kind.size_bytes / block_type.block_bytes() as u64;
            let n_values = n_blocks * block_type.block_len() as u64;
            n_weights += n_values;
            encode_s += n_values as f64 * seconds_per_value(block_type) / n_threads as f64;
        }
        Estimate {
            memory_bytes_max: EXTRACTION_MEMORY_BYTES_MAX,
            n_weights,
            n_threads,
            encode_s,
            fetch_bytes,
            send_bytes,
        }
    }

    /// `about 3 min to encode 46.7 G weights on 8 threads; …`
    pub(crate) fn time(&self) -> String {
        let over_link = |bytes: u64| {
            format!(
                "{} ({} at 1 Gbit/s)",
                terminal::size(bytes),
                about(bytes as f64 / LINK_BYTES_PER_S)
            )
        };
        let fetch = self
            .fetch_bytes
            .map(|bytes| format!("fetch {}, ", over_link(bytes)));
        format!(
            "{}encode {:.2} G weights ({} on {} thread{} here), send {}",
            fetch.unwrap_or_default(),
            self.n_weights as f64 / 1e9,
            about(self.encode_s),
            self.n_threads,
            if self.n_threads == 1 { "" } else { "s" },
            over_link(self.send_bytes)
        )
    }
}

/// The best of some runs: whatever else the machine does makes them only slower.
fn seconds_per_value(block_type: BlockType) -> f64 {
    // Any values do; a generator of its own because they need not be good.
    let values: Vec<f32> = (0..SAMPLE_VALUES as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5)
        .collect();
    let n_bytes = SAMPLE_VALUES / block_type.block_len() * block_type.block_bytes();
    let mut blocks = vec![0; n_bytes];
    let mut best = Duration::MAX;
    for _ in 0..SAMPLES {
        let began = Instant::now();
        quant::encode(block_type, black_box(&values), &mut blocks);
        black_box(&mut blocks);
        best = best.min(began.elapsed());
    }
    best.as_secs_f64() / SAMPLE_VALUES as f64
}

/// A time as a person says it.
fn about(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => "under 1 s".to_owned(),
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6_000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3_600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vindex::TypeCount;

    #[test]
    fn weights_are_counted_from_blocks_and_times_are_told_in_units_of_people() {
        let count = |size_bytes| TypeCount {
            n_tensors: 1,
            size_bytes,
        };
        let census = Census::from([("Q4_K", count(144 * 10)), ("F32", count(4 * 7))]);
        let estimate = Estimate::of(&census, Some(250_000_000_000), 1_000);
        assert_eq!(estimate.n_weights, 2560 + 7);
        let time = estimate.time();
        assert!(time.contains("(33 min at 1 Gbit/s), encode"), "{time}");
        assert!(!Estimate::of(&census, None, 1_000).time().contains("fetch"));
        assert_eq!(about(0.2), "under 1 s");
        assert_eq!(about(59.6), "60 s");
        assert_eq!(about(7_200.0), "2.0 h");
    }
}
