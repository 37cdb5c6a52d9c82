//! How long a trial may take: short where only the image can be at fault, long where the network is
//! missing through no fault of the image.

use super::machine::Limits;
use super::state::{Outage, State};

/// The time of one trial, in one boot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TrialTime {
    /// Seconds since the boot at the agent's first start in it.
    pub began_s: u64,
    /// Seconds since the boot of the newest round of checks in which nothing was wrong but the
    /// network; `None` if there was none.
    pub spared_s: Option<u64>,
    /// Whether the old slot had no hub session either: then a missing one says nothing of the image.
    pub hub_was_missing: bool,
    /// See [`Limits::trial_s`].
    pub limit_s: u64,
    /// See [`Limits::trial_outage_s`].
    pub outage_limit_s: u64,
}

impl TrialTime {
    /// The time that the trial in `state` has; `None` if that is no trial.
    #[must_use]
    pub fn of(state: &State, limits: &Limits) -> Option<Self> {
        let State::Trial { run, began_s, outage, .. } = state else { return None };
        Some(TrialTime {
            began_s: *began_s,
            spared_s: outage.as_ref().map(|outage: &Outage| outage.seen_s),
            hub_was_missing: run.passage.hub_before == Some(false),
            limit_s: limits.trial_s,
            outage_limit_s: limits.trial_outage_s.max(limits.trial_s),
        })
    }

    /// Seconds since the boot at which the trial is lost. Once the network is back, the image has
    /// the usual time again, and in all no more than the long one.
    #[must_use]
    pub fn ends_s(&self) -> u64 {
        let counts_from = self.spared_s.unwrap_or_default().max(self.began_s);
        let longest = self.began_s.saturating_add(self.outage_limit_s);
        counts_from.saturating_add(self.limit_s).min(longest)
    }

    /// Whether an outage buys time at all.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.outage_limit_s > self.limit_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_buys_time_and_not_without_end() {
        for (began_s, spared_s, limits, ends_s) in [
            (20, None, (600, 86_400), 620),
            (20, Some(20), (600, 86_400), 620),
            (20, Some(400), (600, 86_400), 1000),
            (20, Some(86_000), (600, 86_400), 86_420),
            (20, Some(90_000), (600, 86_400), 86_420),
            // Switched off.
            (20, Some(400), (600, 600), 620),
        ] {
            let (limit_s, outage_limit_s) = limits;
            let time =
                TrialTime { began_s, spared_s, hub_was_missing: false, limit_s, outage_limit_s };
            assert_eq!(time.ends_s(), ends_s, "{time:?}");
            assert_eq!(time.may_wait(), limits.0 < limits.1);
        }
    }
}
