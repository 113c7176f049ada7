//! The handshake: both ends prove that they know the secret, compare the model, and agree on limits.
//!
//! ```text
//! node -> server  Hello      nonce 32
//! server -> node  Challenge  nonce 32
//! node -> server  Proof      vindex id 32 | hidden 4 | layers 4 | experts 4 | beside 4 | proof 32
//! server -> node  Welcome    layers from, to | experts from, to | max rows | max in flight | zero 8 | proof 32
//! ```
//!
//! With `H(k, m)` for HMAC-SHA256 (RFC 2104) under key `k`: the session's key is `H(secret, "skulk wire 1" | Hello |
//! Challenge)`; the node's proof `H(key, "node" | Proof without its proof)`, the server's `H(key, "server" | Proof |
//! Welcome without its proof)`; and the first and second 8 bytes of `H(key, "frames" | Proof | Welcome)` seed the
//! checksums of frames to the server and to the node.
//!
//! Invariant: a proof is good in the one session whose two fresh nonces went into it, in one direction; so a recording
//! of either end's words opens nothing. Words after the handshake are guarded against accidents, not against somebody
//! in the middle: that is the network's (or a tunnel's) business.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use vindex::{Vindex, VindexId};

use super::frame::{FrameError, Header, Kind, Limits, PROOF_BYTES, WELCOME_BYTES, append_short};
use super::inlet::Inlet;
use super::refusal::Refusal;
use super::secret::Secret;
use super::socket::Socket;
use crate::ffn::beside;

/// The model that both ends must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Identity of the weights.
    pub id: VindexId,
    /// Numbers in a row.
    pub hidden: u32,
    /// Layers.
    pub n_layers: u32,
    /// Experts of the layers that have most, of those that a router chooses from; 1 when all are dense.
    pub n_experts: u32,
    /// Experts that every token visits beside them, 0 or 1. Its number is the one after the last, and whoever holds expert 0
    /// holds it.
    pub n_beside: u32,
}

impl Identity {
    /// A row wider than this is no model's, and sizes stay far from overflow.
    pub(super) const HIDDEN_MAX: u32 = 1 << 24;

    /// Of the model in this vindex.
    pub fn of(vindex: &Vindex) -> Identity {
        let config = &vindex.index().config;
        Identity {
            id: vindex.id(),
            hidden: config.hidden,
            n_layers: config.n_layers,
            n_experts: config.experts.map_or(1, |experts| experts.n),
            n_beside: config.experts.as_ref().and_then(beside).map_or(0, |_| 1),
        }
    }

    /// Whether the model has an expert of this number.
    pub(super) fn has(&self, expert: u32) -> bool {
        expert < self.n_experts || (expert == self.n_experts && self.n_beside > 0)
    }

    /// The expert whose holders hold `expert`, which the model has: one of the ranges that servers tell.
    pub(super) fn holder(&self, expert: u32) -> u32 {
        if expert < self.n_experts { expert } else { 0 }
    }
}

/// What a server holds and how much it takes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Welcome {
    pub(super) layers: Range<u32>,
    pub(super) experts: Range<u32>,
    /// Rows, and visits, of one frame.
    pub(super) max_rows: u32,
    /// Frames of one connection that wait for their answer.
    pub(super) max_in_flight: u32,
}

