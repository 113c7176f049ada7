//! Feed-forward rows from weights in this process, read where they lie in the mapped files.
//!
//! Rows are gathered by expert, so that each expert's weights are read once for all rows of a batch; a dense layer is one
//! expert, on the same path.
//!
//! Invariant: the row of a visit depends on the input row, the layer and the expert alone, as the products do. Leaves
//! out the router, and the weighting of experts.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use quant::{Activations, GateActivation};
use vindex::{Activation, Vindex};

use crate::collector::{Collector, Watch};
use crate::ffn::{Batch, FeedForward, FfnError, Visit};
use crate::rows::{add, fill, parts, sized};
use crate::threads::Pool;
use crate::weights::{ModelError, Weight, vector};

/// Feed-forward weights of some layers and experts. May be called from several threads, which take turns.
#[derive(Debug)]
pub struct Local {
    vindex: Arc<Vindex>,
    pool: Arc<Pool>,
    hidden: usize,
    activation: GateActivation,
    layers: Range<u32>,
    experts: Range<u32>,
    /// Of `layers`, in order.
    weights: Vec<Layer>,
    /// Whether the threads are of no use between calls.
    rests: bool,
    /// Who learns what enters the matrices.
    watch: Watch,
    scratch: Mutex<Scratch>,
}

#[derive(Debug)]
struct Layer {
    /// `(ffn, hidden)` for each expert.
    gate: Weight,
    /// `(ffn, hidden)` for each expert.
    up: Weight,
    /// `(hidden, ffn)` for each expert.
    down: Weight,
    /// Of gate, up and down.
    bias: Option<[Vec<f32>; 3]>,
}

/// Buffers that are kept between calls.
#[derive(Debug, Default)]
struct Scratch {
    visits: Visits,
    /// The batch's rows.
    input: Activations,
    /// `(n_visits, ffn)`: activation(gate) * up.
    middle: Vec<f32>,
    /// `(n_visits, ffn)`: up, where a bias is added before they are multiplied.
    up: Vec<f32>,
    middle_activations: Activations,
    /// `(n_visits, hidden)`.
    output: Vec<f32>,
}

impl Local {
    /// All layers and experts that are open in `vindex`.
    ///
    /// # Errors
    /// As [`Local::with_ranges`].
    pub fn new(vindex: Arc<Vindex>, pool: Arc<Pool>) -> Result<Local, ModelError> {
        let (config, share) = (&vindex.index().config, vindex.share());
        let (n_layers, n_experts) = (config.n_layers, config.experts.map_or(1, |e| e.n));
        let layers = share.layers.map_or(0..n_layers, Range::from);
        let experts = share.experts.map_or(0..n_experts, Range::from);
        Local::with_ranges(vindex, pool, layers, experts)
    }

    /// The experts `experts` of the layers `layers`; a dense layer has one expert.
    ///
    /// # Errors
    /// [`ModelError`] when the model has them not, or a tensor is missing or has another shape.
    pub fn with_ranges(
        vindex: Arc<Vindex>,
        pool: Arc<Pool>,
        layers: Range<u32>,
        experts: Range<u32>,
    ) -> Result<Local, ModelError> {
        let config = &vindex.index().config;
        let n_experts = config.experts.map_or(1, |e| e.n);
        for (what, range, n) in [
            ("layers", &layers, config.n_layers),
            ("experts", &experts, n_experts),
        ] {
            if range.start >= range.end || range.end > n {
                return Err(ModelError::Range {
                    what,
                    got_start: range.start,
                    got_end: range.end,
                    n,
                });
            }
        }
        let weights = layers
            .clone()
            .map(|l| Layer::open(&vindex, l, experts.clone()))
            .collect::<Result<_, _>>()?;
        Ok(Local {
            hidden: config.hidden as usize,
            activation: match config.activation {
                Activation::Silu => GateActivation::Silu,
                Activation::GeluTanh => GateActivation::GeluTanh,
                Activation::SwigluClamped => {
                    let what = "clamped gates are not computed".to_owned();
                    return Err(ModelError::Config { what });
                }
            },
            vindex,
            pool,
            layers,
            experts,
            weights,
            rests: false,
            watch: Watch::default(),
            scratch: Mutex::default(),
        })
    }

    /// The same weights, for a caller who does something else between calls: the threads leave the processors alone
    /// meanwhile.
    #[must_use]
    pub fn resting(self) -> Local {
        Local {
            rests: true,
            ..self
        }
    }

    /// The same weights, which tell `collector` what enters them.
    #[must_use]
    pub fn collecting(self, collector: Arc<Collector>) -> Local {
        Local {
            watch: Watch::by(collector),
            ..self
        }
    }

    /// Layers that are held.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
    }

    /// Experts that are held of each of them.
    pub fn experts(&self) -> Range<u32> {
        self.experts.clone()
    }

    /// The vindex.
    pub fn vindex(&self) -> &Arc<Vindex> {
        &self.vindex
    }
}

