//! A weight server: answers feed-forward requests of many nodes over sockets.
//!
//! ```text
//!  accept ──> a thread for each connection: handshake, then frames ──> Queue (bounded) ──> one pass over a layer's weights
//!                                                                                     └──> Outlet of each connection
//! ```
//!
//! Invariant: nothing that a peer does, or leaves undone, makes this server wait for it, hold more memory than
//! [`ServerLimits`] say, or answer anybody else wrongly. Opening weights, HTTP and signals are the program's.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::frame::{Header, Kind, VISIT_BYTES, append_short, visits};
use super::hello::{self, Identity, Session, Welcome};
use super::inlet::Inlet;
use super::outlet::{Held, Outlet, WAITING_MAX};
use super::queue::{Job, Queue};
use super::refusal::Refusal;
use super::rows;
use super::secret::Secret;
use super::server_stats::{Counters, ServerStats};
use super::socket::{Listener, Socket};
use crate::ffn::FeedForward;

/// What a server serves, and to whom.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The model; nodes that want another are refused.
    pub model: Identity,
    /// Layers it answers for.
    pub layers: Range<u32>,
    /// Experts it answers for, in each of these layers; with expert 0 for what is beside the experts, too.
    pub experts: Range<u32>,
    /// What nodes must know. Without one, listen only where [`super::Address::is_local`].
    pub secret: Secret,
    /// Bounds.
    pub limits: ServerLimits,
}

/// Bounds of a server's memory and patience.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Connections that have proved themselves; more are refused.
    pub connections: usize,
    /// Connections that have not; the oldest makes room for the next.
    pub handshakes: usize,
    /// Bytes of the rows of one frame, in f32.
    pub frame_bytes: usize,
    /// Requests of one connection that wait for their answer: 1 to 32.
    pub in_flight: u32,
    /// Bytes of requests and answers, of all connections together; more is refused as busy.
    pub held_bytes: u64,
    /// Rows, and visits, of one pass over the weights.
    pub pass_rows: usize,
    /// For the whole handshake.
    pub hello: Duration,
    /// From the first to the last byte of a frame.
    pub frame: Duration,
    /// For a peer to take an answer off our hands.
    pub send: Duration,
}

impl Default for ServerLimits {
    fn default() -> ServerLimits {
        ServerLimits {
            connections: 256,
            handshakes: 64,
            frame_bytes: 4 << 20,
            in_flight: 8,
            held_bytes: 256 << 20,
            pass_rows: 512,
            hello: Duration::from_secs(2),
            frame: Duration::from_secs(10),
            send: Duration::from_secs(5),
        }
    }
}

/// Rows of one frame, however narrow they are.
const ROWS_MAX: usize = 1 << 16;

/// A weight server. Clones are the same server; it ends with the last of them.
#[derive(Clone)]
pub struct Server {
    owner: Arc<Owner>,
}

/// Ends the server's threads when nobody is left who could.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Shared {
    options: ServerOptions,
    welcome: Welcome,
    queue: Queue,
    counters: Arc<Counters>,
    is_draining: AtomicBool,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    /// By age.
    open: BTreeMap<u64, Connection>,
    /// A byte here wakes a thread that accepts.
    accepting: Vec<UnixStream>,
}

struct Connection {
    socket: Arc<Socket>,
    /// Whether it has proved itself.
    is_greeted: bool,
    /// Soon after that.
    outlet: Option<Arc<Outlet>>,
}

impl Connections {
    fn n_greeted(&self) -> usize {
        let connections = self.open.values();
        connections
            .filter(|connection| connection.is_greeted)
            .count()
    }
}

