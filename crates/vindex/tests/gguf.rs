//! Models in GGUF as sources: what is kept, what is derived, and which files are refused.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use support::goldens::goldens;
use support::{OPTIONS, chain, extracted, run, run_plan};
use vindex::{
    Config, Error, Index, LocalDir, MetaArray, MetaValue, Plan, Recipe, Vindex, is_gguf, plan_gguf,
    verify,
};

/// A GGUF file as these tests write one: by the format's description, not by the code under test.
struct Gguf {
    metadata: Vec<(String, MetaValue)>,
    /// Name, shape with the row length first, number of the type, bytes.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    alignment: usize,
}

impl Gguf {
    /// The tensors of a vindex and the metadata of its first part.
    fn of(dir: &Path) -> Gguf {
        let vindex = Vindex::open(dir).unwrap();
        let metadata = vindex.metadata().unwrap();
        let tensors = vindex.index().tensors.iter().map(|t| {
            let bytes = vindex.tensor(&t.name).unwrap().bytes.to_vec();
            (t.name.clone(), t.ne.clone(), t.block_type.gguf_id(), bytes)
        });
        Gguf {
            metadata: metadata
                .iter()
                .filter(|(key, _)| !key.starts_with("split."))
                .cloned()
                .collect(),
            tensors: tensors.collect(),
            alignment: 32,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut b = b"GGUF".to_vec();
        b.extend(3u32.to_le_bytes());
        b.extend((self.tensors.len() as u64).to_le_bytes());
        b.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut b, key);
            put(&mut b, value);
        }
        let mut offset = 0;
        for (name, ne, id, bytes) in &self.tensors {
            text(&mut b, name);
            b.extend((ne.len() as u32).to_le_bytes());
            ne.iter().for_each(|n| b.extend(n.to_le_bytes()));
            b.extend(id.to_le_bytes());
            b.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(self.alignment);
        }
        for (_, _, _, bytes) in &self.tensors {
            b.resize(b.len().next_multiple_of(self.alignment), 0);
            b.extend(bytes);
        }
        b.resize(b.len().next_multiple_of(self.alignment), 0);
        b
    }

    fn set(&mut self, key: &str, value: MetaValue) -> &mut Gguf {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    fn write(&self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }
}

fn text(b: &mut Vec<u8>, text: &str) {
    b.extend((text.len() as u64).to_le_bytes());
    b.extend(text.as_bytes());
}

