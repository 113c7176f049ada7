//! Sidecars from end to end: the real program against a real registry that counts bytes. What is fetched, what the
//! repositories hold, what is said when nothing is to be done, and what `verify`, `catalog add` and a batch make of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Snapshot, Token};
use registry::{Options, Running};
use serde_json::{Value, json};

const TOKEN: &str = "hf_test_secret";

struct Bench {
    dir: tempfile::TempDir,
    registry: Running,
    runtime: tokio::runtime::Runtime,
    hub: Hub,
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            token: Some(TOKEN.to_owned()),
            ..Options::default()
        };
        let registry = registry::spawn(&dir.path().join("registry"), options).unwrap();
        let settings = Settings {
            endpoint: registry.url().to_owned(),
            token: Token::new(TOKEN),
            ..Settings::default()
        };
        Bench {
            dir,
            registry,
            runtime: tokio::runtime::Runtime::new().unwrap(),
            hub: Hub::new(settings).unwrap(),
        }
    }

    /// Commits files to a repository, made where it is not there.
    fn put(&self, repo: &str, files: &[(&str, Vec<u8>)], deletions: &[&str]) {
        let repo: RepoId = repo.parse().unwrap();
        let additions = files.iter().map(|(path, bytes)| Addition {
            path: (*path).to_owned(),
            size_bytes: bytes.len() as u64,
            sha256: None,
            content: Content::Bytes(bytes.clone()),
        });
        let request = CommitRequest {
            summary: "Add".into(),
            additions: additions.collect(),
            deletions: deletions.iter().map(|path| (*path).to_owned()).collect(),
        };
        self.runtime.block_on(async {
            self.hub.create_repo(&repo, false).await.unwrap();
            self.hub.commit(&repo, &request, &|_| {}).await.unwrap();
        });
    }

    /// A manifest of entries with these keys, each with these lines.
    fn manifest(&self, entries: &[(&str, &str)]) {
        let mut text = String::from("# mine\nmodels:\n");
        for (key, lines) in entries {
            text += &format!(
                "- key: {key}\n  source_model: owner/{key}\n  quant: q4k\n  tier: smoke\n  slices: [full]\n  output_name: {key}.vindex\n  hf_repo: acme/{key}-vindex\n{lines}"
            );
        }
        fs::write(self.path("m.yaml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Run {
        let output = Command::new(env!("CARGO_BIN_EXE_skulk-weights"))
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.path("home"))
            .env("HF_ENDPOINT", self.registry.url())
            .env("HF_TOKEN", TOKEN)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Run {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    fn ok(&self, args: &[&str]) -> Run {
        let run = self.run(args);
        assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
        run
    }

    fn publish(&self, artifact: &str, more: &[&str]) -> Run {
        self.ok(&[
            &[
                "--manifest",
                "m.yaml",
                "publish",
                "--model",
                "m",
                "--artifact",
                artifact,
            ],
            more,
        ]
        .concat())
    }

    fn head(&self, repo: &str) -> Option<Snapshot> {
        let repo: RepoId = repo.parse().unwrap();
        self.runtime.block_on(self.hub.head(&repo)).unwrap()
    }

    fn read(&self, repo: &str, path: &str) -> Vec<u8> {
        let head = self.head(repo).unwrap();
        self.runtime
            .block_on(head.read_file(path, 1 << 30))
            .unwrap()
            .to_vec()
    }

    fn n_fetched(&self) -> u64 {
        self.registry.stats().sum("/resolve/").sent_bytes
    }
}

/// Bytes that differ from place to place.
fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        // An exponent that is no NaN's.
        (state & 0x3f) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// A safetensors file of tensors of one type: names and shapes.
fn safetensors(tensors: &[(&str, &str, &[u64])]) -> Vec<u8> {
    let (mut header, mut data) = (BTreeMap::new(), Vec::new());
    for (i, (name, dtype, shape)) in tensors.iter().enumerate() {
        let width = match *dtype {
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        let n_bytes = shape.iter().product::<u64>() as usize * width;
        let begin = data.len();
        data.extend(noise(n_bytes, i as u32 + n_bytes as u32));
        header.insert(
            (*name).to_owned(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

fn tensors(file: &[u8]) -> Value {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&file[8..8 + n]).unwrap()
}

const MTP: &str = "  mtp_source_repo: owner/base\n  mtp_sidecar_repo: acme/base-mtp\n";

/// Three shards, heads in two of them, one scale beside another shard's weights; returns the bytes of heads and scales.
fn heads(bench: &Bench) -> u64 {
    let shards = [
        safetensors(&[("model.embed_tokens.weight", "BF16", &[4096, 512])]),
        safetensors(&[
            ("model.layers.0.mlp.up_proj.weight", "BF16", &[2048, 512]),
            ("mtp.layers.0.mlp.up_proj.weight", "F8_E4M3", &[2048, 512]),
            ("mtp.fc.weight", "BF16", &[512, 1024]),
        ]),
        safetensors(&[
            ("mtp.layers.0.mlp.up_proj.weight_scale_inv", "F32", &[16, 4]),
            ("mtp.norm.weight", "F32", &[512]),
            ("model.norm.weight", "BF16", &[512]),
        ]),
    ];
    let mut map = BTreeMap::new();
    let mut files = vec![("config.json", br#"{"model_type": "qwen3_5"}"#.to_vec())];
    let names = [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ];
    for (name, shard) in names.into_iter().zip(shards) {
        for tensor in tensors(&shard).as_object().unwrap().keys() {
            map.insert(tensor.clone(), name);
        }
        files.push((name, shard));
    }
    let index = serde_json::to_vec(&json!({"weight_map": map})).unwrap();
    files.push(("model.safetensors.index.json", index));
    files.push(("README.md", b"---\nlicense: mit\n---\n# m\n".to_vec()));
    bench.put("owner/base", &files, &[]);
    2048 * 512 + 2 * 512 * 1024 + 4 * 64 + 4 * 512
}

#[test]
fn of_a_checkpoint_only_heads_are_fetched() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    let head_bytes = heads(&bench);
    let before = bench.n_fetched();
    let plan = bench.publish("mtp", &["--dry-run", "--inspect"]);
    assert!(
        plan.stdout.contains("1 head(s) of layout block, 3 tensors"),
        "{}",
        plan.stdout
    );
    assert!(bench.head("acme/base-mtp").is_none() && !bench.path(".scratch").exists());
    let small = bench.n_fetched() - before;
    assert!(
        small < 4096,
        "{small} bytes for headers, configuration and index"
    );

    let before = bench.n_fetched();
    bench.publish("mtp", &[]);
    let fetched = bench.n_fetched() - before - small;
    assert!(
        fetched as f64 <= 1.02 * head_bytes as f64,
        "{fetched} bytes for {head_bytes} of heads"
    );
    assert_eq!(fs::read_dir(bench.path(".scratch")).unwrap().count(), 0);
    let card = String::from_utf8(bench.read("acme/base-mtp", "README.md")).unwrap();
    let commit = bench.head("owner/base").unwrap().commit().to_string();
    assert!(
        card.contains(&format!("source_revision: \"{commit}\"")) && card.contains("license: mit"),
        "{card}"
    );
    let header = tensors(&bench.read("acme/base-mtp", "mtp.safetensors"));
    let metadata = &header["__metadata__"];
    assert_eq!(metadata["skulk.norm_convention"], "zero_centered");
    assert_eq!(metadata["skulk.source_commit"], commit.as_str());
    assert_eq!(header["mtp.layers.0.mlp.up_proj.weight"]["dtype"], "BF16");
    assert_eq!(
        header.get("mtp.layers.0.mlp.up_proj.weight_scale_inv"),
        None
    );
}

#[test]
fn a_sidecar_that_is_there_is_kept_unless_forced() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    heads(&bench);
    bench.publish("mtp", &[]);
    let head = bench.head("acme/base-mtp").unwrap().commit().clone();
    let before = bench.n_fetched();
    let again = bench.publish("mtp", &[]);
    assert!(
        again
            .stdout
            .contains("already exists and covers owner/base")
            && !again.stderr.contains("warning"),
        "{}{}",
        again.stdout,
        again.stderr
    );
    assert!(bench.n_fetched() - before < 4096);
    bench.publish("mtp", &["--force"]);
    assert_eq!(
        *bench.head("acme/base-mtp").unwrap().commit(),
        head,
        "the same bytes made a commit"
    );

    bench.put("owner/base", &[("notes.txt", b"x".to_vec())], &[]);
    let moved = bench.publish("mtp", &[]);
    assert!(
        moved.stderr.contains("was made from owner/base at")
            && moved.stderr.contains("--force replaces it"),
        "{}",
        moved.stderr
    );
    assert_eq!(*bench.head("acme/base-mtp").unwrap().commit(), head);
    bench.publish("mtp", &["--force"]);
    assert_ne!(*bench.head("acme/base-mtp").unwrap().commit(), head);
}

#[test]
fn without_heads_no_repository_is_made() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    bench.put(
        "owner/base",
        &[(
            "model.safetensors",
            safetensors(&[("model.norm.weight", "BF16", &[8])]),
        )],
        &[],
    );
    let run = bench.run(&[
        "--manifest",
        "m.yaml",
        "publish",
        "--model",
        "m",
        "--artifact",
        "mtp",
    ]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr
            .contains("no MTP head tensors found in owner/base"),
        "{}",
        run.stderr
    );
    assert!(bench.head("acme/base-mtp").is_none());
}

#[test]
fn router_biases_keep_their_precision_when_asked() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    let shard = safetensors(&[
        ("model.layers.1.eh_proj.weight", "BF16", &[4, 8]),
        (
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "F32",
            &[8],
        ),
    ]);
    let config = br#"{"num_hidden_layers": 1, "num_nextn_predict_layers": 1}"#.to_vec();
    bench.put(
        "owner/base",
        &[("model.safetensors", shard), ("config.json", config)],
        &[],
    );
    bench.publish("mtp", &["--keep-f32"]);
    let header = tensors(&bench.read("acme/base-mtp", "mtp.safetensors"));
    assert_eq!(
        header["mtp.0.mlp.gate.e_score_correction_bias"]["dtype"],
        "F32"
    );
    assert_eq!(header["mtp.0.eh_proj.weight"]["dtype"], "BF16");
    let names: Value = serde_json::from_str(
        header["__metadata__"]["skulk.original_names"]
            .as_str()
            .unwrap(),
    )
    .unwrap();
    assert_eq!(
        names["mtp.0.eh_proj.weight"],
        "model.layers.1.eh_proj.weight"
    );
    bench.ok(&["--manifest", "m.yaml", "verify", "m", "--artifact", "mtp"]);
}

const VISION: &str = "  vision_source_repo: owner/vl\n  vision_sidecar_repo: acme/m-vision\n";

#[test]
fn a_vision_tower_is_mirrored_without_what_does_not_belong_to_it() {
    let bench = Bench::new();
    bench.manifest(&[("m", VISION)]);
    let tower = safetensors(&[("vision_tower.a.weight", "BF16", &[64, 64])]);
    let index = json!({"weight_map": {"vision_tower.a.weight": "model-1.safetensors", "model.layers.0.a": "model-2.safetensors"}});
    let files = [
        ("model-1.safetensors", tower.clone()),
        (
            "model-2.safetensors",
            safetensors(&[("model.layers.0.a", "BF16", &[512, 512])]),
        ),
        (
            "model.safetensors.index.json",
            serde_json::to_vec(&index).unwrap(),
        ),
        ("config.json", b"{}".to_vec()),
        ("LICENSE", b"be kind\n".to_vec()),
        ("modeling.py", b"pass\n".to_vec()),
        ("README.md", b"---\nlicense: mit\n---\n".to_vec()),
    ];
    bench.put("owner/vl", &files, &[]);
    bench.put(
        "acme/m-vision",
        &[
            ("old.json", b"{}".to_vec()),
            ("notes.md", b"mine\n".to_vec()),
        ],
        &[],
    );
    let plan = bench.publish("vision", &["--dry-run", "--inspect"]);
    assert!(
        plan.stdout.contains("vision deletion:      old.json") && !plan.stdout.contains("notes.md"),
        "{}",
        plan.stdout
    );
    bench.publish("vision", &[]);
    let head = bench.head("acme/m-vision").unwrap();
    let paths: Vec<&str> = head
        .files()
        .iter()
        .map(|file| file.path.as_str())
        .filter(|path| *path != ".gitattributes")
        .collect();
    assert_eq!(
        paths,
        [
            "LICENSE",
            "README.md",
            "config.json",
            "model-1.safetensors",
            "model.safetensors.index.json",
            "notes.md"
        ]
    );
    assert_eq!(bench.read("acme/m-vision", "model-1.safetensors"), tower);

    let before = bench.n_fetched();
    let again = bench.publish("vision", &[]);
    assert!(
        again
            .stdout
            .contains("already published hf://acme/m-vision"),
        "{}",
        again.stdout
    );
    assert_eq!(bench.head("acme/m-vision").unwrap().commit(), head.commit());
    assert!(bench.n_fetched() - before < 4096);
    bench.ok(&[
        "--manifest",
        "m.yaml",
        "verify",
        "m",
        "--artifact",
        "vision",
    ]);
    bench.put(
        "acme/m-vision",
        &[("config.json", b"{\"a\": 1}".to_vec())],
        &["LICENSE"],
    );
    let run = bench.run(&[
        "--manifest",
        "m.yaml",
        "verify",
        "m",
        "--artifact",
        "vision",
    ]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stdout.contains("config.json differs") && run.stdout.contains("LICENSE is missing"),
        "{}",
        run.stdout
    );
}

#[test]
fn a_repository_of_another_artifact_is_not_overwritten() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    heads(&bench);
    let card = "---\nfoxlight:\n  artifact_type: vindex\n---\n".into();
    bench.put("acme/base-mtp", &[("README.md", card)], &[]);
    let run = bench.run(&[
        "--manifest",
        "m.yaml",
        "publish",
        "--model",
        "m",
        "--artifact",
        "mtp",
    ]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("acme/base-mtp holds a vindex"),
        "{}",
        run.stderr
    );
}

#[test]
fn verify_makes_a_sidecar_again_and_says_what_differs() {
    let bench = Bench::new();
    bench.manifest(&[("m", MTP)]);
    heads(&bench);
    bench.publish("mtp", &[]);
    let good = bench.ok(&["--manifest", "m.yaml", "verify", "m", "--artifact", "mtp"]);
    assert!(
        good.stdout
            .contains("as its source: 3 tensors, value by value"),
        "{}",
        good.stdout
    );
    let mut file = bench.read("acme/base-mtp", "mtp.safetensors");
    let last = file.len() - 1;
    file[last] ^= 1;
    bench.put("acme/base-mtp", &[("mtp.safetensors", file)], &[]);
    let bad = bench.run(&["--manifest", "m.yaml", "verify", "m", "--artifact", "mtp"]);
    assert_eq!(bad.code, Some(1));
    assert!(
        bad.stdout.contains("mtp.norm.weight has other values")
            && bad.stderr.contains("in 1 place"),
        "{}{}",
        bad.stdout,
        bad.stderr
    );
}

#[test]
fn a_batch_goes_on_and_sums_up() {
    let bench = Bench::new();
    bench.manifest(&[
        (
            "a",
            "  mtp_source_repo: owner/none\n  mtp_sidecar_repo: acme/none-mtp\n",
        ),
        ("b", ""),
        ("m", MTP),
    ]);
    heads(&bench);
    let batch = [
        "--manifest",
        "m.yaml",
        "publish",
        "--tier",
        "smoke",
        "--artifact",
        "mtp",
    ];
    let run = bench.run(&batch);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stdout
            .contains("a    failed: cannot read the source owner/none")
            && run.stdout.contains("m    not begun"),
        "{}",
        run.stdout
    );
    let run = bench.run(&[&batch[..], &["--continue-on-error"]].concat());
    assert_eq!(run.code, Some(1));
    assert!(
        run.stdout.contains("b    not configured") && run.stdout.contains("m    published"),
        "{}",
        run.stdout
    );
    assert!(
        run.stderr
            .contains("1 of 3 entries failed, 0 were not begun"),
        "{}",
        run.stderr
    );
    let shard = safetensors(&[("mtp.fc.weight", "BF16", &[4, 8])]);
    bench.put("owner/none", &[("model.safetensors", shard)], &[]);
    let run = bench.ok(&batch);
    assert!(
        run.stdout.contains("a    published") && run.stdout.contains("m    already published"),
        "{}",
        run.stdout
    );
}

#[test]
fn an_entry_is_added_to_the_operators_manifest() {
    let bench = Bench::new();
    bench.manifest(&[("m", "  # of mine\n")]);
    let config =
        br#"{"model_type": "qwen3_5_moe", "num_experts": 8, "num_experts_per_tok": 2}"#.to_vec();
    let shard = safetensors(&[
        ("mtp.fc.weight", "BF16", &[4, 8]),
        ("mtp.norm.weight", "BF16", &[4]),
    ]);
    bench.put(
        "big/New-7B-Instruct",
        &[("config.json", config), ("model.safetensors", shard)],
        &[],
    );
    let old = fs::read_to_string(bench.path("m.yaml")).unwrap();
    let add = [
        "--manifest",
        "m.yaml",
        "catalog",
        "add",
        "big/New-7B-Instruct",
    ];
    let dry = bench.ok(&[&add[..], &["--dry-run"]].concat());
    assert!(
        dry.stdout
            .contains("detected 2 MTP tensors in big/New-7B-Instruct")
            && dry.stdout.contains("is a single file"),
        "{}",
        dry.stdout
    );
    let declined = bench.ok(&add);
    assert!(declined.stdout.contains("aborted"), "{}", declined.stdout);
    assert_eq!(fs::read_to_string(bench.path("m.yaml")).unwrap(), old);

    bench.ok(&[&add[..], &["--yes"]].concat());
    let new = fs::read_to_string(bench.path("m.yaml")).unwrap();
    let entry = "- key: new-7b-full-q4-k\n  source_model: big/New-7B-Instruct\n  quant: q4k\n  tier: moe\n  slices:\n  - full\n  output_name: new-7b-it-full-q4-k.vindex\n  hf_repo: acme/new-7b-it-full-q4-k-vindex\n  mtp_source_repo: big/New-7B-Instruct\n  mtp_sidecar_repo: acme/new-7b-instruct-mtp\n";
    assert_eq!(new, old + entry);
    bench.ok(&["--manifest", "m.yaml", "catalog", "validate"]);
    let again = bench.run(&[&add[..], &["--yes"]].concat());
    assert!(
        again.code == Some(1) && again.stderr.contains("already exists"),
        "{}",
        again.stderr
    );
}

#[test]
fn an_entry_is_added_to_the_one_source_of_a_config_under_its_owner() {
    let bench = Bench::new();
    bench.manifest(&[("m", "")]);
    let config = "catalogs:\n- path: m.yaml\n  namespace: lab\n  hf_owner: acme\n  hf_collection: acme/mine-0123456789abcdef01234567\n";
    fs::write(bench.path("skulk-weights.yaml"), config).unwrap();
    let index = |names: &[&str]| {
        serde_json::to_vec(&json!({"weight_map": names.iter().map(|name| ((*name).to_owned(), "m.safetensors")).collect::<BTreeMap<_, _>>()})).unwrap()
    };
    let card = b"---\nbase_model: big/VL\nbase_model_relation: quantized\n---\n".to_vec();
    bench.put(
        "small/VL-4bit",
        &[
            ("model.safetensors.index.json", index(&["model.layers.0.a"])),
            ("README.md", card),
        ],
        &[],
    );
    bench.put(
        "big/VL",
        &[(
            "model.safetensors.index.json",
            index(&["model.layers.0.a", "model.visual.a", "mtp.fc.weight"]),
        )],
        &[],
    );
    let added = bench.ok(&["catalog", "add", "small/VL-4bit", "--yes"]);
    assert!(
        added.stdout.contains("added lab/vl-full-q4-k to m.yaml"),
        "{}",
        added.stdout
    );
    let shown = bench.ok(&["catalog", "show", "lab/vl-full-q4-k"]);
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(shown["hf_repo"], "acme/vl-full-q4-k-vindex");
    assert_eq!(shown["hf_collection"], "acme/mine-0123456789abcdef01234567");
    assert_eq!(shown["mtp_source_repo"], "big/VL");
    assert_eq!(shown["mtp_sidecar_repo"], "acme/vl-mtp");
    assert_eq!(shown["vision_source_repo"], "big/VL");
    assert_eq!(shown["vision_sidecar_repo"], "acme/vl-vision");
}
