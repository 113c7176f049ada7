//! What the wire costs: an empty round trip, one row and a prompt's rows, over a Unix socket and over TCP on loopback,
//! beside a plain blocking socket that sends the same number of bytes back and forth.
//!
//! `cargo bench -p engine --bench wire`. Microseconds; the best of several runs, since others may use the machine.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::wire::{
    Address, Identity, Listener, Remote, RemoteOptions, Secret, Server, ServerLimits, ServerOptions,
};
use engine::{Batch, FeedForward, FfnError, Visit};
use vindex::VindexId;

const HIDDEN: u32 = 4096;
const RUNS: usize = 15;

/// Gives each visit its row back.
struct Echo;

impl FeedForward for Echo {
    fn forward(&self, _layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        let hidden = HIDDEN as usize;
        for (visit, out) in batch.visits.iter().zip(out.chunks_exact_mut(hidden)) {
            out.copy_from_slice(&batch.rows[visit.row as usize * hidden..][..hidden]);
        }
        Ok(())
    }
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let unix: Address = format!("unix:{}/wire", folder.path().display())
        .parse()
        .expect("an address");
    let tcp: Address = "127.0.0.1:0".parse().expect("an address");
    println!("microseconds          unix      tcp");
    let [unix, tcp] = [unix, tcp].map(|at| measure(&at));
    let plain = |bytes: usize| {
        let (a, b) = UnixStream::pair().expect("a pair");
        let unix = back_and_forth(a, b, bytes);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let a =
            TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (b, _) = listener.accept().expect("a connection");
        a.set_nodelay(true).expect("no delay");
        b.set_nodelay(true).expect("no delay");
        (unix, back_and_forth(a, b, bytes))
    };
    let (plain_unix, plain_tcp) = plain(48);
    println!("plain, 48 bytes   {plain_unix:8.1} {plain_tcp:8.1}");
    println!("ping              {:8.1} {:8.1}", unix[0], tcp[0]);
    let (plain_unix, plain_tcp) = plain(48 + HIDDEN as usize * 4);
    println!("plain, one row    {plain_unix:8.1} {plain_tcp:8.1}");
    println!("one row           {:8.1} {:8.1}", unix[1], tcp[1]);
    println!("16 rows           {:8.1} {:8.1}", unix[2], tcp[2]);
    println!("512 rows          {:8.1} {:8.1}", unix[3], tcp[3]);
    let gb = |micros: f64| 2.0 * 512.0 * f64::from(HIDDEN) * 4.0 / micros / 1e3;
    println!("512 rows, GB/s    {:8.2} {:8.2}", gb(unix[3]), gb(tcp[3]));
}

/// Ping, one row, 16 rows, 512 rows.
fn measure(at: &Address) -> [f64; 4] {
    let model = Identity {
        id: VindexId::of(b"a bench"),
        hidden: HIDDEN,
        n_layers: 1,
        n_experts: 1,
        n_beside: 0,
    };
    let options = ServerOptions {
        model,
        layers: 0..1,
        experts: 0..1,
        secret: Secret::default(),
        limits: ServerLimits::default(),
    };
    let listener = Listener::bind(at).expect("a free address");
    let address = listener.address().clone();
    let server = Server::new(Arc::new(Echo), options).expect("a server");
    let thread = thread::spawn({
        let server = server.clone();
        move || server.serve(&listener).expect("it serves")
    });
    let remote = Remote::connect(&[address], RemoteOptions::new(model)).expect("a server");
    let ping = best(500, || {
        remote.ping(0).expect("a pong");
    });
    let rows = |n_rows: usize, n_calls: usize| {
        let rows = vec![0.5; n_rows * HIDDEN as usize];
        let visits: Vec<Visit> = (0..n_rows as u32)
            .map(|row| Visit { row, expert: 0 })
            .collect();
        let mut out = vec![0.0; rows.len()];
        best(n_calls, || {
            let batch = Batch {
                rows: &rows,
                visits: &visits,
            };
            remote.forward(0, batch, &mut out).expect("rows");
        })
    };
    let times = [ping, rows(1, 500), rows(16, 100), rows(512, 5)];
    drop(remote);
    server.drain(Duration::from_secs(1));
    thread.join().expect("it ends");
    times
}

fn back_and_forth<S: Read + Write + Send + 'static>(mut a: S, mut b: S, n_bytes: usize) -> f64 {
    let echo = thread::spawn(move || {
        let mut bytes = vec![0; n_bytes];
        while b.read_exact(&mut bytes).is_ok() && b.write_all(&bytes).is_ok() {}
    });
    let mut bytes = vec![1; n_bytes];
    let micros = best(500, || {
        a.write_all(&bytes).expect("it is read");
        a.read_exact(&mut bytes).expect("it comes back");
    });
    drop(a);
    echo.join().expect("it ends");
    micros
}

/// Microseconds of one call, in the best of several runs.
fn best(n_calls: usize, mut call: impl FnMut()) -> f64 {
    (0..RUNS)
        .map(|_| {
            let began = Instant::now();
            (0..n_calls).for_each(|_| call());
            began.elapsed().as_secs_f64() * 1e6 / n_calls as f64
        })
        .fold(f64::MAX, f64::min)
}
