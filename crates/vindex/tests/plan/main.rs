//! Plans at the seam: a checkpoint's files in, tensors and metadata out, held against what llama.cpp's converter
//! makes of the same files (`fixtures/gguf`). Tokenizers and files that lie have modules of their own.

mod changed;
mod refusals;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod tokenizers;
mod variants;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vindex::{
    Change, Component, Error, LocalDir, MetaArray, MetaValue, Order, Origin, Plan, PlannedTensor,
    Recipe, RopeScaling, Source, Transform, Values, plan,
};

use changed::{Changed, ONE};
use support::goldens::{self, Golden};
use support::{checkpoint_dir, fixtures};

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

fn plan_of(dir: &Path, recipe: Recipe) -> Result<Plan, Error> {
    plan(&LocalDir::open(dir)?, recipe)
}

fn converted(golden: &Golden) -> Value {
    serde_json::from_str(&fs::read_to_string(&golden.gguf).unwrap()).unwrap()
}

fn tensors(plan: &Plan) -> impl Iterator<Item = &PlannedTensor> {
    plan.parts.iter().flat_map(|p| &p.tensors)
}

#[test]
fn tensors_are_those_of_the_converter() {
    for golden in goldens::goldens() {
        let family = &golden.family;
        let plan = plan_of(&golden.model, Recipe::F32).unwrap();
        let ours: BTreeMap<&str, Value> = tensors(&plan)
            .map(|t| (t.name.as_str(), json!([t.ne, t.block_type.name()])))
            .collect();
        let golden = converted(&golden);
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
    for golden in goldens::goldens() {
        let family = &golden.family;
        let plan = plan_of(&golden.model, Recipe::F32).unwrap();
        let golden = converted(&golden);
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
            .map(|(key, value)| (key.as_str(), described(key, value)))
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

/// A value as the golden files describe it: arrays of tokenizers by length and by the sha256 of their canonical JSON.
fn described(key: &str, value: &MetaValue) -> Value {
    let array = |elem: &str, values: Value| {
        if !key.starts_with("tokenizer.") {
            return json!({"type": "ARRAY", "elem": elem, "value": values});
        }
        let len = values.as_array().unwrap().len();
        let sha256: String = Sha256::digest(values.to_string())
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
        MetaValue::Array(MetaArray::Strings(v)) => array("STRING", json!(v)),
        MetaValue::Array(MetaArray::I32s(v)) => array("INT32", json!(v)),
        MetaValue::Array(MetaArray::Bools(v)) => array("BOOL", json!(v)),
        MetaValue::Array(MetaArray::F32s(v)) => {
            let doubles: Vec<f64> = v.iter().map(|&x| x.into()).collect();
            array("FLOAT32", json!(doubles))
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
    let golden = converted(&goldens::golden("llama3").unwrap());
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
            Values::Checkpoint { transform, .. } => transform.clone(),
            computed => panic!("{computed:?}"),
        };
    let llama = of("llama");
    assert_eq!(
        transform(&llama, "blk.1.attn_q.weight"),
        Transform::order(Order::InterleaveRope { n_heads: 4 })
    );
    assert_eq!(
        transform(&llama, "blk.1.attn_k.weight"),
        Transform::order(Order::InterleaveRope { n_heads: 2 })
    );
    assert_eq!(transform(&llama, "blk.1.attn_v.weight"), Transform::NONE);
    assert_eq!(
        transform(&of("qwen2"), "blk.0.attn_q.bias"),
        Transform::NONE
    );

    let gemma3 = of("gemma3");
    for norm in ["output_norm", "blk.5.attn_q_norm", "blk.0.post_ffw_norm"] {
        assert_eq!(
            transform(&gemma3, &format!("{norm}.weight")),
            Transform::change(Change::AddOne)
        );
    }
    let window = gemma3.config.attention.sliding_window.unwrap();
    assert_eq!(
        (window.n_tokens, window.layers),
        (8, vec![true, true, true, true, true, false])
    );
    assert_eq!(gemma3.config.rope.base_sliding, Some(10_000.0));
    assert_eq!(gemma3.config.eos, [1, 7]);

    let period =
        Changed::family("gemma3").json("config.json", |c| c["sliding_window_pattern"] = json!(2));
    let layers = MetaArray::Bools(vec![true, false, true, false, true, false]);
    assert!(period.plan().unwrap().metadata.contains(&(
        "gemma3.attention.sliding_window_pattern".to_owned(),
        MetaValue::Array(layers)
    )));

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

    let mistral = Changed::mistral().plan().unwrap();
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
    let plan = plan_of(&fixtures().join("../models/kjv"), Recipe::Q4k).unwrap();
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
