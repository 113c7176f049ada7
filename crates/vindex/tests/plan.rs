//! Plans at the seam: a checkpoint's files in, tensors and metadata out, held against what llama.cpp's converter
//! makes of the same files (`fixtures/gguf`); and files that lie.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vindex::{
    Checkpoint, Component, Error, LocalDir, MetaArray, MetaValue, Origin, Plan, PlannedTensor,
    Recipe, RopeScaling, Source, SourceError, SourceFile, Transform, Values, plan,
};

const FAMILIES: [&str; 9] = [
    "gemma2",
    "gemma3",
    "llama",
    "llama3",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
];

/// The converter derives these from the name of a directory or of an upstream repository; ours is the model's name.
const NAMED_BY_DIRECTORY: [&str; 4] = [
    "general.name",
    "general.organization",
    "general.finetune",
    "general.basename",
];

/// Keys of ours that the converter does not write and llama.cpp does not read: the window that it drops for the
/// architecture `llama`, and the original tokenizer for readers that have no use for GGUF's form.
const OURS: [&str; 2] = [
    "llama.attention.sliding_window",
    "tokenizer.huggingface.json",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn checkpoint_dir(family: &str) -> PathBuf {
    repository().join("fixtures/models").join(family)
}

fn plan_of(dir: &Path, recipe: Recipe) -> Result<Plan, Error> {
    plan(&LocalDir::open(dir)?, recipe)
}

fn golden(family: &str) -> Value {
    let text = fs::read_to_string(
        repository()
            .join("fixtures/gguf")
            .join(family)
            .with_extension("json"),
    )
    .unwrap();
    serde_json::from_str(&text).unwrap()
}

fn tensors(plan: &Plan) -> impl Iterator<Item = &PlannedTensor> {
    plan.parts.iter().flat_map(|p| &p.tensors)
}

#[test]
fn tensors_are_those_of_the_converter() {
    for family in FAMILIES {
        let plan = plan_of(&checkpoint_dir(family), Recipe::F32).unwrap();
        let ours: BTreeMap<&str, Value> = tensors(&plan)
            .map(|t| (t.name.as_str(), json!([t.ne, t.block_type.name()])))
            .collect();
        let golden = golden(family);
        let theirs: BTreeMap<&str, Value> = golden["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| (t["name"].as_str().unwrap(), json!([t["ne"], t["type"]])))
            .collect();
        assert_eq!(ours, theirs, "{family}");
        assert_eq!(
            tensors(&plan).count(),
            theirs.len(),
            "{family}: a tensor comes twice"
        );
    }
}

#[test]
fn metadata_is_that_of_the_converter() {
    for family in FAMILIES {
        let plan = plan_of(&checkpoint_dir(family), Recipe::F32).unwrap();
        let golden = golden(family);
        let theirs: BTreeMap<&str, Value> = golden["metadata"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(key, _)| !NAMED_BY_DIRECTORY.contains(&key.as_str()))
            .map(|(key, value)| (key.as_str(), value.clone()))
            .collect();
        let ours: BTreeMap<&str, Value> = plan
            .metadata
            .iter()
            .map(|(key, value)| (key.as_str(), described(value)))
            .filter(|(key, _)| !NAMED_BY_DIRECTORY.contains(key) && !OURS.contains(key))
            .collect();
        for (key, value) in &theirs {
            assert_eq!(ours.get(key), Some(value), "{family}: {key}");
        }
        let extra: Vec<_> = ours
            .keys()
            .filter(|key| !theirs.contains_key(*key))
            .collect();
        assert_eq!(
            extra,
            Vec::<&&str>::new(),
            "{family}: keys the converter does not write"
        );
        let keys: BTreeSet<&str> = plan.metadata.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(
            keys.len(),
            plan.metadata.len(),
            "{family}: a key comes twice"
        );
    }
}

/// A value as the golden files describe it: arrays by length and by the sha256 of their canonical JSON.
fn described(value: &MetaValue) -> Value {
    let array = |elem: &str, len: usize, text: String| {
        let sha256: String = Sha256::digest(text)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        json!({"type": "ARRAY", "elem": elem, "len": len, "sha256_canonical_json": sha256})
    };
    match value {
        MetaValue::U32(n) => json!({"type": "UINT32", "value": n}),
        MetaValue::F32(n) => json!({"type": "FLOAT32", "value": f64::from(*n)}),
        MetaValue::Bool(b) => json!({"type": "BOOL", "value": b}),
        MetaValue::String(s) => json!({"type": "STRING", "value": s}),
        MetaValue::Array(MetaArray::Strings(v)) => {
            array("STRING", v.len(), serde_json::to_string(v).unwrap())
        }
        MetaValue::Array(MetaArray::I32s(v)) => {
            array("INT32", v.len(), serde_json::to_string(v).unwrap())
        }
        MetaValue::Array(MetaArray::F32s(v)) => {
            let doubles: Vec<f64> = v.iter().map(|&x| x.into()).collect();
            array("FLOAT32", v.len(), serde_json::to_string(&doubles).unwrap())
        }
        other => panic!("no golden has {other:?}"),
    }
}

#[test]
fn rope_factors_are_those_of_the_converter() {
    let plan = plan_of(&checkpoint_dir("llama3"), Recipe::Q4k).unwrap();
    assert_eq!(
        plan.config.rope.scaling,
        Some(RopeScaling::FrequencyFactors)
    );
    let planned = tensors(&plan)
        .find(|t| t.name == "rope_freqs.weight")
        .unwrap();
    let Values::Computed { values } = &planned.values else {
        panic!("{planned:?}")
    };
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let sha256: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let golden = golden("llama3");
    let theirs = golden["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .find(|t| t["name"] == "rope_freqs.weight")
        .unwrap();
    assert_eq!(json!(sha256), theirs["sha256_f32"]);
}

#[test]
fn quirks_of_the_families_become_numbers_and_transforms() {
    let of = |family: &str| plan_of(&checkpoint_dir(family), Recipe::F32).unwrap();
    let transform =
        |plan: &Plan, name: &str| match &tensors(plan).find(|t| t.name == name).unwrap().values {
            Values::Checkpoint { transform, .. } => *transform,
            computed => panic!("{computed:?}"),
        };
    let llama = of("llama");
    assert_eq!(
        transform(&llama, "blk.1.attn_q.weight"),
        Transform::InterleaveRope { n_heads: 4 }
    );
    assert_eq!(
        transform(&llama, "blk.1.attn_k.weight"),
        Transform::InterleaveRope { n_heads: 2 }
    );
    assert_eq!(transform(&llama, "blk.1.attn_v.weight"), Transform::None);
    assert_eq!(
        transform(&of("qwen2"), "blk.0.attn_q.bias"),
        Transform::None
    );

    let gemma3 = of("gemma3");
    for norm in ["output_norm", "blk.5.attn_q_norm", "blk.0.post_ffw_norm"] {
        assert_eq!(
            transform(&gemma3, &format!("{norm}.weight")),
            Transform::AddOne
        );
    }
    let window = gemma3.config.attention.sliding_window.unwrap();
    assert_eq!(
        (window.n_tokens, window.layers),
        (8, vec![true, true, true, true, true, false])
    );
    assert_eq!(gemma3.config.rope.base_sliding, Some(10_000.0));
    assert_eq!(gemma3.config.eos, [1, 7]);

    let gemma2 = of("gemma2").config;
    assert_eq!(
        gemma2.attention.sliding_window.unwrap().layers,
        [true, false]
    );
    assert_eq!(
        (gemma2.attention.softcap, gemma2.logit_softcap),
        (Some(50.0), Some(30.0))
    );
    assert_eq!(
        (gemma2.embedding_scale, gemma2.attention.scale),
        (16.0, 0.125)
    );

    let mistral = of("mistral");
    assert_eq!(
        mistral
            .config
            .attention
            .sliding_window
            .as_ref()
            .unwrap()
            .layers,
        [true, true]
    );
    assert!(mistral.metadata.contains(&(
        "llama.attention.sliding_window".to_owned(),
        MetaValue::U32(8)
    )));
    assert_eq!(mistral.warnings.len(), 1, "{:?}", mistral.warnings);

    let moe = of("qwen3_moe").config;
    let experts = moe.experts.unwrap();
    assert_eq!(
        (experts.n, experts.n_used, experts.ffn, experts.normalise),
        (4, 2, 256, true)
    );
}

#[test]
fn experts_are_stacked_in_their_order() {
    let plan = plan_of(&checkpoint_dir("mixtral"), Recipe::Q4k).unwrap();
    let down = tensors(&plan)
        .find(|t| t.name == "blk.0.ffn_down_exps.weight")
        .unwrap();
    let Values::Checkpoint { tensors, .. } = &down.values else {
        panic!("{down:?}")
    };
    let expected: Vec<String> = (0..4)
        .map(|e| format!("model.layers.0.block_sparse_moe.experts.{e}.w2.weight"))
        .collect();
    assert_eq!(tensors, &expected);
    assert_eq!(
        (down.ne.as_slice(), down.block_type.name()),
        ([256, 256, 4].as_slice(), "Q6_K")
    );
}

#[test]
fn the_plan_of_the_trained_model() {
    let plan = plan_of(&repository().join("models/kjv"), Recipe::Q4k).unwrap();
    insta::assert_snapshot!(described_plan(&plan));
}

fn described_plan(plan: &Plan) -> String {
    let mut text = format!(
        "{}\n{}\n",
        plan.stem,
        serde_json::to_string_pretty(&plan.config).unwrap()
    );
    for (key, value) in &plan.metadata {
        let value = match value {
            MetaValue::String(s) if s.len() > 60 => format!("string of {} bytes", s.len()),
            MetaValue::Array(MetaArray::Strings(v)) => format!("{} strings", v.len()),
            MetaValue::Array(MetaArray::I32s(v)) => format!("{} i32", v.len()),
            short => format!("{short:?}"),
        };
        writeln!(text, "{key} = {value}").unwrap();
    }
    for (index, part) in plan.parts.iter().enumerate() {
        writeln!(text, "part {} {:?}", index + 1, part.component).unwrap();
        for t in &part.tensors {
            writeln!(text, "  {} {:?} {}", t.name, t.ne, t.block_type).unwrap();
        }
    }
    for left in &plan.left_out {
        writeln!(text, "left out {}: {}", left.tensor, left.reason).unwrap();
    }
    for warning in &plan.warnings {
        writeln!(text, "warning: {warning}").unwrap();
    }
    text
}

#[test]
fn every_recipe_keeps_vectors_and_routers_and_falls_back_where_rows_do_not_fit() {
    let types = |recipe: Recipe, family: &str| -> BTreeMap<String, &'static str> {
        let plan = plan_of(&checkpoint_dir(family), recipe).unwrap();
        tensors(&plan)
            .map(|t| (t.name.clone(), t.block_type.name()))
            .collect()
    };
    let gemma3 = types(Recipe::Q4k, "gemma3");
    assert_eq!(gemma3["token_embd.weight"], "Q8_0", "rows of 96");
    assert_eq!(gemma3["blk.0.attn_output.weight"], "Q8_0", "rows of 128");
    assert_eq!(gemma3["blk.0.ffn_down.weight"], "Q6_K", "rows of 256");
    let moe = types(Recipe::Q4k, "qwen3_moe");
    assert_eq!(moe["blk.0.ffn_gate_inp.weight"], "F32");
    assert_eq!(moe["blk.0.ffn_gate_exps.weight"], "Q4_K");
    for (recipe, matrix) in [
        (Recipe::Bf16, "BF16"),
        (Recipe::F16, "F16"),
        (Recipe::Q8_0, "Q8_0"),
    ] {
        let qwen2 = types(recipe, "qwen2");
        assert_eq!(
            (qwen2["blk.0.attn_k.weight"], qwen2["blk.0.attn_k.bias"]),
            (matrix, "F32")
        );
        assert_eq!(qwen2["output_norm.weight"], "F32");
    }
    assert_eq!(
        Recipe::Q4k
            .block_type("blk.0.attn_q.weight", &[40, 8])
            .name(),
        "F16"
    );
}

#[test]
fn a_snapshot_of_the_hub_cache_knows_its_repository() {
    let cache = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repo = cache.path().join("models--some-org--Some--Model");
    let (snapshot, blobs) = (repo.join("snapshots").join(commit), repo.join("blobs"));
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("cafe"), b"inside").unwrap();
    fs::write(cache.path().join("secret"), b"outside").unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("../../blobs/cafe", snapshot.join("config.json")).unwrap();
        std::os::unix::fs::symlink("../../../secret", snapshot.join("tokenizer.json")).unwrap();
        std::os::unix::fs::symlink("../../blobs/gone", snapshot.join("model.safetensors")).unwrap();
    }
    let dir = LocalDir::open(&snapshot).unwrap();
    assert_eq!(
        dir.origin(),
        Origin {
            model_name: "Some--Model".to_owned(),
            repo: Some("some-org/Some--Model".to_owned()),
            commit: Some(commit.to_owned()),
        }
    );
    #[cfg(unix)]
    {
        let names: Vec<String> = dir.files().unwrap().into_iter().map(|f| f.path).collect();
        assert_eq!(names, ["config.json", "tokenizer.json"]);
        let mut buf = [0; 6];
        dir.read_at("config.json", 0, &mut buf).unwrap();
        assert_eq!(&buf, b"inside");
        let refused = dir
            .read_at("tokenizer.json", 0, &mut buf)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("outside of the checkpoint's directory"),
            "{refused}"
        );
        assert!(dir.read_at("../../../secret", 0, &mut buf).is_err());
    }
}

