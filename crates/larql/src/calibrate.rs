//! Statistics of what enters a model's matrices while a text passes: `imatrix` writes them to a file, `extract` weighs the
//! errors of blocks by them.
//!
//! The text is encoded once and cut as llama.cpp's `llama-imatrix` cuts it: chunks of 512 tokens (or the model's context, if
//! that is less), the first token of each replaced by the one that begins a text, where the model wants one; what is left
//! over is not used.
//!
//! Invariant: model and text alone decide the statistics, to the bit. The unquantised copy that a calibration computes
//! with is gone when it ends, in whatever way short of a kill that no process can hear.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::{Collector, Tokenizer, Wanted};
use terminal::{Failure, Meter, size};
use vindex::{
    ColumnStatistics, Dtype, Error, ExtractOptions, INDEX_FILE, Imatrix, JOURNAL_FILE, Plan, Recipe,
};

use crate::cli;
use crate::context::Context;
use crate::extract::show;
use crate::model::Model;
use crate::pass::Pass;

/// Tokens that are computed by themselves.
const CHUNK: usize = 512;
/// Tokens of which the logits are in memory at once.
const STEP: usize = 64;

/// Collects statistics with a vindex and writes them to a file.
pub(crate) fn imatrix(args: &cli::Imatrix, context: &Context) -> Result<(), Failure> {
    let text = read(&args.text)?;
    let imatrix = collect(&args.dir, &args.text, &text, args.threads, context)?;
    let bytes = imatrix.to_bytes().map_err(Failure::new)?;
    let cannot = || format!("cannot write {}", args.output.display());
    let name = args.output.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Failure::new(cannot()).hint("name a file"))?;
    let dir = match args.output.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    vindex::write_whole(dir, name, &bytes).map_err(Failure::of(cannot()))?;
    context.output.text(format_args!(
        "wrote {}: statistics {} of {} tensors over {} chunks of {} tokens",
        args.output.display(),
        imatrix.sha256(),
        imatrix.entries().len(),
        imatrix.n_chunks(),
        imatrix.chunk_tokens()
    ))?;
    context.output.value(&serde_json::json!({
        "output": args.output, "statistics": imatrix.sha256(), "n_tensors": imatrix.entries().len(),
        "n_chunks": imatrix.n_chunks(), "chunk_tokens": imatrix.chunk_tokens(), "n_unseen": imatrix.n_unseen(),
    }))
}

/// The statistics that the command line asks for, if it does: read from a file, or collected over a text with a copy of the
/// model that is not quantised.
pub(crate) fn asked(
    args: &cli::Extract,
    model: &Model,
    plan: &Plan,
    context: &Context,
) -> Result<Option<Arc<Imatrix>>, Failure> {
    let imatrix = match (&args.imatrix, &args.calibrate) {
        (None, None) => return Ok(None),
        (Some(file), _) => Imatrix::read(file)
            .map_err(Failure::of(format!("cannot weigh by {}", file.display())))?,
        (None, Some(text)) => calibrate(args, text, model, plan, context)?,
    };
    Ok(Some(Arc::new(imatrix)))
}

/// What is cheap to refuse comes first: a recipe without weights, an output that is finished, a text that is none.
fn calibrate(
    args: &cli::Extract,
    text_path: &Path,
    model: &Model,
    plan: &Plan,
    context: &Context,
) -> Result<Imatrix, Failure> {
    let cannot = || format!("cannot calibrate {}", args.model);
    if !plan.recipe.is_weighed() {
        let recipe = plan.recipe;
        return Err(
            Failure::new(format!("the recipe {recipe} has no blocks to weigh"))
                .hint("--calibrate goes with --quant q4k"),
        );
    }
    let holds = |file| args.output.join(file).exists();
    if holds(INDEX_FILE) && !holds(JOURNAL_FILE) && !args.force {
        let path = args.output.clone();
        return Err(Failure::new(cannot()).cause(Error::OutputExists { path }));
    }
    let text = read(text_path)?;
    let exact = vindex::plan(model.source(), lossless(plan)).map_err(Failure::of(cannot()))?;
    let copy = Copy::beside(&args.output, context)?;
    let bytes: u64 = exact.census().values().map(|kind| kind.size_bytes).sum();
    context.output.text(format_args!(
        "calibrating by {}: {} as {} takes {} beside the output while it runs",
        text_path.display(),
        exact.stem,
        exact.recipe,
        size(bytes)
    ))?;
    let options = ExtractOptions {
        threads: crate::pass::n_threads(args.threads),
        allow_nonfinite: args.allow_nonfinite,
    };
    let meter = Meter::new("copy");
    let extract = || {
        vindex::extract(model.source(), &exact, &copy.dir, &options, &|progress| {
            show(&meter, progress);
        })
    };
    // What an earlier run of whatever plan left there is of no worth.
    let extracted = match extract() {
        Err(Error::OutputExists { .. } | Error::OtherPlan { .. }) => {
            vindex::clear(&copy.dir).and_then(|()| extract())
        }
        result => result,
    };
    drop(meter);
    extracted.map_err(Failure::of(cannot()))?;
    collect(&copy.dir, text_path, &text, args.threads, context)
}

