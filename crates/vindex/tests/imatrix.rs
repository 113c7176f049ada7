//! Statistics of columns: the files that they travel in, the plans that they weigh and those that they do not fit.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use quant::BlockType;
use support::{OPTIONS, checkpoint_dir, extracted, fixtures, run_plan};
use vindex::{
    ColumnStatistics, Error, ExtractOptions, Imatrix, LocalDir, MetaValue, Plan, Recipe, Source,
    SourceError, Vindex, VindexId, plan, read_header, verify,
};

/// A model with matrices of several types, trained.
fn kjv() -> PathBuf {
    fixtures().join("../models/kjv")
}

fn planned(checkpoint: &Path) -> Plan {
    plan(&LocalDir::open(checkpoint).unwrap(), Recipe::Q4k).unwrap()
}

/// Statistics of every matrix but routers, made from a seed; a quarter of the columns matter a hundred times as much.
fn statistics(plan: &Plan, seed: u64) -> BTreeMap<String, ColumnStatistics> {
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let tensors = plan.parts.iter().flat_map(|part| &part.tensors);
    let matrices = tensors.filter(|t| t.ne.len() > 1 && !t.name.contains("ffn_gate_inp"));
    let of = |tensor: &vindex::PlannedTensor| {
        let n_matrices: u64 = tensor.ne[2..].iter().product();
        let counts: Vec<f32> = (0..n_matrices)
            .map(|_| (random() % 500 + 1) as f32)
            .collect();
        let n = tensor.ne[0] * n_matrices;
        let one =
            |_| (random() % 1000 + 1) as f32 * [1.0, 1.0, 1.0, 100.0][(random() % 4) as usize];
        let sums = (0..n).map(one).collect();
        (tensor.name.clone(), ColumnStatistics { sums, counts })
    };
    matrices.map(of).collect()
}

fn imatrix(entries: BTreeMap<String, ColumnStatistics>) -> Arc<Imatrix> {
    Arc::new(Imatrix::new(entries, 7, 512).unwrap())
}

fn extract_to(source: &dyn Source, plan: &Plan, out: &Path, threads: usize) -> VindexId {
    let options = ExtractOptions { threads, ..OPTIONS };
    run_plan(source, plan, out, &options).0.unwrap()
}