impl FeedForward for Local {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        let layer = self.layer(layer, batch, out)?;
        // What a panicking call left behind is overwritten like anything else.
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch {
            visits,
            input,
            middle,
            up,
            middle_activations,
            output,
        } = &mut *scratch;
        visits.gather(batch.visits);
        let (hidden, ffn, n_visits) = (self.hidden, layer.gate.n_rows, batch.visits.len());

        let n_experts = self.vindex.index().config.experts.map_or(1, |e| e.n) as usize;
        self.watch.see_visits(
            &[&layer.gate, &layer.up],
            n_experts,
            (&visits.experts, &visits.rows),
            batch.rows,
        );
        fill(
            input,
            batch.rows,
            hidden,
            &[layer.gate.block_type, layer.up.block_type],
            &self.pool,
        );
        let middle = sized(middle, n_visits * ffn);
        match &layer.bias {
            None => self.multiply_gated(layer, visits, input, middle),
            Some([gate_bias, up_bias, _]) => {
                let up = sized(up, n_visits * ffn);
                self.multiply(&layer.gate, visits, &visits.rows, input, middle);
                self.multiply(&layer.up, visits, &visits.rows, input, up);
                self.gate_with_bias((middle, gate_bias), (up, up_bias));
            }
        }

        self.watch.see_visits(
            &[&layer.down],
            n_experts,
            (&visits.experts, &visits.places),
            middle,
        );
        fill(
            middle_activations,
            middle,
            ffn,
            &[layer.down.block_type],
            &self.pool,
        );
        if visits.are_in_order {
            self.multiply(&layer.down, visits, &visits.places, middle_activations, out);
        } else {
            let output = sized(output, n_visits * hidden);
            self.multiply(
                &layer.down,
                visits,
                &visits.places,
                middle_activations,
                output,
            );
            for (row, &visit) in output.chunks_exact(hidden).zip(&visits.order) {
                out[visit as usize * hidden..][..hidden].copy_from_slice(row);
            }
        }
        if self.rests {
            self.pool.rest();
        }
        if let Some([_, _, bias]) = &layer.bias {
            out.chunks_exact_mut(hidden).for_each(|row| add(row, bias));
        }
        Ok(())
    }
}

impl Local {
    /// The layer, when everything that is asked for is held and fits.
    fn layer(&self, layer: u32, batch: Batch<'_>, out: &[f32]) -> Result<&Layer, FfnError> {
        let invalid = |reason: String| Err(FfnError::Invalid(reason));
        let (n_values, n_visits, n_out) = (batch.rows.len(), batch.visits.len(), out.len());
        if !n_values.is_multiple_of(self.hidden) || n_visits * self.hidden != n_out {
            return invalid(format!(
                "{n_values} values for {n_visits} visits and {n_out} for their results are not rows of {}",
                self.hidden
            ));
        }
        let n_rows = n_values / self.hidden;
        if let Some(visit) = batch
            .visits
            .iter()
            .find(|visit| visit.row as usize >= n_rows)
        {
            return invalid(format!(
                "row {} is visited, and there are {n_rows}",
                visit.row
            ));
        }
        let Range { start, end } = self.experts;
        if let Some(visit) = batch
            .visits
            .iter()
            .find(|v| !(start..end).contains(&v.expert))
        {
            let expert = visit.expert;
            return invalid(format!(
                "expert {expert} is not held here; experts {start}..{end} are"
            ));
        }
        let Range { start, end } = self.layers;
        if !(start..end).contains(&layer) {
            return invalid(format!(
                "layer {layer} is not held here; layers {start}..{end} are"
            ));
        }
        Ok(&self.weights[(layer - start) as usize])
    }

    /// `out`, `(n_visits, w.n_rows)`: for each place the product of its expert's matrix with the activation row that
    /// `rows` names.
    fn multiply(
        &self,
        w: &Weight,
        visits: &Visits,
        rows: &[u32],
        x: &Activations,
        out: &mut [f32],
    ) {
        let n_threads = self.pool.n_threads();
        let tasks = visits
            .groups(rows, out, w.n_rows)
            .flat_map(|(expert, rows, out)| {
                let w = w.expert(&self.vindex, expert);
                parts(w, out, visits.n_groups, n_threads).map(move |part| (part, rows))
            });
        self.pool.for_each(tasks, |(p, rows)| {
            quant::multiply(&p.w, p.rows, x.pick(rows), p.out)
        });
    }

