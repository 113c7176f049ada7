//! A bad network between two programs of this machine: a proxy for TCP and Unix sockets that delays, bundles, stalls,
//! garbles or cuts what passes, because the kernels of test machines often can't (`netem`).
//!
//! Invariant: unless they are garbled, bytes arrive in order and unchanged, or not at all; a delay limits no throughput, since each chunk waits
//! on its own and not behind the delay of the one before.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

/// What the network does.
#[derive(Args, Clone, Debug)]
pub(crate) struct Network {
    /// Milliseconds that every byte takes, each way.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) delay_ms: f64,
    /// Bytes leave only every so many milliseconds, all at once.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) burst_ms: f64,
    /// After so many bytes, both ways together, a connection stays open and nothing passes any more.
    #[arg(long)]
    pub(crate) stall_after: Option<u64>,
    /// After so many bytes, both ways together, a connection is cut.
    #[arg(long)]
    pub(crate) cut_after: Option<u64>,
}

impl Network {
    /// One that changes nothing.
    pub(crate) fn good() -> Network {
        Network {
            delay_ms: 0.0,
            burst_ms: 0.0,
            stall_after: None,
            cut_after: None,
        }
    }
}

/// Serves until the process ends.
pub(crate) fn run(listen: &str, to: &str, network: Network) -> Result<(), String> {
    let (address, _) = start(listen, to, network)?;
    println!("{address} -> {to}");
    loop {
        thread::park();
    }
}

/// The state of the cable: shared with all connections of a proxy.
#[derive(Debug, Default)]
pub(crate) struct Cable {
    is_pulled: AtomicBool,
    is_noisy: AtomicBool,
    n_passed: AtomicU64,
}

impl Cable {
    /// From now on nothing passes, and no connection ends: what a pulled cable looks like from both ends.
    pub(crate) fn pull(&self) {
        self.is_pulled.store(true, Ordering::SeqCst);
    }

    /// What was held passes, and all that follows.
    pub(crate) fn plug(&self) {
        self.is_pulled.store(false, Ordering::SeqCst);
    }

    /// From now on no byte arrives as it was sent.
    pub(crate) fn garble(&self) {
        self.is_noisy.store(true, Ordering::SeqCst);
    }

    /// Bytes that passed, both ways, over all connections.
    pub(crate) fn n_passed(&self) -> u64 {
        self.n_passed.load(Ordering::SeqCst)
    }

    fn is_pulled(&self) -> bool {
        self.is_pulled.load(Ordering::SeqCst)
    }
}

