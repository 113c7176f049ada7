//! The built-in catalog, planned against a registry that holds of each source only what is small: its configuration, its
//! tokenizer and the index of its weights. Every entry gives a whole plan, with the number of weights that its model has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Token};
use serde_json::{Value, json};

const INDEX: &str = "model.safetensors.index.json";
const TOKEN: &str = "hf_test_secret";

/// A source of the catalog: whose tokenizer stands in for its own, and how many weights its text model has.
struct Model {
    repo: &'static str,
    tokenizer: &'static str,
    /// Of the text model as its publisher or the configuration tells them, rope factors not counted.
    n_weights: u64,
    /// Of the q4k vindex, by the block types of docs/vindex.md, in GiB.
    gib: std::ops::Range<f64>,
}

const MODELS: [Model; 9] = [
    Model {
        repo: "google/gemma-3-4b-it",
        tokenizer: "gemma3",
        n_weights: 3_880_263_168,
        gib: 2.2..2.6,
    },
    Model {
        repo: "meta-llama/Llama-3.2-3B-Instruct",
        tokenizer: "llama3",
        n_weights: 3_212_749_824,
        gib: 1.8..2.2,
    },
    Model {
        repo: "Qwen/Qwen2.5-7B-Instruct",
        tokenizer: "qwen2",
        n_weights: 7_615_616_512,
        gib: 4.2..4.8,
    },
    Model {
        repo: "mistralai/Mixtral-8x7B-Instruct-v0.1",
        tokenizer: "mixtral",
        n_weights: 46_702_792_704,
        gib: 26.0..29.0,
    },
    Model {
        repo: "mistralai/Mixtral-8x22B-Instruct-v0.1",
        tokenizer: "mixtral",
        n_weights: 140_630_071_296,
        gib: 78.0..86.0,
    },
    Model {
        repo: "google/gemma-4-31B-it",
        tokenizer: "gemma3",
        n_weights: 30_697_345_340,
        gib: 16.5..19.0,
    },
    Model {
        repo: "google/gemma-4-26b-a4b-it",
        tokenizer: "gemma3",
        n_weights: 25_233_141_790,
        // Experts are 704 wide, no multiple of 256: their down projections take eight bits.
        gib: 16.5..17.5,
    },
    Model {
        repo: "mlx-community/Qwen3.5-9B-OptiQ-4bit",
        tokenizer: "qwen2",
        n_weights: 8_953_803_264,
        gib: 4.9..6.2,
    },
    Model {
        repo: "mlx-community/Qwen3.6-35B-A3B-4bit",
        tokenizer: "qwen2",
        n_weights: 34_660_610_688,
        gib: 18.0..22.0,
    },
];

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// The names of a checkpoint, as its writer has them.
fn names(config: &Value) -> Vec<String> {
    let text = config.get("text_config").unwrap_or(config);
    let class = config["architectures"][0].as_str().unwrap();
    let is = |family: &str| class.starts_with(family);
    let is_mlx = config.get("quantization").is_some();
    let count = |key: &str| text[key].as_u64().unwrap_or(0);
    let has_experts = !text["moe_intermediate_size"].is_null();
    let mut names = vec!["embed_tokens.weight".to_owned(), "norm.weight".to_owned()];
    for l in 0..count("num_hidden_layers") {
        let kind = text["layer_types"][l as usize].as_str();
        let mut parts = vec!["input_layernorm.weight", "post_attention_layernorm.weight"];
        if kind == Some("linear_attention") {
            parts.extend([
                "linear_attn.A_log",
                "linear_attn.dt_bias",
                "linear_attn.conv1d.weight",
                "linear_attn.norm.weight",
            ]);
            let matrices = [
                "in_proj_qkv",
                "in_proj_z",
                "in_proj_a",
                "in_proj_b",
                "out_proj",
            ];
            names.extend(matrices.map(|part| format!("layers.{l}.linear_attn.{part}.weight")));
        } else {
            let has_values = !(is("Gemma4") && kind == Some("full_attention"));
            let matrices = [("q", true), ("k", true), ("v", has_values), ("o", true)];
            let matrices = matrices.iter().filter(|(_, has)| *has);
            names.extend(matrices.map(|(m, _)| format!("layers.{l}.self_attn.{m}_proj.weight")));
            if is("Gemma") || is("Qwen3_5") {
                parts.extend(["self_attn.q_norm.weight", "self_attn.k_norm.weight"]);
            }
            if is("Qwen2") {
                names
                    .extend(["q", "k", "v"].map(|m| format!("layers.{l}.self_attn.{m}_proj.bias")));
            }
        }
        if is("Gemma") {
            parts.extend([
                "pre_feedforward_layernorm.weight",
                "post_feedforward_layernorm.weight",
            ]);
        }
        if is("Gemma4") {
            parts.push("layer_scalar");
        }
        let matrices = ["gate", "up", "down"];
        if is("Mixtral") {
            parts.push("block_sparse_moe.gate.weight");
            for e in 0..count("num_local_experts") {
                let experts = format!("layers.{l}.block_sparse_moe.experts.{e}");
                names.extend([1, 2, 3].map(|w| format!("{experts}.w{w}.weight")));
            }
        } else if !(has_experts && is_mlx) {
            names.extend(matrices.map(|m| format!("layers.{l}.mlp.{m}_proj.weight")));
        }
        if has_experts && is("Gemma4") {
            parts.extend([
                "experts.gate_up_proj",
                "experts.down_proj",
                "router.proj.weight",
                "router.scale",
                "router.per_expert_scale",
                "pre_feedforward_layernorm_2.weight",
                "post_feedforward_layernorm_1.weight",
                "post_feedforward_layernorm_2.weight",
            ]);
        } else if has_experts {
            parts.extend(["mlp.gate.weight", "mlp.shared_expert_gate.weight"]);
            for room in ["switch_mlp", "shared_expert"] {
                names.extend(matrices.map(|m| format!("layers.{l}.mlp.{room}.{m}_proj.weight")));
            }
        }
        names.extend(parts.iter().map(|part| format!("layers.{l}.{part}")));
    }
    let prefix = match (is_mlx, class) {
        (true, _) | (_, "Gemma3ForConditionalGeneration") => "language_model.model.",
        (_, "Gemma4ForConditionalGeneration") => "model.language_model.",
        _ => "model.",
    };
    let mut names: Vec<String> = names.iter().map(|name| format!("{prefix}{name}")).collect();
    if config.get("tie_word_embeddings") == Some(&json!(false)) {
        let outside = if is_mlx { "language_model." } else { "" };
        names.push(format!("{outside}lm_head.weight"));
    }
    if is_mlx {
        // All but vectors and convolutions are stored in four bits, with scales and biases beside.
        let is_matrix = |name: &String| {
            let stem = name.strip_suffix(".weight").unwrap_or_default();
            !stem.is_empty() && !stem.ends_with("norm") && !stem.ends_with("conv1d")
        };
        let matrices: Vec<String> = names.iter().filter(|n| is_matrix(n)).cloned().collect();
        for name in matrices {
            let stem = name.strip_suffix("weight").unwrap();
            names.extend([format!("{stem}scales"), format!("{stem}biases")]);
        }
    }
    if is("Gemma") {
        names.push("vision_tower.vision_model.embeddings.patch_embedding.weight".to_owned());
    }
    names
}

