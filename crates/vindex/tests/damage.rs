//! A vindex that is not what it says: what `open` and `verify` find, and what they say then.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use proptest::prelude::*;
use support::goldens::goldens;
use support::{copy_dir, extracted, extracted_from, flip};
use vindex::{Error, Index, Recipe, Vindex, Wrong, WrongPart, read_header, verify};

/// The wrong parts of a damaged vindex, as text.
fn damage(dir: &Path) -> Vec<String> {
    let error = verify(dir, &|_| ()).unwrap_err();
    let Error::Damaged { wrong, .. } = &error else {
        panic!("{error}")
    };
    for part in wrong {
        assert!(error.to_string().contains(&part.to_string()), "{error}");
    }
    let without_hash = |part: &WrongPart| {
        let mut part = part.clone();
        if let Wrong::Sha256 { expected, got } = &mut part.what {
            *expected = "(as recorded)".to_owned();
            *got = "(another)".to_owned();
        }
        part.to_string()
    };
    wrong.iter().map(without_hash).collect()
}

/// One flipped bit is found in whichever part, wherever in it; only that part is blamed.
#[test]
fn a_flipped_bit_is_found_in_every_part() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("llama");
    extracted("llama", Recipe::Q4k, &dir);
    let index = Vindex::open(&dir).unwrap().index().clone();
    for part in &index.parts {
        let path = dir.join(&part.file);
        for at in [0, part.size_bytes / 2, part.size_bytes - 1] {
            flip(&path, at);
            let error = verify(&dir, &|_| ()).unwrap_err();
            let Error::Damaged { wrong, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(
                wrong
                    .iter()
                    .map(|part| part.file.as_str())
                    .collect::<Vec<_>>(),
                [part.file.as_str()]
            );
            assert!(
                matches!(&wrong[0].what, Wrong::Sha256 { expected, .. } if *expected == part.sha256),
                "{error}"
            );
            flip(&path, at);
        }
    }
    verify(&dir, &|_| ()).unwrap();
}

/// Each kind of damage, all in one directory, all told at once.
#[test]
fn every_wrong_part_is_told() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("qwen2");
    extracted("qwen2", Recipe::Q4k, &dir);
    let part = |n: usize| dir.join(format!("qwen2-q4k-{n:05}-of-00006.gguf"));
    flip(&part(1), 40);
    fs::remove_file(part(2)).unwrap();
    File::options()
        .write(true)
        .open(part(3))
        .unwrap()
        .set_len(1000)
        .unwrap();
    File::options()
        .append(true)
        .open(part(5))
        .unwrap()
        .write_all(b"more")
        .unwrap();
    // Two parts of equal length, swapped.
    let (a, b) = (fs::read(part(4)).unwrap(), fs::read(part(6)).unwrap());
    assert_eq!(a.len(), b.len());
    fs::write(part(4), b).unwrap();
    fs::write(part(6), a).unwrap();
    insta::assert_snapshot!(damage(&dir).join("\n"), @r"
    qwen2-q4k-00001-of-00006.gguf: sha256 (another), expected (as recorded)
    qwen2-q4k-00002-of-00006.gguf: missing; damaged tensors: token_embd.weight, output_norm.weight
    qwen2-q4k-00003-of-00006.gguf: 1000 bytes, expected 100576; damaged tensors: blk.0.attn_norm.weight to blk.0.ffn_norm.weight (9 in all)
    qwen2-q4k-00004-of-00006.gguf: sha256 (another), expected (as recorded); damaged tensors: blk.0.ffn_gate.weight, blk.0.ffn_up.weight, blk.0.ffn_down.weight
    qwen2-q4k-00005-of-00006.gguf: 100580 bytes, expected 100576; damaged tensors: blk.1.attn_norm.weight to blk.1.ffn_norm.weight (9 in all)
    qwen2-q4k-00006-of-00006.gguf: sha256 (another), expected (as recorded); damaged tensors: blk.1.ffn_gate.weight, blk.1.ffn_up.weight, blk.1.ffn_down.weight
    ");

    // Opening hashes nothing; it sees what lengths tell.
    let error = Vindex::open(&dir).unwrap_err();
    let Error::Damaged { wrong, .. } = &error else {
        panic!("{error}")
    };
    let seen: Vec<(&str, bool)> = wrong
        .iter()
        .map(|part| (&part.file[10..15], matches!(part.what, Wrong::Missing)))
        .collect();
    assert_eq!(seen, [("00002", true), ("00003", false), ("00005", false)]);
}

