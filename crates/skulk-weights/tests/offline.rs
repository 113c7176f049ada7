//! The built-in catalog, planned against a registry that holds of each source only what is small: its configuration, its
//! tokenizer and the index of its weights. Every entry gives a whole plan, with the number of weights that its model has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Token};
use serde_json::{Value, json};

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

const MODELS: [Model; 5] = [
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
];

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// The names of a checkpoint, as its writer has them.
fn names(config: &Value) -> Vec<String> {
    let text = config.get("text_config").unwrap_or(config);
    let n_layers = text["num_hidden_layers"].as_u64().unwrap();
    let class = config["architectures"][0].as_str().unwrap();
    let attention = [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ];
    let dense = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let mut names = vec![
        "model.embed_tokens.weight".to_owned(),
        "model.norm.weight".to_owned(),
    ];
    if config.get("tie_word_embeddings") == Some(&json!(false)) {
        names.push("lm_head.weight".to_owned());
    }
    for l in 0..n_layers {
        let mut add = |part: &str| names.push(format!("model.layers.{l}.{part}.weight"));
        attention.iter().for_each(|part| add(part));
        match class {
            "MixtralForCausalLM" => {
                add("block_sparse_moe.gate");
                for e in 0..text["num_local_experts"].as_u64().unwrap() {
                    (1..=3).for_each(|w| add(&format!("block_sparse_moe.experts.{e}.w{w}")));
                }
            }
            _ => dense.iter().for_each(|part| add(part)),
        }
        if class.starts_with("Gemma3") {
            for part in [
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            ] {
                add(part);
            }
        }
        if class.starts_with("Qwen2") {
            for part in ["q", "k", "v"] {
                names.push(format!("model.layers.{l}.self_attn.{part}_proj.bias"));
            }
        }
    }
    if class.starts_with("Gemma3") {
        names = names
            .into_iter()
            .map(|name| format!("language_model.{name}"))
            .collect();
        names.push("vision_tower.vision_model.embeddings.patch_embedding.weight".to_owned());
        names.push("multi_modal_projector.mm_input_projection_weight".to_owned());
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
    for model in &MODELS {
        let config_file = repository("fixtures/catalog")
            .join(model.repo.replace('/', "--"))
            .join("config.json");
        let config: Value = serde_json::from_slice(&fs::read(&config_file).unwrap()).unwrap();
        let total_size = 2 * model.n_weights;
        let weight_map: BTreeMap<String, &str> = names(&config)
            .into_iter()
            .map(|name| (name, "model-00001-of-00001.safetensors"))
            .collect();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        let file = |path: &str, bytes: Vec<u8>| Addition {
            path: path.to_owned(),
            size_bytes: bytes.len() as u64,
            sha256: None,
            content: Content::Bytes(bytes),
        };
        let mut additions = vec![
            file("config.json", fs::read(&config_file).unwrap()),
            file(
                "model.safetensors.index.json",
                serde_json::to_vec(&index).unwrap(),
            ),
            file(
                "README.md",
                b"---\nlicense: apache-2.0\n---\n# m\n".to_vec(),
            ),
        ];
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "generation_config.json",
        ] {
            let path = repository("fixtures/models")
                .join(model.tokenizer)
                .join(name);
            if let Ok(bytes) = fs::read(path) {
                additions.push(file(name, bytes));
            }
        }
        let repo: RepoId = model.repo.parse().unwrap();
        runtime.block_on(async {
            hub.create_repo(&repo, false).await.unwrap();
            let request = CommitRequest {
                summary: "Add".into(),
                additions,
                deletions: Vec::new(),
            };
            hub.commit(&repo, &request, &|_| {}).await.unwrap();
        });
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
        let Some(model) = MODELS.iter().find(|model| model.repo == source) else {
            continue;
        };
        let artifact = [
            "publish",
            "--model",
            key,
            "--dry-run",
            "--inspect",
            "--artifact",
            "vindex",
        ];
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
