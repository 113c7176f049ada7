//! `skulk demo`: a model published, then served split between two processes of this machine, and asked something.
//!
//! A registry in this process stands for the Hub. `skulk-weights publish` puts a small model there; `larql serve` pulls
//! the feed-forward weights of that commit and serves them; `skulk serve` pulls attention and asks it for the rest.
//!
//! Invariant: nothing is special to the demo but the address of the Hub; every number was measured in this run. Every
//! wait has a deadline, and no process or directory is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Token};
use serde_json::{Value, json};
use terminal::{Failure, Output, size, write};

use crate::cli;
use crate::context::Context;

mod ask;
mod process;

use ask::{Asked, ask, metric};
use process::Process;

const OWNER: &str = "foxlight-demo";
const TARGET: &str = "foxlight-demo/kjv-full-q4-k-vindex";
/// The registry is gone when the demo ends, and is reached from this machine only.
const TOKEN: &str = "demo";
/// For a publication, and for each process to come up.
const STEP_MAX: Duration = Duration::from_secs(120);

/// Runs the demo in the directory that is to be kept, or in one that goes away.
pub(crate) fn demo(args: &cli::Demo, context: &Context, output: Output) -> Result<(), Failure> {
    let programs = Programs::beside_this()?;
    let temporary = match &args.keep {
        Some(_) => None,
        None => {
            Some(tempfile::tempdir().map_err(Failure::of("cannot make a temporary directory"))?)
        }
    };
    let root = match (&args.keep, &temporary) {
        (Some(root), _) => root.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => PathBuf::new(),
    };
    fs::create_dir_all(&root).map_err(|error| Failure::io("cannot make", &root, error))?;
    let options = registry::Options {
        token: Some(TOKEN.to_owned()),
        ..registry::Options::default()
    };
    let running = registry::spawn(&root.join("registry"), options)
        .map_err(Failure::of("cannot serve a registry"))?;
    let stage = Stage {
        programs,
        root,
        endpoint: running.url().to_owned(),
        output,
    };
    let mut stop = context.stop()?;
    // An interrupt ends the wait and drops what runs.
    context.wait(async {
        tokio::select! {
            done = play(&stage, args) => done,
            () = stop.told() => Err(Failure::Interrupted),
        }
    })
}

/// The programs of one build.
struct Programs {
    larql: PathBuf,
    skulk: PathBuf,
    skulk_weights: PathBuf,
}

impl Programs {
    fn beside_this() -> Result<Programs, Failure> {
        let skulk =
            std::env::current_exe().map_err(Failure::of("cannot tell where this program is"))?;
        let find = |name: &str| {
            let path = skulk.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX));
            if path.is_file() {
                return Ok(path);
            }
            Err(
                Failure::new(format!("there is no {name} beside {}", skulk.display()))
                    .hint("`cargo xtask demo` builds all programs and runs the demo with them"),
            )
        };
        Ok(Programs {
            larql: find("larql")?,
            skulk_weights: find("skulk-weights")?,
            skulk,
        })
    }
}

/// Where the demo takes place.
struct Stage {
    programs: Programs,
    root: PathBuf,
    /// Of the registry.
    endpoint: String,
    output: Output,
}

impl Stage {
    /// A command in the surroundings of the demo's Hub.
    fn command(&self, program: &Path) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(program);
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_TOKEN", TOKEN)
            .env("HF_HOME", self.root.join("hf"))
            .env("SKULK_WEIGHTS_LARQL", &self.programs.larql)
            .stdin(Stdio::null());
        for name in [
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN",
            "SKULK_WEIGHTS_COLLECTION",
            "SKULK_API_KEY",
            "SKULK_SECRET",
        ] {
            command.env_remove(name);
        }
        command
    }
}