/// Serves on threads of its own; where it listens, and its cable.
pub(crate) fn start(
    listen: &str,
    to: &str,
    network: Network,
) -> Result<(String, Arc<Cable>), String> {
    let cannot = |error: io::Error| format!("cannot listen on {listen}: {error}");
    let listener = Listener::bind(listen).map_err(cannot)?;
    let address = listener.address(listen).map_err(cannot)?;
    let cable = Arc::new(Cable::default());
    let (to, of_proxy) = (to.to_owned(), Arc::clone(&cable));
    thread::spawn(move || {
        loop {
            let Ok(here) = listener.accept() else {
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            let (to, network, cable) = (to.clone(), network.clone(), Arc::clone(&of_proxy));
            thread::spawn(move || {
                // Nobody gets through a pulled cable, nor is refused at its other end.
                while cable.is_pulled() {
                    thread::sleep(TICK);
                }
                match Stream::connect(&to) {
                    Ok(there) => connect(here, there, &network, &cable),
                    Err(_) => here.shutdown(),
                }
            });
        }
    });
    Ok((address, cable))
}

const TICK: Duration = Duration::from_millis(1);
/// What a noisy cable does to every byte.
const NOISE: u8 = 0x55;
/// Chunks under way in one direction: more than any delay and window of ours need.
const CHUNKS: usize = 4096;
const CHUNK_BYTES: usize = 64 << 10;

/// Two directions, each with a thread that receives and one that sends when a chunk's time has come.
fn connect(here: Stream, there: Stream, network: &Network, cable: &Arc<Cable>) {
    let n_passed = Arc::new(AtomicU64::new(0));
    let both = [(here.again(), there.again()), (there.again(), here.again())];
    for (from, to) in both {
        let (Ok(mut from), Ok(mut to)) = (from, to) else {
            return here.shutdown();
        };
        let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(CHUNKS);
        let (timing, network) = (network.clone(), network.clone());
        let began = Instant::now();
        thread::spawn(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            while let Ok(n_bytes @ 1..) = from.read(&mut chunk) {
                let due = due(began, Instant::now(), &timing);
                if sender.send((due, chunk[..n_bytes].to_vec())).is_err() {
                    return;
                }
            }
        });
        let (n_passed, cable) = (Arc::clone(&n_passed), Arc::clone(cable));
        let ends = [here.again(), there.again()];
        thread::spawn(move || {
            let shutdown = || ends.iter().flatten().for_each(Stream::shutdown);
            for (due, mut chunk) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                while cable.is_pulled() {
                    thread::sleep(TICK);
                }
                if cable.is_noisy.load(Ordering::SeqCst) {
                    chunk.iter_mut().for_each(|byte| *byte ^= NOISE);
                }
                cable
                    .n_passed
                    .fetch_add(chunk.len() as u64, Ordering::SeqCst);
                let before = n_passed.fetch_add(chunk.len() as u64, Ordering::SeqCst);
                // What passes of this chunk before the limit, and whether that is the end.
                let allowed = |limit: Option<u64>| {
                    limit.map_or(chunk.len() as u64, |limit| {
                        limit.saturating_sub(before).min(chunk.len() as u64)
                    })
                };
                let passing = allowed(network.stall_after).min(allowed(network.cut_after)) as usize;
                if to.write_all(&chunk[..passing]).is_err() {
                    break;
                }
                if passing < chunk.len() {
                    if network
                        .stall_after
                        .is_some_and(|limit| before + chunk.len() as u64 > limit)
                    {
                        loop {
                            thread::park();
                        }
                    }
                    break;
                }
            }
            shutdown();
        });
    }
}

