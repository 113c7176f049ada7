//! What enters each matrix of a model while texts pass: the sum of the squares of every column, from which an
//! importance-weighted quantisation learns which columns matter.
//!
//! For a matrix `w` and rows `x` that were multiplied with it, `squares[j] = Σ x[j]²` and `counts` is how many rows there
//! were; experts count by themselves, by the rows that visited them. A matrix that is both embeddings and output head is
//! seen as the head.
//!
//! Invariant: sums are in double precision and in the order of the rows, so that neither threads nor the cut of a text
//! into steps change them. A pass that collects nothing pays one comparison for a product. Leaves out what is done with
//! the sums, and matrices whose inputs are on another machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::weights::{Stack, Weight};

/// Collects over any number of steps; [`crate::Forward::collecting`] and [`crate::Local::collecting`] fill it.
#[derive(Debug, Default)]
pub struct Collector {
    sums: Mutex<BTreeMap<String, ColumnSums>>,
}

/// What entered one matrix, or each of several stacked ones.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnSums {
    /// Columns of one matrix.
    pub n_cols: usize,
    /// `(n_matrices, n_cols)`: the sum of the squares.
    pub squares: Vec<f64>,
    /// `(n_matrices)`: the rows that were summed.
    pub counts: Vec<u64>,
}

impl Collector {
    /// What was collected, by the tensor's GGUF name; the collector is empty afterwards.
    pub fn take(&self) -> BTreeMap<String, ColumnSums> {
        std::mem::take(&mut *self.sums.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds `rows` of a matrix, in order; each is the number of a matrix of `n_matrices` and what entered it.
    fn add<'a>(
        &self,
        (name, n_cols): (&str, usize),
        n_matrices: usize,
        rows: impl Iterator<Item = (usize, &'a [f32])>,
    ) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = sums.entry(name.to_owned()).or_insert_with(|| ColumnSums {
            n_cols,
            squares: vec![0.0; n_matrices * n_cols],
            counts: vec![0; n_matrices],
        });
        for (matrix, row) in rows {
            sums.counts[matrix] += 1;
            let squares = &mut sums.squares[matrix * n_cols..][..n_cols];
            for (sum, &x) in squares.iter_mut().zip(row) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
    }
}

/// Where a pass tells what enters its matrices: to nobody, or to a [`Collector`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch(Option<Arc<Collector>>);

impl Watch {
    pub(crate) fn by(collector: Arc<Collector>) -> Watch {
        Watch(Some(collector))
    }

    /// Tells that `rows`, `(n, n_cols)`, enter each of `weights`.
    #[inline]
    pub(crate) fn see(&self, weights: &[&Weight], rows: &[f32]) {
        if let Some(collector) = &self.0 {
            for weight in weights {
                let rows = rows.chunks_exact(weight.n_cols).map(|row| (0, row));
                collector.add((weight.name(), weight.n_cols), 1, rows);
            }
        }
    }

    /// Tells that `rows`, `(n, matrices, n_cols)`, enter the matrices of `stack`.
    #[inline]
    pub(crate) fn see_stack(&self, stack: &Stack, rows: &[f32]) {
        if let Some(collector) = &self.0 {
            let rows = rows.chunks_exact(stack.n_cols).enumerate();
            let rows = rows.map(|(i, row)| (i % stack.n, row));
            collector.add((stack.name(), stack.n_cols), stack.n, rows);
        }
    }

    /// Tells which of `rows`, `(n, n_cols)`, enter which of the `n_experts` matrices of each of `weights`: for each visit
    /// its expert, of which `first` has the first matrix, and its row. Weights that are stored together are one.
    #[inline]
    pub(crate) fn see_visits(
        &self,
        weights: &[&Weight],
        (first, n_experts): (u32, usize),
        visits: (&[u32], &[u32]),
        rows: &[f32],
    ) {
        if let Some(collector) = &self.0 {
            for (i, weight) in weights.iter().enumerate() {
                if weights[..i].iter().any(|w| w.name() == weight.name()) {
                    continue;
                }
                let n_cols = weight.n_cols;
                let visits = visits.0.iter().zip(visits.1);
                let rows = visits.map(|(&expert, &row)| {
                    let row = &rows[row as usize * n_cols..][..n_cols];
                    ((expert - first) as usize, row)
                });
                collector.add((weight.name(), n_cols), n_experts, rows);
            }
        }
    }
}
