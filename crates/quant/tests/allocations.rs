//! Warm products allocate nothing: an allocator that counts is the witness.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use quant::{
    Activations, BlockType, Columns, GateActivation, Matrix, accumulate_rows, encode, multiply,
    multiply_gated, softmax_in_place,
};

struct Counting;

thread_local! {
    static N_ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.set(N_ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn warm_products_allocate_nothing() {
    let (n_rows, n_cols, n) = (40, 512, 20);
    for block_type in BlockType::ALL {
        let mut bytes = vec![0; n_rows * block_type.row_bytes(n_cols).unwrap()];
        encode(block_type, &vec![0.5; n_rows * n_cols], &mut bytes);
        let w = Matrix {
            block_type,
            n_rows,
            n_cols,
            bytes: &bytes,
        };
        let x = vec![1.0; n * n_cols];
        let mut out = vec![0.0; n * n_rows];
        let mut activations = Activations::new();
        let mut sum = vec![0.0; n_cols];
        let mut pass = || {
            activations.fill(&x, n_cols, &[block_type]);
            multiply(
                &w,
                0..n_rows,
                activations.all(),
                Columns::new(&mut out, n_rows),
            );
            let picked = activations.pick(&[3, 1]);
            let out = &mut out[..2 * n_rows];
            multiply(&w, 0..n_rows, picked, Columns::new(out, n_rows));
            let columns = Columns::new(out, n_rows);
            multiply_gated(&w, &w, 0..n_rows, picked, GateActivation::Silu, columns);
            softmax_in_place(out);
            if block_type.block_len() == 1 {
                accumulate_rows(&w, &out[..n_rows], &mut sum);
            }
        };
        pass();
        let before = N_ALLOCATIONS.get();
        pass();
        assert_eq!(N_ALLOCATIONS.get(), before, "{block_type}");
    }
}