/// A checkpoint in memory: a family's files, some of them changed.
struct Changed {
    name: String,
    files: BTreeMap<String, Vec<u8>>,
}

impl Changed {
    fn family(family: &str) -> Changed {
        let files = fs::read_dir(checkpoint_dir(family)).unwrap().map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        });
        Changed {
            name: family.to_owned(),
            files: files.collect(),
        }
    }

    fn without(mut self, file: &str) -> Changed {
        self.files.remove(file).unwrap();
        self
    }

    fn with(mut self, file: &str, bytes: impl Into<Vec<u8>>) -> Changed {
        self.files.insert(file.to_owned(), bytes.into());
        self
    }

    fn json(self, file: &str, change: impl FnOnce(&mut Value)) -> Changed {
        let mut value: Value = serde_json::from_slice(&self.files[file]).unwrap();
        change(&mut value);
        self.with(file, value.to_string())
    }

    /// Rewrites a header; the data section stays as it is.
    fn header(
        self,
        file: &str,
        change: impl FnOnce(&mut serde_json::Map<String, Value>),
    ) -> Changed {
        let bytes = &self.files[file];
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Map<String, Value> =
            serde_json::from_slice(&bytes[8..end]).unwrap();
        change(&mut header);
        let text = Value::Object(header).to_string();
        let mut changed = (text.len() as u64).to_le_bytes().to_vec();
        changed.extend(text.as_bytes());
        changed.extend(&bytes[end..]);
        self.with(file, changed)
    }

    fn plan(&self) -> Result<Plan, Error> {
        plan(self, Recipe::Q4k)
    }

    /// The error and its causes, as the operator reads them.
    fn error(&self) -> String {
        let error = self.plan().expect_err("the plan should fail");
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(c) = cause {
            write!(text, ": {c}").unwrap();
            cause = c.source();
        }
        text
    }
}