/// A recipe that keeps the numbers of the checkpoint's matrices; those that are codes and scales are rounded to BF16, as
/// converters do.
fn lossless(plan: &Plan) -> Recipe {
    let matrices = plan.checkpoint.tensors().filter(|(_, t)| t.shape.len() > 1);
    let (mut has_f32, mut has_f16, mut has_bf16) = (false, false, false);
    for (_, tensor) in matrices {
        match tensor.dtype {
            Dtype::F32 => has_f32 = true,
            Dtype::F16 => has_f16 = true,
            _ => has_bf16 = true,
        }
    }
    match (has_f32, has_f16, has_bf16) {
        (false, false, true) => Recipe::Bf16,
        (false, true, false) => Recipe::F16,
        _ => Recipe::F32,
    }
}

/// Statistics of the vindex in `dir` over `text`.
fn collect(
    dir: &Path,
    text_path: &Path,
    text: &str,
    threads: Option<NonZeroUsize>,
    context: &Context,
) -> Result<Imatrix, Failure> {
    let collector = Arc::new(Collector::default());
    let mut pass = Pass::collecting(dir, threads, &collector)?;
    let tokenizer = Tokenizer::of(pass.model().vindex()).map_err(Failure::of(format!(
        "cannot read the tokenizer of {}",
        dir.display()
    )))?;
    let encode = |text: &str| {
        tokenizer
            .encode(text, true)
            .map_err(Failure::of("cannot encode the text"))
    };
    let tokens = encode(text.strip_suffix('\n').unwrap_or(text))?;
    let begins = encode("")?.first().copied();
    let chunk = CHUNK.min(pass.model().config().context as usize);
    let n_chunks = tokens.len() / chunk.max(1);
    if n_chunks == 0 {
        return Err(Failure::new(format!(
            "{} has {} tokens, less than a chunk of {chunk}",
            text_path.display(),
            tokens.len()
        ))
        .hint("take a longer text, of the kind that the model will read and write"));
    }
    let meter = Meter::new("calibrate");
    meter.set_total(text.len() as u64);
    for (i, tokens) in tokens.chunks_exact(chunk).enumerate() {
        let mut tokens = tokens.to_vec();
        if let Some(begins) = begins {
            tokens[0] = begins;
        }
        let mut sequence = pass.sequence(chunk);
        for tokens in tokens.chunks(STEP) {
            pass.step(&mut sequence, tokens, Wanted::All)?;
        }
        let done = |chunks: usize| (text.len() * chunks / n_chunks) as u64;
        meter.add(done(i + 1) - done(i));
    }
    drop(meter);
    let entries: BTreeMap<String, ColumnStatistics> = collector
        .take()
        .into_iter()
        .map(|(name, seen)| {
            let entry = ColumnStatistics {
                sums: seen.squares.iter().map(|&sum| sum as f32).collect(),
                counts: seen.counts.iter().map(|&count| count as f32).collect(),
            };
            (name, entry)
        })
        .collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let imatrix = Imatrix::new(entries, count(n_chunks), count(chunk)).map_err(|reason| {
        Failure::new(format!("the statistics are unusable: {reason}"))
            .hint("verify the vindex: larql verify")
    })?;
    context.output.text(format_args!(
        "statistics {} of {} tensors over {n_chunks} chunks of {chunk} tokens",
        imatrix.sha256(),
        imatrix.entries().len()
    ))?;
    let name = text_path.file_name().unwrap_or_default();
    Ok(imatrix.of_datasets(vec![name.to_string_lossy().into_owned()]))
}

fn read(text: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(text).map_err(|error| Failure::io("cannot read", text, error))
}

/// The directory of the copy that is not quantised; it goes with this.
struct Copy {
    dir: PathBuf,
}

impl Copy {
    fn beside(output: &Path, context: &Context) -> Result<Copy, Failure> {
        let name = output.file_name().ok_or_else(|| {
            Failure::new(format!("{} has no name", output.display())).hint("name a directory")
        })?;
        let mut name = name.to_owned();
        name.push(".calibration");
        let dir = output.with_file_name(name);
        context.scratch(dir.clone())?;
        Ok(Copy { dir })
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// As far as that goes: what cannot be removed is used or overwritten by the next run.
pub(crate) fn remove(copy: &Path) {
    // Threads that still write may put a file back.
    for _ in 0..20 {
        let _ = vindex::clear(copy);
        if std::fs::remove_dir(copy).is_ok() || !copy.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