fn refusal(result: Result<Plan, Error>) -> String {
    match result {
        Err(error @ Error::Calibration { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// The bytes of a vindex's first file.
fn first_part(dir: &Path) -> Vec<u8> {
    let vindex = Vindex::open(dir).unwrap();
    std::fs::read(dir.join(&vindex.index().parts[0].file)).unwrap()
}

/// The values of a tensor.
fn values(vindex: &Vindex, name: &str) -> Vec<f32> {
    let tensor = vindex.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.ne.iter().product::<u64>() as usize];
    quant::decode(tensor.block_type, tensor.bytes, &mut values);
    values
}

#[test]
fn the_same_statistics_give_the_same_vindex_with_any_threads() {
    for checkpoint in [kjv(), checkpoint_dir("mixtral")] {
        let source = LocalDir::open(&checkpoint).unwrap();
        let plain = planned(&checkpoint);
        let one = imatrix(statistics(&plain, 3));
        let other = imatrix(statistics(&plain, 5));
        assert_ne!(one.sha256(), other.sha256());
        let calibrated =
            |imatrix: &Arc<Imatrix>| plain.clone().calibrated(imatrix.clone()).unwrap();
        let tmp = tempfile::tempdir().unwrap();
        let dir = |name: &str| tmp.path().join(name);
        let id = extract_to(&source, &calibrated(&one), &dir("a"), 1);
        // By way of a file, as somebody else would.
        let read = Arc::new(Imatrix::from_bytes(&one.to_bytes().unwrap()).unwrap());
        assert_eq!(extract_to(&source, &calibrated(&read), &dir("b"), 3), id);
        assert_ne!(extract_to(&source, &calibrated(&other), &dir("c"), 3), id);
        assert_ne!(extract_to(&source, &plain, &dir("d"), 3), id);

        verify(&dir("a"), &|_| ()).unwrap();
        let vindex = Vindex::open(&dir("a")).unwrap();
        let calibration = vindex.index().calibration.as_ref().unwrap();
        assert_eq!(calibration.imatrix, one.sha256());
        let json = std::fs::read_to_string(dir("a").join("index.json")).unwrap();
        let line = format!("\n\"calibration\":{{\"imatrix\":\"{}\"}},\n", one.sha256());
        assert!(json.contains(&line), "{json}");
        let plain_json = std::fs::read_to_string(dir("d").join("index.json")).unwrap();
        assert!(!plain_json.contains("calibration"));
        let header = read_header(&first_part(&dir("a"))).unwrap();
        let key = |key: &str| {
            header
                .metadata
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v)
        };
        let n_entries = MetaValue::U32(one.entries().len() as u32);
        assert_eq!(key("quantize.imatrix.entries_count"), Some(&n_entries));
        assert_eq!(
            key("quantize.imatrix.chunks_count"),
            Some(&MetaValue::U32(7))
        );
        assert_eq!(key("general.file_type"), Some(&MetaValue::U32(15)));
        let mut text = Vec::new();
        vindex::dump(&vindex, &mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().contains(one.sha256()));
    }
}

/// Beside blocks of the same type without weights, and expert by expert: the sum over columns of their mean square times
/// the squared error.
#[test]
fn errors_cost_less_where_columns_matter() {
    for checkpoint in [kjv(), checkpoint_dir("mixtral")] {
        let source = LocalDir::open(&checkpoint).unwrap();
        let tmp = tempfile::tempdir().unwrap();
        let mut plan = planned(&checkpoint);
        let mut entries = statistics(&plan, 3);
        let (unvisited, n_experts) = (2, 4);
        let stacked = "blk.0.ffn_up_exps.weight";
        if let Some(entry) = entries.get_mut(stacked) {
            entry.counts[unvisited] = 0.0;
        }
        plan = plan.calibrated(imatrix(entries.clone())).unwrap();
        extract_to(&source, &plan, &tmp.path().join("with"), 2);
        plan.imatrix = None;
        extract_to(&source, &plan, &tmp.path().join("without"), 2);
        let exact = vindex::plan(&source, Recipe::F32).unwrap();
        extract_to(&source, &exact, &tmp.path().join("exact"), 2);
        let [with, without, exact] =
            ["with", "without", "exact"].map(|name| Vindex::open(&tmp.path().join(name)).unwrap());
        for (name, entry) in &entries {
            let [x, with, without] = [&exact, &with, &without].map(|v| values(v, name));
            let n_matrices = entry.counts.len();
            let n_cols = entry.sums.len() / n_matrices;
            let n = x.len() / n_matrices;
            for matrix in 0..n_matrices {
                let sums = &entry.sums[matrix * n_cols..][..n_cols];
                let cost = |y: &[f32]| -> f64 {
                    let errors = (matrix * n..(matrix + 1) * n).map(|i| f64::from(x[i] - y[i]));
                    let weights = sums.iter().cycle();
                    errors
                        .zip(weights)
                        .map(|(e, &w)| e * e * f64::from(w))
                        .sum()
                };
                let ratio = cost(&with) / cost(&without);
                if name == stacked && matrix == unvisited && n_matrices == n_experts {
                    assert!(ratio > 0.9, "{name} {matrix}: {ratio} without a visit");
                } else {
                    assert!(ratio < 0.85, "{name} {matrix}: {ratio}");
                }
            }
        }
    }
}

#[test]
fn a_calibrated_recipe_by_its_types() {
    let types = |plan: &Plan| {
        let tensors = plan.parts.iter().flat_map(|part| &part.tensors);
        let matrices = tensors.filter(|t| t.ne.len() > 1);
        let types = matrices.map(|t| (t.name.clone(), t.block_type));
        types.collect::<BTreeMap<String, BlockType>>()
    };
    let plan = planned(&kjv());
    let imatrix = imatrix(statistics(&plan, 3));
    let types = types(&plan.calibrated(imatrix).unwrap());
    let of = |layer: u32, kind: &str| types[&format!("blk.{layer}.{kind}.weight")];
    for layer in 0..4 {
        assert_eq!(of(layer, "attn_q"), BlockType::Q4_K);
        assert_eq!(of(layer, "attn_k"), BlockType::Q5_K);
        assert_eq!(of(layer, "attn_v"), BlockType::Q6_K);
        assert_eq!(of(layer, "attn_output"), BlockType::Q5_K);
        assert_eq!(of(layer, "ffn_up"), BlockType::Q4_K);
        assert_eq!(of(layer, "ffn_down"), BlockType::Q5_K);
    }
    assert_eq!(of(2, "ffn_gate"), BlockType::Q4_K);
    assert_eq!(of(3, "ffn_gate"), BlockType::Q5_K);
    assert_eq!(types["token_embd.weight"], BlockType::Q6_K);
}

#[test]
fn statistics_of_another_model_are_refused() {
    let plan = planned(&kjv());
    let good = statistics(&plan, 3);
    let with = |change: &dyn Fn(&mut BTreeMap<String, ColumnStatistics>)| {
        let mut entries = good.clone();
        change(&mut entries);
        plan.clone().calibrated(imatrix(entries))
    };
    with(&|_| ()).unwrap();
    let name = "blk.1.ffn_down.weight";
    let text = refusal(with(&|e| e.get_mut(name).unwrap().sums.truncate(512)));
    assert!(
        text.contains(name) && text.contains("512 sums") && text.contains("768"),
        "{text}"
    );
    let text = refusal(with(&|e| {
        e.remove(name);
    }));
    assert!(text.contains("nothing of blk.1.ffn_down.weight"), "{text}");
    let text = refusal(with(&|e| {
        let entry = e[name].clone();
        e.insert("blk.4.ffn_down.weight".to_owned(), entry);
    }));
    assert!(
        text.contains("blk.4.ffn_down.weight") && text.contains("4 layers"),
        "{text}"
    );
    let text = refusal(with(&|e| {
        *e = BTreeMap::from([("blk.0.ssm_in.weight".to_owned(), e[name].clone())]);
    }));
    assert!(text.contains("nothing of this model's"), "{text}");
    for recipe in [Recipe::F32, Recipe::Bf16, Recipe::F16, Recipe::Q8_0] {
        let plan = vindex::plan(&LocalDir::open(&kjv()).unwrap(), recipe).unwrap();
        let text = refusal(plan.calibrated(imatrix(good.clone())));
        assert!(
            text.contains(recipe.name()) && text.contains("q4k"),
            "{text}"
        );
    }
    // What llama.cpp does not watch, and what we do not have, is no reason.
    let plain_warnings = plan.warnings.len();
    let calibrated = with(&|e| {
        e.remove("token_embd.weight");
        e.insert(
            "blk.0.ffn_gate_inp_shexp.weight".to_owned(),
            e[name].clone(),
        );
    });
    assert_eq!(calibrated.unwrap().warnings.len(), plain_warnings);
    let calibrated = with(&|e| e.retain(|name, _| !name.contains("attn_output"))).unwrap();
    let warning = calibrated.warnings.last().unwrap();
    assert!(
        warning.starts_with("4 matrices") && warning.contains("blk.0.attn_output"),
        "{warning}"
    );
}

#[test]
fn experts_that_nothing_visited_are_told() {
    let plan = planned(&checkpoint_dir("mixtral"));
    let mut entries = statistics(&plan, 3);
    for name in ["ffn_gate_exps", "ffn_up_exps"] {
        entries
            .get_mut(&format!("blk.0.{name}.weight"))
            .unwrap()
            .counts[3] = 0.0;
    }
    let imatrix = imatrix(entries);
    assert_eq!(imatrix.n_unseen(), 2);
    let calibrated = plan.calibrated(imatrix).unwrap();
    let warning = calibrated.warnings.last().unwrap();
    assert!(
        warning.starts_with("2 matrices of experts")
            && warning.contains("blk.0.ffn_gate_exps.weight[3]"),
        "{warning}"
    );
}

/// A source of which one file ends early.
struct Cut<'a>(&'a LocalDir);

impl Source for Cut<'_> {
    fn files(&self) -> Result<Vec<vindex::SourceFile>, SourceError> {
        self.0.files()
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        if offset_bytes > 3_000_000 {
            return Err("it was cut".into());
        }
        self.0.read_at(path, offset_bytes, buf)
    }

    fn fingerprint(&self) -> Result<String, SourceError> {
        self.0.fingerprint()
    }

    fn origin(&self) -> vindex::Origin {
        self.0.origin()
    }
}