/// Damage to stacked experts is told by expert.
#[test]
fn a_damaged_expert_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("mixtral");
    extracted("mixtral", Recipe::Q4k, &dir);
    let index = Vindex::open(&dir).unwrap().index().clone();
    let tensor = |name: &str| {
        index
            .tensors
            .iter()
            .find(|tensor| tensor.name == name)
            .unwrap()
    };
    let (up, down) = (
        tensor("blk.0.ffn_up_exps.weight"),
        tensor("blk.0.ffn_down_exps.weight"),
    );
    let path = dir.join(&index.parts[up.part as usize].file);
    flip(&path, up.offset_bytes + up.size_bytes / 4 * 2);
    flip(&path, down.offset_bytes + down.size_bytes - 1);
    insta::assert_snapshot!(damage(&dir).join("\n"), @"mixtral-q4k-00004-of-00004.gguf: sha256 (another), expected (as recorded); damaged tensors: blk.0.ffn_up_exps.weight[2], blk.0.ffn_down_exps.weight[3]");
}

/// The index may lie about what is in a part although the part's hash is right.
#[test]
fn an_index_that_disagrees_with_a_header_is_found() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("llama");
    extracted("llama", Recipe::Q8_0, &dir);
    let text = fs::read_to_string(dir.join("index.json")).unwrap();
    let (gate, up) = ("\"blk.1.ffn_gate.weight\"", "\"blk.1.ffn_up.weight\"");
    let swapped = text
        .replace(gate, "\"?\"")
        .replace(up, gate)
        .replace("\"?\"", up);
    fs::write(dir.join("index.json"), swapped).unwrap();
    insta::assert_snapshot!(damage(&dir).join("\n"), @"llama-q8_0-00006-of-00006.gguf: its header disagrees with the index (tensor blk.1.ffn_gate.weight Q8_0 [256, 256] at 288, expected blk.1.ffn_up.weight Q8_0 [256, 256] at 288); damaged tensors: blk.1.ffn_up.weight, blk.1.ffn_gate.weight, blk.1.ffn_down.weight");
}

/// What is not a vindex, or not one that can be read, is told by name.
#[test]
fn an_index_of_more_layers_than_parts_is_refused() {
    let mut index: serde_json::Value = serde_json::from_slice(sample_index()).unwrap();
    index["config"]["n_layers"] = serde_json::json!(u32::MAX);
    let error = Index::from_json(index.to_string().as_bytes()).unwrap_err();
    assert!(error.contains("4294967295 layers in"), "{error}");
}

