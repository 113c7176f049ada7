//! A tensor of a vindex as a forward pass takes it: a matrix in mapped memory, or a few numbers.
//!
//! Invariant: a [`Weight`] that was found has the shape that the model's numbers say, so that later uses cannot fail.

use std::ops::Range;

use quant::{BlockType, Matrix};
use vindex::{Share, Vindex};

/// Why a vindex cannot be computed with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The index has no such tensor, or this slice has not its part.
    #[error(
        "tensor {tensor} is not here ({dir} is open for the slice {share}); pull the slice that this role needs"
    )]
    Missing {
        /// GGUF name.
        tensor: String,
        /// The directory.
        dir: String,
        /// What of the directory is open.
        share: Share,
    },
    /// The tensor has another shape than the model's numbers say.
    #[error(
        "tensor {tensor} has the shape {got:?}, expected {expected:?} (row length first); extract again"
    )]
    Shape {
        /// GGUF name.
        tensor: String,
        /// What the configuration says.
        expected: Vec<u64>,
        /// What the index says.
        got: Vec<u64>,
    },
    /// A number of the configuration with which nothing can be computed.
    #[error("the model's {what}; extract again")]
    Config {
        /// Which, and what is wrong.
        what: String,
    },
    /// A layer or an expert that the model does not have.
    #[error("{what} {got_start}..{got_end} are not among the model's {n}")]
    Range {
        /// Layers or experts.
        what: &'static str,
        /// First asked for.
        got_start: u32,
        /// One after the last asked for.
        got_end: u32,
        /// How many there are.
        n: u32,
    },
}

/// A matrix, or one matrix an expert, stacked.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    name: String,
    /// How rows are stored.
    pub(crate) block_type: BlockType,
    /// Where the matrix begins among the rows that are stored together.
    first_row: usize,
    /// Rows of one matrix.
    pub(crate) n_rows: usize,
    /// Values in a row.
    pub(crate) n_cols: usize,
}

impl Weight {
    /// Finds the matrix `(n_rows, n_cols)` called `name`.
    pub(crate) fn find(
        vindex: &Vindex,
        name: String,
        n_rows: u32,
        n_cols: u32,
    ) -> Result<Weight, ModelError> {
        Weight::with_shape(vindex, name, 0, &[n_cols.into(), n_rows.into()])
    }

    /// Finds the matrices `(n_experts, n_rows, n_cols)` called `name`, of which all in `held` are here.
    pub(crate) fn find_stacked(
        vindex: &Vindex,
        name: String,
        held: Range<u32>,
        n_rows: u32,
        n_cols: u32,
    ) -> Result<Weight, ModelError> {
        if held.clone().any(|k| vindex.expert(&name, k).is_none()) {
            return Err(missing(vindex, &name));
        }
        Weight::with_shape(vindex, name, held.start, &[n_cols.into(), n_rows.into()])
    }

    /// Finds the two halves of each of the matrices `(n_experts, 2 * n_rows, n_cols)` called `name`.
    pub(crate) fn find_stacked_pair(
        vindex: &Vindex,
        name: String,
        held: Range<u32>,
        n_rows: u32,
        n_cols: u32,
    ) -> Result<[Weight; 2], ModelError> {
        let both = Weight::find_stacked(vindex, name, held, n_rows.saturating_mul(2), n_cols)?;
        let n_rows = n_rows as usize;
        let half = |first_row| Weight {
            first_row,
            n_rows,
            ..both.clone()
        };
        Ok([half(0), half(n_rows)])
    }

    /// `ne`: of one matrix.
    fn with_shape(
        vindex: &Vindex,
        name: String,
        expert: u32,
        ne: &[u64; 2],
    ) -> Result<Weight, ModelError> {
        let view = vindex.expert(&name, expert);
        let view = view.ok_or_else(|| missing(vindex, &name))?;
        if view.ne != ne {
            return Err(ModelError::Shape {
                tensor: name,
                expected: ne.to_vec(),
                got: view.ne.to_vec(),
            });
        }
        Ok(Weight {
            name,
            block_type: view.block_type,
            first_row: 0,
            // They fit: the tensor is in memory.
            n_rows: ne[1] as usize,
            n_cols: ne[0] as usize,
        })
    }

