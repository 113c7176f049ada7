//! `serve`: what is told and refused before anything listens, rows that are those of the same weights here, what is
//! shown over HTTP, and how it ends.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine::wire::{ConnectError, Identity, Remote, RemoteOptions, Secret};
use engine::{Batch, FeedForward, Local, Pool, Visit};
use serde_json::Value;
use vindex::{Component, INDEX_FILE, Index, Part, SLICE_FILE, Tensor, Vindex};

use crate::bench::{Bench, model, names};
use crate::served::Served;

/// Rows that are no round numbers.
fn rows(n_rows: usize, hidden: usize) -> Vec<f32> {
    (0..n_rows * hidden)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013)
        .collect()
}

pub(crate) fn options(dir: &Path, secret: &str) -> RemoteOptions {
    RemoteOptions {
        secret: Secret::new(secret.as_bytes().to_vec()),
        ..RemoteOptions::new(Identity::of(&Vindex::open(dir).unwrap()))
    }
}

/// The rows of `ffn` in `layer`, for visits of `experts` by each row.
pub(crate) fn answer(
    ffn: &dyn FeedForward,
    layer: u32,
    n_rows: usize,
    hidden: usize,
    experts: &[u32],
) -> Vec<u32> {
    let visits: Vec<Visit> = (0..n_rows as u32)
        .flat_map(|row| experts.iter().map(move |&expert| Visit { row, expert }))
        .collect();
    let mut out = vec![0.0; visits.len() * hidden];
    let rows = rows(n_rows, hidden);
    let batch = Batch {
        rows: &rows,
        visits: &visits,
    };
    ffn.forward(layer, batch, &mut out).unwrap();
    assert!(out.iter().any(|value| *value != 0.0));
    out.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn local(dir: &Path) -> Local {
    let vindex = Arc::new(Vindex::open(dir).unwrap());
    Local::new(vindex, Arc::new(Pool::new(1))).unwrap()
}

#[test]
fn two_servers_of_layers_give_the_rows_of_one_process() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    let dir = bench.path("out");
    fs::write(bench.path("secret"), "a secret of these tests\n").unwrap();
    let socket = format!("unix:{}", bench.path("low.sock").display());
    let low = [
        "out",
        "--layers",
        "0..1",
        "--listen",
        &socket,
        "--secret-file",
        "secret",
        "--threads",
        "1",
    ];
    let low = Served::start(&bench, &low, &[]);
    let secret = [("SKULK_SECRET", "a secret of these tests")];
    let high = Served::start(
        &bench,
        &["out", "--layers", "1..2", "--listen", "127.0.0.1:0"],
        &secret,
    );
    assert_eq!(low.ready["layers"], serde_json::json!([0, 1]));
    assert_eq!(high.ready["experts"], serde_json::json!([0, 1]));
    assert_eq!(low.text("vindex"), bench.verified("out").unwrap());

    let peers = [low.address(), high.address()];
    let wrong = Remote::connect(&peers, options(&dir, "another"));
    assert!(
        matches!(wrong, Err(ConnectError::Secret { .. })),
        "{wrong:?}"
    );
    let remote = Remote::connect(&peers, options(&dir, "a secret of these tests")).unwrap();
    let here = local(&dir);
    let hidden = here.vindex().index().config.hidden as usize;
    for layer in 0..2 {
        for n_rows in [1, 5] {
            let there = answer(&remote, layer, n_rows, hidden, &[0]);
            assert_eq!(
                there,
                answer(&here, layer, n_rows, hidden, &[0]),
                "layer {layer}"
            );
        }
    }
    assert_eq!(low.metric("skulk_weights_requests_total"), 2);
    assert_eq!(low.metric("skulk_weights_rows_total"), 6);
    assert!(high.metric("skulk_weights_refused_total{reason=\"secret\"}") <= 1);
    assert!(low.metric("process_resident_memory_bytes") > 0);
    assert_eq!(low.get("/health", None).0, 200);
    assert_eq!(low.get("/ready", None), (200, "ready\n".to_owned()));
    assert_eq!(low.get("/secrets", None).0, 404);
}

