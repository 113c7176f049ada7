//! Runs that are cut, and disks that forget.

use std::sync::atomic::AtomicU64;

use vindex::{Origin, SourceError, SourceFile};

use super::*;
use crate::mtp::heads::{Heads, names};
use crate::mtp::layout::SourceFacts;

/// A checkpoint of twelve small head tensors that counts what is read, and gives up after some reads.
struct Cut {
    file: Vec<u8>,
    n_bytes: AtomicU64,
    reads_left: AtomicUsize,
}

const FILE: &str = "model.safetensors";
const N_TENSORS: usize = 12;
const TENSOR_BYTES: u64 = 64;

impl Cut {
    fn new() -> Cut {
        let mut header = serde_json::Map::new();
        for i in 0..N_TENSORS {
            let begin = TENSOR_BYTES * i as u64;
            header.insert(
                format!("mtp.{i:02}.weight"),
                serde_json::json!({"dtype": "BF16", "shape": [32], "data_offsets": [begin, begin + TENSOR_BYTES]}),
            );
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend((0..N_TENSORS as u64 * TENSOR_BYTES).map(|i| (i % 61) as u8));
        Cut {
            file,
            n_bytes: AtomicU64::new(0),
            reads_left: AtomicUsize::new(usize::MAX),
        }
    }

    fn layout(&self) -> Layout {
        let names = names(self).unwrap();
        let heads = Heads::read(self, &names, false).unwrap().unwrap();
        Layout::new(heads, SourceFacts::new("o/m", None, &names.config))
    }

    /// Writes with one worker after `n_reads` more reads end it; the bytes read, and how it ended.
    fn write(
        &self,
        layout: &Layout,
        path: &Path,
        n_reads: usize,
    ) -> (u64, Result<Written, Failure>) {
        self.n_bytes.store(0, Ordering::Relaxed);
        self.reads_left.store(n_reads, Ordering::Relaxed);
        let log = Log::open(&path.with_extension("journal"), "testing").unwrap();
        let written = write(
            layout,
            self,
            path,
            log,
            1,
            &Meter::new("test"),
            &AtomicBool::new(false),
        );
        (self.n_bytes.load(Ordering::Relaxed), written)
    }
}

impl Source for Cut {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        Ok(vec![SourceFile {
            path: FILE.to_owned(),
            size_bytes: self.file.len() as u64,
        }])
    }

    fn read_at(&self, _path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let left = self.reads_left.load(Ordering::Relaxed);
        if left == 0 {
            return Err("cut".into());
        }
        self.reads_left.store(left - 1, Ordering::Relaxed);
        self.n_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        buf.copy_from_slice(&self.file[offset_bytes as usize..][..buf.len()]);
        Ok(())
    }

    fn origin(&self) -> Origin {
        Origin::default()
    }
}

#[test]
fn a_run_that_was_cut_anywhere_is_gone_on_from() {
    let source = Cut::new();
    let layout = source.layout();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.safetensors");
    let (_, written) = source.write(&layout, &whole, usize::MAX);
    let whole_sum = written.unwrap().sha256;
    for n_reads in 0..=N_TENSORS {
        let path = dir.path().join(format!("{n_reads}.safetensors"));
        let (first, cut) = source.write(&layout, &path, n_reads);
        assert_eq!(cut.is_ok(), n_reads == N_TENSORS);
        if cut.is_err() {
            assert_eq!(
                std::fs::read(&path).unwrap()[..8],
                [0; 8],
                "a header before the end"
            );
        }
        let (second, written) = source.write(&layout, &path, usize::MAX);
        assert_eq!(first, n_reads as u64 * TENSOR_BYTES);
        assert_eq!(
            first + second,
            N_TENSORS as u64 * TENSOR_BYTES,
            "cut after {n_reads} reads"
        );
        assert_eq!(written.unwrap().sha256, whole_sum);
        assert_eq!(
            std::fs::read(&path).unwrap(),
            std::fs::read(&whole).unwrap()
        );
    }
}

#[test]
fn a_piece_that_the_disk_lost_is_fetched_again_and_no_other() {
    let source = Cut::new();
    let layout = source.layout();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    source.write(&layout, &path, N_TENSORS - 2).1.unwrap_err();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[layout.data_start as usize + 70] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (n_bytes, written) = source.write(&layout, &path, usize::MAX);
    assert_eq!(n_bytes, 3 * TENSOR_BYTES);
    assert_eq!(written.unwrap().sums.len(), N_TENSORS);
}

#[test]
fn a_file_of_other_heads_is_begun_anew() {
    let source = Cut::new();
    let mut layout = source.layout();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    source.write(&layout, &path, 5).1.unwrap_err();
    layout.source.repo = "o/other".to_owned();
    let (n_bytes, written) = source.write(&layout, &path, usize::MAX);
    assert_eq!(n_bytes, N_TENSORS as u64 * TENSOR_BYTES);
    written.unwrap();
}