#[test]
fn every_entry_of_the_catalog_is_planned_without_weights() {
    let dir = tempfile::tempdir().unwrap();
    let options = registry::Options {
        token: Some(TOKEN.to_owned()),
        ..registry::Options::default()
    };
    let registry = registry::spawn(&dir.path().join("registry"), options).unwrap();
    let settings = Settings {
        endpoint: registry.url().to_owned(),
        token: Token::new(TOKEN),
        ..Settings::default()
    };
    let hub = Hub::new(settings).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let publish = |repo: &str, files: Vec<(&str, Vec<u8>)>| {
        let additions = files.into_iter().map(|(path, bytes)| Addition {
            path: path.to_owned(),
            size_bytes: bytes.len() as u64,
            sha256: None,
            content: Content::Bytes(bytes),
        });
        let request = CommitRequest {
            summary: "Add".into(),
            additions: additions.collect(),
            deletions: Vec::new(),
        };
        let repo: RepoId = repo.parse().unwrap();
        runtime.block_on(async {
            hub.create_repo(&repo, false).await.unwrap();
            hub.commit(&repo, &request, &|_| {}).await.unwrap();
        });
    };
    let index = |names: Vec<String>, total_size: u64| {
        let shard = "model-00001-of-00001.safetensors";
        let map: BTreeMap<String, &str> = names.into_iter().map(|name| (name, shard)).collect();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": map});
        (INDEX, serde_json::to_vec(&index).unwrap())
    };
    for model in &MODELS {
        let folder = repository("fixtures/catalog").join(model.repo.replace('/', "--"));
        let config_json = fs::read(folder.join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config_json).unwrap();
        let card = b"---\nlicense: apache-2.0\n---\n# m\n".to_vec();
        let mut files = vec![
            ("config.json", config_json),
            index(names(&config), 2 * model.n_weights),
            ("README.md", card),
        ];
        let tokenizer = repository("fixtures/models").join(model.tokenizer);
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "generation_config.json",
        ] {
            if let Ok(bytes) = fs::read(tokenizer.join(name)) {
                files.push((name, bytes));
            }
        }
        publish(model.repo, files);
    }
    for repo in ["Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.6-35B-A3B"] {
        let heads = [
            "mtp.fc.weight",
            "mtp.layers.0.input_layernorm.weight",
            "mtp.norm.weight",
        ];
        let config = br#"{"architectures": ["Qwen3_5ForConditionalGeneration"], "mtp_num_hidden_layers": 1}"#;
        let names = heads.map(str::to_owned).to_vec();
        publish(
            repo,
            vec![("config.json", config.to_vec()), index(names, 1)],
        );
    }

    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_skulk-weights"))
            .args(args)
            .current_dir(dir.path())
            .env_clear()
            .env("HOME", dir.path())
            .env("HF_ENDPOINT", registry.url())
            .env("HF_TOKEN", TOKEN)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success(),
            "{args:?}\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    };
    let mut planned = Vec::new();
    for key in run(&["catalog", "list"]).lines() {
        let entry: Value = serde_json::from_str(&run(&["catalog", "show", key])).unwrap();
        let source = entry["source_model"].as_str().unwrap();
        let model = MODELS.iter().find(|model| model.repo == source);
        let model = model.unwrap_or_else(|| panic!("{key} has a source that is not planned here"));
        let artifact = ["publish", "--model", key, "--dry-run", "--inspect"];
        let text = run(&artifact);
        for label in [
            "source commit:",
            "source size:",
            "vindex size:",
            "memory to serve:",
            "memory to extract:",
            "time estimate:",
        ] {
            assert!(text.contains(label), "{key} has no {label}\n{text}");
        }
        assert!(!text.contains("unknown"), "{text}");
        let has_heads = !entry["mtp_source_repo"].is_null();
        assert_eq!(
            text.contains("mtp heads:          3 tensors by name"),
            has_heads,
            "{text}"
        );
        let plan: Value =
            serde_json::from_str(&run(&[&artifact[..], &["--json"]].concat())).unwrap();
        let inspection = &plan["inspection"];
        let extraction = &inspection["extraction"];
        assert_eq!(
            inspection["source"]["size_bytes"],
            json!(2 * model.n_weights)
        );
        // Factors of rope are computed, not weights.
        let n_weights = extraction["estimate"]["n_weights"].as_u64().unwrap();
        assert!(
            (model.n_weights..model.n_weights + 1_000).contains(&n_weights),
            "{key}: {n_weights}"
        );
        let bytes = |value: &Value| value.as_f64().unwrap();
        let gib = bytes(&extraction["size_bytes"]) / f64::from(1 << 30);
        assert!(model.gib.contains(&gib), "{key}: {gib} GiB");
        let slices = &extraction["slices"];
        let parts = bytes(&slices["attention"]) + bytes(&slices["expert-server"]);
        assert_eq!(parts, bytes(&slices["full"]), "{key}: {slices}");
        planned.push(source.to_owned());
    }
    for model in &MODELS {
        assert!(
            planned.iter().any(|source| source == model.repo),
            "{} is in no entry",
            model.repo
        );
    }
}
