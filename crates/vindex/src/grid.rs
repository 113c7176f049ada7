//! How the scales of a quantised matrix spread over its values, told from the two shapes.
//!
//! Invariant: every value has exactly one scale, and the scales' own shape says which; their number alone decides only
//! where the shapes have nothing in common. Tiles at the lower and right edge may be cut. Left out: the numbers.

/// Sides of square tiles that checkpoints use, the likeliest first.
const SIDES: [u64; 4] = [128, 64, 256, 32];

/// The tiles of a stack of matrices, `rows` by `cols` values each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Rows of each matrix.
    pub rows: u64,
    /// Values of a row.
    pub cols: u64,
    block_rows: u64,
    /// Values of a row that share a scale.
    pub block_cols: u64,
    scale_rows: u64,
    /// Scales of a row.
    pub scale_cols: u64,
    /// Each matrix has scales of its own.
    per_matrix: bool,
}

impl Grid {
    /// How `scales` (its shape) spreads over values of the shape `values`; `tile` is the configuration's
    /// `weight_block_size`. `None` when it cannot.
    pub fn of(values: &[u64], scales: &[u64], tile: Option<[u64; 2]>) -> Option<Grid> {
        let n_values = product(values)?;
        let n_scales = product(scales)?;
        if n_values == 0 || n_scales == 0 {
            return None;
        }
        let flat = |group: u64| Grid {
            rows: 1,
            cols: n_values,
            block_rows: 1,
            block_cols: group,
            scale_rows: 1,
            scale_cols: n_values.div_ceil(group),
            per_matrix: false,
        };
        let &[.., cols] = values else {
            return (n_scales == 1).then(|| flat(1));
        };
        let rows = if values.len() == 1 {
            1
        } else {
            values[values.len() - 2]
        };
        let n_matrices = n_values / (rows * cols);
        let whole = Grid {
            rows,
            cols,
            block_rows: rows,
            block_cols: cols,
            scale_rows: 1,
            scale_cols: 1,
            per_matrix: false,
        };
        if n_scales == 1 {
            return Some(whole);
        }
        if values.len() == 1 {
            return n_values
                .is_multiple_of(n_scales)
                .then(|| flat(n_values / n_scales));
        }
        if n_matrices > 1 && n_scales == n_matrices {
            return Some(Grid {
                per_matrix: true,
                ..whole
            });
        }
        // One scale a row, written as a vector.
        if scales.len() == 1 && n_scales == rows && n_matrices == 1 {
            return Some(Grid {
                block_rows: 1,
                scale_rows: rows,
                ..whole
            });
        }
        if scales.len() == values.len() {
            let leading = |shape: &[u64]| product(&shape[..shape.len() - 2]);
            let per_matrix = match leading(scales)? {
                n if n == n_matrices => n_matrices > 1,
                1 => false,
                _ => return None,
            };
            let (scale_rows, scale_cols) = (scales[scales.len() - 2], scales[scales.len() - 1]);
            let [block_rows, block_cols] = blocks([rows, cols], [scale_rows, scale_cols], tile)?;
            return Some(Grid {
                rows,
                cols,
                block_rows,
                block_cols,
                scale_rows,
                scale_cols,
                per_matrix,
            });
        }
        n_values
            .is_multiple_of(n_scales)
            .then(|| flat(n_values / n_scales))
    }

    /// Where the scales of a row (of all matrices' rows, one after another) begin.
    pub fn first_scale(&self, row: u64) -> u64 {
        let (matrix, row) = (row / self.rows, row % self.rows);
        let scale_row = row / self.block_rows;
        let before = if self.per_matrix {
            matrix * self.scale_rows
        } else {
            0
        };
        (before + scale_row) * self.scale_cols
    }
}

fn product(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))
}

/// Rows and columns of a tile, such that `sides` take `counts` of them.
fn blocks(sides: [u64; 2], counts: [u64; 2], tile: Option<[u64; 2]>) -> Option<[u64; 2]> {
    let fits =
        |block: [u64; 2]| (0..2).all(|i| block[i] > 0 && sides[i].div_ceil(block[i]) == counts[i]);
    let squares = SIDES.iter().map(|&side| [side, side]);
    if let Some(block) = tile.into_iter().chain(squares).find(|&block| fits(block)) {
        return Some(block);
    }
    let mut block = [0; 2];
    for i in 0..2 {
        block[i] = match (sides[i], counts[i]) {
            (side, 1) => side,
            (side, n) if n > 0 && side.is_multiple_of(n) => side / n,
            (side, n) => *SIDES.iter().find(|&&b| side.div_ceil(b) == n)?,
        };
    }
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scale of each value, in row-major order.
    fn spread(values: &[u64], scales: &[u64], tile: Option<[u64; 2]>) -> Option<Vec<u64>> {
        let grid = Grid::of(values, scales, tile)?;
        let n_rows = values.iter().product::<u64>() / grid.cols;
        let scale = |row, col| grid.first_scale(row) + col / grid.block_cols;
        Some(
            (0..n_rows)
                .flat_map(|row| (0..grid.cols).map(move |col| scale(row, col)))
                .collect(),
        )
    }

    #[test]
    fn the_scales_own_shape_says_how_they_spread() {
        assert_eq!(spread(&[4, 512], &[4, 1], None).unwrap()[511..513], [0, 1]);
        assert_eq!(
            spread(&[2, 4], &[2], None).unwrap(),
            [0, 0, 0, 0, 1, 1, 1, 1]
        );
        assert_eq!(
            spread(&[2, 4], &[2, 2], None).unwrap(),
            [0, 0, 1, 1, 2, 2, 3, 3]
        );
        assert_eq!(spread(&[6], &[3], None).unwrap(), [0, 0, 1, 1, 2, 2]);
        assert_eq!(spread(&[2, 3], &[], None).unwrap(), [0; 6]);
        assert_eq!(spread(&[2, 1, 2], &[2, 1, 1], None).unwrap(), [0, 0, 1, 1]);
        assert_eq!(spread(&[2, 2, 1], &[2, 2, 1], None).unwrap(), [0, 1, 2, 3]);
        assert_eq!(spread(&[], &[1], None).unwrap(), [0]);
    }

    #[test]
    fn tiles_are_square_and_cut_at_the_edges() {
        let of = |values: &[u64], scales: &[u64]| Grid::of(values, scales, None).unwrap();
        let grid = of(&[256, 320], &[2, 3]);
        assert_eq!((grid.block_rows, grid.block_cols), (128, 128));
        assert_eq!(grid.first_scale(255), 3);
        let grid = of(&[200, 100], &[4, 2]);
        assert_eq!((grid.block_rows, grid.block_cols), (64, 64));
        let grid = Grid::of(&[100, 100], &[10, 10], Some([10, 10])).unwrap();
        assert_eq!((grid.block_rows, grid.block_cols), (10, 10));
        let grid = of(&[3, 256, 256], &[3, 2, 2]);
        assert_eq!(grid.first_scale(256 + 128), 4 + 2);
    }

    #[test]
    fn what_cannot_spread_is_refused() {
        for (values, scales) in [
            (&[4, 4][..], &[3, 1][..]),
            (&[5], &[2]),
            (&[4, 4], &[0]),
            (&[2, 2, 2], &[3, 1, 1]),
            (&[], &[2]),
        ] {
            assert_eq!(
                Grid::of(values, scales, None),
                None,
                "{values:?} {scales:?}"
            );
        }
    }
}