/// What was begun with some weights goes on with the same weights only.
#[test]
fn weights_are_not_mixed_by_an_interruption() {
    let source = LocalDir::open(&kjv()).unwrap();
    let plain = planned(&kjv());
    let [one, other] = [3, 5].map(|seed| {
        let imatrix = imatrix(statistics(&plain, seed));
        plain.clone().calibrated(imatrix).unwrap()
    });
    let tmp = tempfile::tempdir().unwrap();
    let (out, whole) = (tmp.path().join("out"), tmp.path().join("whole"));
    run_plan(&Cut(&source), &one, &out, &OPTIONS).0.unwrap_err();
    for plan in [&other, &plain] {
        let error = run_plan(&source, plan, &out, &OPTIONS).0.unwrap_err();
        assert!(matches!(error, Error::OtherPlan { .. }), "{error}");
    }
    let id = extract_to(&source, &one, &out, 2);
    assert_eq!(id, extract_to(&source, &one, &whole, 2));
}

/// Without statistics nothing changes: a vindex is what it was.
#[test]
fn without_statistics_the_plan_is_the_recipe() {
    let tmp = tempfile::tempdir().unwrap();
    extracted("llama3", Recipe::Q4k, tmp.path());
    let vindex = Vindex::open(tmp.path()).unwrap();
    assert_eq!(vindex.index().calibration, None);
    for tensor in &vindex.index().tensors {
        assert_eq!(
            tensor.block_type,
            Recipe::Q4k.block_type(&tensor.name, &tensor.ne)
        );
    }
}