    /// The matrix, as it lies in the file.
    pub(crate) fn matrix<'a>(&self, vindex: &'a Vindex) -> Matrix<'a> {
        self.expert(vindex, 0)
    }

    /// The matrix of one expert, which must be one of those that were found.
    pub(crate) fn expert<'a>(&self, vindex: &'a Vindex, expert: usize) -> Matrix<'a> {
        let view = vindex
            .expert(&self.name, expert as u32)
            .expect("it was found when the model was opened");
        Matrix {
            block_type: self.block_type,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
            bytes: &view.bytes[self.first_row * self.row_bytes()..][..self.bytes()],
        }
    }

    /// GGUF name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of one matrix.
    pub(crate) fn bytes(&self) -> usize {
        self.n_rows * self.row_bytes()
    }

    fn row_bytes(&self) -> usize {
        let row_bytes = self.block_type.row_bytes(self.n_cols);
        row_bytes.expect("a stored row is whole blocks")
    }
}

/// Matrices of one shape that lie one after the other in one tensor.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    name: String,
    pub(crate) block_type: BlockType,
    /// Matrices.
    pub(crate) n: usize,
    /// Of one matrix.
    pub(crate) n_rows: usize,
    pub(crate) n_cols: usize,
}

impl Stack {
    /// Finds the matrices `(n, n_rows, n_cols)` called `name`.
    pub(crate) fn find(
        vindex: &Vindex,
        name: String,
        n: u32,
        n_rows: u32,
        n_cols: u32,
    ) -> Result<Stack, ModelError> {
        let view = vindex.tensor(&name).ok_or_else(|| missing(vindex, &name))?;
        let expected = [n_cols.into(), n_rows.into(), n.into()];
        if view.ne != expected {
            return Err(ModelError::Shape {
                tensor: name,
                expected: expected.to_vec(),
                got: view.ne.to_vec(),
            });
        }
        Ok(Stack {
            name,
            block_type: view.block_type,
            // They fit: the tensor is in memory.
            n: n as usize,
            n_rows: n_rows as usize,
            n_cols: n_cols as usize,
        })
    }

    /// The matrix `i`, as it lies in the file.
    pub(crate) fn matrix<'a>(&self, vindex: &'a Vindex, i: usize) -> Matrix<'a> {
        let view = vindex
            .tensor(&self.name)
            .expect("it was found when the model was opened");
        let size = view.bytes.len() / self.n;
        Matrix {
            block_type: self.block_type,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
            bytes: &view.bytes[i * size..][..size],
        }
    }

    /// GGUF name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        let row_bytes = self.block_type.row_bytes(self.n_cols);
        self.n * self.n_rows * row_bytes.expect("a stored row is whole blocks")
    }
}

/// The numbers of the vector called `name`.
pub(crate) fn vector(vindex: &Vindex, name: &str, n: u32) -> Result<Vec<f32>, ModelError> {
    numbers(vindex, name, &[n.into()])
}

/// The numbers of the tensor called `name`, which has rows of `ne[0]`.
pub(crate) fn numbers(vindex: &Vindex, name: &str, ne: &[u64]) -> Result<Vec<f32>, ModelError> {
    let view = vindex.tensor(name).ok_or_else(|| missing(vindex, name))?;
    if view.ne != ne {
        return Err(ModelError::Shape {
            tensor: name.to_owned(),
            expected: ne.to_vec(),
            got: view.ne.to_vec(),
        });
    }
    // They fit: the tensor is in memory.
    let mut values = vec![0.0; ne.iter().product::<u64>() as usize];
    quant::decode(view.block_type, view.bytes, &mut values);
    Ok(values)
}

/// The vectors of the experts `held`, one after the other, from those called `name`.
pub(crate) fn stacked_vectors(
    vindex: &Vindex,
    name: &str,
    held: Range<u32>,
    n: u32,
) -> Result<Vec<f32>, ModelError> {
    let mut values = vec![0.0; held.len() * n as usize];
    for (expert, values) in held.zip(values.chunks_exact_mut(n.max(1) as usize)) {
        let view = vindex.expert(name, expert);
        let view = view.ok_or_else(|| missing(vindex, name))?;
        if view.ne != [u64::from(n)] {
            return Err(ModelError::Shape {
                tensor: name.to_owned(),
                expected: vec![n.into()],
                got: view.ne.to_vec(),
            });
        }
        quant::decode(view.block_type, view.bytes, values);
    }
    Ok(values)
}

fn missing(vindex: &Vindex, name: &str) -> ModelError {
    ModelError::Missing {
        tensor: name.to_owned(),
        dir: vindex.dir().display().to_string(),
        share: vindex.share(),
    }
}
