//! The protocol once more, written from `docs/wire.md` alone: what says the same as the engine is the engine's own
//! frames, and what does not is a hostile peer.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use engine::wire::{Address, Identity};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub(crate) const HELLO: u8 = 1;
pub(crate) const CHALLENGE: u8 = 2;
pub(crate) const PROOF: u8 = 3;
pub(crate) const WELCOME: u8 = 4;
pub(crate) const FORWARD: u8 = 5;
pub(crate) const ROWS: u8 = 6;
pub(crate) const REFUSED: u8 = 7;
pub(crate) const PING: u8 = 8;
pub(crate) const PONG: u8 = 9;
pub(crate) const GOODBYE: u8 = 10;

/// A frame, field by field; nothing is checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) row_type: u8,
    pub(crate) code: u8,
    pub(crate) id: u64,
    pub(crate) layer: u32,
    pub(crate) n_rows: u32,
    pub(crate) n_visits: u32,
    pub(crate) micros: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn bytes(&self, seed: u64) -> Vec<u8> {
        self.bytes_saying(self.payload.len() as u64, seed)
    }

    /// With a length of its own choice.
    pub(crate) fn bytes_saying(&self, n_payload_bytes: u64, seed: u64) -> Vec<u8> {
        let mut bytes = b"SKFF\x01".to_vec();
        bytes.extend([self.kind, self.row_type, self.code]);
        bytes.extend(self.id.to_le_bytes());
        for field in [self.layer, self.n_rows, self.n_visits, self.micros] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(n_payload_bytes.to_le_bytes());
        assert_eq!(bytes.len(), 40);
        bytes.extend(&self.payload);
        bytes.extend(xxh3_64_with_seed(&bytes, seed).to_le_bytes());
        bytes
    }

    /// Reads one, and asserts its checksum.
    pub(crate) fn read(stream: &mut impl Read, seed: u64) -> io::Result<Frame> {
        let mut bytes = vec![0; 40];
        stream.read_exact(&mut bytes)?;
        assert_eq!(&bytes[..5], b"SKFF\x01");
        let n = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let wide =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let frame = Frame {
            kind: bytes[5],
            row_type: bytes[6],
            code: bytes[7],
            id: wide(8),
            layer: n(16),
            n_rows: n(20),
            n_visits: n(24),
            micros: n(28),
            payload: vec![0; wide(32) as usize],
        };
        let mut rest = vec![0; frame.payload.len() + 8];
        stream.read_exact(&mut rest)?;
        bytes.extend(&rest);
        let (covered, checksum) = bytes.split_at(bytes.len() - 8);
        assert_eq!(
            checksum,
            xxh3_64_with_seed(covered, seed).to_le_bytes(),
            "{frame:?}"
        );
        let payload = covered[40..].to_vec();
        Ok(Frame { payload, ..frame })
    }
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any key");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().to_vec()
}

fn seeds(key: &[u8], proof: &[u8], welcome: &[u8]) -> (u64, u64) {
    let bytes = mac(key, &[b"frames", proof, welcome]);
    let seed = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    (seed(0), seed(8))
}

fn short(kind: u8, payload: &[u8]) -> Vec<u8> {
    let payload = payload.to_vec();
    Frame {
        kind,
        payload,
        ..Frame::default()
    }
    .bytes(0)
}