impl Server {
    /// A server of the weights behind `ffn`.
    ///
    /// # Panics
    /// When a range is empty or not one of the model's, or the rows are wider than any model's.
    pub fn new(ffn: Arc<dyn FeedForward>, options: ServerOptions) -> io::Result<Server> {
        let model = options.model;
        let fits = |range: &Range<u32>, n| range.start < range.end && range.end <= n;
        assert!(
            fits(&options.layers, model.n_layers),
            "layers {:?} of {model:?}",
            options.layers
        );
        assert!(
            fits(&options.experts, model.n_experts),
            "experts {:?} of {model:?}",
            options.experts
        );
        assert!(
            (1..=Identity::HIDDEN_MAX).contains(&model.hidden),
            "rows of {model:?}"
        );
        let hidden = model.hidden as usize;
        let max_rows = (options.limits.frame_bytes / (hidden * 4)).clamp(1, ROWS_MAX) as u32;
        let counters = Arc::new(Counters::default());
        let shared = Arc::new(Shared {
            welcome: Welcome {
                layers: options.layers.clone(),
                experts: options.experts.clone(),
                max_rows,
                max_in_flight: options.limits.in_flight.clamp(1, WAITING_MAX as u32 / 2),
            },
            queue: Queue::new(ffn, hidden, options.limits.pass_rows, Arc::clone(&counters)),
            counters,
            is_draining: AtomicBool::new(false),
            connections: Mutex::default(),
            options,
        });
        let relief = Arc::clone(&shared);
        thread::Builder::new()
            .name("wire-relief".into())
            .spawn(move || relief.queue.relieve())?;
        Ok(Server {
            owner: Arc::new(Owner(shared)),
        })
    }

