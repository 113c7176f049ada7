//! `pull`: a share of a published vindex becomes a directory. What a pull does, and in which order, is `hub`'s; here it
//! is asked for, shown, and its failures are told.

use hub::{PullError, Pulling, Wanted};
use terminal::{Failure, Meter, size};

use crate::cli::Pull;
use crate::context::Context;

/// Fetches what is missing of a share.
pub(crate) fn pull(args: &Pull, context: &Context) -> Result<(), Failure> {
    context.on_interrupt("what is fetched stays; the same command goes on after it");
    let output = context.output;
    let hub = context.hub()?;
    let wanted = Wanted {
        slice: args.slice,
        layers: args.ranges.layers,
        experts: args.ranges.experts,
    };
    let published = context
        .wait(hub.published(&args.from, wanted))
        .map_err(failure)?;
    let (repo, commit) = (published.repo(), published.commit());
    output.text(format_args!("source: hf://{repo} at commit {commit}"))?;
    let (id, share) = (published.id(), published.share());
    output.text(format_args!(
        "vindex: {id}, slice {share}: {} parts, {}",
        published.n_parts(),
        size(published.size_bytes())
    ))?;

    let meter = Meter::new("pull");
    let progress = |pulling| show(&meter, pulling);
    let pulled = context.wait(published.pull(&args.output, args.force, &progress));
    let pulled = pulled.map_err(failure)?;
    drop(meter);
    output.text(format_args!(
        "pulled {}: {} parts fetched ({}), {} here already; every byte is what the index says",
        args.output.display(),
        pulled.n_fetched,
        size(pulled.bytes_fetched),
        pulled.n_parts - pulled.n_fetched
    ))?;
    output.value(&serde_json::json!({
        "repo": repo.to_string(), "commit": commit.to_string(), "vindex": id.to_string(), "slice": share.slice,
        "layers": share.layers, "experts": share.experts, "output": args.output, "n_parts": pulled.n_parts,
        "n_fetched": pulled.n_fetched, "bytes_fetched": pulled.bytes_fetched,
    }))
}

/// Draws how a pull goes on.
pub(crate) fn show(meter: &Meter, pulling: Pulling) {
    match pulling {
        Pulling::Started { bytes_total } => meter.set_total(bytes_total),
        Pulling::Bytes(bytes) => meter.add(bytes),
        Pulling::PartDone {
            index,
            n_parts,
            file,
            size_bytes,
            was_here,
        } => meter.item(format!(
            "part {} of {n_parts}: {file}{}, {}",
            index + 1,
            if was_here { " here already" } else { "" },
            size(size_bytes)
        )),
    }
}

/// What failed, the error behind it, and what to do now.
pub(crate) fn failure(error: PullError) -> Failure {
    Failure::One {
        message: error.to_string(),
        hint: error.hint(),
        cause: error.into_cause(),
    }
}
