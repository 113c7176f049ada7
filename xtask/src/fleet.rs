//! Weight servers and nodes as processes of their own, to be killed, stopped and cut off.
//!
//! Invariant: a process that was started here ends with the value that holds it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::build::Done;

/// What all processes of a fleet share.
pub(crate) struct Fleet {
    pub(crate) larql: PathBuf,
    pub(crate) vindex: PathBuf,
    /// What servers and nodes share.
    pub(crate) secret_file: PathBuf,
}

/// Silence after which a node asks a replica.
pub(crate) const STALL: Duration = Duration::from_millis(500);

/// A weight server.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
}

impl Fleet {
    /// Serves `vindex` at `listen` and waits until it is ready; in a network namespace when one is named.
    pub(crate) fn serve(
        &self,
        vindex: &Path,
        listen: &str,
        namespace: Option<&str>,
    ) -> Done<Server> {
        let mut command = match namespace {
            None => Command::new(&self.larql),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(&self.larql);
                command
            }
        };
        let mut child = command
            .arg("serve")
            .arg(vindex)
            .args([
                "--listen",
                listen,
                "--http",
                "127.0.0.1:0",
                "--threads",
                "1",
                "--json",
                "--secret-file",
            ])
            .arg(&self.secret_file)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start larql serve: {error}"))?;
        let mut line = String::new();
        let read = child
            .stdout
            .take()
            .map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let told: Option<Value> = read
            .and_then(Result::ok)
            .and_then(|_| serde_json::from_str(&line).ok());
        let mut server = Server {
            child,
            address: String::new(),
        };
        let address = told.as_ref().and_then(|told| told["listen"].as_str());
        server.address = address
            .ok_or_else(|| format!("larql serve did not become ready on {listen}: {line:?}"))?
            .to_owned();
        Ok(server)
    }

    /// Starts a generation of `n_tokens` with feed-forward rows from `servers`, each layer within `deadline`; without
    /// servers, on its own.
    pub(crate) fn generate(
        &self,
        n_tokens: usize,
        servers: &[&str],
        deadline: Duration,
    ) -> Done<Node> {
        let ids: Vec<String> = (0..24).map(|i| (20 + i * 7 % 200).to_string()).collect();
        let mut command = Command::new(&self.larql);
        command
            .arg("run")
            .arg(&self.vindex)
            .args([
                "--ids",
                &ids.join(","),
                "--max-tokens",
                &n_tokens.to_string(),
            ])
            .args(["--greedy", "--ignore-eos", "--json", "--threads", "1"]);
        if !servers.is_empty() {
            command
                .args(["--ffn", &servers.join(","), "--secret-file"])
                .arg(&self.secret_file)
                .args([
                    "--ffn-stall",
                    &humantime::format_duration(STALL).to_string(),
                ])
                .args([
                    "--ffn-deadline",
                    &humantime::format_duration(deadline).to_string(),
                ]);
        }
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start larql run: {error}"))?;
        Ok(Node {
            child: Some(child),
            began: Instant::now(),
        })
    }
}

impl Server {
    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        // It fails when the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops it (`STOP`) or lets it go on (`CONT`).
    pub(crate) fn signal(&self, signal: Signal) -> Done {
        kill_process(Pid::from_child(&self.child), signal)
            .map_err(|error| format!("cannot signal larql serve: {error}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A generation that runs.
pub(crate) struct Node {
    child: Option<Child>,
    began: Instant,
}

/// How a generation ended.
#[derive(Debug, PartialEq)]
pub(crate) enum Ended {
    /// With these tokens.
    Tokens(Vec<u64>),
    /// With an exit status and a message.
    Error(String),
    /// Not at all, within the time it had.
    Hung,
}

impl Ended {
    /// How it would have ended after `n` tokens.
    pub(crate) fn first(&self, n: usize) -> Ended {
        match self {
            Ended::Tokens(tokens) => Ended::Tokens(tokens[..n.min(tokens.len())].to_vec()),
            Ended::Error(message) => Ended::Error(message.clone()),
            Ended::Hung => Ended::Hung,
        }
    }
}

impl Node {
    /// Whether it ended.
    pub(crate) fn has_ended(&mut self) -> Done<bool> {
        let ended = self.child.as_mut().map(Child::try_wait).transpose();
        ended
            .map(|ended| ended.flatten().is_some())
            .map_err(|error| format!("cannot wait for larql run: {error}"))
    }

    /// Waits for the end; how it ended.
    pub(crate) fn wait(mut self, limit: Duration) -> Done<Ended> {
        let mut child = self.child.take().ok_or("a generation is waited for once")?;
        loop {
            let ended = child
                .try_wait()
                .map_err(|error| format!("cannot wait for larql run: {error}"))?;
            if ended.is_some() {
                break;
            }
            if self.began.elapsed() > limit {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(Ended::Hung);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = child
            .wait_with_output()
            .map_err(|error| format!("cannot read larql run: {error}"))?;
        if !output.status.success() {
            return Ok(Ended::Error(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            ));
        }
        let told: Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("larql run --json printed no JSON: {error}"))?;
        let ids = told["ids"]
            .as_array()
            .ok_or("larql run --json told no ids")?;
        Ok(Ended::Tokens(
            ids.iter().filter_map(Value::as_u64).collect(),
        ))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
