//! A program that runs beside the demo until it is told to stop.
//!
//! Invariant: it does not outlive its [`Process`]: dropped without [`Process::stop`], it is killed.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use terminal::Failure;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A running program.
pub(super) struct Process {
    name: &'static str,
    child: Child,
}

impl Process {
    /// Starts a program that says in one line of JSON that it is ready. What else it has to say goes to `log`.
    pub(super) async fn start(
        name: &'static str,
        mut command: Command,
        log: &Path,
        within: Duration,
    ) -> Result<(Process, Value), Failure> {
        let file = File::create(log).map_err(|error| Failure::io("cannot write", log, error))?;
        command
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .map_err(Failure::of(format!("cannot run {name}")))?;
        let Some(stdout) = child.stdout.take() else {
            return Err(Failure::new(format!("{name} has no standard output")));
        };
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(within, lines.next_line()).await;
        let line =
            line.map_err(|_| Failure::new(format!("{name} was not ready within {within:?}")))?;
        let line = line.map_err(Failure::of(format!("cannot read what {name} says")))?;
        let ready = line.and_then(|line| serde_json::from_str::<Value>(&line).ok());
        let Some(ready) = ready.filter(|ready| ready.get("error").is_none()) else {
            // The log goes with the demo's folder, so that its words are told here.
            let said = fs::read_to_string(log).unwrap_or_default();
            return Err(
                Failure::new(format!("{name} did not come up")).hint(said.trim().to_owned())
            );
        };
        // Nobody reads further lines; they must not fill the pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok((Process { name, child }, ready))
    }

    /// Memory that it holds at this moment; unknown where the system has no `/proc`.
    pub(super) fn rss_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(kib * 1024)
    }

    /// Asks it to stop and waits for its end.
    pub(super) async fn stop(mut self, within: Duration) -> Result<(), Failure> {
        self.terminate();
        match tokio::time::timeout(within, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Failure::new(format!("{} ended with {status}", self.name))),
            Ok(Err(error)) => {
                Err(Failure::new(format!("cannot wait for {}", self.name)).cause(error))
            }
            Err(_) => Err(Failure::new(format!(
                "{} did not stop within {within:?}",
                self.name
            ))),
        }
    }

    #[cfg(target_os = "linux")]
    fn terminate(&mut self) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        let sent = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        if !matches!(sent, Some(Ok(()))) {
            // It has ended, which the wait tells.
            let _ = self.child.start_kill();
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn terminate(&mut self) {
        let _ = self.child.start_kill();
    }
}