    /// Accepts connections until [`Server::drain`]; returns when it takes no more. Several threads may serve several
    /// listeners.
    ///
    /// # Errors
    /// When the system can't wake this thread later; a connection that fails is not an error.
    pub fn serve(&self, listener: &Listener) -> io::Result<()> {
        let shared = &self.owner.0;
        let (wakes, woken) = UnixStream::pair()?;
        {
            let mut connections = shared.connections();
            if shared.is_draining.load(Ordering::SeqCst) {
                return Ok(());
            }
            connections.accepting.push(wakes);
        }
        while !shared.is_draining.load(Ordering::SeqCst) {
            match listener.accept(&woken) {
                Ok(Some(socket)) => shared.admit(socket),
                Ok(None) => break,
                // Out of file descriptors, usually: it passes as connections end.
                Err(error) => {
                    tracing::warn!("cannot accept on {}: {error}", listener.address());
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
        Ok(())
    }

    /// Takes no more connections or requests, answers what was taken, says goodbye, and ends within `limit`. Requests
    /// that come meanwhile are refused, so that nodes turn to a replica. Returns whether everything was answered.
    pub fn drain(&self, limit: Duration) -> bool {
        let shared = &self.owner.0;
        let until = Instant::now() + limit;
        shared.is_draining.store(true, Ordering::SeqCst);
        let outlets: Vec<Arc<Outlet>> = {
            let mut connections = shared.connections();
            for mut accepting in connections.accepting.drain(..) {
                // Whoever is gone needs no waking.
                let _ = accepting.write_all(&[0]);
            }
            connections
                .open
                .values()
                .filter_map(|connection| connection.outlet.clone())
                .collect()
        };
        for outlet in outlets {
            let mut frame = outlet.buffer();
            append_short(&mut frame, Header::new(Kind::Goodbye), outlet.seed, &[]);
            outlet.send(frame, None);
        }
        let mut is_done = shared.queue.idle(until);
        while is_done && shared.counters.bytes_held.load(Ordering::Acquire) > 0 {
            is_done = Instant::now() < until;
            thread::sleep(Duration::from_millis(1));
        }
        shared.stop();
        is_done
    }

    /// What it has done.
    pub fn stats(&self) -> ServerStats {
        self.owner.0.counters.read()
    }

    /// Rows, and visits, that a frame may have.
    pub fn max_rows(&self) -> u32 {
        self.owner.0.welcome.max_rows
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({:?})", self.owner.0.welcome)
    }
}

impl Shared {
    /// Gives a connection its thread, or refuses it.
    fn admit(self: &Arc<Shared>, socket: Socket) {
        let socket = Arc::new(socket);
        let id = {
            let mut connections = self.connections();
            let greeted = connections.n_greeted();
            if greeted >= self.options.limits.connections {
                self.counters.refuse(Refusal::Full);
                return hello::refuse(&socket, Refusal::Full, "too many connections");
            }
            if connections.open.len() - greeted >= self.options.limits.handshakes {
                // An honest node is done in a millisecond, so the oldest is the one least likely to be one.
                let oldest = connections
                    .open
                    .iter()
                    .find(|(_, connection)| !connection.is_greeted);
                if let Some(id) = oldest.map(|(id, _)| *id) {
                    self.counters.refuse(Refusal::Full);
                    if let Some(connection) = connections.open.remove(&id) {
                        connection.socket.shutdown();
                    }
                }
            }
            connections.next += 1;
            let id = connections.next;
            let socket = Arc::clone(&socket);
            connections.open.insert(
                id,
                Connection {
                    socket,
                    is_greeted: false,
                    outlet: None,
                },
            );
            self.counters
                .connections
                .store(connections.open.len() as u64, Ordering::Relaxed);
            id
        };
        let shared = Arc::clone(self);
        // Room for the kernels, which compute on this thread when nobody else does.
        let thread = thread::Builder::new()
            .name("wire-in".into())
            .stack_size(1 << 20);
        let spawned = thread.spawn(move || {
            shared.talk(id, &socket);
            shared.forget(id);
        });
        if let Err(error) = spawned {
            tracing::warn!("no thread for a connection: {error}");
            self.forget(id);
        }
    }

    fn forget(&self, id: u64) {
        let mut connections = self.connections();
        if let Some(connection) = connections.open.remove(&id) {
            match connection.outlet {
                Some(outlet) => outlet.close(),
                None => connection.socket.shutdown(),
            }
        }
        self.counters
            .connections
            .store(connections.open.len() as u64, Ordering::Relaxed);
    }

    /// Counts a node that has proved itself among those that have, unless there are too many. Before it is told, so
    /// that a node that is in knows that others are out.
    fn greet(&self, id: u64) -> Result<(), Refusal> {
        let mut connections = self.connections();
        if self.is_draining.load(Ordering::SeqCst) {
            return Err(Refusal::Draining);
        }
        let is_full = connections.n_greeted() >= self.options.limits.connections;
        match connections.open.get_mut(&id) {
            Some(connection) if !is_full => connection.is_greeted = true,
            // Closed to make room, or too late.
            _ => return Err(Refusal::Full),
        }
        self.counters.greeted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A connection from its first byte to its last.
    fn talk(&self, id: u64, socket: &Arc<Socket>) {
        let limits = &self.options.limits;
        let mut inlet = Inlet::new();
        let until = Instant::now() + limits.hello;
        let (secret, model) = (&self.options.secret, &self.options.model);
        let admit = || self.greet(id);
        let received = hello::receive(
            socket,
            &mut inlet,
            secret,
            model,
            &self.welcome,
            until,
            admit,
        );
        let session = match received {
            Ok(session) => session,
            Err(error) => {
                match error {
                    hello::HelloError::Secret => self.counters.refuse(Refusal::Secret),
                    hello::HelloError::Model(_) => self.counters.refuse(Refusal::Model),
                    hello::HelloError::Refused(refusal, _) => self.counters.refuse(refusal),
                    hello::HelloError::Frame(_) | hello::HelloError::Turn(_) => {
                        self.counters.refuse(Refusal::BadFrame);
                    }
                    _ => {}
                }
                return tracing::debug!("no handshake: {error}");
            }
        };
        let sent = Arc::clone(&self.counters.bytes_sent);
        let outlet = Arc::new(Outlet::new(
            Arc::clone(socket),
            session.seed_to_node,
            limits.send,
            sent,
        ));
        match self.connections().open.get_mut(&id) {
            Some(connection) if !self.is_draining.load(Ordering::SeqCst) => {
                connection.outlet = Some(Arc::clone(&outlet));
            }
            // It was closed to make room, or everything is.
            _ => return,
        }
        inlet.widen();
        if let Err(text) = self.converse(&session, &mut inlet, &outlet) {
            self.counters.refuse(Refusal::BadFrame);
            tracing::debug!("closed a connection: {text}");
            self.refuse(&outlet, 0, Refusal::BadFrame, &text);
        }
        outlet.close();
    }

    /// Frames, until the connection ends (`Ok`) or what comes is no frame of a node.
    fn converse(
        &self,
        session: &Session,
        inlet: &mut Inlet,
        outlet: &Arc<Outlet>,
    ) -> Result<(), String> {
        let frame_limit = self.options.limits.frame;
        if outlet.socket.set_recv_limit(frame_limit).is_err() {
            return Ok(());
        }
        let mut began = Instant::now();
        loop {
            while let Some(header) = inlet
                .frame(session.seed_to_server, &session.limits)
                .map_err(|error| error.to_string())?
            {
                match header.kind {
                    Kind::Forward => self.forward(&header, inlet.payload(&header), outlet)?,
                    Kind::Ping => {
                        let mut frame = outlet.buffer();
                        let pong = Header {
                            id: header.id,
                            ..Header::new(Kind::Pong)
                        };
                        append_short(&mut frame, pong, outlet.seed, &[]);
                        outlet.send(frame, None);
                    }
                    kind => return Err(format!("a {kind:?} frame from a node")),
                }
                inlet.pass(&header);
                began = Instant::now();
            }
            let was_empty = inlet.is_empty();
            match inlet.fill(|bytes| outlet.socket.recv(bytes)) {
                Ok(n_bytes) => {
                    self.counters
                        .bytes_received
                        .fetch_add(n_bytes as u64, Ordering::Relaxed);
                }
                // A node may be silent as long as it likes between frames.
                Err(error) if error.kind() == ErrorKind::WouldBlock && was_empty => continue,
                Err(_) => return Ok(()),
            }
            if was_empty {
                began = Instant::now();
            } else if began.elapsed() > frame_limit {
                return Err("a frame took too long to arrive".into());
            }
        }
    }

    /// Takes a request, or refuses it. `Err`: no honest node would send it.
    fn forward(&self, header: &Header, payload: &[u8], outlet: &Arc<Outlet>) -> Result<(), String> {
        self.counters
            .frames_received
            .fetch_add(1, Ordering::Relaxed);
        let arrived = Instant::now();
        let refuse = |refusal, text: &str| {
            self.counters.refuse(refusal);
            self.refuse(outlet, header.id, refusal, text);
            Ok(())
        };
        let (Some(row_type), model) = (header.row_type, &self.options.model) else {
            return Err("rows without a type".into());
        };
        if self.is_draining.load(Ordering::SeqCst) {
            return refuse(Refusal::Draining, "this server is going away");
        }
        if !self.options.layers.contains(&header.layer) {
            let text = format!(
                "layer {} is not one of {:?}",
                header.layer, self.options.layers
            );
            return refuse(Refusal::NotHere, &text);
        }
        if outlet.n_in_flight.load(Ordering::Relaxed) >= self.welcome.max_in_flight {
            return refuse(
                Refusal::Busy,
                "this connection has too many requests in flight",
            );
        }
        // The request as numbers, the answer as numbers and as bytes.
        let row_bytes = u64::from(model.hidden) * 4;
        let n_bytes = (u64::from(header.n_rows) + 2 * u64::from(header.n_visits)) * row_bytes;
        let Some(held) = Held::take(
            &self.counters.bytes_held,
            n_bytes,
            self.options.limits.held_bytes,
        ) else {
            return refuse(Refusal::Busy, "too many requests wait already");
        };

        let mut buffers = self.queue.buffers();
        let (row_bytes, visit_bytes) =
            payload.split_at(payload.len() - header.n_visits as usize * VISIT_BYTES);
        buffers
            .rows
            .resize(header.n_rows as usize * model.hidden as usize, 0.0);
        rows::decode(row_bytes, row_type, &mut buffers.rows)
            .map_err(|rows::NotFinite| "a row has a number that is not finite".to_owned())?;
        buffers.visits.extend(visits(visit_bytes));
        let mut row_before = 0;
        for visit in &buffers.visits {
            if visit.row < row_before || visit.row >= header.n_rows {
                return Err(format!(
                    "a visit of row {} after one of row {row_before}",
                    visit.row
                ));
            }
            row_before = visit.row;
            let held = &self.options.experts;
            if !model.has(visit.expert) || !held.contains(&model.holder(visit.expert)) {
                let text = format!("expert {} is not one of {held:?}", visit.expert);
                return refuse(Refusal::NotHere, &text);
            }
        }
        outlet.n_in_flight.fetch_add(1, Ordering::Relaxed);
        let job = Job {
            outlet: Arc::clone(outlet),
            id: header.id,
            layer: header.layer,
            row_type,
            buffers,
            arrived,
            held: Some(held),
        };
        self.queue.submit(job, header.code == 1);
        Ok(())
    }

    fn refuse(&self, outlet: &Arc<Outlet>, id: u64, refusal: Refusal, text: &str) {
        let mut frame = outlet.buffer();
        refusal.append(&mut frame, id, text, outlet.seed);
        self.counters.frames_sent.fetch_add(1, Ordering::Relaxed);
        outlet.send(frame, None);
    }

    /// Ends every thread of the server.
    fn stop(&self) {
        self.is_draining.store(true, Ordering::SeqCst);
        self.queue.stop();
        let mut connections = self.connections();
        connections.accepting.clear();
        for connection in connections.open.values() {
            match &connection.outlet {
                Some(outlet) => outlet.close(),
                None => connection.socket.shutdown(),
            }
        }
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