/// What the two ends agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    /// Of the checksums of frames from node to server.
    pub(super) seed_to_server: u64,
    /// Of the checksums of frames from server to node.
    pub(super) seed_to_node: u64,
    pub(super) limits: Limits,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelloError {
    #[error("{}", transport(.0))]
    Io(#[from] io::Error),
    #[error("it speaks another protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("it answered out of turn, with {0:?}")]
    Turn(Kind),
    #[error("the secrets differ")]
    Secret,
    #[error("it refused: {}", .1)]
    Refused(Refusal, String),
    #[error("another model: {0}")]
    Model(String),
    #[error("impossible ranges or limits: {0}")]
    Welcome(String),
}

/// What happened to a connection, in a person's words.
pub(super) fn transport(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "the connection was closed".into(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".into(),
        ErrorKind::ConnectionRefused => "connection refused".into(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "the connection was cut".into(),
        _ => error.to_string(),
    }
}

type Nonce = [u8; 32];
type Proof = [u8; 32];
const PROVED_BYTES: usize = PROOF_BYTES - size_of::<Proof>();
const WELCOMED_BYTES: usize = WELCOME_BYTES - size_of::<Proof>();

/// The node's end.
pub(super) fn greet(
    socket: &Socket,
    inlet: &mut Inlet,
    secret: &Secret,
    model: &Identity,
    until: Instant,
) -> Result<(Session, Welcome), HelloError> {
    let hello = nonce()?;
    say(socket, Kind::Hello, &hello, until)?;
    let challenge: Nonce = hear(socket, inlet, Kind::Challenge, until)?;
    let key = session_key(secret, &hello, &challenge);

    let mut proof = [0; PROOF_BYTES];
    proof[..32].copy_from_slice(model.id.as_bytes());
    proof[32..36].copy_from_slice(&model.hidden.to_le_bytes());
    proof[36..40].copy_from_slice(&model.n_layers.to_le_bytes());
    proof[40..44].copy_from_slice(&model.n_experts.to_le_bytes());
    proof[44..48].copy_from_slice(&model.n_beside.to_le_bytes());
    let mac = keyed(&key, &[b"node", &proof[..PROVED_BYTES]])
        .finalize()
        .into_bytes();
    proof[PROVED_BYTES..].copy_from_slice(&mac);
    say(socket, Kind::Proof, &proof, until)?;

    let welcome: [u8; WELCOME_BYTES] = hear(socket, inlet, Kind::Welcome, until)?;
    let (told, mac) = welcome.split_at(WELCOMED_BYTES);
    keyed(&key, &[b"server", &proof, told])
        .verify_slice(mac)
        .map_err(|_| HelloError::Secret)?;
    let numbers: Vec<u32> = told
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .collect();
    let &[
        layers_from,
        layers_to,
        experts_from,
        experts_to,
        max_rows,
        max_in_flight,
        0,
        0,
    ] = numbers.as_slice()
    else {
        return Err(HelloError::Welcome("reserved bytes are not zero".into()));
    };
    let told = Welcome {
        layers: layers_from..layers_to,
        experts: experts_from..experts_to,
        max_rows,
        max_in_flight,
    };
    let fits = |range: &Range<u32>, n| range.start < range.end && range.end <= n;
    if !fits(&told.layers, model.n_layers)
        || !fits(&told.experts, model.n_experts)
        || told.max_rows == 0
        || told.max_in_flight == 0
    {
        return Err(HelloError::Welcome(format!("{told:?}")));
    }
    Ok((
        session(&key, &proof, &welcome, model.hidden, max_rows),
        told,
    ))
}

/// The server's end. A node that has proved itself is still refused when `admit` says so. An error has been told to the
/// node where it can be.
pub(super) fn receive(
    socket: &Socket,
    inlet: &mut Inlet,
    secret: &Secret,
    model: &Identity,
    told: &Welcome,
    until: Instant,
    admit: impl FnOnce() -> Result<(), Refusal>,
) -> Result<Session, HelloError> {
    let hello: Nonce = hear(socket, inlet, Kind::Hello, until).inspect_err(|error| {
        if let HelloError::Frame(_) = error {
            refuse(socket, Refusal::BadFrame, &error.to_string());
        }
    })?;
    let challenge = nonce()?;
    say(socket, Kind::Challenge, &challenge, until)?;
    let key = session_key(secret, &hello, &challenge);

    let proof: [u8; PROOF_BYTES] = hear(socket, inlet, Kind::Proof, until)?;
    let (wanted, mac) = proof.split_at(PROVED_BYTES);
    if keyed(&key, &[b"node", wanted]).verify_slice(mac).is_err() {
        refuse(socket, Refusal::Secret, "the secrets differ");
        return Err(HelloError::Secret);
    }
    let n = |at: usize| {
        u32::from_le_bytes([wanted[at], wanted[at + 1], wanted[at + 2], wanted[at + 3]])
    };
    if wanted[..32] != *model.id.as_bytes() {
        let text = format!(
            "this server holds vindex {}, the node wants {}",
            model.id,
            hex::encode(&wanted[..32])
        );
        refuse(socket, Refusal::Model, &text);
        return Err(HelloError::Model(text));
    }
    let (ours, theirs) = (
        [
            model.hidden,
            model.n_layers,
            model.n_experts,
            model.n_beside,
        ],
        [n(32), n(36), n(40), n(44)],
    );
    if ours != theirs {
        let text = format!(
            "hidden, layers, experts and those beside are {ours:?} here and {theirs:?} at the node"
        );
        refuse(socket, Refusal::Model, &text);
        return Err(HelloError::Model(text));
    }

    if let Err(refusal) = admit() {
        let text = format!("this server is {refusal}");
        refuse(socket, refusal, &text);
        return Err(HelloError::Refused(refusal, text));
    }

    let mut welcome = [0; WELCOME_BYTES];
    let numbers = [
        told.layers.start,
        told.layers.end,
        told.experts.start,
        told.experts.end,
        told.max_rows,
        told.max_in_flight,
    ];
    for (bytes, number) in welcome.as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
        *bytes = number.to_le_bytes();
    }
    let mac = keyed(&key, &[b"server", &proof, &welcome[..WELCOMED_BYTES]])
        .finalize()
        .into_bytes();
    welcome[WELCOMED_BYTES..].copy_from_slice(&mac);
    // Whoever hears Welcome may ask at once, so that this end must be ready before it says it; it is, for nothing is
    // read between this and the first request.
    say(socket, Kind::Welcome, &welcome, until)?;
    Ok(session(&key, &proof, &welcome, model.hidden, told.max_rows))
}

/// Says no, to whoever has no session yet; it need not arrive.
pub(super) fn refuse(socket: &Socket, refusal: Refusal, text: &str) {
    let mut frame = Vec::new();
    refusal.append(&mut frame, 0, text, 0);
    let _ = socket.send_now(&frame);
}

fn nonce() -> Result<Nonce, HelloError> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(nonce)
}

