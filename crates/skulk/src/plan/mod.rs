//! `skulk plan`: how fast a model would run on machines that may not be there, what each would hold, and what it costs.
//!
//! `shape` weighs the model by its index, `nodes` reads the machines, `place` divides the one among the others, `formula`
//! predicts. Invariant: no weight is read; of a repository only `index.json`.

mod formula;
mod nodes;
mod place;
mod report;
mod shape;

use std::fs;
use std::path::Path;

use hub::Reference;
use terminal::{Failure, Output};
use vindex::{INDEX_FILE, Index};

pub use formula::{Load, Share, Speed, Step, Wire, distinct_experts, predict, step, wire_bytes};
pub use nodes::{Bytes, Gpu, Link, Node, Nodes, Role, Split};
pub use place::{Holds, Place, Plan, place};
pub use shape::{CacheShape, LayerShape, Shape};

use crate::cli;
use crate::context::Context;
use crate::model::Model;

/// An index of the largest models known takes about 4 MB.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Runs `skulk plan`.
pub(crate) fn run(args: &cli::Plan, context: &Context, output: Output) -> Result<(), Failure> {
    let index = read_index(&args.model, context)?;
    let shape = Shape::of(&index);
    let text = fs::read_to_string(&args.nodes)
        .map_err(|error| Failure::io("cannot read", &args.nodes, error))?;
    let wrong = |reason: String| {
        Failure::new(format!("{}: {reason}", args.nodes.display()))
            .hint("docs/plan.md draws the file")
    };
    let nodes = Nodes::parse(&text).map_err(wrong)?;
    let load = Load {
        n_streams: args.streams.get(),
        context: args.context.map_or(shape.context, |n| n.get()),
        kv: args.kv,
        wire_value_bytes: args.wire.n_bytes() as u64,
    };
    let plan = place(&shape, load, &nodes).map_err(wrong)?;
    output.text(report::text(&shape, load, &plan))?;
    output.value(&report::json(&shape, load, &plan))?;
    if plan.problems.is_empty() {
        Ok(())
    } else {
        Err(Failure::Shown)
    }
}

/// The index of a directory, or of a repository.
fn read_index(model: &Model, context: &Context) -> Result<Index, Failure> {
    let (name, text) = match model {
        Model::Dir(dir) => (
            dir.display().to_string(),
            read_bounded(&dir.join(INDEX_FILE))?,
        ),
        Model::Repo(Reference { repo, revision }) => {
            let hub = context.hub()?;
            let text = context.wait(async {
                let snapshot = hub.snapshot(repo, revision.as_deref()).await?;
                snapshot.read_file(INDEX_FILE, INDEX_BYTES_MAX).await
            });
            let text = text.map_err(Failure::of(format!("cannot read the index of {repo}")))?;
            (repo.to_string(), text.to_vec())
        }
    };
    Index::from_json(&text)
        .map_err(|reason| Failure::new(format!("{name} is no vindex: {INDEX_FILE}: {reason}")))
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, Failure> {
    let length = fs::metadata(path)
        .map_err(|error| Failure::io("cannot read", path, error))?
        .len();
    if length > INDEX_BYTES_MAX {
        return Err(Failure::new(format!(
            "{} has {length} bytes",
            path.display()
        )));
    }
    fs::read(path).map_err(|error| Failure::io("cannot read", path, error))
}