#[test]
fn servers_of_a_repository_pull_their_experts_and_give_the_rows_of_one_process() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "q4k");
    let publish = [
        "--json",
        "publish",
        "out",
        "--repo",
        "acme/moe",
        "--slices",
        "expert-server",
    ];
    let published = bench.command(&publish).output().unwrap().stdout;
    let published: Value = serde_json::from_slice(&published).unwrap();
    let commit = published["commit"].as_str().unwrap().to_owned();
    let from = format!("acme/moe@{commit}");
    let serve = |experts: &str| {
        Served::start(
            &bench,
            &[
                &from,
                "--experts",
                experts,
                "--listen",
                "127.0.0.1:0",
                "--cache",
                "cache",
            ],
            &[],
        )
    };
    let (low, high) = (serve("0..1"), serve("1..4"));
    assert!(low.ready["held_bytes"].as_u64() < high.ready["held_bytes"].as_u64());
    let dir = bench.path("out");
    let remote = Remote::connect(&[low.address(), high.address()], options(&dir, "")).unwrap();
    let here = local(&dir);
    let hidden = here.vindex().index().config.hidden as usize;
    for experts in [&[0u32, 3][..], &[1, 2], &[2, 0]] {
        let there = answer(&remote, 0, 3, hidden, experts);
        assert_eq!(there, answer(&here, 0, 3, hidden, experts), "{experts:?}");
    }
    // What was pulled is there for the next one, which needs no Hub.
    let before = bench.registry.stats().sum("").n_requests;
    let again = serve("1..4");
    assert_eq!(bench.registry.stats().sum("").n_requests, before);
    assert_eq!(again.ready["dir"], high.ready["dir"]);
    let kept = bench.path("cache").join("acme--moe").join(&commit);
    assert_eq!(
        names(&kept),
        ["expert-server-experts-0..1", "expert-server-experts-1..4"]
    );
}

#[test]
fn it_drains_when_told_to_stop() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    let hidden = Vindex::open(&bench.path("out"))
        .unwrap()
        .index()
        .config
        .hidden as usize;
    for signal in ["TERM", "INT"] {
        let socket = bench.path("s.sock");
        let listen = format!("unix:{}", socket.display());
        let served = Served::start(&bench, &["out", "--listen", &listen], &[]);
        let remote = Remote::connect(&[served.address()], options(&bench.path("out"), "")).unwrap();
        answer(&remote, 0, 1, hidden, &[0]);
        served.signal(signal);
        let (status, stderr) = served.ended();
        assert_eq!(status.code(), Some(0), "{signal}: {stderr}");
        assert!(stderr.contains("stopping"), "{stderr}");
        assert!(!socket.exists());
    }
}

