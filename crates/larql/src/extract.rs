//! `extract`: from a checkpoint to a vindex.
//!
//! Invariant: what `--plan` prints is the value that is executed without it.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::time::Instant;

use serde::Serialize;
use terminal::{Failure, Meter, size};
use vindex::{
    Census, Component, ExtractOptions, Plan, PlannedTensor, Progress, Sizes, Values, Vindex,
};

use crate::calibrate;
use crate::cli::Extract;
use crate::context::Context;
use crate::model::Model;

/// What a plan comes to.
#[derive(Debug, Serialize)]
struct Summary {
    stem: String,
    recipe: vindex::Recipe,
    n_parts: usize,
    n_tensors: usize,
    size_bytes: u64,
    types: Census,
    /// Digest of the statistics that weigh errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<String>,
    sizes: Sizes,
    left_out: BTreeMap<String, LeftOut>,
    warnings: Vec<String>,
}

/// The tensors left out for one reason.
#[derive(Debug, Default, Serialize)]
struct LeftOut {
    n_tensors: usize,
    /// The first of them.
    first: String,
}

/// Extracts, or with `--plan` only says what would be written.
pub(crate) fn extract(args: &Extract, context: &Context) -> Result<(), Failure> {
    context.on_interrupt("the parts that are finished stay; the same command goes on after them");
    let output = context.output;
    let model = Model::open(&args.model, args.revision.as_deref(), context)?;
    output.text(format_args!("source: {model}"))?;
    let plan = plan(args, &model)?;
    let plan = match calibrate::asked(args, &model, &plan, context)? {
        None => plan,
        Some(imatrix) => plan.calibrated(imatrix).map_err(Failure::of(format!(
            "cannot weigh the blocks of {}",
            args.model
        )))?,
    };
    let summary = Summary::of(&plan).map_err(Failure::of(format!(
        "cannot plan the extraction of {}",
        args.model
    )))?;
    output.text(summary.to_string().trim_end())?;
    if args.plan {
        output.text(described(&plan, &summary.sizes).trim_end())?;
        return output.value(
            &serde_json::json!({"source": model.to_string(), "summary": summary, "plan": plan}),
        );
    }
    if args.force {
        vindex::clear(&args.output).map_err(Failure::of(format!(
            "cannot clear {}",
            args.output.display()
        )))?;
    }
    let started = Instant::now();
    let all = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let options = ExtractOptions {
        threads: args.threads.map_or(all, NonZeroUsize::get),
        allow_nonfinite: args.allow_nonfinite,
    };
    let meter = Meter::new("extract");
    let id = vindex::extract(model.source(), &plan, &args.output, &options, &|progress| {
        show(&meter, progress)
    });
    drop(meter);
    let id = id.map_err(|error| refused(error, args))?;
    let seconds = started.elapsed().as_secs_f64();
    let written = Vindex::open(&args.output).map_err(Failure::of(format!(
        "cannot open {}",
        args.output.display()
    )))?;
    let size_bytes: u64 = written
        .index()
        .parts
        .iter()
        .map(|part| part.size_bytes)
        .sum();
    output.text(format_args!("vindex: {id}"))?;
    output.text(format_args!(
        "wrote {}: {} parts, {} in {seconds:.1} s",
        args.output.display(),
        summary.n_parts,
        size(size_bytes)
    ))?;
    output.value(&serde_json::json!({
        "vindex": id.to_string(), "output": args.output, "source": model.to_string(), "seconds": seconds,
        "size_bytes": size_bytes, "summary": summary,
    }))
}

/// The plan of a checkpoint with a recipe, or of a model in GGUF, which needs none.
fn plan(args: &Extract, model: &Model) -> Result<Plan, Failure> {
    let source = model.source();
    let cannot = || format!("cannot plan the extraction of {}", args.model);
    let is_gguf = args.file.is_some() || vindex::is_gguf(source).map_err(Failure::of(cannot()))?;
    match (is_gguf, args.quant) {
        (true, Some(recipe)) => Err(Failure::new(format!(
            "{} is in GGUF, whose blocks are kept as they are; it cannot become {recipe}",
            args.model
        ))
        .hint("leave --quant away, or extract from the original checkpoint in safetensors")),
        (false, None) => Err(Failure::new(format!(
            "{} can be stored in several ways, and --quant does not say how",
            args.model
        ))
        .hint("add --quant with f32, bf16, f16, q8_0 or q4k")),
        (false, Some(recipe)) => vindex::plan(source, recipe).map_err(Failure::of(cannot())),
        (true, None) => vindex::plan_gguf(source, args.file.as_deref()).map_err(|error| {
            let several = matches!(error, vindex::Error::SeveralModels { .. });
            let failure = Failure::new(cannot()).cause(error);
            match several {
                true => failure.hint("--file NAME.gguf takes one of them"),
                false => failure,
            }
        }),
    }
}

