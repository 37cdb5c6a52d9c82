//! How long to wait before the next try, and when to give up; how fast to go.

use std::time::Duration;

use tokio::time::Instant;

/// A byte in time: every one that is accepted renews the budget.
#[derive(Debug)]
pub(super) struct Patience {
    min: Duration,
    max: Duration,
    budget: Duration,
    last_progress: Instant,
    failures: u32,
}

impl Patience {
    /// Waits `min` before the second try, twice as much each time up to `max`, all with full
    /// jitter; gives up after `budget` without progress.
    pub(super) fn new(min: Duration, max: Duration, budget: Duration) -> Self {
        Patience { min, max, budget, last_progress: Instant::now(), failures: 0 }
    }

    /// Something new came.
    pub(super) fn progress(&mut self) {
        self.last_progress = Instant::now();
        self.failures = 0;
    }

    /// Time since something new came.
    pub(super) fn waited(&self) -> Duration {
        self.last_progress.elapsed()
    }

    /// The delay before the next try; `None` if that is beyond the budget. The server's `asked`
    /// counts whatever it is: the whole of it is waited, and up to half of it more.
    pub(super) fn next_delay(&mut self, asked: Option<Duration>) -> Option<Duration> {
        let ceiling = self.min.saturating_mul(2_u32.saturating_pow(self.failures)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        let left = self.budget.checked_sub(self.waited())?;
        let asked = asked.unwrap_or_default();
        if asked > left {
            return None;
        }
        // Full jitter spreads a fleet that lost the same server at the same moment, also one that
        // was told to come back at the same moment. `asked` is no longer than the budget here.
        let delay = asked + ceiling.max(asked / 2).mul_f64(fastrand::f64());
        if asked.is_zero() { (delay <= left).then_some(delay) } else { Some(delay.min(left)) }
    }
}

/// Keeps a stream at or below a rate.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: Option<u64>,
    /// When the bytes taken so far would have come at that rate.
    due: Instant,
}

impl Pace {
    /// At most `bytes_per_s`; as fast as it goes if that is not set.
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Pace { bytes_per_s, due: Instant::now() }
    }

    /// Waits until `count` more bytes are due. Time that nobody used is not made up for.
    pub(super) async fn take(&mut self, count: u64) {
        let Some(rate) = self.bytes_per_s else { return };
        let micros = u128::from(count) * 1_000_000 / u128::from(rate.max(1));
        let cost = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        self.due = self.due.max(Instant::now()) + cost;
        tokio::time::sleep_until(self.due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn gives_up_only_after_the_budget_without_progress() {
        let mut patience = Patience::new(SECOND, SECOND * 8, SECOND * 60);
        for round in 0..3 {
            let mut tries = 0;
            while let Some(delay) = patience.next_delay(None) {
                assert!(delay <= SECOND * 8, "{delay:?} in round {round}");
                tokio::time::advance(delay).await;
                tries += 1;
            }
            assert!(tries >= 7, "{tries}");
            assert!(patience.waited() <= SECOND * 60);
            patience.progress();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn obeys_the_server_within_the_budget() {
        let mut patience = Patience::new(SECOND, SECOND, SECOND * 60);
        let delay = patience.next_delay(Some(SECOND * 30)).unwrap();
        assert!((SECOND * 30..=SECOND * 45).contains(&delay), "{delay:?}");
        assert_eq!(patience.next_delay(Some(SECOND * 61)), None);
        let delay = patience.next_delay(Some(SECOND * 60));
        assert_eq!(delay, Some(SECOND * 60), "the spread does not use up the budget");
    }

    #[tokio::test(start_paused = true)]
    async fn bears_whatever_a_server_asks_for() {
        let mut patience = Patience::new(SECOND, SECOND, SECOND * 60);
        tokio::time::advance(SECOND * 2).await;
        assert_eq!(patience.next_delay(Some(Duration::from_secs(u64::MAX))), None);
        assert_eq!(patience.next_delay(Some(Duration::MAX)), None);
        let mut endless = Patience::new(SECOND, SECOND, SECOND * 604_800);
        tokio::time::advance(SECOND * 604_801).await;
        assert_eq!(endless.next_delay(None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fleet_that_is_told_one_moment_does_not_come_back_in_one() {
        let delays: Vec<Duration> = (0..100)
            .map(|_| Patience::new(SECOND, SECOND, SECOND * 600).next_delay(Some(SECOND * 60)))
            .map(Option::unwrap)
            .collect();
        assert!(delays.iter().all(|delay| *delay >= SECOND * 60), "never earlier than asked");
        let late = delays.iter().filter(|delay| **delay > SECOND * 70).count();
        let early = delays.iter().filter(|delay| **delay < SECOND * 80).count();
        assert!(late > 10 && early > 10, "{delays:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_rate() {
        let begin = Instant::now();
        let mut pace = Pace::new(Some(1000));
        for _ in 0..10 {
            pace.take(500).await;
        }
        assert_eq!(begin.elapsed().as_millis(), 5000);
    }
}