#[test]
fn what_cannot_be_served_is_said_before_anything_listens() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    bench.ok(&["publish", "out", "--repo", "acme/full", "--slices", "none"]);
    bench.ok(&["pull", "acme/full", "-o", "node", "--slice", "attention"]);
    bench.ok(&["pull", "acme/full", "-o", "low", "--layers", "0..1"]);
    fs::create_dir(bench.path("empty")).unwrap();
    fs::write(bench.path("blank"), "\n").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (args, words) in [
        (
            &["out", "--listen", "0.0.0.0:0"][..],
            &[
                "refusing to serve on 0.0.0.0:0 without a secret",
                "--secret-file",
                "SKULK_SECRET",
            ][..],
        ),
        (
            &["out", "--listen", "weights.example:7844"],
            &["refusing to serve on weights.example:7844 without a secret"],
        ),
        (
            &["out", "--http", "0.0.0.0:0"],
            &[
                "refusing to show metrics on 0.0.0.0:0 without a token",
                "--http-token-file",
            ],
        ),
        (
            &["out", "--listen", &taken],
            &[
                "cannot listen on 127.0.0.1:",
                "in use",
                "name another address with --listen",
            ],
        ),
        (
            &["out", "--listen", "127.0.0.1:0", "--http", &taken],
            &["for HTTP", "in use", "--http"],
        ),
        (
            &["nowhere"],
            &["there is no directory nowhere", "owner/name[@revision]"],
        ),
        (
            &["empty"],
            &[
                "cannot serve empty",
                "it has no index.json",
                "hint: make one with `larql extract`",
            ],
        ),
        (
            &["out", "--layers", "1..3"],
            &["layers 1..3 are not all in the model, which has layers 0..2"],
        ),
        (
            &["out", "--experts", "0..2"],
            &["the model is dense, it has no experts"],
        ),
        (
            &["low", "--layers", "0..2"],
            &[
                "complete for the slice expert-server of layers 0..1, not for expert-server",
                "larql pull",
            ],
        ),
        (
            &["node"],
            &[
                "complete for the slice attention, not for expert-server",
                "larql pull",
            ],
        ),
        (
            &["out", "--secret-file", "missing"],
            &["cannot read the secret in missing"],
        ),
        (
            &["out", "--secret-file", "blank"],
            &["there is no secret in blank", "openssl rand"],
        ),
        (
            &["acme/none", "--cache", "cache"],
            &["cannot pull acme/none", "no repository acme/none"],
        ),
        (
            &["acme/full@nothing", "--cache", "cache"],
            &["cannot pull acme/full", "has no revision nothing"],
        ),
        (
            &["acme/full", "--layers", "5..6", "--cache", "cache"],
            &["layers 5..6 are not all in the model"],
        ),
        (
            &["acme/full"],
            &["unknown where to keep what is pulled", "--cache"],
        ),
    ] {
        let run = bench.run(&[&["serve"], args].concat());
        assert_eq!(run.code, Some(1), "{args:?}\n{}{}", run.stdout, run.stderr);
        assert_eq!(run.stdout, "", "{args:?}");
        for word in words {
            assert!(
                run.stderr.contains(word),
                "{args:?}: {word}\n{}",
                run.stderr
            );
        }
    }
    for args in [
        &["out", "--listen", "7844"][..],
        &["out", "--listen", "unix:low.sock"],
        &["out", "--layers", "2..1"],
        &["out", "--threads", "0"],
    ] {
        let run = bench.run(&[&["serve"], args].concat());
        assert_eq!(run.code, Some(2), "{args:?}\n{}{}", run.stdout, run.stderr);
    }
}

#[test]
fn beyond_this_machine_a_secret_opens_and_a_token_shows() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    fs::write(bench.path("token"), "tok-en\n").unwrap();
    let args = [
        "out",
        "--listen",
        "0.0.0.0:0",
        "--http",
        "0.0.0.0:0",
        "--http-token-file",
        "token",
    ];
    let served = Served::start(&bench, &args, &[("SKULK_SECRET", "s3cret-of-tests")]);
    assert!(
        !served.ready.to_string().contains("s3cret")
            && !served.ready.to_string().contains("tok-en")
    );
    assert_eq!(served.get("/metrics", None).0, 401);
    assert_eq!(served.get("/metrics", Some("tok-eN")).0, 401);
    assert_eq!(served.get("/metrics", Some("tok-en")).0, 200);
    assert_eq!(
        (served.get("/health", None).0, served.get("/ready", None).0),
        (200, 200)
    );
}

/// 20 GB of weights that are all holes: nothing but the index is read before a node asks, and then only its layer.
#[cfg(target_os = "linux")]
#[test]
fn who_says_nothing_keeps_nobody_from_asking_whether_it_lives() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    let served = Served::start(&bench, &["out", "--listen", "127.0.0.1:0"], &[]);
    let silent: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(served.text("http")).unwrap())
        .collect();
    assert_eq!(served.get("/health", None), (200, "ok\n".to_owned()));
    assert_eq!(served.get("/ready", None).0, 200);
    drop(silent);
}

