//! A feed-forward layer without weights, and servers of it: what is tested here is the wire.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use engine::wire::{
    Address, Identity, Listener, Remote, RemoteOptions, Server, ServerLimits, ServerOptions,
};
use engine::{Batch, FeedForward, FfnError, Visit};
use vindex::VindexId;

/// Mixes each row with itself, its layer and its expert, in f32 and in a fixed order.
#[derive(Debug)]
pub(crate) struct Oracle {
    pub(crate) model: Identity,
    pub(crate) layers: Range<u32>,
    pub(crate) experts: Range<u32>,
    /// How long each pass takes.
    pub(crate) pause: Duration,
    pub(crate) n_passes: AtomicU64,
}

impl Oracle {
    pub(crate) fn whole(model: Identity) -> Oracle {
        Oracle {
            model,
            layers: 0..model.n_layers,
            experts: 0..model.n_experts,
            pause: Duration::ZERO,
            n_passes: AtomicU64::new(0),
        }
    }
}

impl FeedForward for Oracle {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        let hidden = self.model.hidden as usize;
        assert!(
            self.layers.contains(&layer),
            "layer {layer} was asked of {:?}",
            self.layers
        );
        assert_eq!(out.len(), batch.visits.len() * hidden);
        assert!(batch.visits.is_sorted_by_key(|visit| visit.row));
        self.n_passes.fetch_add(1, Ordering::Relaxed);
        if !self.pause.is_zero() {
            thread::sleep(self.pause);
        }
        for (visit, out) in batch.visits.iter().zip(out.chunks_exact_mut(hidden)) {
            let is_beside = visit.expert == self.model.n_experts && self.model.n_beside > 0;
            let held_with = if is_beside { 0 } else { visit.expert };
            assert!(
                self.experts.contains(&held_with),
                "{visit:?} was asked of {:?}",
                self.experts
            );
            let row = &batch.rows[visit.row as usize * hidden..][..hidden];
            let scale = 1.0 + layer as f32 / 7.0 + visit.expert as f32 / 13.0;
            for (i, out) in out.iter_mut().enumerate() {
                *out = row[i] * scale + row[(i + 1) % hidden] * 0.37 - row[hidden - 1 - i] / 3.0;
            }
        }
        Ok(())
    }
}

pub(crate) fn model(hidden: u32, n_layers: u32, n_experts: u32) -> Identity {
    Identity {
        id: VindexId::of(format!("{hidden} {n_layers} {n_experts}").as_bytes()),
        hidden,
        n_layers,
        n_experts,
        n_beside: 0,
    }
}

/// A server on a thread, and where it listens.
pub(crate) struct Running {
    pub(crate) server: Server,
    pub(crate) address: Address,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(
        ffn: Arc<dyn FeedForward>,
        options: ServerOptions,
        at: &Address,
    ) -> Running {
        let listener = Listener::bind(at).expect("a free address");
        let server = Server::new(ffn, options).expect("a server");
        let address = listener.address().clone();
        let thread = thread::spawn({
            let server = server.clone();
            move || server.serve(&listener).expect("the server serves")
        });
        Running {
            server,
            address,
            thread: Some(thread),
        }
    }

    pub(crate) fn of(oracle: Oracle, at: &Address) -> Running {
        let options = options(&oracle);
        Running::start(Arc::new(oracle), options, at)
    }

    /// Ends it at once, whatever it is doing.
    fn end(&mut self) {
        self.server.drain(Duration::ZERO);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server's thread ends well");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn options(oracle: &Oracle) -> ServerOptions {
    ServerOptions {
        model: oracle.model,
        layers: oracle.layers.clone(),
        experts: oracle.experts.clone(),
        secret: Default::default(),
        limits: ServerLimits::default(),
    }
}

pub(crate) fn tcp() -> Address {
    "127.0.0.1:0".parse().expect("an address")
}

/// A Unix socket in `folder`.
pub(crate) fn unix(folder: &tempfile::TempDir, name: &str) -> Address {
    let path: PathBuf = folder.path().join(name);
    format!("unix:{}", path.display())
        .parse()
        .expect("an address")
}

pub(crate) fn connect(servers: &[Running], model: Identity) -> Remote {
    let addresses: Vec<Address> = servers
        .iter()
        .map(|server| server.address.clone())
        .collect();
    Remote::connect(&addresses, RemoteOptions::new(model)).expect("the servers hold the model")
}

/// Rows that differ from each other in every number, the same for the same seed.
pub(crate) fn rows(n_rows: usize, hidden: u32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n_rows * hidden as usize)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect()
}

/// A model in which every token visits one more expert, beside those that are chosen for it.
pub(crate) fn model_with_one_beside(hidden: u32, n_layers: u32, n_experts: u32) -> Identity {
    Identity {
        n_beside: 1,
        ..model(hidden, n_layers, n_experts)
    }
}

/// Each row visits `n_used` experts, as a router might choose them, and then what is beside them; in dense layers it visits
/// expert 0.
pub(crate) fn visits_of(
    model: &Identity,
    is_dense: bool,
    n_rows: usize,
    n_used: u32,
) -> Vec<Visit> {
    if is_dense {
        return visits(n_rows, 1, 1);
    }
    let chosen = visits(n_rows, n_used, model.n_experts);
    let beside = |row| Visit {
        row,
        expert: model.n_experts,
    };
    chosen
        .chunks(n_used as usize)
        .flat_map(|chosen| {
            let beside = (0..model.n_beside).map(|_| beside(chosen[0].row));
            chosen.iter().copied().chain(beside)
        })
        .collect()
}

/// Each row visits `n_used` experts, as a router might choose them.
pub(crate) fn visits(n_rows: usize, n_used: u32, n_experts: u32) -> Vec<Visit> {
    (0..n_rows as u32)
        .flat_map(|row| {
            // The step has no factor in common with a power of two, so the experts of a row differ.
            (0..n_used).map(move |i| Visit {
                row,
                expert: (row * 7 + i * 5 + row / 3) % n_experts,
            })
        })
        .collect()
}

pub(crate) fn bits(rows: &[f32]) -> Vec<u32> {
    rows.iter().map(|value| value.to_bits()).collect()
}

/// What `ffn` says of these rows.
pub(crate) fn ask(
    ffn: &dyn FeedForward,
    layer: u32,
    rows: &[f32],
    visits: &[Visit],
    hidden: u32,
) -> Result<Vec<f32>, FfnError> {
    let mut out = vec![f32::NAN; visits.len() * hidden as usize];
    ffn.forward(layer, Batch { rows, visits }, &mut out)?;
    Ok(out)
}