pub(crate) fn dial(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.to_string()).expect("the server listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// A node's end of a connection that was agreed on.
pub(crate) struct Node {
    pub(crate) stream: TcpStream,
    pub(crate) to_server: u64,
    pub(crate) to_node: u64,
    /// layers from and to, experts from and to, rows of a frame, frames in flight.
    pub(crate) welcome: Vec<u32>,
}

impl Node {
    pub(crate) fn greet(address: &Address, secret: &[u8], model: &Identity) -> Node {
        let mut stream = dial(address);
        let nonce = [7u8; 32];
        stream.write_all(&short(HELLO, &nonce)).expect("a hello");
        let challenge = Frame::read(&mut stream, 0).expect("a challenge");
        assert_eq!((challenge.kind, challenge.payload.len()), (CHALLENGE, 32));
        let key = mac(secret, &[b"skulk wire 1", &nonce, &challenge.payload]);
        let mut proof = model.id.as_bytes().to_vec();
        for number in [
            model.hidden,
            model.n_layers,
            model.n_experts,
            model.n_beside,
        ] {
            proof.extend(number.to_le_bytes());
        }
        proof.extend(mac(&key, &[b"node", &proof]));
        stream.write_all(&short(PROOF, &proof)).expect("a proof");
        let welcome = Frame::read(&mut stream, 0).expect("a welcome");
        assert_eq!(
            (welcome.kind, welcome.payload.len()),
            (WELCOME, 64),
            "{welcome:?}"
        );
        assert_eq!(
            welcome.payload[32..],
            mac(&key, &[b"server", &proof, &welcome.payload[..32]])
        );
        let (to_server, to_node) = seeds(&key, &proof, &welcome.payload);
        let numbers = welcome.payload[..24]
            .chunks(4)
            .map(|n| u32::from_le_bytes(n.try_into().expect("four")));
        Node {
            stream,
            to_server,
            to_node,
            welcome: numbers.collect(),
        }
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        let bytes = frame.bytes(self.to_server);
        self.stream.write_all(&bytes).expect("the server reads");
    }

    pub(crate) fn read(&mut self) -> io::Result<Frame> {
        Frame::read(&mut self.stream, self.to_node)
    }
}

/// A request for one visit of each of these rows, f32.
pub(crate) fn forward(id: u64, layer: u32, rows: &[f32], hidden: u32, expert: u32) -> Frame {
    let n_rows = rows.len() as u32 / hidden;
    let mut payload: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
    for row in 0..n_rows {
        payload.extend(row.to_le_bytes());
        payload.extend(expert.to_le_bytes());
    }
    Frame {
        kind: FORWARD,
        row_type: 1,
        id,
        layer,
        n_rows,
        n_visits: n_rows,
        payload,
        ..Frame::default()
    }
}

/// The answer to a request of f32 rows, all zeros.
pub(crate) fn zeros(request: &Frame) -> Frame {
    // Rows of f32, and eight bytes for each visit.
    let visit_bytes = request.n_visits as usize * 8;
    let row_bytes = (request.payload.len() - visit_bytes) / request.n_rows as usize;
    Frame {
        kind: ROWS,
        row_type: 1,
        id: request.id,
        layer: request.layer,
        n_visits: request.n_visits,
        payload: vec![0; request.n_visits as usize * row_bytes],
        ..Frame::default()
    }
}

/// What a server that greets well sends, in bytes, for each request; `None` closes the connection.
pub(crate) type Answer = dyn Fn(&Frame, u64) -> Option<Vec<u8>> + Send + Sync;

/// Listens, greets every node as a server of the whole model would, and answers as `answer` says. It runs as long as
/// the test does.
pub(crate) fn serve(model: Identity, secret: &'static [u8], answer: Box<Answer>) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let answer: &'static Answer = Box::leak(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || greeted(stream, model, secret, answer));
        }
    });
    address.parse().expect("an address")
}

fn greeted(
    mut stream: TcpStream,
    model: Identity,
    secret: &[u8],
    answer: &Answer,
) -> io::Result<()> {
    let hello = Frame::read(&mut stream, 0)?;
    let nonce = [9u8; 32];
    stream.write_all(&short(CHALLENGE, &nonce))?;
    let proof = Frame::read(&mut stream, 0)?;
    let key = mac(secret, &[b"skulk wire 1", &hello.payload, &nonce]);
    assert_eq!(
        proof.payload[48..],
        mac(&key, &[b"node", &proof.payload[..48]])
    );
    let mut welcome = Vec::new();
    for number in [0, model.n_layers, 0, model.n_experts, 64, 8, 0, 0] {
        welcome.extend(number.to_le_bytes());
    }
    welcome.extend(mac(&key, &[b"server", &proof.payload, &welcome]));
    stream.write_all(&short(WELCOME, &welcome))?;
    let (to_server, to_node) = seeds(&key, &proof.payload, &welcome);
    loop {
        let request = Frame::read(&mut stream, to_server)?;
        match answer(&request, to_node) {
            Some(bytes) => stream.write_all(&bytes)?,
            None => return Ok(()),
        }
    }
}
