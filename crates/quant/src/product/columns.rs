//! A window of columns of a row-major array, so that threads write their own columns of one output.
//!
//! Invariant: no two windows share a value: a window is split by value, and each part keeps its own columns. This is
//! the one place outside `arch` with `unsafe`, because a slice cannot leave out the columns between its rows.

use std::marker::PhantomData;

/// All rows and some columns of a row-major f32 array.
#[derive(Debug)]
pub struct Columns<'a> {
    /// The first column of the first row.
    first: *mut f32,
    n_rows: usize,
    n_cols: usize,
    /// Values from one row to the next; at least `n_cols`.
    stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: a window is a unique borrow of its values, as `&mut [f32]` is, and f32 may go to another thread.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// All columns of `values`, (n_rows, n_cols) row-major.
    ///
    /// # Panics
    /// When `n_cols` is 0 or `values` is no whole number of rows.
    pub fn new(values: &'a mut [f32], n_cols: usize) -> Self {
        assert!(
            n_cols > 0 && values.len().is_multiple_of(n_cols),
            "{} values are no whole number of rows of {n_cols}",
            values.len()
        );
        Columns {
            first: values.as_mut_ptr(),
            n_rows: values.len() / n_cols,
            n_cols,
            stride: n_cols,
            values: PhantomData,
        }
    }

    /// The columns before `column` and those from it on.
    ///
    /// # Panics
    /// When `column` is beyond the window.
    pub fn split_at(self, column: usize) -> (Self, Self) {
        assert!(
            column <= self.n_cols,
            "column {column} is beyond a window of {} columns",
            self.n_cols
        );
        let right = Columns {
            first: self.first.wrapping_add(column),
            n_cols: self.n_cols - column,
            ..self
        };
        let left = Columns {
            n_cols: column,
            ..self
        };
        (left, right)
    }

    /// The same window for a while.
    pub(crate) fn reborrow(&mut self) -> Columns<'_> {
        Columns { ..*self }
    }

    /// Rows of the array.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns of this window.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The window's part of row `row`.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(
            row < self.n_rows,
            "row {row} is beyond {} rows",
            self.n_rows
        );
        // SAFETY: the window was cut from a slice of n_rows rows of `stride` values, of which this row's n_cols values
        // belong to this window alone; `self` is borrowed for as long as they are. An empty part is only a place.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.wrapping_add(row * self.stride), self.n_cols)
        }
    }
}
