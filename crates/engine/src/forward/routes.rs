//! What is around the feed-forward rows of a layer: who visits whom, and what the rows that come back add up to.
//!
//! ```text
//! rows     (n, hidden)                 what enters the layer; with a dense branch (2 n, hidden): of each token what enters
//!                                      the experts, then what enters the branch
//! visits   (n, chosen + beside)        of each token the experts that the router chose, in its order, then the one beside
//! delta    (n, hidden)                 weighted sum in the order of the visits; with a dense branch the sum of the chosen
//!                                      and the branch are normed before they are added
//! ```
//!
//! Invariant: a row's visits and its sum depend on that row alone. Leaves out how weights are chosen (`router.rs`), and
//! the rows themselves.

use vindex::Config;

use super::Buffers;
use crate::ffn::{Batch, Visit};
use crate::model::{Layer, Model};
use crate::router::{Router, sigmoid};
use crate::rows::{
    add, add_weighted, fill, multiply, rms_norm, rms_norm_in_place, rows_per_task, sized,
};
use crate::threads::Pool;

/// Buffers that are kept between steps.
#[derive(Default)]
pub(super) struct Routes {
    /// `(n, n_experts)`, and the same for choosing.
    logits: Vec<f32>,
    choice: Vec<f32>,
    /// `(n)`: of shared experts.
    gates: Vec<f32>,
    /// `(n, n_visited)`, with the weight of each visit.
    visits: Vec<Visit>,
    weights: Vec<f32>,
    /// `(2 * n, hidden)` and `(n, hidden)`: what enters, and what the router sees, where a dense branch is beside experts.
    rows: Vec<f32>,
    seen: Vec<f32>,
}

impl Buffers {
    /// Fills the routes of the rows `normed`.
    pub(super) fn route(&mut self, model: &Model, layer: &Layer, n: usize, pool: &Pool) {
        let routes = &mut self.routes;
        routes.visits.clear();
        let Some(router) = &layer.router else {
            let visits = (0..n as u32).map(|row| Visit { row, expert: 0 });
            routes.visits.extend(visits);
            return;
        };
        self.norm_for_branch(model.config(), router, n, pool);
        let routes = &mut self.routes;
        let w = router.w.matrix(model.vindex());
        let gate = router.shared_gate.as_ref();
        let gate = gate.map(|gate| gate.matrix(model.vindex()));
        let seen = match router.branch {
            Some(_) => &routes.seen,
            None => &self.normed,
        };
        let types = [w.block_type, gate.map_or(w.block_type, |w| w.block_type)];
        let seen = &seen[..n * w.n_cols];
        fill(&mut self.activations, seen, w.n_cols, &types, pool);
        let x = self.activations.all();
        let logits = sized(&mut routes.logits, n * w.n_rows);
        multiply(w, x, logits, pool);
        let gates = sized(&mut routes.gates, n);
        match gate {
            Some(gate) => {
                multiply(gate, x, gates, pool);
                gates.iter_mut().for_each(|gate| *gate = sigmoid(*gate));
            }
            None => gates.fill(1.0),
        }

        let (n_chosen, n_visited) = (router.n_chosen(), router.n_visited());
        let weights = sized(&mut routes.weights, n * n_visited);
        let choice = sized(&mut routes.choice, w.n_rows);
        let mut chosen = vec![0; n_chosen];
        let rows = logits
            .chunks_exact_mut(w.n_rows)
            .zip(weights.chunks_exact_mut(n_visited))
            .zip(&*gates);
        for (i, ((logits, weights), gate)) in rows.enumerate() {
            let (weights, beside) = weights.split_at_mut(n_chosen);
            router.choice.choose(logits, choice, &mut chosen, weights);
            let (row, row_beside) = match router.branch {
                Some(_) => (2 * i as u32, 2 * i as u32 + 1),
                None => (i as u32, i as u32),
            };
            let visit = |row| move |expert| Visit { row, expert };
            let visits = chosen.iter().copied().map(visit(row));
            routes.visits.extend(visits);
            beside.fill(*gate);
            let visits = router.beside().map(visit(row_beside));
            routes.visits.extend(visits);
        }
    }

