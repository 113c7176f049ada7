//! What drafting brings: a trained model served with its head and without, unsplit and split over a slow link, on the
//! prompts that come with it.
//!
//! Invariant: with and without take turns prompt by prompt and answer the same requests; the best of the rounds counts
//! for each prompt and either side; an answer that differs is a failure. Leaves out sampled requests and many at once.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bench::extract;
use crate::build::{self, Done, root};
use crate::fleet::Fleet;
use crate::proxy::{self, Network};

const N_ROUNDS: usize = 3;
const N_TOKENS: usize = 64;
/// Each way.
const DELAY_MS: f64 = 1.0;
/// A request that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the bench and prints the table of `BENCHMARKS.md`.
pub(crate) fn run() -> Done {
    let programs = build::programs()?;
    let folder = build::workspace("draft")?;
    let source = root().join("models/kjv");
    let head = folder.join("mtp.safetensors");
    write_head(&source, &head)?;
    let prompts = prompts(&source)?;
    let secret_file = folder.join("secret");
    std::fs::write(&secret_file, "of a bench").map_err(|error| error.to_string())?;

    println!("| model and head | drafts | accepted | plain tok/s | drafting tok/s | ratio |");
    println!("|---|---|---:|---:|---:|---:|");
    for recipe in ["f32", "q4k"] {
        let vindex = folder.join(format!("{recipe}.vindex"));
        extract(&programs.larql, &source, &vindex, recipe)?;
        let fleet = Fleet {
            larql: programs.larql.clone(),
            vindex: vindex.clone(),
            secret_file: secret_file.clone(),
        };
        let server = fleet.serve(&vindex, "127.0.0.1:0", None)?;
        let network = Network {
            delay_ms: DELAY_MS,
            ..Network::good()
        };
        let (far, _) = proxy::start("127.0.0.1:0", &server.address, network)?;
        let mtp = format!("mtp={}", head.display());
        for (place, ffn) in [
            ("unsplit", None),
            ("split, 1 ms each way", Some(far.as_str())),
        ] {
            let node = |more: &[&str]| {
                Node::start(
                    &programs.skulk,
                    &vindex,
                    ffn.map(|far| (far, &*secret_file)),
                    more,
                )
            };
            let plain = node(&[])?;
            for (name, more) in [
                ("head", vec!["--draft", &mtp]),
                (
                    "head, 1 each step",
                    vec!["--draft", &mtp, "--draft-depth", "1"],
                ),
                ("n-gram", vec!["--draft", "ngram"]),
            ] {
                let told = compare(&plain, &node(&more)?, &prompts)?;
                println!(
                    "| {recipe}, {place} | {name} | {:.3} of {} | {:.0} | {:.0} | {:.2} |",
                    told.n_accepted as f64 / told.n_drafted.max(1) as f64,
                    told.n_drafted,
                    told.plain,
                    told.drafting,
                    told.drafting / told.plain,
                );
            }
        }
    }
    Ok(())
}

/// What a comparison found.
struct Told {
    /// Of all rounds.
    n_drafted: u64,
    n_accepted: u64,
    /// Tokens a second, over all prompts.
    plain: f64,
    drafting: f64,
}

fn compare(plain: &Node, drafting: &Node, prompts: &[Vec<u64>]) -> Done<Told> {
    let mut best = vec![[Duration::MAX; 2]; prompts.len()];
    let (mut n_accepted, mut n_drafted, mut n_tokens) = (0, 0, 0);
    for round in 0..N_ROUNDS {
        n_tokens = 0;
        for (prompt, best) in prompts.iter().zip(&mut best) {
            let (one, other) = (plain.complete(prompt)?, drafting.complete(prompt)?);
            if one.text != other.text {
                return Err(format!(
                    "with guesses the answer differs:\n{}\n{}",
                    one.text, other.text
                ));
            }
            best[0] = best[0].min(one.took);
            best[1] = best[1].min(other.took);
            n_tokens += one.n_tokens;
            // In the first round nothing is known yet of costs and chances.
            if round > 0 {
                n_accepted += other.n_accepted;
                n_drafted += other.n_accepted + other.n_rejected;
            }
        }
    }
    let rate = |side: usize| {
        let all: Duration = best.iter().map(|best| best[side]).sum();
        n_tokens as f64 / all.as_secs_f64()
    };
    Ok(Told {
        n_drafted,
        n_accepted,
        plain: rate(0),
        drafting: rate(1),
    })
}