    /// `out`, `(n_visits, ffn)`: `activation(gate x) * (up x)`.
    fn multiply_gated(&self, layer: &Layer, visits: &Visits, x: &Activations, out: &mut [f32]) {
        let n_threads = self.pool.n_threads();
        let groups = visits.groups(&visits.rows, out, layer.gate.n_rows);
        let tasks = groups.flat_map(|(expert, rows, out)| {
            let gate = layer.gate.expert(&self.vindex, expert);
            let up = layer.up.expert(&self.vindex, expert);
            parts(gate, out, visits.n_groups, n_threads).map(move |part| (part, up, rows))
        });
        self.pool.for_each(tasks, |(p, up, rows)| {
            quant::multiply_gated(&p.w, &up, p.rows, x.pick(rows), self.activation, p.out);
        });
    }

    /// `gate = activation(gate + its bias) * (up + its bias)`, `(n_visits, ffn)` both.
    fn gate_with_bias(
        &self,
        (gate, gate_bias): (&mut [f32], &[f32]),
        (up, up_bias): (&mut [f32], &[f32]),
    ) {
        let ffn = gate_bias.len();
        let rows = gate.chunks_exact_mut(ffn).zip(up.chunks_exact_mut(ffn));
        self.pool.for_each(rows, |(gate, up)| {
            add(gate, gate_bias);
            add(up, up_bias);
            match self.activation {
                GateActivation::Silu => quant::silu_in_place(gate),
                GateActivation::GeluTanh => quant::gelu_tanh_in_place(gate),
            }
            gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= *up);
        });
    }
}

impl Layer {
    /// Layer `l`, with the experts `held`.
    fn open(vindex: &Vindex, l: u32, held: Range<u32>) -> Result<Layer, ModelError> {
        let config = &vindex.index().config;
        let hidden = config.hidden;
        let name = |part: &str| format!("blk.{l}.{part}");
        let Some(experts) = &config.experts else {
            let ffn = config.ffn;
            let weight = |part, n_rows, n_cols| Weight::find(vindex, name(part), n_rows, n_cols);
            let vector = |part, n| vector(vindex, &name(part), n);
            return Ok(Layer {
                gate: weight("ffn_gate.weight", ffn, hidden)?,
                up: weight("ffn_up.weight", ffn, hidden)?,
                down: weight("ffn_down.weight", hidden, ffn)?,
                bias: match config.ffn_bias {
                    true => Some([
                        vector("ffn_gate.bias", ffn)?,
                        vector("ffn_up.bias", ffn)?,
                        vector("ffn_down.bias", hidden)?,
                    ]),
                    false => None,
                },
            });
        };
        if config.ffn_bias {
            let what = "experts have biases, which are not computed".to_owned();
            return Err(ModelError::Config { what });
        }
        let stacked = |part, n_rows, n_cols| {
            Weight::find_stacked(vindex, name(part), held.clone(), n_rows, n_cols)
        };
        Ok(Layer {
            gate: stacked("ffn_gate_exps.weight", experts.ffn, hidden)?,
            up: stacked("ffn_up_exps.weight", experts.ffn, hidden)?,
            down: stacked("ffn_down_exps.weight", hidden, experts.ffn)?,
            bias: None,
        })
    }
}

/// The visits of a batch in the order of their experts, and those of an expert in the order of the batch.
#[derive(Debug, Default)]
struct Visits {
    /// Which visit of the batch is at each place.
    order: Vec<u32>,
    /// The expert of the visit at each place.
    experts: Vec<u32>,
    /// The row of the batch of the visit at each place.
    rows: Vec<u32>,
    /// 0, 1, 2, …
    places: Vec<u32>,
    /// Different experts.
    n_groups: usize,
    /// Whether the batch has this order already.
    are_in_order: bool,
}

impl Visits {
    fn gather(&mut self, visits: &[Visit]) {
        let places = 0..visits.len() as u32;
        self.are_in_order = visits.is_sorted_by_key(|visit| visit.expert);
        self.places.clear();
        self.places.extend(places.clone());
        self.order.clear();
        self.order.extend(places);
        self.order.sort_by_key(|&i| visits[i as usize].expert);
        self.experts.clear();
        self.experts
            .extend(self.order.iter().map(|&i| visits[i as usize].expert));
        self.rows.clear();
        self.rows
            .extend(self.order.iter().map(|&i| visits[i as usize].row));
        self.n_groups = self.experts.chunk_by(|a, b| a == b).count();
    }

    /// For each expert that is visited: its number, what `rows` has for its places, and their part of `out`, which is
    /// `(n_visits, width)`.
    fn groups<'a>(
        &'a self,
        mut rows: &'a [u32],
        mut out: &'a mut [f32],
        width: usize,
    ) -> impl Iterator<Item = (usize, &'a [u32], &'a mut [f32])> {
        self.experts.chunk_by(|a, b| a == b).map(move |group| {
            let n = group.len();
            let rows = rows.split_off(..n).expect("a place for each visit");
            let out = out
                .split_off_mut(..n * width)
                .expect("a row for each visit");
            (group[0] as usize, rows, out)
        })
    }
}