#[test]
fn a_large_vindex_is_ready_at_once_and_holds_what_was_asked_for() {
    let bench = Bench::new();
    bench.ok(&["extract", &model("llama"), "-o", "small", "--quant", "f32"]);
    let dir = bench.path("large");
    let layer_bytes = write_large(&bench.path("small"), &dir);
    let served: Vec<Served> = (0..3)
        .map(|_| Served::start(&bench, &["large", "--listen", "127.0.0.1:0"], &[]))
        .collect();
    assert!(served[0].ready["held_bytes"].as_u64().unwrap() > 20 << 30);
    let took = served.iter().map(|served| served.took).min().unwrap();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let resident = |served: &Served| served.metric("process_resident_memory_bytes");
    assert!(
        resident(&served[0]) < 100 << 20,
        "{} bytes",
        resident(&served[0])
    );

    let mut asked = options(&dir, "");
    asked.deadline = Duration::from_secs(60);
    let remote = Remote::connect(&[served[0].address()], asked).unwrap();
    let hidden = Vindex::open(&dir).unwrap().index().config.hidden as usize;
    let mut out = vec![1.0; hidden];
    let batch = Batch {
        rows: &rows(1, hidden),
        visits: &[Visit { row: 0, expert: 0 }],
    };
    remote.forward(7, batch, &mut out).unwrap();
    assert!(out.iter().all(|value| *value == 0.0));
    let held = resident(&served[0]);
    assert!(
        (layer_bytes..layer_bytes + (100 << 20)).contains(&held),
        "{held} bytes, a layer has {layer_bytes}"
    );
}

/// A vindex of dense f32 layers, 20 GB as the index tells and nothing on disk; how long a layer is.
fn write_large(small: &Path, dir: &Path) -> u64 {
    const N_LAYERS: u32 = 160;
    const HIDDEN: u64 = 2048;
    const FFN: u64 = 5632;
    let mut index = Index::from_json(&fs::read(small.join(INDEX_FILE)).unwrap()).unwrap();
    index.config.n_layers = N_LAYERS;
    index.config.hidden = HIDDEN as u32;
    index.config.ffn = FFN as u32;
    let tensor_bytes = HIDDEN * FFN * 4;
    let n_parts = 2 + 2 * N_LAYERS;
    let mut parts = Vec::new();
    let mut tensors = Vec::new();
    for number in 0..n_parts {
        let layer = (number.max(2) - 2) / 2;
        let (component, size_bytes) = match number {
            0 => (Component::Metadata, 4096),
            1 => (Component::Embeddings, 4096),
            n if n % 2 == 0 => (Component::Attention { layer }, 4096),
            _ => (Component::FeedForward { layer }, 4096 + 3 * tensor_bytes),
        };
        parts.push(Part {
            file: format!("{}-{:05}-of-{n_parts:05}.gguf", index.stem, number + 1),
            component,
            size_bytes,
            sha256: "0".repeat(64),
        });
        if let Component::FeedForward { layer } = component {
            for (i, (name, ne)) in [
                ("gate", [HIDDEN, FFN]),
                ("up", [HIDDEN, FFN]),
                ("down", [FFN, HIDDEN]),
            ]
            .into_iter()
            .enumerate()
            {
                tensors.push(Tensor {
                    name: format!("blk.{layer}.ffn_{name}.weight"),
                    block_type: index
                        .tensors
                        .iter()
                        .find(|t| t.name.contains("ffn_up"))
                        .unwrap()
                        .block_type,
                    ne: ne.to_vec(),
                    part: number,
                    offset_bytes: 4096 + i as u64 * tensor_bytes,
                    size_bytes: tensor_bytes,
                    experts: None,
                    sha256: None,
                });
            }
        }
    }
    index.parts = parts;
    index.tensors = tensors;
    fs::create_dir(dir).unwrap();
    for part in &index.parts {
        File::create(dir.join(&part.file))
            .unwrap()
            .set_len(part.size_bytes)
            .unwrap();
    }
    fs::write(dir.join(INDEX_FILE), index.to_json()).unwrap();
    fs::write(dir.join(SLICE_FILE), "{\"slice\":\"full\"}\n").unwrap();
    3 * tensor_bytes
}
