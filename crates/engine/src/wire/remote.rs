//! Feed-forward rows from weight servers: the other implementation of [`FeedForward`].
//!
//! Invariant: a call gives the rows that the weights give, bit for bit with f32 on the wire, or an error within its
//! deadline. What happens in between (servers that die, stall, lie or come back) changes nothing but the time it takes;
//! `docs/failure.md` has the table.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::address::Address;
use super::call::{Call, Memory};
use super::frame::{Header, Kind, append_short};
use super::hello::{HelloError, Identity, transport};
use super::peers::{NoConnection, Peers};
use super::rows::RowType;
use super::secret::Secret;
use crate::ffn::{Batch, FeedForward, FfnError};

/// What is asked of weight servers, and for how long.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// The model that every server must hold.
    pub model: Identity,
    /// What servers must know.
    pub secret: Secret,
    /// How rows are written on the wire.
    pub wire: RowType,
    /// How long a layer may take, over all attempts.
    pub deadline: Duration,
    /// How long a server may be silent before a replica is asked instead; without one, `deadline` holds.
    pub stall: Duration,
    /// How long a handshake may take.
    pub hello: Duration,
}

impl RemoteOptions {
    /// For servers of this model: no secret, f32 rows, 10 s for a layer, replicas asked after 2 s of silence, 2 s for
    /// a handshake.
    pub fn new(model: Identity) -> RemoteOptions {
        RemoteOptions {
            model,
            secret: Secret::default(),
            wire: RowType::F32,
            deadline: Duration::from_secs(10),
            stall: Duration::from_secs(2),
            hello: Duration::from_secs(2),
        }
    }
}

/// Why a node can't begin with these servers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No server was named, or one was named twice.
    #[error("{0}")]
    Peers(String),
    /// A server is beyond this machine, and there is no secret to know it by.
    #[error("refusing to ask {peer} without a secret")]
    Stranger {
        /// Its address.
        peer: Address,
    },
    /// A server does not know our secret, or we do not know its.
    #[error("{peer} has another secret; give both ends the same")]
    Secret {
        /// Its address.
        peer: Address,
    },
    /// A server holds another model.
    #[error("{peer} holds another model: {reason}")]
    Identity {
        /// Its address.
        peer: Address,
        /// What differs.
        reason: String,
    },
    /// The servers that answer do not hold all of the model.
    #[error("no server holds layer {layer}, expert {expert} ({peers})")]
    Uncovered {
        /// First layer that is missing.
        layer: u32,
        /// First expert of it that is missing.
        expert: u32,
        /// What each server holds, or why it did not answer.
        peers: String,
    },
}

impl ConnectError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            ConnectError::Peers(_) => "name each weight server once: --ffn HOST:PORT,unix:/path",
            ConnectError::Stranger { .. } => {
                "give both ends the same file by --secret-file, or set SKULK_SECRET; without one, ask 127.0.0.1 or unix:/path"
            }
            ConnectError::Secret { .. } => "give both ends the same file by --secret-file",
            ConnectError::Identity { .. } => {
                "a node and its weight servers need the same vindex; compare larql dump"
            }
            ConnectError::Uncovered { .. } => {
                "start the missing weight servers with larql serve, or name them with --ffn"
            }
        }
    }
}

/// Weight servers that together hold the feed-forward weights of a model.
pub struct Remote {
    peers: Arc<Peers>,
    layers: Vec<LayerCounters>,
    memory: Mutex<Vec<Memory>>,
}

#[derive(Debug, Default)]
struct LayerCounters {
    calls: AtomicU64,
    waited_micros: AtomicU64,
}

/// What a node saw of its servers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RemoteStats {
    /// Each server.
    pub peers: Vec<PeerStats>,
    /// Each layer: calls, and seconds that they took in all.
    pub layers: Vec<(u64, f64)>,
}

/// What a node saw of one server.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerStats {
    /// Where it is.
    pub address: Address,
    /// Whether it is used.
    pub is_up: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// First layer that it holds, and the one after its last.
    pub layers: (u32, u32),
    /// First expert that it holds, and the one after its last.
    pub experts: (u32, u32),
    /// Requests that it answered.
    pub round_trips: u64,
    /// Bytes of requests.
    pub bytes_sent: u64,
    /// Bytes of answers.
    pub bytes_received: u64,
    /// Seconds that calls waited for it, requests in flight at once counted once.
    pub waited_seconds: f64,
    /// Seconds that requests spent at the server, by its own clock; the rest of a round trip is the wire's.
    pub served_seconds: f64,
    /// Requests that it refused because it was busy.
    pub busy: u64,
    /// How often it went down.
    pub failures: u64,
    /// How often it came back.
    pub reconnects: u64,
}