/// The tokens of each prompt, without the one that begins a document, as the recorded continuations were made.
fn prompts(source: &Path) -> Done<Vec<Vec<u64>>> {
    let path = source.join("prompts.json");
    let text = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let all: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let ids = |prompt: &Value| -> Vec<u64> {
        let ids = prompt["prompt_ids"].as_array().into_iter().flatten();
        ids.skip(1).filter_map(Value::as_u64).collect()
    };
    Ok(all["prompts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(ids)
        .collect())
}

/// The head of the model: its last shard with the metadata that docs/sidecars.md asks for. Nobody reads the other tensors.
fn write_head(source: &Path, target: &Path) -> Done {
    let shard = source.join("model-00002-of-00002.safetensors");
    let said = |error: std::io::Error| format!("cannot write the head: {error}");
    let bytes = std::fs::read(shard).map_err(said)?;
    let n = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n)) as usize;
    let header = bytes.get(8..8 + n).ok_or("the shard has no header")?;
    let mut header: Value = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    header["__metadata__"] = json!({
        "skulk.format": "mtp/1", "skulk.layout": "block", "skulk.norm_convention": "actual_scale",
        "skulk.concat_order": "embed_first", "skulk.hidden_state": "before_final_norm",
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(&bytes[8 + n..]);
    std::fs::write(target, file).map_err(said)
}

/// `skulk serve` in a process of its own.
struct Node {
    child: Child,
    host: String,
}

/// An answer.
struct Answer {
    text: String,
    n_tokens: u64,
    n_accepted: u64,
    n_rejected: u64,
    took: Duration,
}

impl Node {
    fn start(
        skulk: &PathBuf,
        vindex: &Path,
        ffn: Option<(&str, &Path)>,
        more: &[&str],
    ) -> Done<Node> {
        let mut command = Command::new(skulk);
        command.arg("serve").arg(vindex);
        command.args([
            "--listen",
            "127.0.0.1:0",
            "--json",
            "--threads",
            "1",
            "--name",
            "kjv",
        ]);
        if let Some((address, secret_file)) = ffn {
            command
                .args(["--ffn", address, "--secret-file"])
                .arg(secret_file);
        }
        let child = command
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn();
        let mut child = child.map_err(|error| format!("cannot start skulk serve: {error}"))?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout)
                .read_line(&mut line)
                .map_err(|error| format!("cannot read skulk serve: {error}"))?;
        }
        let told: Value = serde_json::from_str(&line).unwrap_or_default();
        let url = told["url"]
            .as_str()
            .and_then(|url| url.strip_prefix("http://"));
        let host = url.map(str::to_owned);
        // Whatever happens from here on, the process ends with its value.
        let mut node = Node {
            child,
            host: String::new(),
        };
        node.host = host.ok_or_else(|| format!("skulk serve did not become ready: {line:?}"))?;
        Ok(node)
    }

    /// Asks for a greedy continuation.
    fn complete(&self, prompt: &[u64]) -> Done<Answer> {
        let body = json!({
            "model": "kjv", "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": true,
        })
        .to_string();
        let failed = |error: std::io::Error| format!("cannot ask {}: {error}", self.host);
        let began = Instant::now();
        let mut stream = TcpStream::connect(&self.host).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            self.host,
            body.len()
        );
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(failed)?;
        let took = began.elapsed();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let told: Value = serde_json::from_str(body)
            .map_err(|error| format!("{} answered {answer:?}: {error}", self.host))?;
        let text = told["choices"][0]["text"].as_str();
        let usage = &told["usage"];
        let details = &usage["completion_tokens_details"];
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        Ok(Answer {
            text: text
                .ok_or_else(|| format!("{} answered {told}", self.host))?
                .to_owned(),
            n_tokens: number(&usage["completion_tokens"]),
            n_accepted: number(&details["accepted_prediction_tokens"]),
            n_rejected: number(&details["rejected_prediction_tokens"]),
            took,
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It fails when the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
