//! When to try again, and when to stop.
//!
//! Invariant: a request that makes no progress ends within `give_up_after` plus one attempt, whatever the
//! Hub answers; only the time in which an upload moved is not counted. Only what passes by itself is tried again: 408, 429, 5xx, cut or refused connections.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use crate::Settings;

const WAIT_MAX: Duration = Duration::from_secs(8);
/// Attempts at an address that has never answered: most likely it is wrong.
const N_ATTEMPTS_UNHEARD: u32 = 3;

/// The patience left for one request.
#[derive(Debug)]
pub(crate) struct Patience {
    since: Instant,
    n_attempts: u32,
    give_up_after: Duration,
    base: Duration,
}

impl Patience {
    pub(crate) fn new(settings: &Settings) -> Patience {
        Patience {
            since: Instant::now(),
            n_attempts: 0,
            give_up_after: settings.give_up_after,
            base: settings.backoff_base,
        }
    }

    /// Counts an attempt.
    pub(crate) fn attempt(&mut self) {
        self.n_attempts += 1;
    }

    pub(crate) fn n_attempts(&self) -> u32 {
        self.n_attempts
    }

    /// Something useful arrived: the clock starts anew.
    pub(crate) fn renew(&mut self) {
        self.since = Instant::now();
        self.n_attempts = 0;
    }

    /// Does not count a time in which bytes moved, even if they have to be sent again.
    pub(crate) fn forgive(&mut self, moving: Duration) {
        self.since += moving;
    }

    /// How long to wait before the next attempt; `None` to give up. `asked` is the Hub's own wish and is
    /// honoured when it fits in the patience left.
    pub(crate) fn wait(&self, asked: Option<Duration>) -> Option<Duration> {
        let left = self.give_up_after.checked_sub(self.since.elapsed())?;
        let wait = match asked {
            Some(asked) => asked.max(self.base),
            None => {
                let doubled = self
                    .base
                    .saturating_mul(1 << self.n_attempts.saturating_sub(1).min(10));
                doubled.min(WAIT_MAX).mul_f64(0.5 + 0.5 * random())
            }
        };
        (wait < left).then_some(wait)
    }

    /// As [`Patience::wait`], for an address that cannot be reached; `heard` when it has answered before.
    pub(crate) fn wait_unreachable(&self, heard: bool) -> Option<Duration> {
        if !heard && self.n_attempts >= N_ATTEMPTS_UNHEARD {
            None
        } else {
            self.wait(None)
        }
    }
}

/// Whether an answer with this status may be different a moment later.
pub(crate) fn passes(status: StatusCode) -> bool {
    status == StatusCode::REQUEST_TIMEOUT
        || status == StatusCode::TOO_MANY_REQUESTS
        || status.is_server_error()
}

/// The wait that the Hub asks for: `Retry-After: 7`, or `RateLimit: "api";r=0;t=55`.
pub(crate) fn asked_wait(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    if let Some(seconds) = text("retry-after").and_then(|v| v.trim().parse::<u64>().ok()) {
        return Some(Duration::from_secs(seconds));
    }
    let limit = text("ratelimit")?;
    let number = |key: &str| {
        limit.split([';', ',']).find_map(|part| {
            part.trim()
                .strip_prefix(key)?
                .strip_prefix('=')?
                .parse::<u64>()
                .ok()
        })
    };
    match number("r") {
        Some(r) if r > 0 => None,
        _ => number("t").map(Duration::from_secs),
    }
}

/// A number in 0..1, different in each call; the standard library's hash keys are its source.
fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap()))
            .collect()
    }

    #[test]
    fn the_hub_says_how_long_to_wait() {
        assert_eq!(
            asked_wait(&headers(&[("retry-after", "7")])),
            Some(Duration::from_secs(7))
        );
        assert_eq!(
            asked_wait(&headers(&[("ratelimit", "\"api\";r=0;t=55")])),
            Some(Duration::from_secs(55))
        );
        assert_eq!(
            asked_wait(&headers(&[("ratelimit", "\"api\";r=3;t=55")])),
            None
        );
        assert_eq!(
            asked_wait(&headers(&[(
                "retry-after",
                "Wed, 21 Oct 2026 07:28:00 GMT"
            )])),
            None
        );
        assert_eq!(asked_wait(&HeaderMap::new()), None);
    }

    #[test]
    fn waits_double_and_end() {
        let settings = Settings {
            backoff_base: Duration::from_millis(100),
            ..Settings::default()
        };
        let mut patience = Patience::new(&settings);
        let mut total = Duration::ZERO;
        for n in 1..6u32 {
            patience.attempt();
            let wait = patience.wait(None).unwrap();
            let full = Duration::from_millis(100 << (n - 1));
            assert!(wait >= full / 2 && wait <= full, "{n}: {wait:?}");
            total += wait;
        }
        assert!(total < Duration::from_secs(4));
        assert_eq!(
            patience.wait(Some(Duration::from_secs(5))),
            Some(Duration::from_secs(5))
        );
        assert_eq!(patience.wait(Some(Duration::from_secs(55))), None);
        assert_eq!(patience.wait_unreachable(false), None);
        assert!(patience.wait_unreachable(true).is_some());
    }
}
