//! What happens to the values of a checkpoint tensor on the way into the vindex, as a value and in words.
//!
//! Invariant: order and change alone decide the values; which places an order means in numbers is in `extract/view.rs`.

use std::fmt;

use serde::Serialize;

/// What happens to the values of a checkpoint tensor on the way into the vindex: they are put into another order, and
/// then each is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Transform {
    /// Which values are taken, and in which order.
    pub order: Order,
    /// What each becomes.
    pub change: Change,
}

impl Transform {
    /// Nothing.
    pub const NONE: Transform = Transform {
        order: Order::AsIs,
        change: Change::None,
    };

    /// Another order alone.
    pub const fn order(order: Order) -> Transform {
        Transform {
            order,
            change: Change::None,
        }
    }

    /// Other values alone.
    pub const fn change(change: Change) -> Transform {
        Transform {
            order: Order::AsIs,
            change,
        }
    }
}

/// Which values of a checkpoint tensor are taken, and in which order. A row is what the last dimension counts; the rows
/// of a vector are its elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// All, as they are.
    AsIs,
    /// Rows of each head are put into the interleaved order that ggml's rope of the llama architecture expects.
    InterleaveRope {
        /// How many heads the rows belong to.
        n_heads: u32,
    },
    /// Heads that belong together are put apart: of `n_groups` groups of `n_each` heads, the first head of each group
    /// comes first, then the second of each. What is before the heads stays.
    TileHeads {
        /// Rows before the heads.
        n_before: u64,
        /// Groups.
        n_groups: u32,
        /// Heads of a group.
        n_each: u32,
    },
    /// The same with the heads within each row.
    TileColumns {
        /// Groups.
        n_groups: u32,
        /// Heads of a group.
        n_each: u32,
    },
    /// The rows are `n_blocks` equal blocks; of all blocks the rows of the first range are taken, then those of the next.
    Rows {
        /// Blocks.
        n_blocks: u32,
        /// First row and one past the last, counted in a block.
        ranges: Vec<[u64; 2]>,
    },
    /// Each second row, from `first` on; rows have `row_len` values.
    Alternate {
        /// 0 or 1.
        first: u32,
        /// Values of a row.
        row_len: u64,
    },
    /// The rows are `n_blocks` equal blocks; the first `n_rows` rows of each block become columns.
    Transposed {
        /// Blocks.
        n_blocks: u32,
        /// Rows of a block that are taken.
        n_rows: u64,
    },
    /// The same with all rows of each block, and of what become rows each second, from `first` on.
    TransposedAlternate {
        /// Blocks.
        n_blocks: u32,
        /// 0 or 1.
        first: u32,
    },
}

/// What each value becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Itself.
    None,
    /// One is added (norms that are stored around zero).
    AddOne,
    /// `-exp(v)` (the decay of a recurrent state, stored as a logarithm).
    NegativeExp,
}

impl Transform {
    /// Whether the values come as they are.
    pub fn is_none(&self) -> bool {
        *self == Transform::NONE
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.order, self.change) {
            (Order::AsIs, change) => change.fmt(f),
            (order, Change::None) => order.fmt(f),
            (order, change) => write!(f, "{order}; {change}"),
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::AsIs => write!(f, "as it is"),
            Order::InterleaveRope { n_heads } => {
                write!(f, "halves of {n_heads} heads interleaved for rope")
            }
            Order::TileHeads {
                n_before,
                n_groups,
                n_each,
            } => {
                write!(f, "{n_groups} groups of {n_each} heads put in turn")?;
                match n_before {
                    0 => Ok(()),
                    n => write!(f, " after {n} rows"),
                }
            }
            Order::TileColumns { n_groups, n_each } => {
                write!(
                    f,
                    "{n_groups} groups of {n_each} heads put in turn in each row"
                )
            }
            Order::Rows { n_blocks, ranges } => {
                let ranges: Vec<String> = ranges
                    .iter()
                    .map(|[start, end]| format!("{start}..{end}"))
                    .collect();
                write!(
                    f,
                    "rows {} of each of {n_blocks} blocks",
                    ranges.join(", then ")
                )
            }
            Order::Alternate { first, row_len } => {
                let what = if *row_len == 1 { "element" } else { "row" };
                write!(f, "each second {what} from {first} on")
            }
            Order::Transposed { n_blocks, n_rows } => {
                write!(
                    f,
                    "the first {n_rows} rows of each of {n_blocks} blocks, transposed"
                )
            }
            Order::TransposedAlternate { n_blocks, first } => {
                write!(
                    f,
                    "each of {n_blocks} blocks transposed, then each second row from {first} on"
                )
            }
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Change::None => "as it is",
            Change::AddOne => "one added",
            Change::NegativeExp => "-exp of each",
        })
    }
}
