//! The matrices of a layer's experts, in lists of experts of one shape: those that a router chooses from, and the one that
//! every token goes through beside them. A dense layer is one list of one expert.
//!
//! Invariant: a list that was opened has the matrices of all its `numbers`, in the shapes that the configuration says.

use std::ops::Range;

use vindex::{Config, Vindex};

use crate::ffn::beside;
use crate::weights::{ModelError, Weight, stacked_vectors, vector};

/// The experts of a layer that are held, in the order of their numbers. There may be none: a dense layer is expert 0.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) lists: Vec<List>,
}

/// Experts of one shape. Matrices are stacked, `(n_stacked, …)`.
#[derive(Debug)]
pub(super) struct List {
    /// Numbers, in the layer, of the experts that are held.
    pub(super) numbers: Range<u32>,
    /// Number of the expert whose matrices are the first of the stacks.
    pub(super) first: u32,
    /// Experts in a stack, held or not.
    pub(super) n_stacked: usize,
    /// `(ffn, hidden)` each.
    pub(super) gate: Weight,
    /// `(ffn, hidden)` each.
    pub(super) up: Weight,
    /// `(hidden, ffn)` each.
    pub(super) down: Weight,
    /// Of gate, up and down, `(numbers, ffn)`, `(numbers, ffn)` and `(numbers, hidden)`.
    pub(super) bias: Option<[Vec<f32>; 3]>,
}

impl Layer {
    /// Layer `l`, with the experts `held` and, where expert 0 is one of them, what is beside them.
    pub(super) fn open(vindex: &Vindex, l: u32, held: Range<u32>) -> Result<Layer, ModelError> {
        let config = &vindex.index().config;
        let mut lists = Vec::new();
        let has_first = held.contains(&0);
        if let Some(experts) = config.experts.filter(|_| config.is_routed(l)) {
            lists.push(List::chosen(vindex, l, held)?);
            if let Some(number) = beside(&experts).filter(|_| has_first) {
                lists.push(match experts.shared {
                    Some(shared) => List::one(vindex, l, number, "_shexp", shared.ffn, false)?,
                    None => List::dense(vindex, config, l, number)?,
                });
            }
        } else if has_first {
            lists.push(List::dense(vindex, config, l, 0)?);
        }
        Ok(Layer { lists })
    }

    /// Where the results of `expert` get a bias, that bias.
    pub(super) fn down_bias(&self, expert: u32) -> Option<&[f32]> {
        let list = self.lists.iter().find(|l| l.numbers.contains(&expert))?;
        let [_, _, bias] = list.bias.as_ref()?;
        Some(list.own(bias, expert))
    }

    /// Whether no result gets a bias.
    pub(super) fn is_plain(&self) -> bool {
        self.lists.iter().all(|list| list.bias.is_none())
    }

    /// Whether `expert` is held.
    pub(super) fn holds(&self, expert: u32) -> bool {
        self.lists.iter().any(|list| list.numbers.contains(&expert))
    }
}

impl List {
    /// The dense feed-forward weights of layer `l`, as expert `number`.
    fn dense(vindex: &Vindex, config: &Config, l: u32, number: u32) -> Result<List, ModelError> {
        List::one(vindex, l, number, "", config.ffn_of(l), config.ffn_bias)
    }

    /// One expert, whose tensors' names end in `suffix`.
    fn one(
        vindex: &Vindex,
        l: u32,
        number: u32,
        suffix: &str,
        ffn: u32,
        has_bias: bool,
    ) -> Result<List, ModelError> {
        let hidden = vindex.index().config.hidden;
        let name = |part: &str, what: &str| format!("blk.{l}.ffn_{part}{suffix}.{what}");
        let weight =
            |part, n_rows, n_cols| Weight::find(vindex, name(part, "weight"), n_rows, n_cols);
        let bias = |part, n| vector(vindex, &name(part, "bias"), n);
        Ok(List {
            numbers: number..number + 1,
            first: number,
            n_stacked: 1,
            gate: weight("gate", ffn, hidden)?,
            up: weight("up", ffn, hidden)?,
            down: weight("down", hidden, ffn)?,
            bias: match has_bias {
                true => Some([bias("gate", ffn)?, bias("up", ffn)?, bias("down", hidden)?]),
                false => None,
            },
        })
    }

    /// The experts `held` of those that a router chooses from.
    fn chosen(vindex: &Vindex, l: u32, held: Range<u32>) -> Result<List, ModelError> {
        let config = &vindex.index().config;
        let hidden = config.hidden;
        let experts = config.experts.expect("the layer is routed");
        let name = |part: &str, what: &str| format!("blk.{l}.ffn_{part}_exps.{what}");
        let weight = |part, n_rows, n_cols| {
            Weight::find_stacked(vindex, name(part, "weight"), held.clone(), n_rows, n_cols)
        };
        let bias = |part, n| stacked_vectors(vindex, &name(part, "bias"), held.clone(), n);
        let pair = name("gate_up", "weight");
        let [gate, up] = if vindex.expert(&pair, held.start).is_some() {
            Weight::find_stacked_pair(vindex, pair, held.clone(), experts.ffn, hidden)?
        } else {
            [
                weight("gate", experts.ffn, hidden)?,
                weight("up", experts.ffn, hidden)?,
            ]
        };
        Ok(List {
            gate,
            up,
            down: weight("down", hidden, experts.ffn)?,
            bias: match experts.bias {
                true => Some([
                    bias("gate", experts.ffn)?,
                    bias("up", experts.ffn)?,
                    bias("down", hidden)?,
                ]),
                false => None,
            },
            numbers: held,
            first: 0,
            n_stacked: experts.n as usize,
        })
    }

    /// What `expert` has of `rows`, which have a row for each of `numbers`.
    pub(super) fn own<'a>(&self, rows: &'a [f32], expert: u32) -> &'a [f32] {
        let width = rows.len() / self.numbers.len();
        &rows[(expert - self.numbers.start) as usize * width..][..width]
    }
}