    /// Fills `rows` and `seen` where a dense branch is beside the experts.
    fn norm_for_branch(&mut self, config: &Config, router: &Router, n: usize, pool: &Pool) {
        let Some(branch) = &router.branch else { return };
        let (hidden, eps) = (config.hidden as usize, config.norm_eps);
        let rows = sized(&mut self.routes.rows, 2 * n * hidden);
        let seen = sized(&mut self.routes.seen, n * hidden);
        let per_task = rows_per_task(n, pool.n_threads()) * hidden;
        let tasks = self.x[..n * hidden]
            .chunks(per_task)
            .zip(self.normed[..n * hidden].chunks(per_task))
            .zip(rows.chunks_mut(2 * per_task))
            .zip(seen.chunks_mut(per_task));
        pool.for_each(tasks, |(((x, normed), rows), seen)| {
            let rows = x
                .chunks_exact(hidden)
                .zip(normed.chunks_exact(hidden))
                .zip(rows.chunks_exact_mut(2 * hidden))
                .zip(seen.chunks_exact_mut(hidden));
            for (((x, normed), rows), seen) in rows {
                let (to_experts, to_branch) = rows.split_at_mut(hidden);
                rms_norm(x, &branch.experts_norm, eps, to_experts);
                to_branch.copy_from_slice(normed);
                rms_norm(x, &branch.router_norm, eps, seen);
            }
        });
    }

    /// What the layer is asked, and room for the answer.
    pub(super) fn batch(&mut self, layer: &Layer, n: usize) -> (Batch<'_>, &mut [f32]) {
        let hidden = layer.ffn_norm.len();
        let has_branch = layer.router.as_ref().is_some_and(|r| r.branch.is_some());
        let rows = match has_branch {
            true => &self.routes.rows[..2 * n * hidden],
            false => &self.normed[..n * hidden],
        };
        let visits = self.routes.visits.as_slice();
        let visited = sized(&mut self.visited, visits.len() * hidden);
        (Batch { rows, visits }, visited)
    }

    /// Adds the feed-forward rows to `x`.
    pub(super) fn add_visited(&mut self, config: &Config, layer: &Layer, n: usize, pool: &Pool) {
        let (hidden, eps) = (config.hidden as usize, config.norm_eps);
        let router = layer.router.as_ref();
        let n_visited = router.map_or(1, Router::n_visited);
        let weights = router.map(|_| &self.routes.weights[..n * n_visited]);
        let visited = &mut self.visited[..n * n_visited * hidden];
        let n_rows = rows_per_task(n, pool.n_threads());
        let tasks = self.x[..n * hidden]
            .chunks_mut(n_rows * hidden)
            .zip(self.delta[..n * hidden].chunks_mut(n_rows * hidden))
            .zip(visited.chunks_mut(n_rows * n_visited * hidden))
            .enumerate();
        pool.for_each(tasks, |(task, ((x, delta), visited))| {
            let rows = x
                .chunks_exact_mut(hidden)
                .zip(delta.chunks_exact_mut(hidden))
                .zip(visited.chunks_exact_mut(n_visited * hidden));
            for (i, ((x, delta), visited)) in rows.enumerate() {
                match (router, weights) {
                    (Some(router), Some(weights)) => {
                        let weights = &weights[(task * n_rows + i) * n_visited..][..n_visited];
                        sum(router, weights, eps, visited, delta);
                    }
                    _ => delta.copy_from_slice(visited),
                }
                if let Some([_, after_feed_forward]) = &layer.post_norms {
                    rms_norm_in_place(delta, after_feed_forward, eps);
                }
                add(x, delta);
            }
        });
    }
}

/// Fills `delta`, a row, from the rows of its visits, `(n_visited, hidden)`.
fn sum(router: &Router, weights: &[f32], eps: f32, visited: &mut [f32], delta: &mut [f32]) {
    let hidden = delta.len();
    let n_summed = match router.branch {
        Some(_) => router.n_chosen(),
        None => router.n_visited(),
    };
    delta.fill(0.0);
    for (weight, row) in weights[..n_summed].iter().zip(visited.chunks_exact(hidden)) {
        add_weighted(delta, *weight, row);
    }
    if let Some(branch) = &router.branch {
        rms_norm_in_place(delta, &branch.after_experts, eps);
        let dense = &mut visited[n_summed * hidden..];
        rms_norm_in_place(dense, &branch.after_dense, eps);
        add(delta, dense);
    }
}