fn say(socket: &Socket, kind: Kind, payload: &[u8], until: Instant) -> Result<(), HelloError> {
    let mut frame = Vec::new();
    append_short(&mut frame, Header::new(kind), 0, payload);
    Ok(socket.send_all(&frame, until)?)
}

/// Waits for a frame of this kind, whose payload has `N` bytes.
fn hear<const N: usize>(
    socket: &Socket,
    inlet: &mut Inlet,
    kind: Kind,
    until: Instant,
) -> Result<[u8; N], HelloError> {
    loop {
        if let Some(header) = inlet.frame(0, &Limits::HANDSHAKE)? {
            let payload = inlet.payload(&header);
            let heard = match header.kind {
                Kind::Refused => {
                    let (refusal, text) = Refusal::read(&header, payload);
                    Err(match refusal {
                        Refusal::Secret => HelloError::Secret,
                        Refusal::Model => HelloError::Model(text),
                        refusal => HelloError::Refused(refusal, text),
                    })
                }
                got if got == kind => payload.try_into().map_err(|_| HelloError::Turn(got)),
                got => Err(HelloError::Turn(got)),
            };
            inlet.pass(&header);
            return heard;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left < Duration::from_micros(1) {
            return Err(io::Error::from(ErrorKind::TimedOut).into());
        }
        socket.set_recv_limit(left)?;
        inlet.fill(|bytes| socket.recv(bytes))?;
    }
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of every length");
    for part in parts {
        mac.update(part);
    }
    mac
}

fn session_key(secret: &Secret, hello: &Nonce, challenge: &Nonce) -> [u8; 32] {
    let mac = keyed(secret.key(), &[b"skulk wire 1", hello, challenge]);
    mac.finalize().into_bytes().into()
}

fn session(
    key: &[u8; 32],
    proof: &[u8; PROOF_BYTES],
    welcome: &[u8; WELCOME_BYTES],
    hidden: u32,
    max_rows: u32,
) -> Session {
    let bytes: [u8; 32] = keyed(key, &[b"frames", proof, welcome])
        .finalize()
        .into_bytes()
        .into();
    let (words, _) = bytes.as_chunks::<8>();
    Session {
        seed_to_server: u64::from_le_bytes(words[0]),
        seed_to_node: u64::from_le_bytes(words[1]),
        limits: Limits { hidden, max_rows },
    }
}
