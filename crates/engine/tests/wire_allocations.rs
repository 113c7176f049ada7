//! A call over the wire allocates nothing once it has been made before: neither at the node nor at the server, which
//! here are one process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use engine::wire::{Address, Identity, Listener, Remote, RemoteOptions, Server, ServerOptions};
use engine::{Batch, FeedForward, FfnError, Visit};
use vindex::VindexId;

struct Counting;

static N_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is the system allocator's; this only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Gives each visit its row back.
struct Echo;

const HIDDEN: usize = 512;

impl FeedForward for Echo {
    fn forward(&self, _layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        for (visit, out) in batch.visits.iter().zip(out.chunks_exact_mut(HIDDEN)) {
            out.copy_from_slice(&batch.rows[visit.row as usize * HIDDEN..][..HIDDEN]);
        }
        Ok(())
    }
}

#[test]
fn a_decoding_step_over_the_wire_allocates_nothing() {
    let model = Identity {
        id: VindexId::of(b"allocations"),
        hidden: HIDDEN as u32,
        n_layers: 4,
        n_experts: 8,
        n_beside: 0,
    };
    let options = ServerOptions {
        model,
        layers: 0..4,
        experts: 0..8,
        secret: Default::default(),
        limits: Default::default(),
    };
    let at: Address = "127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind(&at).expect("a port");
    let address = listener.address().clone();
    let server = Server::new(Arc::new(Echo), options).expect("a server");
    let serving = thread::spawn({
        let server = server.clone();
        move || server.serve(&listener).expect("it serves")
    });
    let remote = Remote::connect(&[address], RemoteOptions::new(model)).expect("a server");

    let rows = vec![0.25; 4 * HIDDEN];
    let visits: Vec<Visit> = (0..8)
        .map(|i| Visit {
            row: i / 2,
            expert: i,
        })
        .collect();
    let mut out = vec![0.0; visits.len() * HIDDEN];
    let mut step = || {
        for layer in 0..model.n_layers {
            let batch = Batch {
                rows: &rows,
                visits: &visits,
            };
            remote.forward(layer, batch, &mut out).expect("rows");
        }
    };
    (0..20).for_each(|_| step());
    let before = N_ALLOCATIONS.load(Ordering::Relaxed);
    (0..100).for_each(|_| step());
    let n = N_ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(n, 0, "allocations in 400 calls");
    assert!(out.iter().all(|value| *value == 0.25));

    drop(remote);
    server.drain(Duration::from_secs(1));
    serving.join().expect("it ends");
}