fn small() -> Imatrix {
    let entry = |n: usize, n_matrices: usize| ColumnStatistics {
        sums: (0..n * n_matrices).map(|i| i as f32 + 0.5).collect(),
        counts: (0..n_matrices).map(|i| 3.0 + i as f32).collect(),
    };
    let entries = [
        ("blk.0.attn_q.weight", 5, 1),
        ("blk.0.ffn_up_exps.weight", 3, 4),
    ];
    let entries = entries.map(|(name, n, k)| (name.to_owned(), entry(n, k)));
    let imatrix = Imatrix::new(BTreeMap::from(entries), 9, 512).unwrap();
    imatrix.of_datasets(vec!["some.txt".to_owned()])
}

/// The same statistics in llama.cpp's older form, with or without what follows the entries.
fn older(imatrix: &Imatrix, with_end: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let number = |bytes: &mut Vec<u8>, n: usize| bytes.extend((n as i32).to_le_bytes());
    number(&mut bytes, imatrix.entries().len());
    for (name, entry) in imatrix.entries() {
        number(&mut bytes, name.len());
        bytes.extend(name.as_bytes());
        number(&mut bytes, 2);
        number(&mut bytes, entry.sums.len());
        let n_cols = entry.sums.len() / entry.counts.len();
        for (i, sum) in entry.sums.iter().enumerate() {
            bytes.extend((sum / entry.counts[i / n_cols] * 2.0).to_le_bytes());
        }
    }
    if with_end {
        number(&mut bytes, 9);
        number(&mut bytes, 8);
        bytes.extend(b"some.txt");
    }
    bytes
}

