//! Against the reference's bytes: decoding is bit-exact, and encoding loses no more than the reference encoder.

use std::fs;
use std::path::PathBuf;

use quant::{BlockType, decode_with, encode_with, isas};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Ours may exceed the reference by rounding only.
const RMSE_RATIO_MAX: f64 = 1.0001;

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/quant")
        .join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Calls `check(matrix name, columns, values, type, the type's entry in quant.json)` for everything there is.
fn each_golden(mut check: impl FnMut(&str, usize, &[f32], BlockType, &Value)) {
    let index: Value = serde_json::from_slice(&fixture("quant.json")).unwrap();
    let mut n_checked = 0;
    for (name, matrix) in index["matrices"].as_object().unwrap() {
        let npy = fixture(matrix["file"].as_str().unwrap());
        let header_len = usize::from(u16::from_le_bytes([npy[8], npy[9]]));
        let data = &npy[10 + header_len..];
        assert_eq!(
            hex(data),
            matrix["sha256_f32"].as_str().unwrap(),
            "{name}: the values themselves"
        );
        let values: Vec<f32> = data
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        let columns = matrix["cols"].as_u64().unwrap() as usize;
        for (type_name, golden) in matrix["types"].as_object().unwrap() {
            check(name, columns, &values, type_name.parse().unwrap(), golden);
            n_checked += 1;
        }
    }
    assert_eq!(n_checked, 6 * 7, "six matrices in seven types");
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn rmse(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum();
    (sum / a.len() as f64).sqrt()
}

#[test]
fn decoding_is_bit_exact() {
    each_golden(|name, _, values, block_type, golden| {
        let blocks = fixture(golden["file"].as_str().unwrap());
        for isa in isas() {
            let mut decoded = vec![0.0; values.len()];
            decode_with(isa, block_type, &blocks, &mut decoded);
            let bytes: Vec<u8> = decoded.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(
                hex(&bytes),
                golden["sha256_dequant_f32"].as_str().unwrap(),
                "{name} {block_type} {isa:?}"
            );
        }
    });
}

#[test]
fn encoding_loses_no_more_than_the_reference() {
    each_golden(|name, columns, values, block_type, golden| {
        for isa in isas() {
            let mut blocks = vec![0; block_type.row_bytes(values.len()).unwrap()];
            encode_with(isa, block_type, values, &mut blocks);
            let mut decoded = vec![0.0; values.len()];
            decode_with(isa, block_type, &blocks, &mut decoded);
            let (ours, reference) = (rmse(values, &decoded), golden["rmse"].as_f64().unwrap());
            assert!(
                ours <= reference * RMSE_RATIO_MAX,
                "{name} {block_type} {isa:?}: {ours} > {reference}"
            );
            let rows = values.chunks(columns).zip(decoded.chunks(columns));
            for (row, ((x, y), reference)) in rows
                .zip(golden["rmse_per_row"].as_array().unwrap())
                .enumerate()
            {
                let (ours, reference) = (rmse(x, y), reference.as_f64().unwrap());
                assert!(
                    ours <= reference * RMSE_RATIO_MAX,
                    "{name} {block_type} {isa:?} row {row}: {ours} > {reference}"
                );
            }
        }
    });
}