impl Source for Changed {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        let listed = self.files.iter();
        Ok(listed
            .map(|(path, b)| SourceFile {
                path: path.clone(),
                size_bytes: b.len() as u64,
            })
            .collect())
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let start = usize::try_from(offset_bytes)?;
        let bytes = self
            .files
            .get(path)
            .and_then(|b| b.get(start..start + buf.len()));
        buf.copy_from_slice(
            bytes.ok_or_else(|| format!("{path} ends before byte {}", start + buf.len()))?,
        );
        Ok(())
    }

    fn origin(&self) -> Origin {
        Origin {
            model_name: self.name.clone(),
            ..Origin::default()
        }
    }
}

const ONE: &str = "model.safetensors";
const O: &str = "model.layers.0.self_attn.o_proj.weight";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn headers_that_lie_are_refused_with_file_and_tensor() {
    let llama = || Changed::family("llama");
    let bytes = llama().files[ONE].clone();
    let truncated = llama().with(ONE, &bytes[..100]);
    let short_data = llama().with(ONE, &bytes[..bytes.len() - 2]);
    let trailing = llama().with(ONE, [&bytes[..], b"xx"].concat());
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let duplicate = {
        let text = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        llama().with(
            ONE,
            [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[0; 8]].concat(),
        )
    };
    let errors = [
        ("truncated header", truncated.error()),
        ("truncated data", short_data.error()),
        ("bytes after the data", trailing.error()),
        ("header of 2^64 - 1 bytes", llama().with(ONE, huge).error()),
        ("empty file", llama().with(ONE, Vec::new()).error()),
        ("a name twice", duplicate.error()),
        (
            "not JSON",
            llama()
                .with(ONE, [&4_u64.to_le_bytes()[..], b"{{{{"].concat())
                .error(),
        ),
        (
            "overlap",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = h[O]["data_offsets"].clone())
                .error(),
        ),
        (
            "shape and offsets disagree",
            llama()
                .header(ONE, |h| h[Q]["shape"] = json!([256, 257]))
                .error(),
        ),
        (
            "shape overflows",
            llama()
                .header(ONE, |h| h[Q]["shape"] = json!([u64::MAX, u64::MAX]))
                .error(),
        ),
        (
            "offsets run backwards",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = json!([9, 8]))
                .error(),
        ),
        (
            "gap",
            llama().header(ONE, |h| drop(h.shift_remove(Q))).error(),
        ),
        (
            "unknown type",
            llama()
                .header(ONE, |h| h[Q]["dtype"] = json!("F17"))
                .error(),
        ),
        (
            "negative offset",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = json!([-2, 8]))
                .error(),
        ),
    ];
    let text: String = errors
        .iter()
        .map(|(what, error)| format!("{what}:\n  {error}\n"))
        .collect();
    insta::assert_snapshot!(text);
}

