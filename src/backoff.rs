//! Delays between attempts: exponential, with full jitter.
//!
//! Full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015): each delay is drawn evenly
//! between nothing and the ceiling, so that devices that lost the hub in the same moment do not
//! come back in the same moment. The crates looked at add jitter on top of the delay instead.

use std::time::Duration;

/// An endless row of growing delays.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    ceiling: Duration,
}

impl Backoff {
    /// Delays of up to `first`, then up to twice that and so on, up to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        let first = first.min(longest);
        Backoff { first, longest, ceiling: first }
    }

    /// Starts again with the first delay, after a success.
    pub fn reset(&mut self) {
        self.ceiling = self.first;
    }

    /// The next delay, drawn from zero to a ceiling that doubles each time.
    pub fn delay(&mut self) -> Duration {
        let drawn = Duration::try_from_secs_f64(self.ceiling.as_secs_f64() * fastrand::f64());
        let delay = drawn.unwrap_or(self.ceiling);
        self.ceiling = self.ceiling.saturating_mul(2).min(self.longest);
        delay
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.delay())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_ceiling_doubles_up_to_the_longest_and_starts_again() {
        for _ in 0..100 {
            let mut backoff = Backoff::new(SECOND, 10 * SECOND);
            for ceiling in [1, 2, 4, 8, 10, 10] {
                let delay = backoff.delay();
                assert!(delay <= ceiling * SECOND, "{delay:?} > {ceiling} s");
            }
            backoff.reset();
            assert!(backoff.delay() <= SECOND);
        }
    }

    #[test]
    fn delays_fill_the_whole_range() {
        let delays: Vec<Duration> =
            (0..1000).map(|_| Backoff::new(10 * SECOND, 10 * SECOND).delay()).collect();
        assert!(delays.iter().any(|delay| *delay < SECOND));
        assert!(delays.iter().any(|delay| *delay > 9 * SECOND));
    }

    #[test]
    fn a_first_delay_above_the_longest_is_cut() {
        assert!(Backoff::new(60 * SECOND, SECOND).take(50).all(|delay| delay <= SECOND));
    }

    #[test]
    fn never_overflows() {
        assert!(Backoff::new(SECOND, Duration::MAX).nth(200).is_some());
    }
}
