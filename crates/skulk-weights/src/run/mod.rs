//! Carries out a plan.

use std::path::PathBuf;

use crate::failure::Failure;
use crate::output::Output;
use crate::plan::PublishPlan;

/// A publication to carry out.
pub(crate) struct Request {
    pub(crate) plan: PublishPlan,
    pub(crate) hub: hub::Hub,
    /// The program to run; empty when the plan has no vindex step.
    pub(crate) larql: PathBuf,
    pub(crate) output: Output,
}

/// Inspects the plan, prints it, and carries it out.
pub(crate) async fn publish(request: Request) -> Result<(), Failure> {
    let Request {
        plan,
        hub: _,
        larql,
        output,
    } = request;
    output.text(format_args!("{plan}"))?;
    Err(Failure::new(format!(
        "publishing with {} is not built yet",
        larql.display()
    )))
}
