//! A node for a test, and clients that do what a well-made one would not.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) const KEY: &str = "test-key-0123456789";
const PATIENCE: Duration = Duration::from_secs(60);

/// The vindexes of all tests, made once.
pub(crate) mod vindex {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::OnceLock;

    use tempfile::TempDir;
    use vindex::{ExtractOptions, LocalDir, Recipe, extract, plan};

    /// A directory for files of tests.
    pub(crate) fn dir() -> PathBuf {
        static DIR: OnceLock<TempDir> = OnceLock::new();
        DIR.get_or_init(|| tempfile::tempdir().expect("a directory"))
            .path()
            .to_owned()
    }

    /// The checkpoint's chat template is in it.
    pub(crate) fn with_template() -> PathBuf {
        static MADE: OnceLock<PathBuf> = OnceLock::new();
        MADE.get_or_init(|| make(&checkpoint(), "with-template"))
            .clone()
    }

    /// There is no chat template in it.
    pub(crate) fn without_template() -> PathBuf {
        static MADE: OnceLock<PathBuf> = OnceLock::new();
        let made = MADE.get_or_init(|| {
            let copy = dir().join("checkpoint");
            fs::create_dir_all(&copy).expect("a directory");
            for entry in fs::read_dir(checkpoint()).expect("the checkpoint") {
                let path = entry.expect("an entry").path();
                fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("a copy");
            }
            let path = copy.join("tokenizer_config.json");
            let text = fs::read(&path).expect("the tokenizer's settings");
            let mut settings: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
            settings
                .as_object_mut()
                .expect("an object")
                .remove("chat_template");
            fs::write(&path, settings.to_string()).expect("a file");
            make(&copy, "without-template")
        });
        made.clone()
    }

    fn checkpoint() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/kjv")
    }

    fn make(checkpoint: &Path, name: &str) -> PathBuf {
        let out = dir().join(name);
        let source = LocalDir::open(checkpoint).expect("the checkpoint");
        let plan = plan(&source, Recipe::Q4k).expect("a plan");
        let options = ExtractOptions {
            threads: 2,
            allow_nonfinite: false,
        };
        extract(&source, &plan, &out, &options, &|_| {}).expect("a vindex");
        out
    }
}

/// What a node is started with.
pub(crate) struct Options {
    pub(crate) with_key: bool,
    /// The model has its own chat template.
    pub(crate) recipe_template: bool,
    pub(crate) template: Option<PathBuf>,
    /// Options about weight servers, and whatever else.
    pub(crate) more: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            with_key: false,
            recipe_template: true,
            template: None,
            more: Vec::new(),
        }
    }
}

/// A running node.
pub(crate) struct Node {
    child: Child,
    host: String,
}

impl Node {
    pub(crate) fn start(options: &Options) -> Node {
        let dir = if options.recipe_template {
            vindex::with_template()
        } else {
            vindex::without_template()
        };
        let mut command = skulk();
        command.args([
            "--json",
            "serve",
            "--name",
            "kjv",
            "--listen",
            "127.0.0.1:0",
            "--threads",
            "2",
        ]);
        command.arg(dir).args(&options.more);
        if options.with_key {
            command.env("SKULK_API_KEY", format!("another-key-1,{KEY}"));
        }
        if let Some(template) = &options.template {
            command.arg("--chat-template").arg(template);
        }
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .expect("skulk starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let ready: Value = serde_json::from_str(&line).expect("the ready line is JSON");
        let url = ready["url"].as_str().expect("a url");
        let host = url.strip_prefix("http://").expect("http").to_owned();
        Node { child, host }
    }

    /// A connection on which a request was sent.
    pub(crate) fn send(&self, path: &str, body: &Value) -> TcpStream {
        self.request("POST", path, KEY, &body.to_string())
    }

    /// Bytes in place of a body, with a length of their own choice.
    pub(crate) fn send_bytes(&self, path: &str, body: &[u8], said: u64) -> TcpStream {
        let mut stream = self.dial();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\ncontent-length: {said}\r\n\r\n"
        );
        // Whoever is refused at the head may be cut off before the rest is written.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body));
        stream
    }

    pub(crate) fn dial(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.host).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a deadline");
        stream
    }

    fn request(&self, method: &str, path: &str, key: &str, body: &str) -> TcpStream {
        let mut stream = self.dial();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream
            .write_all(head.as_bytes())
            .expect("the request is sent");
        stream
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(self.send(path, body))
    }

    pub(crate) fn get_as(&self, path: &str, key: &str) -> (u16, Value) {
        answer(self.request("GET", path, key, ""))
    }

    /// The data of each event.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let text = read_all(self.send(path, body));
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(str::to_owned).collect()
    }

    /// The sum of the lines that begin so.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = read_all(self.request("GET", "/metrics", KEY, ""));
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    pub(crate) fn wait_for(&self, what: &str, is_so: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < until, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Memory that the node holds.
    #[cfg(target_os = "linux")]
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("the node runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.expect("a size").trim().trim_end_matches(" kB");
        kib.parse::<u64>().expect("a number") * 1024
    }

    /// Names of the files whose content it has mapped and that end so.
    #[cfg(target_os = "linux")]
    pub(crate) fn mapped(&self, end: &str) -> Vec<String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id()));
        let maps = maps.expect("the node runs");
        let paths = maps.lines().filter(|line| line.ends_with(end));
        paths
            .filter_map(|line| Some(line.rsplit_once('/')?.1.to_owned()))
            .collect()
    }

    #[cfg(unix)]
    pub(crate) fn terminate(&self) {
        let status = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status();
        assert!(status.expect("kill runs").success());
    }

    /// How it ended, within a time.
    pub(crate) fn ended(&mut self, within: Duration) -> ExitStatus {
        let until = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status;
            }
            assert!(Instant::now() < until, "the node does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The data of each event of a stream, as it comes.
pub(crate) fn events(stream: TcpStream) -> impl Iterator<Item = String> {
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.filter_map(|line| Some(line.strip_prefix("data: ")?.to_owned()))
}

/// All that comes until the connection ends, with the pieces of a chunked body joined as they came.
pub(crate) fn read_all(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A node that ends cuts the connection; what came before counts.
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8(bytes).expect("UTF-8")
}

/// Status and body.
pub(crate) fn answer(stream: TcpStream) -> (u16, Value) {
    let text = read_all(stream);
    let (head, body) = text.split_once("\r\n\r\n").expect("headers");
    let status = head
        .split(' ')
        .nth(1)
        .expect("a status")
        .parse()
        .expect("a number");
    assert!(head.contains("x-request-id: req_"), "{head}");
    (status, serde_json::from_str(body).expect("JSON"))
}

pub(crate) fn skulk() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skulk"));
    command.env_remove("SKULK_API_KEY").env("RUST_LOG", "warn");
    command
}

/// What the program says on standard output when all goes well.
pub(crate) fn says(arguments: &[&str]) -> String {
    let output = skulk().args(arguments).output().expect("skulk runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// What the program says when it fails.
pub(crate) fn fails(arguments: &[&str]) -> String {
    let output = skulk().args(arguments).output().expect("skulk runs");
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