#[test]
fn both_forms_of_llama_cpps_files_are_read() {
    let imatrix = small();
    let bytes = imatrix.to_bytes().unwrap();
    let read = Imatrix::from_bytes(&bytes).unwrap();
    assert_eq!(read, imatrix);
    assert_eq!((read.n_chunks(), read.chunk_tokens()), (9, 512));
    let header = read_header(&bytes).unwrap();
    let names: Vec<(&str, &[u64])> = header
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.ne.as_slice()))
        .collect();
    assert_eq!(
        names,
        [
            ("blk.0.attn_q.weight.in_sum2", [5, 1].as_slice()),
            ("blk.0.attn_q.weight.counts", &[1, 1]),
            ("blk.0.ffn_up_exps.weight.in_sum2", &[3, 4]),
            ("blk.0.ffn_up_exps.weight.counts", &[1, 4]),
        ]
    );
    for with_end in [false, true] {
        let read = Imatrix::from_bytes(&older(&imatrix, with_end)).unwrap();
        assert_eq!(read.n_chunks(), if with_end { 9 } else { 0 });
        for (name, entry) in imatrix.entries() {
            let got = &read.entries()[name];
            assert_eq!(got.counts, [2.0]);
            let n_cols = entry.sums.len() / entry.counts.len();
            for (i, (got, sum)) in got.sums.iter().zip(&entry.sums).enumerate() {
                assert!((got / 2.0 / (sum / entry.counts[i / n_cols]) - 1.0).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn what_is_no_file_of_statistics_says_why() {
    let bytes = small().to_bytes().unwrap();
    for cut in 0..bytes.len() - 32 {
        assert!(Imatrix::from_bytes(&bytes[..cut]).is_err(), "{cut}");
    }
    let bytes = older(&small(), false);
    for cut in 0..bytes.len() {
        assert!(Imatrix::from_bytes(&bytes[..cut]).is_err(), "{cut}");
    }
    let why = |bytes: &[u8]| Imatrix::from_bytes(bytes).unwrap_err();
    assert!(why(b"").contains("number of entries"));
    assert!(why(&[0xff; 64]).contains("-1 do not fit"));
    assert!(why(&i32::MAX.to_le_bytes().repeat(4)).contains("do not fit"));
    let tmp = tempfile::tempdir().unwrap();
    extracted("llama3", Recipe::F32, tmp.path());
    assert!(why(&first_part(tmp.path())).contains("general.type is not imatrix"));
    let entry = |sums: Vec<f32>, counts: Vec<f32>| {
        let entries = BTreeMap::from([("a".to_owned(), ColumnStatistics { sums, counts })]);
        Imatrix::new(entries, 1, 1)
    };
    assert!(entry(vec![1.0, 2.0, 3.0], vec![1.0, 1.0]).is_err());
    assert!(entry(vec![], vec![1.0]).is_err());
    assert!(entry(vec![1.0], vec![]).is_err());
    for wrong in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(entry(vec![1.0, wrong], vec![1.0]).is_err());
        assert!(entry(vec![1.0], vec![wrong]).is_err());
    }
    assert!(Imatrix::new(BTreeMap::new(), 1, 1).is_err());
    let path = tmp.path().join("none");
    assert!(matches!(Imatrix::read(&path), Err(Error::Io { .. })));
    std::fs::write(&path, "no").unwrap();
    let error = Imatrix::read(&path).unwrap_err();
    assert!(matches!(&error, Error::Imatrix { .. }), "{error}");
}

proptest! {
    #[test]
    fn damaged_files_do_no_harm(at in 0usize..400, bits in 1u8.., is_older: bool) {
        let mut bytes = if is_older { older(&small(), true) } else { small().to_bytes().unwrap() };
        let at = at % bytes.len();
        bytes[at] ^= bits;
        // Whatever it says, it ends, and in bounded memory.
        let _ = Imatrix::from_bytes(&bytes);
    }
}
