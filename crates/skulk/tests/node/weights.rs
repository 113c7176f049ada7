//! A weight server in a process of its own, so that it can be killed: this program of tests, started once more for one
//! test.
//!
//! Invariant: it ends when it is killed or when the process that started it ends.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use engine::wire::{Identity, Listener, Server, ServerLimits, ServerOptions};
use engine::{Local, Pool};
use vindex::{Share, Vindex};

/// Of the process that serves: where it listens, and the vindex.
const LISTEN: &str = "SKULK_TEST_LISTEN";
const DIR: &str = "SKULK_TEST_VINDEX";

/// A weight server of the model that nodes of tests serve.
pub(crate) struct Weights {
    child: Child,
    pub(crate) address: String,
}

impl Weights {
    /// Starts one and waits until it listens.
    pub(crate) fn start(listen: &str) -> Weights {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "weights::a_weight_server_can_be_killed"])
            .arg("--nocapture")
            .env(LISTEN, listen)
            .env(DIR, crate::vindex::with_template())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut lines = stdout.lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.split_once("listening on ")?.1.to_owned()));
        // What it says later has nobody to read it, and must not end it.
        thread::spawn(move || lines.for_each(drop));
        let address = address.expect("a weight server listens");
        Weights { child, address }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it has ended");
    }

    /// Another process in the place of one that was killed.
    pub(crate) fn start_again(&mut self) {
        *self = Weights::start(&self.address);
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the process that [`Weights::start`] starts, the server.
#[test]
fn a_weight_server_can_be_killed() {
    if let Ok(listen) = std::env::var(LISTEN) {
        return serve(&listen);
    }
    let mut weights = Weights::start("127.0.0.1:0");
    TcpStream::connect(&weights.address).expect("it listens");
    weights.kill();
    TcpStream::connect(&weights.address).expect_err("nobody listens");
    weights.start_again();
    TcpStream::connect(&weights.address).expect("it listens again");
}

fn serve(listen: &str) {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("a directory"));
    let share = |index: &vindex::Index, _| Share::of_experts(index, None, None);
    let vindex = Arc::new(Vindex::open_as(&dir, share).expect("a vindex"));
    let local = Local::new(vindex.clone(), Arc::new(Pool::new(1))).expect("its weights");
    let options = ServerOptions {
        model: Identity::of(&vindex),
        layers: local.layers(),
        experts: local.experts(),
        secret: Default::default(),
        limits: ServerLimits::default(),
    };
    let server = Server::new(Arc::new(local), options).expect("a server");
    let listener = Listener::bind(&listen.parse().expect("an address")).expect("a free address");
    println!("listening on {}", listener.address());
    thread::spawn(move || server.serve(&listener));
    // Its end is the end of the process that started this one.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