impl Remote {
    /// Greets all servers at once. One that can't be reached is tried again in the background when the others hold all
    /// of the model; servers that hold the same are replicas of each other. Beyond this machine none is asked without a
    /// secret.
    ///
    /// # Errors
    /// [`ConnectError`]; it takes as long as a handshake may.
    pub fn connect(peers: &[Address], options: RemoteOptions) -> Result<Remote, ConnectError> {
        if peers.is_empty() {
            return Err(ConnectError::Peers("no weight server is named".into()));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = peers.iter().find(|peer| !seen.insert(*peer)) {
            return Err(ConnectError::Peers(format!("{twice} is named twice")));
        }
        let stranger = peers.iter().find(|peer| !peer.is_local());
        if let (Some(peer), true) = (stranger, options.secret.is_empty()) {
            return Err(ConnectError::Stranger { peer: peer.clone() });
        }
        let n_layers = options.model.n_layers;
        let until = Instant::now() + options.hello;
        let peers = Arc::new(Peers::new(options, peers.to_vec()));
        let dialed: Vec<_> = thread::scope(|scope| {
            let dials: Vec<_> = (0..peers.addresses.len())
                .map(|peer| {
                    let peers = &peers;
                    thread::Builder::new()
                        .name("wire-dial".into())
                        .spawn_scoped(scope, move || peers.dial(peer, until))
                })
                .collect();
            dials
                .into_iter()
                .map(|dial| dial?.join().expect("a handshake does not panic"))
                .collect()
        });
        let mut down = Vec::new();
        for (peer, dialed) in dialed.into_iter().enumerate() {
            let address = || peers.addresses[peer].clone();
            match dialed {
                Ok((connection, welcome)) => peers.came_up(peer, connection, welcome),
                Err(HelloError::Secret) => return Err(ConnectError::Secret { peer: address() }),
                Err(HelloError::Model(reason)) => {
                    return Err(ConnectError::Identity {
                        peer: address(),
                        reason,
                    });
                }
                Err(error) => {
                    peers.states()[peer].reason = error.to_string();
                    down.push(peer);
                }
            }
        }
        covered(&peers)?;
        for peer in down {
            peers.revive(peer);
        }
        Ok(Remote {
            peers,
            layers: (0..n_layers).map(|_| LayerCounters::default()).collect(),
            memory: Mutex::default(),
        })
    }

    /// What has been seen of the servers.
    pub fn stats(&self) -> RemoteStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |micros: &AtomicU64| read(micros) as f64 * 1e-6;
        let states = self.peers.states();
        let peers = states
            .iter()
            .zip(&self.peers.counters)
            .zip(&self.peers.addresses);
        RemoteStats {
            peers: peers
                .map(|((state, counters), address)| {
                    let range = |range: &std::ops::Range<u32>| (range.start, range.end);
                    PeerStats {
                        address: address.clone(),
                        is_up: state.is_up,
                        reason: (!state.is_up).then(|| state.reason.clone()),
                        layers: state
                            .welcome
                            .as_ref()
                            .map_or((0, 0), |welcome| range(&welcome.layers)),
                        experts: state
                            .welcome
                            .as_ref()
                            .map_or((0, 0), |welcome| range(&welcome.experts)),
                        round_trips: read(&counters.round_trips),
                        bytes_sent: read(&counters.bytes_sent),
                        bytes_received: read(&counters.bytes_received),
                        waited_seconds: seconds(&counters.waited_micros),
                        served_seconds: seconds(&counters.served_micros),
                        busy: read(&counters.busy),
                        failures: read(&counters.failures),
                        reconnects: read(&counters.reconnects),
                    }
                })
                .collect(),
            layers: self
                .layers
                .iter()
                .map(|layer| (read(&layer.calls), seconds(&layer.waited_micros)))
                .collect(),
        }
    }