fn refused(error: vindex::Error, args: &Extract) -> Failure {
    let hint = match &error {
        vindex::Error::OutputExists { .. } => Some("`larql verify` checks it; --force replaces it"),
        vindex::Error::OtherPlan { .. } => Some("--force removes it and begins anew"),
        vindex::Error::NonFinite { .. } => Some("--allow-nonfinite takes such values as they are"),
        _ => None,
    };
    let failure = Failure::new(format!(
        "cannot extract {} into {}",
        args.model,
        args.output.display()
    ))
    .cause(error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Shows how an extraction or a verification goes on.
pub(crate) fn show(meter: &Meter, progress: Progress) {
    match progress {
        Progress::Started { bytes_total, .. } => meter.set_total(bytes_total),
        Progress::Bytes(bytes) => meter.add(bytes),
        Progress::PartKept {
            index,
            n_parts,
            file,
            size_bytes,
        } => {
            meter.add(size_bytes);
            meter.item(format!(
                "part {} of {n_parts}: {file} kept, {}",
                index + 1,
                size(size_bytes)
            ));
        }
        Progress::PartDone {
            index,
            n_parts,
            file,
            size_bytes,
        } => {
            meter.item(format!(
                "part {} of {n_parts}: {file}, {}",
                index + 1,
                size(size_bytes)
            ));
        }
        Progress::NonFinite {
            file,
            tensor,
            count,
        } => {
            meter.warn(format_args!(
                "{file}: tensor {tensor} holds {count} values that are NaN, infinite or too large for their type"
            ));
        }
        _ => {}
    }
}

impl Summary {
    fn of(plan: &Plan) -> Result<Summary, vindex::Error> {
        let types = plan.census();
        let mut left_out: BTreeMap<String, LeftOut> = BTreeMap::new();
        for tensor in &plan.left_out {
            let group = left_out.entry(tensor.reason.clone()).or_default();
            if group.n_tensors == 0 {
                group.first.clone_from(&tensor.tensor);
            }
            group.n_tensors += 1;
        }
        Ok(Summary {
            sizes: plan.sizes()?,
            stem: plan.stem.clone(),
            recipe: plan.recipe,
            n_parts: plan.parts.len(),
            n_tensors: types.values().map(|kind| kind.n_tensors).sum(),
            size_bytes: types.values().map(|kind| kind.size_bytes).sum(),
            types,
            calibration: plan
                .imatrix
                .as_ref()
                .map(|imatrix| imatrix.sha256().to_owned()),
            left_out,
            warnings: plan.warnings.clone(),
        })
    }
}

/// Every part with its size, and of every tensor what it is made of and how.
fn described(plan: &Plan, sizes: &Sizes) -> String {
    let mut text = String::new();
    for (i, (part, part_size)) in plan.parts.iter().zip(&sizes.parts).enumerate() {
        let what = match part.component {
            Component::Metadata => "metadata".to_owned(),
            Component::Embeddings => "embeddings".to_owned(),
            Component::Attention { layer } => format!("attention {layer}"),
            Component::FeedForward { layer } => format!("feed-forward {layer}"),
            Component::NextN { layer } => format!("nextn {layer}"),
        };
        text += &format!("part {}: {what}, {}\n", i + 1, size(part_size.size_bytes));
        for tensor in &part.tensors {
            let ne: Vec<String> = tensor.ne.iter().map(u64::to_string).collect();
            let (ne, from) = (ne.join(" x "), origin(tensor));
            let (name, kind) = (&tensor.name, tensor.block_type);
            text += &format!("  {name:<36} {kind:<5} {ne:<18} {from}\n");
        }
    }
    text
}

/// Where the values of a tensor come from, in words.
fn origin(tensor: &PlannedTensor) -> String {
    match &tensor.values {
        Values::Checkpoint { tensors, transform } => {
            let others = match tensors.len() {
                0 | 1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            let first = tensors.first().map_or("", String::as_str);
            let how = match transform.is_none() {
                true => String::new(),
                false => format!(" ({transform})"),
            };
            format!("from {first}{others}{how}")
        }
        Values::Packed {
            blocks,
            scales,
            order,
        } => format!("blocks kept, from {blocks} and {scales} ({order})"),
        Values::Kept { tensor } => format!("blocks kept, from {tensor}"),
        Values::Computed { .. } => "computed from the configuration".to_owned(),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "plan: {} as {}: {} tensors in {} parts, {}",
            self.stem,
            self.recipe,
            self.n_tensors,
            self.n_parts,
            size(self.size_bytes)
        )?;
        for (name, kind) in &self.types {
            writeln!(
                f,
                "  {name:<6} {:>6} tensors {:>12}",
                kind.n_tensors,
                size(kind.size_bytes).to_string()
            )?;
        }
        if let Some(statistics) = &self.calibration {
            writeln!(f, "  weighed by the statistics {statistics}")?;
        }
        for slice in &self.sizes.slices {
            writeln!(
                f,
                "  {:<14} {:>5} parts {:>12}",
                slice.slice,
                slice.n_parts,
                size(slice.size_bytes).to_string()
            )?;
        }
        for range in self.sizes.ranges(|bytes| size(bytes).to_string()) {
            writeln!(f, "  expert-server, {range}")?;
        }
        for (reason, group) in &self.left_out {
            let others = match group.n_tensors - 1 {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            writeln!(f, "  left out: {}{others} ({reason})", group.first)?;
        }
        for warning in &self.warnings {
            writeln!(f, "  warning: {warning}")?;
        }
        Ok(())
    }
}