#[test]
fn what_is_no_vindex_says_why() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = tmp.path().join("whole");
    extracted("qwen2", Recipe::Q4k, &whole);
    let text = fs::read_to_string(whole.join("index.json")).unwrap();
    let mut said = String::new();
    let mut case = |what: &str, file: &str, content: Option<String>| {
        let dir = tmp.path().join("case");
        let _ = fs::remove_dir_all(&dir);
        copy_dir(&whole, &dir);
        match content {
            Some(content) => fs::write(dir.join(file), content).unwrap(),
            None => fs::remove_file(dir.join(file)).unwrap(),
        }
        let error = Vindex::open(&dir).unwrap_err();
        let verified = verify(&dir, &|_| ()).unwrap_err();
        assert_eq!(error.to_string(), verified.to_string());
        said += &format!(
            "{what}:\n  {}\n",
            error.to_string().replace(&dir.display().to_string(), "DIR")
        );
    };
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        Some(text.replacen(from, to, 1))
    };
    case("no index", "index.json", None);
    case("no slice", "slice.json", None);
    case(
        "unknown slice",
        "slice.json",
        Some("{\"slice\":\"half\"}".to_owned()),
    );
    case("not JSON", "index.json", Some("GGUF".to_owned()));
    case(
        "cut off",
        "index.json",
        Some(text[..text.len() / 2].to_owned()),
    );
    case("another format", "index.json", with("vindex/1", "vindex/2"));
    case(
        "unknown field",
        "index.json",
        with("\"name\":", "\"extra\":1,\n\"name\":"),
    );
    case(
        "path as a stem",
        "index.json",
        Some(text.replace("qwen2-q4k", "../../etc/qwen2-q4k")),
    );
    case(
        "path as a file",
        "index.json",
        with("\"qwen2-q4k-00002-of-00006.gguf\"", "\"/etc/passwd\""),
    );
    case(
        "part beyond the last",
        "index.json",
        with("\"part\":5", "\"part\":6"),
    );
    case(
        "size overflows",
        "index.json",
        with("\"ne\":[256,512]", "\"ne\":[256,18446744073709551615]"),
    );
    case(
        "no dimension",
        "index.json",
        with("\"ne\":[256,512]", "\"ne\":[]"),
    );
    case(
        "nothing in a dimension",
        "index.json",
        with("\"ne\":[256,512]", "\"ne\":[256,0]"),
    );
    case(
        "unaligned",
        "index.json",
        with("\"offset_bytes\":", "\"offset_bytes\":1"),
    );
    case(
        "hash",
        "index.json",
        with("\"sha256\":\"", "\"sha256\":\"X"),
    );
    case(
        "name twice",
        "index.json",
        with("\"blk.1.attn_k.weight\"", "\"blk.0.attn_k.weight\""),
    );
    insta::assert_snapshot!(said.trim_end());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to an index, reading it ends with a sound index or with a sentence.
    #[test]
    fn a_hostile_index_never_panics(edits in prop::collection::vec((any::<prop::sample::Index>(), edit()), 1..4)) {
        let mut text = sample_index().to_vec();
        for (at, edit) in edits {
            edit.apply(at.index(text.len()), &mut text);
        }
        if let Ok(index) = Index::from_json(&text) {
            for tensor in &index.tensors {
                let part = &index.parts[tensor.part as usize];
                prop_assert!(tensor.offset_bytes.checked_add(tensor.size_bytes).unwrap() <= part.size_bytes);
                prop_assert!(!part.file.contains('/') && !part.file.contains('\\'));
            }
        }
    }

    /// Whatever is done to a GGUF header, reading it ends with a header or with a sentence.
    #[test]
    fn a_hostile_header_never_panics(edits in prop::collection::vec((any::<prop::sample::Index>(), edit()), 1..4)) {
        let mut bytes = sample_header().to_vec();
        for (at, edit) in edits {
            edit.apply(at.index(bytes.len()), &mut bytes);
        }
        let _ = read_header(&bytes);
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Byte(u8),
    Cut(usize),
    Insert(Vec<u8>),
    Truncate,
}

fn edit() -> impl Strategy<Value = Edit> {
    let numbers = [
        "18446744073709551615",
        "-1",
        "1e300",
        "null",
        "0",
        "\"\"",
        "[]",
        "9999999999999999999999",
    ];
    prop_oneof![
        any::<u8>().prop_map(Edit::Byte),
        (1usize..40).prop_map(Edit::Cut),
        prop::sample::select(numbers.to_vec())
            .prop_map(|text| Edit::Insert(text.as_bytes().to_vec())),
        prop::collection::vec(any::<u8>(), 1..9).prop_map(Edit::Insert),
        Just(Edit::Truncate),
    ]
}

impl Edit {
    fn apply(self, at: usize, bytes: &mut Vec<u8>) {
        match self {
            Edit::Byte(byte) => bytes[at] = byte,
            Edit::Cut(n) => drop(bytes.drain(at..(at + n).min(bytes.len()))),
            Edit::Insert(new) => drop(bytes.splice(at..at, new)),
            Edit::Truncate => bytes.truncate(at.max(1)),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

fn sample() -> &'static (Vec<u8>, Vec<u8>) {
    static SAMPLE: std::sync::OnceLock<(Vec<u8>, Vec<u8>)> = std::sync::OnceLock::new();
    SAMPLE.get_or_init(|| {
        let tmp = tempfile::tempdir().unwrap();
        extracted("mixtral", Recipe::Q4k, tmp.path());
        let part = fs::read(tmp.path().join("mixtral-q4k-00003-of-00004.gguf")).unwrap();
        (
            fs::read(tmp.path().join("index.json")).unwrap(),
            part[..600].to_vec(),
        )
    })
}

fn sample_index() -> &'static [u8] {
    &sample().0
}

fn sample_header() -> &'static [u8] {
    &sample().1
}

/// The families' own checkpoints are sound, so that the tests above damage something whole.
#[test]
fn every_family_verifies() {
    for golden in goldens() {
        let tmp = tempfile::tempdir().unwrap();
        let id = extracted_from(&golden.model, Recipe::Q4k, tmp.path());
        let verified = verify(tmp.path(), &|_| ()).unwrap();
        assert_eq!(verified.id, id, "{}", golden.family);
    }
}
