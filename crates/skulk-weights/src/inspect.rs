//! What only the network knows about a plan.

use std::fmt;

use serde::Serialize;

use crate::plan::PublishPlan;

/// What the Hub told about a plan's source and target.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Inspection {
    /// The most bytes that scratch holds at a time, when the source's sizes are known.
    pub(crate) disk_needed_bytes: Option<u64>,
}

/// Asks the Hub about the source and the target of `plan`.
pub(crate) async fn inspect(_plan: &PublishPlan, _hub: &hub::Hub) -> Inspection {
    Inspection::default()
}

impl fmt::Display for Inspection {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}