/// When a chunk that arrived `now` may leave.
fn due(began: Instant, now: Instant, network: &Network) -> Instant {
    let due = now + Duration::from_secs_f64(network.delay_ms / 1e3);
    if network.burst_ms <= 0.0 {
        return due;
    }
    let burst = network.burst_ms / 1e3;
    let n_bursts = (due - began).as_secs_f64() / burst;
    began + Duration::from_secs_f64(n_bursts.ceil() * burst)
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &str) -> io::Result<Listener> {
        match address.strip_prefix("unix:") {
            Some(path) => {
                if Path::new(path).exists() {
                    std::fs::remove_file(path)?;
                }
                Ok(Listener::Unix(UnixListener::bind(path)?))
            }
            None => Ok(Listener::Tcp(TcpListener::bind(address)?)),
        }
    }

    /// With the port that the system chose.
    fn address(&self, asked: &str) -> io::Result<String> {
        match self {
            Listener::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Listener::Unix(_) => Ok(asked.to_owned()),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => Stream::tcp(listener.accept()?.0),
            Listener::Unix(listener) => Ok(Stream::Unix(listener.accept()?.0)),
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(address: &str) -> io::Result<Stream> {
        match address.strip_prefix("unix:") {
            Some(path) => Ok(Stream::Unix(UnixStream::connect(path)?)),
            None => Stream::tcp(TcpStream::connect(address)?),
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        Ok(Stream::Tcp(stream))
    }

    fn again(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
        })
    }

    fn shutdown(&self) {
        // It fails when the connection has ended, which is what is wanted.
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends back what it receives.
    fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let (mut from, mut to) = (&stream, &stream);
                    io::copy(&mut from, &mut to)
                });
            }
        });
        address
    }

    fn dial(address: &str) -> TcpStream {
        let stream = TcpStream::connect(address).expect("the proxy listens");
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .expect("a timeout");
        stream
    }

    #[test]
    fn bytes_take_the_delay_each_way_and_are_not_slowed_beyond_it() {
        let network = Network {
            delay_ms: 40.0,
            ..Network::good()
        };
        let (proxy, _) = start("127.0.0.1:0", &echo(), network).expect("a proxy");
        let mut stream = dial(&proxy);
        let began = Instant::now();
        let sent: Vec<u8> = (0..4_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let mut writer = stream.try_clone().expect("the other half");
        let writing = thread::spawn({
            let sent = sent.clone();
            move || writer.write_all(&sent).expect("it is read")
        });
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got).expect("all comes back");
        writing.join().expect("the writer");
        assert!(got == sent);
        assert!(began.elapsed() >= Duration::from_millis(80));
    }

    #[test]
    fn bursts_hold_bytes_until_their_time() {
        let began = Instant::now();
        let network = Network {
            delay_ms: 1.0,
            burst_ms: 10.0,
            ..Network::good()
        };
        let after =
            |millis: u64| due(began, began + Duration::from_millis(millis), &network) - began;
        assert_eq!(after(0), Duration::from_millis(10));
        assert_eq!(after(8), Duration::from_millis(10));
        assert_eq!(after(12), Duration::from_millis(20));
    }

    #[test]
    fn a_stall_keeps_the_connection_and_a_cut_ends_it() {
        let mut bytes = [0; 10];
        let network = Network {
            stall_after: Some(8),
            ..Network::good()
        };
        let (proxy, _) = start("127.0.0.1:0", &echo(), network).expect("a proxy");
        let mut stream = dial(&proxy);
        stream.write_all(&[1; 5]).expect("it passes");
        stream
            .read_exact(&mut bytes[..3])
            .expect("3 of 5 come back");
        let error = stream.read(&mut bytes).expect_err("nothing follows");
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ),
            "{error}"
        );

        let network = Network {
            cut_after: Some(8),
            ..Network::good()
        };
        let (proxy, _) = start("127.0.0.1:0", &echo(), network).expect("a proxy");
        let mut stream = dial(&proxy);
        stream.write_all(&[1; 5]).expect("it passes");
        stream
            .read_exact(&mut bytes[..3])
            .expect("3 of 5 come back");
        assert_eq!(stream.read(&mut bytes).expect("the end"), 0);
    }

    #[test]
    fn a_noisy_cable_changes_every_byte() {
        let mut bytes = [0; 4];
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let there = listener.local_addr().expect("an address").to_string();
        let (proxy, cable) = start("127.0.0.1:0", &there, Network::good()).expect("a proxy");
        cable.garble();
        let mut stream = dial(&proxy);
        stream.write_all(b"here").expect("it passes");
        let (mut received, _) = listener.accept().expect("a connection");
        received.read_exact(&mut bytes).expect("it arrives");
        assert_eq!(bytes, b"here".map(|byte| byte ^ NOISE));
    }

    #[test]
    fn a_pulled_cable_holds_what_passes_until_it_is_plugged() {
        let (proxy, cable) = start("127.0.0.1:0", &echo(), Network::good()).expect("a proxy");
        let mut stream = dial(&proxy);
        let mut bytes = [0; 4];
        stream.write_all(b"here").expect("it passes");
        stream.read_exact(&mut bytes).expect("it comes back");
        cable.pull();
        stream.write_all(b"lost").expect("the kernel takes it");
        assert!(stream.read(&mut bytes).is_err());
        cable.plug();
        stream.read_exact(&mut bytes).expect("it comes back");
        assert_eq!(&bytes, b"lost");
    }
}