async fn play(stage: &Stage, args: &cli::Demo) -> Result<(), Failure> {
    let output = stage.output;
    output.text(format_args!("A Hub of our own runs at {}.", stage.endpoint))?;
    let settings = Settings {
        endpoint: stage.endpoint.clone(),
        token: Token::new(TOKEN),
        ..Settings::default()
    };
    let hub = Hub::new(settings).map_err(failed)?;
    let (bytes, collection) = add_checkpoint(&hub, &args.model_dir).await?;
    output.text(format_args!(
        "It holds the checkpoint hf://{OWNER}/kjv, {}.\n",
        size(bytes)
    ))?;

    output.text("$ skulk-weights publish --model demo/kjv-full-q4-k --artifact vindex")?;
    publish(stage, &collection).await?;
    let repo: RepoId = TARGET.parse().map_err(failed)?;
    let snapshot = hub.snapshot(&repo, None).await.map_err(failed)?;
    let pinned = format!("{TARGET}@{}", snapshot.commit());
    output.text(format_args!(
        "published hf://{pinned}: {} files\n",
        snapshot.files().len()
    ))?;

    output.text(format_args!("$ larql serve {pinned}"))?;
    let mut command = stage.command(&stage.programs.larql);
    command
        .args([
            "--json",
            "serve",
            &pinned,
            "--listen",
            "127.0.0.1:0",
            "--cache",
        ])
        .arg(stage.root.join("weights"));
    let (weights, ready) = Process::start(
        "larql serve",
        command,
        &stage.root.join("larql.log"),
        STEP_MAX,
    )
    .await?;
    let address = text_of(&ready, "listen")?;
    output.text(format_args!(
        "the weight server holds feed-forward weights alone and listens at {address}\n"
    ))?;

    output.text(format_args!("$ skulk serve {pinned} --ffn {address}"))?;
    let mut command = stage.command(&stage.programs.skulk);
    command
        .args([
            "--json",
            "serve",
            &pinned,
            "--ffn",
            &address,
            "--listen",
            "127.0.0.1:0",
            "--cache",
        ])
        .arg(stage.root.join("node"));
    let (node, ready) = Process::start(
        "skulk serve",
        command,
        &stage.root.join("skulk.log"),
        STEP_MAX,
    )
    .await?;
    let url = text_of(&ready, "url")?;
    output.text(format_args!(
        "the node holds attention alone and speaks the OpenAI API at {url}/v1\n"
    ))?;

    output.text(format_args!(
        "$ curl {url}/v1/completions -d '{{\"prompt\": …, \"stream\": true}}'"
    ))?;
    let body = json!({
        "model": TARGET, "prompt": args.prompt, "max_tokens": args.tokens.get(), "temperature": 0, "stream": true,
    });
    if !output.json {
        write(&args.prompt)?;
    }
    let show = |text: &str| if output.json { Ok(()) } else { write(text) };
    let asked = ask(&url, &body, STEP_MAX, show).await?;
    output.text("\n")?;
    let measured = measure(&url, &asked, &weights, &node).await?;
    output.text(table(&measured))?;
    output.value(&measured)?;
    node.stop(Duration::from_secs(10)).await?;
    weights.stop(Duration::from_secs(10)).await
}

fn failed(error: hub::Error) -> Failure {
    Failure::new("the demo's registry did not do what it was asked").cause(error)
}

fn text_of(ready: &Value, name: &str) -> Result<String, Failure> {
    let text = ready[name].as_str().map(str::to_owned);
    text.ok_or_else(|| Failure::new(format!("the ready line has no {name}: {ready}")))
}

/// Puts the model into the registry; how many bytes it has, and a collection for what is made of it.
async fn add_checkpoint(hub: &Hub, model_dir: &Path) -> Result<(u64, String), Failure> {
    let unreadable = |error| {
        Failure::io("cannot read the model in", model_dir, error)
            .hint("run in the repository's checkout, or name a checkpoint with --model-dir")
    };
    let mut additions = Vec::new();
    for entry in fs::read_dir(model_dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let metadata = fs::metadata(&path).map_err(unreadable)?;
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name.filter(|_| metadata.is_file()) {
            additions.push(Addition {
                path: name.to_owned(),
                size_bytes: metadata.len(),
                sha256: None,
                content: Content::File(path.clone()),
            });
        }
    }
    additions.sort_by(|a, b| a.path.cmp(&b.path));
    let bytes = additions.iter().map(|file| file.size_bytes).sum();
    let request = CommitRequest {
        summary: "Add the checkpoint".to_owned(),
        additions,
        deletions: Vec::new(),
    };
    let repo: RepoId = format!("{OWNER}/kjv").parse().map_err(failed)?;
    hub.create_repo(&repo, false).await.map_err(failed)?;
    hub.commit(&repo, &request, &|_| {}).await.map_err(failed)?;
    for collection in hub.collections(OWNER).await.map_err(failed)? {
        if collection.title == "Vindexes" {
            return Ok((bytes, collection.slug));
        }
    }
    let made = hub.create_collection(OWNER, "Vindexes", None, false).await;
    Ok((bytes, made.map_err(failed)?.slug))
}