    /// One empty round trip to the server `peer` (its place in the list given to [`Remote::connect`]): how long it took.
    ///
    /// # Errors
    /// In words, when the server is down or does not answer within the handshake's limit; it is then down.
    pub fn ping(&self, peer: usize) -> Result<Duration, String> {
        let began = Instant::now();
        let until = began + self.peers.options.hello;
        let mut connection = self.peers.lease(peer, until).map_err(|error| match error {
            NoConnection::Full => "it takes no more connections".to_owned(),
            NoConnection::Lost => self.peers.states()[peer].reason.clone(),
        })?;
        let began = Instant::now();
        let id = connection.next_id;
        connection.next_id += 1;
        let ping = Header {
            id,
            ..Header::new(Kind::Ping)
        };
        append_short(
            &mut connection.out,
            ping,
            connection.session.seed_to_server,
            &[],
        );
        let out = std::mem::take(&mut connection.out);
        let answered = connection
            .socket
            .send_all(&out, until)
            .map_err(|error| transport(&error))
            .and_then(|()| {
                loop {
                    match connection
                        .inlet
                        .frame(connection.session.seed_to_node, &connection.session.limits)
                    {
                        Ok(Some(header)) => {
                            connection.inlet.pass(&header);
                            let is_ours = header.kind == Kind::Pong && header.id == id;
                            return if is_ours {
                                Ok(())
                            } else {
                                Err(format!("a {:?} frame", header.kind))
                            };
                        }
                        Ok(None) => {}
                        Err(error) => return Err(error.to_string()),
                    }
                    match connection.inlet.fill(|bytes| connection.socket.recv(bytes)) {
                        Err(error)
                            if error.kind() == std::io::ErrorKind::WouldBlock
                                && Instant::now() < until => {}
                        Err(error) => return Err(transport(&error)),
                        Ok(_) => {}
                    }
                }
            });
        let spent = began.elapsed();
        connection.out = out;
        connection.out.clear();
        match answered {
            Ok(()) => self.peers.give_back(peer, connection, spent),
            Err(reason) => {
                self.peers.discard(peer, connection, Some(reason.clone()));
                return Err(reason);
            }
        }
        Ok(spent)
    }
}

impl FeedForward for Remote {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        check(&self.peers.options.model, layer, &batch, out.len())?;
        if batch.visits.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let memory = self
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut memory = memory.unwrap_or_default();
        let done = Call::new(&self.peers, layer, batch, out, &mut memory).run();
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(memory);
        let counters = &self.layers[layer as usize];
        counters.calls.fetch_add(1, Ordering::Relaxed);
        counters
            .waited_micros
            .fetch_add(began.elapsed().as_micros() as u64, Ordering::Relaxed);
        done
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.peers.close();
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote")
            .field(&self.peers.addresses)
            .finish()
    }
}

/// Whether the peers that are up hold every layer and expert.
fn covered(peers: &Peers) -> Result<(), ConnectError> {
    let states = peers.states();
    let model = &peers.options.model;
    for layer in 0..model.n_layers {
        for expert in 0..model.n_experts {
            if !states
                .iter()
                .any(|state| state.holds(layer, &(expert..expert + 1)))
            {
                let told = states
                    .iter()
                    .zip(&peers.addresses)
                    .map(|(state, address)| match &state.welcome {
                        Some(welcome) => {
                            format!(
                                "{address}: layers {:?}, experts {:?}",
                                welcome.layers, welcome.experts
                            )
                        }
                        None => format!("{address}: {}", state.reason),
                    });
                return Err(ConnectError::Uncovered {
                    layer,
                    expert,
                    peers: told.collect::<Vec<_>>().join("; "),
                });
            }
        }
    }
    Ok(())
}

fn check(model: &Identity, layer: u32, batch: &Batch<'_>, n_out: usize) -> Result<(), FfnError> {
    let hidden = model.hidden as usize;
    let n_rows = batch.rows.len() / hidden;
    let invalid = |text: String| Err(FfnError::Invalid(text));
    if layer >= model.n_layers {
        return invalid(format!("layer {layer} of a model with {}", model.n_layers));
    }
    if batch.rows.len() != n_rows * hidden {
        return invalid(format!(
            "{} numbers are no whole rows of {hidden}",
            batch.rows.len()
        ));
    }
    if n_out != batch.visits.len() * hidden {
        return invalid(format!(
            "room for {n_out} numbers; {} visits give {hidden} each",
            batch.visits.len()
        ));
    }
    let mut row_before = 0;
    for visit in batch.visits {
        if visit.row < row_before || visit.row as usize >= n_rows || !model.has(visit.expert) {
            return invalid(format!(
                "{visit:?} after row {row_before}, with {n_rows} rows, {} experts and {} beside",
                model.n_experts, model.n_beside
            ));
        }
        row_before = visit.row;
    }
    Ok(())
}