fn put(b: &mut Vec<u8>, value: &MetaValue) {
    let mut array = |id: u32, n: usize, bytes: Vec<u8>| {
        b.extend(9u32.to_le_bytes());
        b.extend(id.to_le_bytes());
        b.extend((n as u64).to_le_bytes());
        b.extend(bytes);
    };
    match value {
        MetaValue::Array(MetaArray::Strings(v)) => {
            let mut bytes = Vec::new();
            v.iter().for_each(|t| text(&mut bytes, t));
            array(8, v.len(), bytes);
        }
        MetaValue::Array(MetaArray::F32s(v)) => {
            array(6, v.len(), v.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        MetaValue::Array(MetaArray::I32s(v)) => {
            array(5, v.len(), v.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        MetaValue::Array(MetaArray::U16s(v)) => {
            array(2, v.len(), v.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        MetaValue::Array(MetaArray::Bools(v)) => {
            array(7, v.len(), v.iter().map(|&x| u8::from(x)).collect());
        }
        MetaValue::U32(v) => b.extend([4u32.to_le_bytes(), v.to_le_bytes()].concat()),
        MetaValue::F32(v) => b.extend([6u32.to_le_bytes(), v.to_le_bytes()].concat()),
        MetaValue::I32(v) => b.extend([5u32.to_le_bytes(), v.to_le_bytes()].concat()),
        MetaValue::U16(v) => {
            b.extend(2u32.to_le_bytes());
            b.extend(v.to_le_bytes());
        }
        MetaValue::Bool(v) => {
            b.extend(7u32.to_le_bytes());
            b.push(u8::from(*v));
        }
        MetaValue::String(v) => {
            b.extend(8u32.to_le_bytes());
            text(b, v);
        }
        other => panic!("these tests write no {other:?}"),
    }
}

fn planned(dir: &Path, file: Option<&str>) -> Result<Plan, Error> {
    plan_gguf(&LocalDir::open(dir).unwrap(), file)
}

fn index_of(dir: &Path) -> Index {
    Vindex::open(dir).unwrap().index().clone()
}

/// Extracts the model in `dir` into a new directory beside it.
fn kept(dir: &Path, file: Option<&str>, out: &Path) -> Index {
    let source = LocalDir::open(dir).unwrap();
    let plan = plan_gguf(&source, file).unwrap();
    run_plan(&source, &plan, out, &OPTIONS).0.unwrap();
    verify(out, &|_| ()).unwrap();
    index_of(out)
}

/// Tensors by name with all that a reader sees of them.
fn tensors(dir: &Path) -> BTreeMap<String, (String, Vec<u64>, Vec<u8>)> {
    let vindex = Vindex::open(dir).unwrap();
    let tensors = vindex.index().tensors.iter().map(|t| {
        let bytes = vindex.tensor(&t.name).unwrap().bytes.to_vec();
        (
            t.name.clone(),
            (t.block_type.to_string(), t.ne.clone(), bytes),
        )
    });
    tensors.collect()
}

/// A model's numbers without the tokens that end a text: GGUF has one of them, a checkpoint may list several.
fn without_ends(config: &Config) -> Config {
    Config {
        eos: Vec::new(),
        ..config.clone()
    }
}

#[test]
fn a_vindex_is_a_split_gguf_and_gives_the_same_files_again() {
    for golden in goldens() {
        let family = golden.family;
        for recipe in [Recipe::F32, Recipe::Q4k] {
            let tmp = tempfile::tempdir().unwrap();
            let (first, again) = (tmp.path().join("first"), tmp.path().join("again"));
            let source = LocalDir::open(&golden.model).unwrap();
            run(&source, recipe, &first, &OPTIONS).0.unwrap();
            assert!(is_gguf(&LocalDir::open(&first).unwrap()).unwrap());
            let (expected, got) = (index_of(&first), kept(&first, None, &again));
            assert_eq!(got.recipe, Recipe::Kept);
            assert_eq!(got.parts, expected.parts, "{family} {recipe}");
            assert_eq!(got.tensors, expected.tensors, "{family} {recipe}");
            assert_eq!(
                without_ends(&got.config),
                without_ends(&expected.config),
                "{family} {recipe}"
            );
            let ends = &got.config.eos;
            assert!(
                expected
                    .config
                    .eos
                    .first()
                    .is_none_or(|eos| ends.contains(eos))
            );
        }
    }
}

#[test]
fn one_file_in_any_order_and_alignment_gives_the_same_tensors() {
    for (family, alignment) in [
        ("llama3", 32),
        ("gemma3", 64),
        ("qwen3_moe", 8),
        ("mixtral", 32),
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let (first, one) = (tmp.path().join("first"), tmp.path().join("one"));
        extracted(family, Recipe::Q4k, &first);
        fs::create_dir(&one).unwrap();
        let mut file = Gguf::of(&first);
        file.tensors.reverse();
        file.alignment = alignment;
        if alignment != 32 {
            file.set("general.alignment", MetaValue::U32(alignment as u32));
        }
        file.set("general.name", MetaValue::String("A name".to_owned()));
        // A kind of array that our own parts never have.
        file.set(
            "general.numbers",
            MetaValue::Array(MetaArray::U16s(vec![1, 2])),
        );
        file.write(&one.join("Some Model.Q4_K_M.gguf"));
        // Neither is a model.
        fs::write(one.join("mmproj-F16.gguf"), "GGUF").unwrap();
        fs::write(one.join("imatrix.gguf"), "GGUF").unwrap();
        let out = tmp.path().join("out");
        let got = kept(&one, None, &out);
        assert_eq!(got.stem, "Some-Model.Q4_K_M");
        assert_eq!(got.name, "A name");
        assert_eq!(
            without_ends(&got.config),
            without_ends(&index_of(&first).config)
        );
        assert_eq!(tensors(&out), tensors(&first), "{family}");
        let metadata = Vindex::open(&out).unwrap().metadata().unwrap();
        let keys: Vec<&str> = metadata.iter().map(|(key, _)| key.as_str()).collect();
        assert!(keys.contains(&"general.numbers") && !keys.contains(&"general.alignment"));
        let left_out = planned(&one, None).unwrap().left_out;
        let left_out: Vec<&str> = left_out.iter().map(|l| l.tensor.as_str()).collect();
        assert_eq!(left_out, ["imatrix.gguf", "mmproj-F16.gguf"]);
    }
}

#[test]
fn among_several_models_one_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let (first, dir) = (tmp.path().join("first"), tmp.path().join("dir"));
    extracted("llama", Recipe::Q8_0, &first);
    fs::create_dir(&dir).unwrap();
    let file = Gguf::of(&first);
    for name in ["m-Q8_0.gguf", "m-Q4_0.gguf"] {
        file.write(&dir.join(name));
    }
    let error = planned(&dir, None).unwrap_err().to_string();
    assert_eq!(
        error,
        "the source has 2 models in GGUF: m-Q4_0.gguf, m-Q8_0.gguf; name one of them"
    );
    assert_eq!(planned(&dir, Some("m-Q8_0.gguf")).unwrap().stem, "m-Q8_0");
    let error = planned(&dir, Some("m-Q2_K.gguf")).unwrap_err().to_string();
    assert!(error.starts_with("m-Q2_K.gguf is missing"), "{error}");
    // A split model is one, by whichever of its files it is named, and lacks none of them.
    let parts = tmp.path().join("first");
    let names = index_of(&parts).parts;
    let plan = planned(&parts, Some(&names[3].file)).unwrap();
    assert_eq!(plan.stem, "llama-q8_0");
    fs::remove_file(parts.join(&names[2].file)).unwrap();
    let error = planned(&parts, None).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("{} is missing", names[2].file)),
        "{error}"
    );
}

/// What llama.cpp assumes where a file is silent.
#[test]
fn absent_keys_have_the_values_of_llama_cpp() {
    let tmp = tempfile::tempdir().unwrap();
    let config = |family: &str, change: &dyn Fn(&mut Gguf)| {
        let dir = tempfile::tempdir_in(tmp.path()).unwrap();
        let (first, one) = (dir.path().join("first"), dir.path().join("one"));
        extracted(family, Recipe::Q8_0, &first);
        fs::create_dir(&one).unwrap();
        let mut file = Gguf::of(&first);
        change(&mut file);
        file.write(&one.join("m.gguf"));
        planned(&one, None).map(|plan| plan.config)
    };
    let drop = |file: &mut Gguf, keys: &[&str]| {
        file.metadata
            .retain(|(key, _)| !keys.iter().any(|k| key.ends_with(k)));
    };
    let gemma2 = config("gemma2", &|file| {
        drop(file, &["sliding_window", "_softcapping", "freq_base"]);
    })
    .unwrap();
    assert_eq!(gemma2.logit_softcap, Some(30.0));
    assert_eq!(gemma2.attention.softcap, Some(50.0));
    let window = gemma2.attention.sliding_window.unwrap();
    assert_eq!((window.n_tokens, window.layers), (4096, vec![true, false]));
    assert_eq!(
        (gemma2.rope.base, gemma2.rope.base_sliding),
        (10_000.0, None)
    );

    let gemma3 = config("gemma3", &|file| {
        drop(file, &["sliding_window", "freq_base_swa"]);
        file.set("gemma3.attention.sliding_window", MetaValue::U32(512));
    })
    .unwrap();
    assert_eq!(gemma3.rope.base_sliding, Some(10_000.0));
    let window = gemma3.attention.sliding_window.unwrap();
    assert_eq!(window.layers, [true, true, true, true, true, false]);
    let gemma3 = config("gemma3", &|file| drop(file, &["sliding_window"])).unwrap();
    assert_eq!(gemma3.attention.sliding_window, None);

    let llama = config("llama", &|file| {
        drop(
            file,
            &[
                "head_count_kv",
                "key_length",
                "value_length",
                "dimension_count",
            ],
        );
        file.set("llama.attention.head_count_kv", MetaValue::U32(2));
        file.set("llama.rope.scaling.factor", MetaValue::F32(4.0));
        let ends = "tokenizer.ggml.eot_token_id";
        file.set(ends, MetaValue::U32(7));
    })
    .unwrap();
    assert_eq!(llama.attention.key_length, 64);
    assert_eq!(
        llama.rope.scaling,
        Some(vindex::RopeScaling::Linear { factor: 4.0 })
    );
    assert!(llama.eos.contains(&7));

    let refused = |family: &str, key: &str, value: MetaValue| {
        let error = config(family, &|file| {
            file.set(key, value.clone());
        });
        let told = chain(&error.unwrap_err());
        // Not the list of all families.
        told.split("; known are").next().unwrap().to_owned()
    };
    let text = |t: &str| MetaValue::String(t.to_owned());
    let told = [
        refused("llama", "llama.residual_scale", MetaValue::F32(2.0)),
        refused("llama", "llama.rope.scaling.type", text("longrope")),
        refused("llama", "general.architecture", text("rwkv7")),
        refused("llama", "llama.attention.head_count_kv", MetaValue::U32(3)),
        refused("llama", "llama.block_count", MetaValue::U32(3)),
        refused("llama", "llama.block_count", MetaValue::F32(2.0)),
        refused("llama", "llama.embedding_length", MetaValue::U32(128)),
        refused("mixtral", "llama.expert_gating_func", MetaValue::U32(3)),
        refused(
            "qwen3",
            "qwen3.attention.sliding_window",
            MetaValue::U32(64),
        ),
        refused(
            "llama",
            "tokenizer.ggml.tokens",
            MetaValue::Array(MetaArray::Strings(vec!["a".to_owned()])),
        ),
    ];
    insta::assert_snapshot!(told.join("\n"));
}

/// A small model in one file, in a directory of its own.
fn model(change: impl Fn(&mut Gguf)) -> (tempfile::TempDir, PathBuf) {
    let tmp = tempfile::tempdir().unwrap();
    let (first, one) = (tmp.path().join("first"), tmp.path().join("one"));
    extracted("llama", Recipe::Q8_0, &first);
    fs::create_dir(&one).unwrap();
    let mut file = Gguf::of(&first);
    change(&mut file);
    file.write(&one.join("m.gguf"));
    (tmp, one)
}

#[test]
fn what_cannot_be_is_refused() {
    let told = |change: &dyn Fn(&mut Gguf)| {
        let (_tmp, dir) = model(change);
        chain(&planned(&dir, None).unwrap_err())
    };
    let told = [
        told(&|file| file.tensors[0].2 = 10),
        told(&|file| file.tensors[0].2 = 99),
        told(&|file| file.tensors[1].0 = file.tensors[0].0.clone()),
        told(&|file| file.tensors[0].1 = vec![0, 512]),
        told(&|file| file.tensors[0].1 = vec![u64::MAX, 512]),
        // Shorter than what it says, so that the next one begins within it.
        told(&|file| file.tensors[0].3.truncate(64)),
        told(&|file| file.tensors.last_mut().unwrap().3.truncate(64)),
        told(&|file| file.metadata.push(file.metadata[0].clone())),
        told(&|file| {
            file.set("general.alignment", MetaValue::U32(24));
        }),
        told(&|file| {
            file.set("split.count", MetaValue::U16(2));
        }),
        told(&|file| {
            let extra = (
                "blk.0.attn_sinks.weight".to_owned(),
                vec![4],
                0,
                vec![0; 16],
            );
            file.tensors.push(extra);
        }),
        told(&|file| {
            let extra = (
                "blk.0.ffn_gate.0.weight".to_owned(),
                vec![4],
                0,
                vec![0; 16],
            );
            file.tensors.push(extra);
        }),
    ];
    insta::assert_snapshot!(told.join("\n"));
}

#[test]
fn a_scale_that_is_no_number_is_found() {
    let (tmp, dir) = model(|file| {
        let (name, _, _, bytes) = &mut file.tensors[0];
        assert_eq!(name, "token_embd.weight");
        bytes[34..36].copy_from_slice(&0x7e00u16.to_le_bytes());
    });
    let source = LocalDir::open(&dir).unwrap();
    let plan = plan_gguf(&source, None).unwrap();
    let out = tmp.path().join("out");
    let error = run_plan(&source, &plan, &out, &OPTIONS).0.unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite { tensor, count: 32, .. } if tensor == "token_embd.weight"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A damaged header is an error or another model, never a panic, and takes no memory that is not there.
    #[test]
    fn damaged_headers_are_refused_or_read(
        flips in prop::collection::vec((0usize..40_000, 0u8..8), 0..4),
        cut in prop::option::of(0usize..60_000),
    ) {
        static MODEL: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let whole = MODEL.get_or_init(|| {
            let (_tmp, dir) = model(|_| ());
            fs::read(dir.join("m.gguf")).unwrap()
        });
        let mut bytes = whole.clone();
        for (at, bit) in flips {
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("m.gguf"), bytes).unwrap();
        let _ = planned(tmp.path(), None);
    }
}