#[test]
fn checkpoints_that_do_not_fit_together_are_refused() {
    let index = "model.safetensors.index.json";
    let (first, second) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    let config = |change: fn(&mut Value)| Changed::family("llama").json("config.json", change);
    let elsewhere = |h: &mut serde_json::Map<String, Value>| {
        let tensor = h.shift_remove(Q).unwrap();
        h.insert("model.layers.0.self_attn.qq_proj.weight".to_owned(), tensor);
    };
    let errors = [
        (
            "no checkpoint",
            Changed::family("llama").without(ONE).error(),
        ),
        (
            "missing shard",
            Changed::family("llama3").without(second).error(),
        ),
        (
            "in the index, not in its shard",
            Changed::family("llama3")
                .json(index, |i| i["weight_map"]["x"] = json!(first))
                .error(),
        ),
        (
            "in another shard than the index says",
            Changed::family("llama3")
                .json(index, |i| i["weight_map"][Q] = json!(first))
                .error(),
        ),
        ("in two shards", {
            let twice = Changed::family("llama3");
            let bytes = twice.files[first].clone();
            twice.with(second, bytes).error()
        }),
        (
            "unknown and missing tensor",
            Changed::family("llama").header(ONE, elsewhere).error(),
        ),
        (
            "unknown tensor",
            config(|c| c["num_hidden_layers"] = json!(1)).error(),
        ),
        (
            "missing tensors",
            config(|c| c["num_hidden_layers"] = json!(4)).error(),
        ),
        (
            "layers without end",
            config(|c| c["num_hidden_layers"] = json!(10_000))
                .error()
                .chars()
                .take(120)
                .collect(),
        ),
        (
            "wrong shape",
            config(|c| c["intermediate_size"] = json!(512)).error(),
        ),
        (
            "type",
            Changed::family("llama")
                .header(ONE, |h| h[Q]["dtype"] = json!("I16"))
                .error(),
        ),
        (
            "no config",
            Changed::family("llama").without("config.json").error(),
        ),
        (
            "unknown architecture",
            config(|c| c["architectures"] = json!(["MambaForCausalLM"])).error(),
        ),
        (
            "no architecture",
            config(|c| c["architectures"] = json!([])).error(),
        ),
        (
            "heads",
            config(|c| c["num_key_value_heads"] = json!(3)).error(),
        ),
        ("zero", config(|c| c["hidden_size"] = json!(0)).error()),
        (
            "text for a number",
            config(|c| c["rms_norm_eps"] = json!("small")).error(),
        ),
        (
            "activation",
            config(|c| c["hidden_act"] = json!("relu")).error(),
        ),
        (
            "rope scaling",
            config(|c| c["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0})).error(),
        ),
        (
            "quantised",
            config(|c| c["quantization_config"] = json!({"quant_method": "gptq"})).error(),
        ),
        (
            "no tokenizer",
            Changed::family("llama")
                .without("tokenizer.model")
                .without("tokenizer.json")
                .error(),
        ),
        (
            "tokenizer.model is something else",
            Changed::family("llama")
                .with("tokenizer.model", *b"{\"a\": 1}")
                .error(),
        ),
        (
            "unigram",
            Changed::family("qwen3")
                .json("tokenizer.json", |t| t["model"]["type"] = json!("Unigram"))
                .error(),
        ),
        (
            "token beyond the embedding matrix",
            Changed::family("qwen3")
                .json("tokenizer.json", |t| {
                    t["added_tokens"][0]["id"] = json!(512)
                })
                .error(),
        ),
    ];
    let text: String = errors
        .iter()
        .map(|(what, error)| format!("{what}:\n  {error}\n"))
        .collect();
    insta::assert_snapshot!(text);
}

#[test]
fn tensors_outside_of_the_model_proper_are_left_out_with_a_reason() {
    let renamed = Changed::family("qwen3").header(ONE, |h| {
        let head = h.shift_remove("lm_head.weight").unwrap();
        h.insert("mtp.fc.weight".to_owned(), head);
    });
    let tied = renamed.json("config.json", |c| c["tie_word_embeddings"] = json!(true));
    let plan = tied.plan().unwrap();
    assert!(plan.config.tied_embeddings);
    assert!(!tensors(&plan).any(|t| t.name == "output.weight"));
    assert_eq!(plan.left_out.len(), 1);
    assert_eq!(plan.left_out[0].tensor, "mtp.fc.weight");

    let tied = Changed::family("qwen3")
        .json("config.json", |c| c["tie_word_embeddings"] = json!(true))
        .plan()
        .unwrap();
    assert_eq!(tied.left_out[0].tensor, "lm_head.weight");
}

#[test]
fn a_text_model_inside_a_multimodal_one_is_the_same_model() {
    let alone = Changed::family("gemma3");
    let inside = |prefix: &'static str| {
        Changed::family("gemma3")
            .json("config.json", |c| {
                let text = c.clone();
                *c = json!({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": text});
            })
            .header(ONE, move |h| {
                *h = std::mem::take(h)
                    .into_iter()
                    .map(|(name, t)| match name.strip_prefix("model.") {
                        Some(rest) => (format!("{prefix}{rest}"), t),
                        None => (name, t),
                    })
                    .collect();
            })
    };
    let names = |plan: &Plan| {
        tensors(plan)
            .map(|t| (t.name.clone(), t.ne.clone()))
            .collect::<Vec<_>>()
    };
    let alone = alone.plan().unwrap();
    for prefix in ["language_model.model.", "model.language_model."] {
        let plan = inside(prefix).plan().unwrap();
        assert_eq!(
            (names(&plan), &plan.config),
            (names(&alone), &alone.config),
            "{prefix}"
        );
        assert_eq!(plan.metadata, alone.metadata);
    }
}

#[test]
fn a_byte_fallback_tokenizer_without_its_model_file_gets_scores_in_the_order_of_its_merges() {
    for (family, prefix) in [("llama", true), ("gemma2", false)] {
        let with = Changed::family(family).plan().unwrap();
        let without = Changed::family(family)
            .without("tokenizer.model")
            .plan()
            .unwrap();
        let get = |plan: &Plan, key: &str| {
            plan.metadata
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.clone())
                .unwrap_or(MetaValue::U8(0))
        };
        for key in [
            "tokenizer.ggml.model",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.bos_token_id",
        ] {
            assert_eq!(get(&with, key), get(&without, key), "{family}: {key}");
        }
        assert_eq!(
            get(&without, "tokenizer.ggml.add_space_prefix"),
            MetaValue::Bool(prefix)
        );
        let (MetaValue::Array(MetaArray::F32s(a)), MetaValue::Array(MetaArray::F32s(b))) = (
            get(&with, "tokenizer.ggml.scores"),
            get(&without, "tokenizer.ggml.scores"),
        ) else {
            panic!("{family}: no scores");
        };
        // Tokens made by merges stand in the same order by either score.
        let made: Vec<usize> = (0..b.len())
            .filter(|&i| b[i] > -100_000.0 && a[i] > -1_000.0)
            .collect();
        let order = |scores: &[f32]| {
            let mut ids = made.clone();
            ids.sort_by(|&x, &y| scores[y].total_cmp(&scores[x]).then(x.cmp(&y)));
            ids
        };
        assert!(made.len() > 100, "{family}");
        assert_eq!(order(&a), order(&b), "{family}");
    }
    let shuffled =
        Changed::family("llama")
            .without("tokenizer.model")
            .json("tokenizer.json", |t| {
                let merges = t["model"]["merges"].as_array_mut().unwrap();
                merges.truncate(merges.len() - 1);
            });
    assert!(
        shuffled.error().contains("needs its tokenizer.model"),
        "{}",
        shuffled.error()
    );
}

#[test]
fn an_unknown_pre_tokenizer_is_default_with_a_warning() {
    let plan = Changed::family("qwen3")
        .json("tokenizer.json", |t| {
            t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("x+")
        })
        .plan()
        .unwrap();
    assert!(plan.metadata.contains(&(
        "tokenizer.ggml.pre".to_owned(),
        MetaValue::String("default".to_owned())
    )));
    assert!(
        plan.warnings.iter().any(|w| w.contains("pre-tokenizer")),
        "{:?}",
        plan.warnings
    );
}

#[test]
fn rope_is_read_in_both_layouts_and_in_every_kind() {
    let old = Changed::family("gemma3").plan().unwrap();
    let nested = Changed::family("gemma3").json("config.json", |c| {
        for key in ["rope_theta", "rope_local_base_freq", "rope_scaling"] {
            c.as_object_mut().unwrap().shift_remove(key);
        }
        c["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        });
    });
    let nested = nested.plan().unwrap();
    assert_eq!(
        nested.config.rope.scaling,
        Some(RopeScaling::Linear { factor: 8.0 })
    );
    let scaled = |rope: &vindex::Rope| vindex::Rope {
        scaling: None,
        ..rope.clone()
    };
    assert_eq!(scaled(&nested.config.rope), scaled(&old.config.rope));
    let has =
        |plan: &Plan, key: &str, value: MetaValue| plan.metadata.contains(&(key.to_owned(), value));
    assert!(has(
        &nested,
        "gemma3.rope.scaling.type",
        MetaValue::String("linear".to_owned())
    ));
    assert!(has(
        &nested,
        "gemma3.rope.scaling.factor",
        MetaValue::F32(8.0)
    ));
    assert!(has(
        &nested,
        "gemma3.rope.freq_base_swa",
        MetaValue::F32(10_000.0)
    ));

    let yarn = Changed::family("qwen2").json("config.json", |c| {
        c["rope_scaling"] =
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    });
    let yarn = yarn.plan().unwrap();
    assert!(matches!(
        yarn.config.rope.scaling,
        Some(RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32768,
            ..
        })
    ));
    assert!(has(
        &yarn,
        "qwen2.rope.scaling.original_context_length",
        MetaValue::U32(32768)
    ));

    let elsewhere = Changed::family("qwen2").json("config.json", |c| {
        c["rope_scaling"] = json!({"type": "llama3"})
    });
    assert!(
        elsewhere.error().contains("llama3"),
        "{}",
        elsewhere.error()
    );
}

#[test]
fn named_chat_templates_get_a_key_each() {
    let plan = Changed::family("qwen2")
        .json("tokenizer_config.json", |t| {
            t["chat_template"] = json!([
                {"name": "default", "template": "A"},
                {"name": "tool use", "template": "B"},
            ]);
        })
        .plan()
        .unwrap();
    let templates: Vec<_> = plan
        .metadata
        .iter()
        .filter(|(key, _)| key.contains("chat_template"))
        .collect();
    let text = |t: &str| MetaValue::String(t.to_owned());
    let expected = [
        (
            "tokenizer.chat_templates".to_owned(),
            MetaValue::Array(MetaArray::Strings(vec!["tool_use".to_owned()])),
        ),
        ("tokenizer.chat_template.tool_use".to_owned(), text("B")),
        ("tokenizer.chat_template".to_owned(), text("A")),
    ];
    assert!(templates.into_iter().eq(&expected));
}

/// The pre-tokenizers of published models, as their `tokenizer.json` has them, under llama.cpp's names.
#[test]
fn known_pre_tokenizers_are_told_by_their_patterns() {
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let deepseek_v3 = [
        r"\p{N}{1,3}",
        "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
    ];
    let digits = json!({"type": "Digits", "individual_digits": true});
    let cases = [
        ("gpt-2", false, bytes(true)),
        ("smollm", false, sequence(vec![digits, bytes(true)])),
        (
            "llama-bpe",
            true,
            sequence(vec![split(llama3), bytes(false)]),
        ),
        (
            "smaug-bpe",
            false,
            sequence(vec![split(llama3), bytes(false)]),
        ),
        (
            "deepseek-v3",
            false,
            sequence(
                deepseek_v3
                    .into_iter()
                    .map(split)
                    .chain([bytes(false)])
                    .collect(),
            ),
        ),
        (
            "default",
            false,
            sequence(vec![
                split(llama3),
                json!({"type": "Whitespace"}),
                bytes(false),
            ]),
        ),
        ("default", false, Value::Null),
    ];
    for (name, ignore_merges, pre_tokenizer) in cases {
        let plan = Changed::family("qwen3")
            .json("tokenizer.json", |t| {
                t["pre_tokenizer"] = pre_tokenizer.clone();
                t["model"]["ignore_merges"] = json!(ignore_merges);
            })
            .plan()
            .unwrap();
        let key = (
            "tokenizer.ggml.pre".to_owned(),
            MetaValue::String(name.to_owned()),
        );
        assert!(plan.metadata.contains(&key), "{name}: {pre_tokenizer}");
    }
}

#[test]
fn part_files_get_a_safe_stem() {
    let stem = |name: &str| {
        Changed {
            name: name.to_owned(),
            ..Changed::family("qwen2")
        }
        .plan()
        .unwrap()
        .stem
    };
    assert_eq!(stem("Qwen3-0.6B"), "Qwen3-0.6B-q4k");
    assert_eq!(stem("../-x y\u{e9}"), "x-y--q4k");
    assert_eq!(stem(""), "model-q4k");
    let plan = Changed::family("qwen2").plan().unwrap();
    let expected = [
        Component::Metadata,
        Component::Embeddings,
        Component::Attention { layer: 0 },
        Component::FeedForward { layer: 0 },
        Component::Attention { layer: 1 },
        Component::FeedForward { layer: 1 },
    ];
    assert!(plan.parts.iter().map(|p| p.component).eq(expected));
    assert!(plan.parts[0].tensors.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes, opening ends with a checkpoint or an error.
    #[test]
    fn random_bytes_as_a_header_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let files = BTreeMap::from([(ONE.to_owned(), bytes)]);
        let _ = Checkpoint::open(&Changed { name: String::new(), files });
    }

    /// Likewise for text that is nearly a header; one that is accepted tiles the file.
    #[test]
    fn random_entries_never_panic(
        entries in prop::collection::btree_map("[a-c]{0,2}", ("(F32|BF16|F4|I64|X)", prop::collection::vec(0_u64..5, 0..10), 0_u64..40, 0_u64..40), 0..4),
        data in 0_usize..60,
    ) {
        let header: serde_json::Map<String, Value> = entries
            .into_iter()
            .map(|(name, (dtype, shape, start, end))| {
                (name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
            })
            .collect();
        let text = Value::Object(header).to_string();
        let bytes = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &vec![0; data]].concat();
        let files = BTreeMap::from([(ONE.to_owned(), bytes)]);
        if let Ok(checkpoint) = Checkpoint::open(&Changed { name: String::new(), files }) {
            let total: u64 = checkpoint.tensors().map(|(_, t)| t.size_bytes).sum();
            prop_assert_eq!(total, data as u64);
        }
    }
}
