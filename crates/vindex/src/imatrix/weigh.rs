//! A plan whose blocks are weighed by statistics, and the weights of a tensor's values while they are encoded.
//!
//! Invariant: statistics of another model never weigh anything: a matrix of another width, a layer that the model has not,
//! or a matrix without statistics where other layers have them refuse the plan. What nothing is known of (a kind of matrix
//! that was not watched, an expert that no row visited) is stored as without statistics, and the plan warns of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use quant::BlockType;

use super::{ColumnStatistics, Imatrix};
use crate::error::Error;
use crate::gguf::MetaValue;
use crate::plan::{Plan, PlannedTensor};
use crate::recipe::Recipe;

impl Plan {
    /// The same plan, in which the errors of blocks are weighed by `imatrix`, with the types of a calibrated recipe.
    ///
    /// # Errors
    /// [`Error::Calibration`] when the recipe has nothing to weigh or the statistics are not of this model.
    pub fn calibrated(mut self, imatrix: Arc<Imatrix>) -> Result<Plan, Error> {
        if !self.recipe.is_weighed() {
            let recipe = self.recipe;
            return Err(refused(format!(
                "the recipe {recipe} has no blocks to weigh, only {} has",
                Recipe::Q4k
            )));
        }
        let (n_layers, is_tied) = (self.config.n_layers, self.config.tied_embeddings);
        for tensor in self.parts.iter_mut().flat_map(|part| &mut part.tensors) {
            // What is kept as it is in the source is of no recipe.
            if tensor.block_type == self.recipe.block_type(&tensor.name, &tensor.ne) {
                let (name, ne) = (&tensor.name, &tensor.ne);
                tensor.block_type = self
                    .recipe
                    .calibrated_block_type(name, ne, n_layers, is_tied);
            }
        }
        let warnings = self.check(&imatrix).map_err(refused)?;
        self.warnings.extend(warnings);
        let count = |n: usize| MetaValue::U32(u32::try_from(n).unwrap_or(u32::MAX));
        // The keys of llama-quantize; its names of files are no content.
        for (key, value) in [
            ("entries_count", count(imatrix.entries().len())),
            ("chunks_count", MetaValue::U32(imatrix.n_chunks())),
        ] {
            self.metadata
                .push((format!("quantize.imatrix.{key}"), value));
        }
        self.imatrix = Some(imatrix);
        Ok(self)
    }

    /// Whether `imatrix` can be of this model, and what it leaves out.
    fn check(&self, imatrix: &Imatrix) -> Result<Vec<String>, String> {
        let matrices: BTreeMap<&str, &PlannedTensor> = self
            .parts
            .iter()
            .flat_map(|part| &part.tensors)
            .filter(|tensor| tensor.ne.len() > 1)
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect();
        let kinds: BTreeSet<String> = matrices.keys().map(|name| kind(name)).collect();
        for (name, entry) in imatrix.entries() {
            match matrices.get(name.as_str()) {
                Some(tensor) => fits(entry, tensor).map_err(|why| format!("{name}: {why}"))?,
                None if kinds.contains(&kind(name)) => {
                    return Err(format!(
                        "they have {name}, and this model has {} layers",
                        self.config.n_layers
                    ));
                }
                // A part of the model that is left out, such as heads that guess.
                None => {}
            }
        }
        let seen_kinds: BTreeSet<String> =
            imatrix.entries().keys().map(|name| kind(name)).collect();
        let (mut n_weighed, mut unwatched, mut unvisited) = (0, Vec::new(), Vec::new());
        for (name, tensor) in &matrices {
            if !is_weighed(tensor.block_type) {
                continue;
            }
            match imatrix.entries().get(*name) {
                Some(entry) => {
                    n_weighed += 1;
                    let unseen = entry.counts.iter().enumerate().filter(|(_, n)| **n == 0.0);
                    unvisited.extend(unseen.map(|(expert, _)| format!("{name}[{expert}]")));
                }
                None if seen_kinds.contains(&kind(name)) => {
                    return Err(format!("they have nothing of {name}"));
                }
                // Rows of embeddings are looked up: nothing enters their columns.
                None if name.ends_with("token_embd.weight") => {}
                None => unwatched.push(*name),
            }
        }
        if n_weighed == 0 {
            return Err("they have nothing of this model's matrices".to_owned());
        }
        let mut warnings = Vec::new();
        if let Some(first) = unwatched.first() {
            warnings.push(format!(
                "{} matrices are stored without weights, the statistics have nothing of them: {first}{}",
                unwatched.len(),
                and_more(unwatched.len())
            ));
        }
        if let Some(first) = unvisited.first() {
            warnings.push(format!(
                "{} matrices of experts are stored without weights, no row of the calibration visited them: {first}{}",
                unvisited.len(),
                and_more(unvisited.len())
            ));
        }
        Ok(warnings)
    }
}

