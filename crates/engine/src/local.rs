//! Feed-forward rows from weights in this process, read where they lie in the mapped files.
//!
//! Rows are gathered by expert, so that each expert's weights are read once for all rows of a batch, and the products of
//! all experts are divided among the threads at once; a dense layer is one expert, on the same path.
//!
//! Invariant: the row of a visit depends on the input row, the layer and the expert alone, as the products do. Leaves
//! out the router, and the weighting of experts.

mod list;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use quant::{Activations, BlockType, GateActivation, Matrix};
use vindex::{Activation, Vindex};

use crate::collector::{Collector, Watch};
use crate::ffn::{Batch, FeedForward, FfnError, Visit};
use crate::rows::{Part, add, fill, parts, sized};
use crate::threads::Pool;
use crate::weights::{ModelError, Weight};
use list::{Layer, List};

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

/// Buffers that are kept between calls.
#[derive(Debug, Default)]
struct Scratch {
    visits: Visits,
    /// The batch's rows.
    input: Activations,
    /// Of each list of experts.
    middles: [Middle; LISTS_MAX],
    /// `(n_visits, hidden)`.
    output: Vec<f32>,
}

/// Lists of a layer.
const LISTS_MAX: usize = 2;

/// What lies between the matrices of a list; places are those of its own visits.
#[derive(Debug, Default)]
struct Middle {
    /// `(n_places, ffn)`: what the gate makes of up.
    gated: Vec<f32>,
    /// `(n_places, ffn)`: up, where a bias is added before it is gated.
    up: Vec<f32>,
    activations: Activations,
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

    /// The experts `experts` of the layers `layers`, and with expert 0 what every token goes through beside them; a dense
    /// layer has expert 0 alone.
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
                Activation::SwigluClamped => GateActivation::SwigluClamped,
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
        if batch.visits.is_empty() {
            return Ok(());
        }
        // What a panicking call left behind is overwritten like anything else.
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch {
            visits,
            input,
            middles,
            output,
        } = &mut *scratch;
        visits.gather(batch.visits);
        let hidden = self.hidden;

        for list in &layer.lists {
            let entering = visits.of(list, &visits.rows);
            let stack = (list.first, list.n_stacked);
            self.watch
                .see_visits(&[&list.gate, &list.up], stack, entering, batch.rows);
        }
        let types: [BlockType; 2 * LISTS_MAX] = std::array::from_fn(|i| {
            let list = &layer.lists[(i / 2).min(layer.lists.len() - 1)];
            let weight = if i % 2 == 0 { &list.gate } else { &list.up };
            weight.block_type
        });
        fill(input, batch.rows, hidden, &types, &self.pool);
        self.gate(layer, visits, input, middles);

        for (list, middle) in layer.lists.iter().zip(middles.iter_mut()) {
            let (ffn, n_places) = (list.gate.n_rows, visits.span(list).len());
            let gated = &middle.gated[..n_places * ffn];
            let entering = visits.of(list, &visits.places);
            let entering = (entering.0, &visits.places[..n_places]);
            let stack = (list.first, list.n_stacked);
            self.watch.see_visits(&[&list.down], stack, entering, gated);
            let types = [list.down.block_type];
            fill(&mut middle.activations, gated, ffn, &types, &self.pool);
        }
        if visits.are_in_order {
            self.multiply_down(layer, visits, middles, out);
        } else {
            let output = sized(output, batch.visits.len() * hidden);
            self.multiply_down(layer, visits, middles, output);
            for (row, &visit) in output.chunks_exact(hidden).zip(&visits.order) {
                out[visit as usize * hidden..][..hidden].copy_from_slice(row);
            }
        }
        if self.rests {
            self.pool.rest();
        }
        if !layer.is_plain() {
            for (row, visit) in out.chunks_exact_mut(hidden).zip(batch.visits) {
                if let Some(bias) = layer.down_bias(visit.expert) {
                    add(row, bias);
                }
            }
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
        let Range { start, end } = self.layers;
        if !(start..end).contains(&layer) {
            return invalid(format!(
                "layer {layer} is not held here; layers {start}..{end} are"
            ));
        }
        let held = &self.weights[(layer - start) as usize];
        if let Some(visit) = batch.visits.iter().find(|v| !held.holds(v.expert)) {
            let (expert, Range { start, end }) = (visit.expert, &self.experts);
            return invalid(format!(
                "expert {expert} is not held here; of layer {layer} experts {start}..{end} are"
            ));
        }
        Ok(held)
    }

