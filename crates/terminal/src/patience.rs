//! How long weight servers are waited for: options that every program has that asks some.
//!
//! Invariant: without a word from the user these are the engine's own limits, and a stall never outlasts the deadline.

use std::time::Duration;

use clap::Args;

/// Options beside `--ffn`, which the command itself has.
#[derive(Args, Clone, Copy, Debug)]
pub struct Patience {
    /// How long a layer may take at the weight servers, over all attempts
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration, requires = "ffn")]
    ffn_deadline: Duration,
    /// How long a weight server may be silent before a replica is asked instead; without one, the deadline holds
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration, requires = "ffn")]
    ffn_stall: Duration,
}

impl Patience {
    /// For a layer of a step, over all attempts.
    pub fn deadline(&self) -> Duration {
        self.ffn_deadline
    }

    /// With a silent server, while another holds the same.
    pub fn stall(&self) -> Duration {
        self.ffn_stall.min(self.ffn_deadline)
    }
}