fn refused(reason: String) -> Error {
    Error::Calibration { reason }
}

fn and_more(n: usize) -> &'static str {
    if n > 1 { " and more" } else { "" }
}

/// A tensor's name without its layer: `blk.*.attn_q.weight`.
fn kind(name: &str) -> String {
    let mut pieces: Vec<&str> = name.split('.').collect();
    if let ["blk", layer, ..] = pieces.as_mut_slice() {
        *layer = "*";
    }
    pieces.join(".")
}

/// Whether there are statistics of each column of the matrix, or of each matrix of a stack.
fn fits(entry: &ColumnStatistics, tensor: &PlannedTensor) -> Result<(), String> {
    let n_cols = tensor.ne[0];
    let n_matrices: u64 = tensor.ne[2..].iter().product();
    let (n_sums, n_counts) = (entry.sums.len() as u64, entry.counts.len() as u64);
    if n_cols.checked_mul(n_matrices) != Some(n_sums) || ![1, n_matrices].contains(&n_counts) {
        return Err(format!(
            "{n_sums} sums and {n_counts} counts, this model's has {n_matrices} of {n_cols} columns"
        ));
    }
    Ok(())
}

/// Whether there is something to weigh when such blocks are made.
fn is_weighed(block_type: BlockType) -> bool {
    !matches!(
        block_type,
        BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::Q8_0 | BlockType::MXFP4
    )
}

/// How much the values of one tensor count.
#[derive(Clone, Copy)]
pub(crate) struct Importance<'a> {
    entry: &'a ColumnStatistics,
    n_cols: usize,
    /// Rows of one matrix of a stack.
    n_rows: u64,
}

impl<'a> Importance<'a> {
    /// Of `tensor`, when `plan` weighs it.
    pub(crate) fn of(plan: &'a Plan, tensor: &PlannedTensor) -> Option<Importance<'a>> {
        if !is_weighed(tensor.block_type) || tensor.ne.len() < 2 {
            return None;
        }
        let entry = plan.imatrix.as_ref()?.entries().get(&tensor.name)?;
        fits(entry, tensor).ok()?;
        Some(Importance {
            entry,
            n_cols: usize::try_from(tensor.ne[0]).ok()?,
            n_rows: tensor.ne[1],
        })
    }

    /// Fills `weights` for the values of the tensor from number `start` on: the mean square of what enters their columns,
    /// and 1 for all of a matrix that nothing entered.
    pub(crate) fn fill(&self, start: u64, weights: &mut [f32]) {
        let n_cols = self.n_cols as u64;
        let mut at = start;
        let mut weights = weights;
        while !weights.is_empty() {
            let (row, column) = (at / n_cols, (at % n_cols) as usize);
            let n = (self.n_cols - column).min(weights.len());
            let (piece, rest) = weights.split_at_mut(n);
            let matrix = (row / self.n_rows) as usize;
            let count = self.entry.counts[matrix.min(self.entry.counts.len() - 1)];
            if count > 0.0 {
                let sums = &self.entry.sums[matrix * self.n_cols + column..][..n];
                for (weight, sum) in piece.iter_mut().zip(sums) {
                    *weight = sum / count;
                }
            } else {
                piece.fill(1.0);
            }
            at += n as u64;
            weights = rest;
        }
    }
}