    /// Fills what is `gated` in the middle of each list, from `x`, the batch's rows.
    fn gate(&self, layer: &Layer, visits: &Visits, x: &Activations, middles: &mut [Middle]) {
        let total: usize = layer.lists.iter().map(|l| l.gate_values(visits)).sum();
        let tasks = layer.lists.iter().zip(&mut *middles);
        let tasks = tasks.flat_map(|(list, Middle { gated, up, .. })| {
            let n = visits.span(list).len() * list.gate.n_rows;
            let gated = sized(gated, n);
            let products = |w, out, then| Products {
                list,
                w,
                then,
                visits: visits.of(list, &visits.rows),
                x,
                total,
                out,
            };
            let (first, second) = match list.bias {
                None => (products(&list.gate, gated, Some(&list.up)), None),
                Some(_) => (
                    products(&list.gate, gated, None),
                    Some(products(&list.up, sized(up, n), None)),
                ),
            };
            let second = second.into_iter().flat_map(|p| self.tasks(p));
            self.tasks(first).chain(second)
        });
        self.pool.for_each(tasks, |task| self.run(task));
        for (list, middle) in layer.lists.iter().zip(middles) {
            if let Some([gate_bias, up_bias, _]) = &list.bias {
                let experts = visits.of(list, &visits.rows).0;
                let ffn = list.gate.n_rows;
                let rows = experts
                    .iter()
                    .zip(middle.gated.chunks_exact_mut(ffn))
                    .zip(middle.up.chunks_exact_mut(ffn));
                self.pool.for_each(rows, |((&expert, gate), up)| {
                    add(gate, list.own(gate_bias, expert));
                    add(up, list.own(up_bias, expert));
                    quant::gate_in_place(self.activation, gate, up);
                });
            }
        }
    }

    /// Fills `out`, `(n_places, hidden)`, from what is gated.
    fn multiply_down(
        &self,
        layer: &Layer,
        visits: &Visits,
        middles: &[Middle],
        mut out: &mut [f32],
    ) {
        let total: usize = layer.lists.iter().map(|l| l.down_values(visits)).sum();
        let tasks = layer.lists.iter().zip(middles);
        let tasks = tasks.flat_map(|(list, middle)| {
            let n_places = visits.span(list).len();
            let own = out.split_off_mut(..n_places * self.hidden);
            let experts = visits.of(list, &visits.places).0;
            self.tasks(Products {
                list,
                w: &list.down,
                then: None,
                visits: (experts, &visits.places[..n_places]),
                x: &middle.activations,
                total,
                out: own.expect("a row for each visit"),
            })
        });
        self.pool.for_each(tasks, |task| self.run(task));
    }

    fn tasks<'a>(&'a self, products: Products<'a>) -> impl Iterator<Item = Task<'a>> {
        let Products {
            list,
            w,
            then,
            visits,
            x,
            total,
            out,
        } = products;
        let n_threads = self.pool.n_threads();
        groups(visits, out, w.n_rows).flat_map(move |(expert, rows, out)| {
            let place = (expert - list.first) as usize;
            let then = then.map(|up| up.expert(&self.vindex, place));
            // As many such products as would be what is computed together.
            let share = total.div_ceil((rows.len() * w.n_rows * w.n_cols).max(1));
            parts(w.expert(&self.vindex, place), out, share, n_threads).map(move |part| Task {
                part,
                then,
                x,
                rows,
            })
        })
    }

    fn run(&self, task: Task<'_>) {
        let (Part { w, rows, out }, x) = (task.part, task.x.pick(task.rows));
        match &task.then {
            Some(up) => quant::multiply_gated(&w, up, rows, x, self.activation, out),
            None => quant::multiply(&w, rows, x, out),
        }
    }
}

/// Products of the matrices of a list with the rows that visit it.
struct Products<'a> {
    list: &'a List,
    w: &'a Weight,
    /// With this the products of `w` are gates of its own.
    then: Option<&'a Weight>,
    /// For each place of the list: its expert, and its row of `x`.
    visits: (&'a [u32], &'a [u32]),
    x: &'a Activations,
    /// Weights times rows of everything that is computed together.
    total: usize,
    /// `(n_places, w.n_rows)`.
    out: &'a mut [f32],
}

/// Some rows of a matrix, for one thread.
struct Task<'a> {
    part: Part<'a>,
    /// The matrix of up, of the same shape, where the products are gates.
    then: Option<Matrix<'a>>,
    x: &'a Activations,
    /// Of `x`.
    rows: &'a [u32],
}

impl List {
    /// Weights times rows of gate and up.
    fn gate_values(&self, visits: &Visits) -> usize {
        let n_products = 1 + usize::from(self.bias.is_some());
        visits.span(self).len() * self.gate.n_rows * self.gate.n_cols * n_products
    }

    /// Weights times rows of down.
    fn down_values(&self, visits: &Visits) -> usize {
        visits.span(self).len() * self.down.n_rows * self.down.n_cols
    }
}

/// For each expert of `visits`, experts and rows: its number, its rows, and their part of `out`, which is `(n_visits,
/// width)`.
fn groups<'a>(
    (experts, mut rows): (&'a [u32], &'a [u32]),
    mut out: &'a mut [f32],
    width: usize,
) -> impl Iterator<Item = (u32, &'a [u32], &'a mut [f32])> {
    experts.chunk_by(|a, b| a == b).map(move |group| {
        let n = group.len();
        let rows = rows.split_off(..n).expect("a row for each visit");
        let out = out.split_off_mut(..n * width);
        (group[0], rows, out.expect("a row for each visit"))
    })
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
    }

    /// The places of a list's visits: they lie together, because its numbers do.
    fn span(&self, list: &List) -> Range<usize> {
        let Range { start, end } = list.numbers;
        let before = |number| self.experts.partition_point(|&expert| expert < number);
        before(start)..before(end)
    }

    /// The experts of a list's visits, and what `rows` has for their places.
    fn of<'a>(&'a self, list: &List, rows: &'a [u32]) -> (&'a [u32], &'a [u32]) {
        let span = self.span(list);
        (&self.experts[span.clone()], &rows[span])
    }
}