/// Runs `skulk-weights publish` on an operator's config and manifest, as `catalog init` would have them begin.
async fn publish(stage: &Stage, collection: &str) -> Result<(), Failure> {
    let config = format!(
        "catalogs:\n- path: models.yaml\n  namespace: demo\n  hf_owner: {OWNER}\n  hf_collection: {collection}\n"
    );
    let manifest = format!(
        "models:\n- key: kjv-full-q4-k\n  source_model: {OWNER}/kjv\n  quant: q4k\n  tier: smoke\n  slices: [full]\n  \
         output_name: kjv-full-q4-k.vindex\n  hf_repo: {TARGET}\n"
    );
    for (name, text) in [("skulk-weights.yaml", config), ("models.yaml", manifest)] {
        let path = stage.root.join(name);
        fs::write(&path, text).map_err(|error| Failure::io("cannot write", &path, error))?;
    }
    let mut command = stage.command(&stage.programs.skulk_weights);
    command
        .arg("--config")
        .arg(stage.root.join("skulk-weights.yaml"))
        .args([
            "publish",
            "--model",
            "demo/kjv-full-q4-k",
            "--artifact",
            "vindex",
            "--scratch",
        ])
        .arg(stage.root.join("scratch"))
        .kill_on_drop(true);
    let done = tokio::time::timeout(STEP_MAX, command.output()).await;
    let done = done.map_err(|_| Failure::new("skulk-weights publish takes too long"))?;
    let done = done.map_err(Failure::of("cannot run skulk-weights"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(Failure::new(format!("skulk-weights publish failed ({})", done.status)).hint(said.trim()))
}

/// What the run has shown.
async fn measure(
    url: &str,
    asked: &Asked,
    weights: &Process,
    node: &Process,
) -> Result<Value, Failure> {
    let text = ask::get(&format!("{url}/metrics"), STEP_MAX).await?;
    let waited = metric(&text, "skulk_ffn_wait_seconds_total");
    let served = metric(&text, "skulk_ffn_served_seconds_total");
    let trips = metric(&text, "skulk_ffn_round_trips_total");
    let bytes = metric(&text, "skulk_ffn_sent_bytes_total")
        + metric(&text, "skulk_ffn_received_bytes_total");
    let rows = (asked.prompt_tokens + asked.tokens).max(1) as f64;
    let decode_s = asked.last.saturating_sub(asked.first).as_secs_f64();
    Ok(json!({
        "text": asked.text, "prompt_tokens": asked.prompt_tokens, "tokens": asked.tokens,
        "first_token_s": asked.first.as_secs_f64(),
        "tokens_per_second": asked.tokens.saturating_sub(1) as f64 / decode_s.max(1e-9),
        "at_the_weight_server": served / asked.last.as_secs_f64(),
        "on_the_wire": (waited - served).max(0.0) / asked.last.as_secs_f64(),
        "round_trips": trips, "round_trip_s": waited / trips.max(1.0),
        "bytes_per_token": bytes / rows,
        "node_rss_bytes": node.rss_bytes(), "weights_rss_bytes": weights.rss_bytes(),
    }))
}

fn table(measured: &Value) -> String {
    let number = |name: &str| measured[name].as_f64().unwrap_or_default();
    let memory = |name: &str| match measured[name].as_u64() {
        Some(bytes) => size(bytes).to_string(),
        None => "unknown".to_owned(),
    };
    let rows = [
        (
            "tokens/s",
            format!(
                "{:.0}, the first after {:.1} ms",
                number("tokens_per_second"),
                1e3 * number("first_token_s")
            ),
        ),
        (
            "time",
            format!(
                "{:.0} % at the weight server, {:.0} % on the wire, the rest at the node",
                100.0 * number("at_the_weight_server"),
                100.0 * number("on_the_wire")
            ),
        ),
        (
            "round trips",
            format!(
                "{:.0}, {:.0} µs each with the weight server's work",
                number("round_trips"),
                1e6 * number("round_trip_s")
            ),
        ),
        (
            "wire",
            format!("{} a token", size(number("bytes_per_token") as u64)),
        ),
        (
            "memory",
            format!(
                "node {}, weight server {}",
                memory("node_rss_bytes"),
                memory("weights_rss_bytes")
            ),
        ),
    ];
    let line = |(name, text): &(&str, String)| format!("{name:<12} {text}");
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}
