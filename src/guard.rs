//! The trial guard: ends the trial of a new image in the place of a daemon that is dead.
//!
//! `twinboot-trial.timer` runs it. It comes from the new image as well, and whatever broke the
//! daemon is likely to be broken here too. So everything is looked at by itself, and what cannot
//! be had is done without: a section of the configuration that cannot be read is replaced by its
//! defaults, a bootloader that cannot be asked by the kernel command line, a command line that
//! does not tell the slot by the saved state, a state that is lost, or not mounted yet, by what the
//! bootloader means to boot next. Nothing is changed before the end but one count.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use tracing::{error, info, warn};

use crate::boot::{self, BootFacts, running};
use crate::clock::{Clock, SystemClock};
use crate::config::{self, Config};
use crate::logging::chain;
use crate::os::{self, Sysroot};
use crate::store::{self, Glimpse};
use crate::update::{BootId, Saved, Slot, State};

/// Restarts for one trial before the guard gives up: a bootloader that does not obey must not make
/// an endless loop of it.
const MAX_RESTARTS: u8 = 3;

/// The file in the state folder that counts them: the update's name, the number, the last boot.
const COUNT_FILE: &str = "guard-restarts";

/// What became of a trial that nobody confirmed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TrialEnd {
    /// No trial, or nothing that another restart would mend.
    NothingToDo,
    /// The trial still has time.
    NotYet,
    /// The machine was ordered to restart; the bootloader takes the old slot.
    Restarting,
}

/// What is known of the present boot.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What the state folder shows.
    pub state: Glimpse,
    /// The slot that runs, if anything tells it.
    pub running: Option<Slot>,
    /// The slot that boots next, if the bootloader can be asked.
    pub next: Option<Slot>,
    /// This boot, if the kernel tells it.
    pub boot: Option<BootId>,
    /// Time since the machine started.
    pub since_boot: Duration,
    /// What a trial may take.
    pub limit: Duration,
}

/// Restarts the machine if a new image is on trial, its time is over, and no daemon ends it.
///
/// # Errors
/// The machine did not take the order; it is right to call again.
pub fn end_unconfirmed_trial(config: &Config, sysroot: &Sysroot) -> Result<TrialEnd> {
    let mut bootloader = boot::open(&config.boot, &config.slots, &config.rauc, sysroot);
    let (running, next) = match bootloader.facts() {
        Ok(BootFacts { running, next, .. }) => (Some(running), next),
        Err(error) => {
            warn!(error = %chain(&error), "the bootloader cannot be asked");
            (running::running(&config.slots, sysroot).ok(), None)
        }
    };
    let facts = Facts {
        state: state(config, sysroot),
        running,
        next,
        boot: os::boot_id(sysroot).ok(),
        since_boot: SystemClock::new(sysroot.clone()).since_boot(),
        limit: config.update.trial_limit_s.duration(),
    };
    let count = config.state.directory.join(COUNT_FILE);
    match decide(&facts) {
        TrialEnd::NothingToDo => {
            // Mostly there is none.
            let _ = fs::remove_file(count);
            return Ok(TrialEnd::NothingToDo);
        }
        TrialEnd::NotYet => return Ok(TrialEnd::NotYet),
        TrialEnd::Restarting => {}
    }
    let run = facts.state.saved.as_ref().and_then(|saved| saved.state.run());
    let trial = run.map_or_else(|| "unknown".to_owned(), |run| run.id.to_string());
    if !may_restart(&count, &trial, facts.boot.as_ref()) {
        error!("the machine was restarted {MAX_RESTARTS} times and came back to this slot");
        return Ok(TrialEnd::NothingToDo);
    }
    warn!(
        running = facts.running.map_or("unknown", Slot::name),
        next = facts.next.map_or("unknown", Slot::name),
        "the trial was not confirmed and twinbootd does not end it: going back"
    );
    // Only the state tells for sure which slot was tried: boot scripts that count boots can name the
    // other slot as the next one also while the only good slot runs.
    if let Some(run) = run
        && let Err(error) = bootloader.cancel_try(run.target())
    {
        // The try was for one boot only, so the restart is right all the same.
        warn!(error = %chain(&error), "the bootloader could not be told");
    }
    os::restart(&config.restart, None)?;
    info!("the restart is ordered");
    Ok(TrialEnd::Restarting)
}

/// What the state folder shows. The guard may run before the data partition is mounted: what lies
/// below the mount point then, on the slot itself, is of some other time and is not believed.
fn state(config: &Config, sysroot: &Sysroot) -> Glimpse {
    let Config { slots, state: config::State { directory, allow_on_slot }, .. } = config;
    match store::state_would_be_lost(directory, slots, sysroot) {
        Some(problem) if !allow_on_slot => {
            warn!(problem, "the saved state is not there");
            Glimpse::default()
        }
        _ => store::glimpse(directory),
    }
}

/// Whether an unconfirmed slot runs whose time is over.
#[must_use]
pub fn decide(facts: &Facts) -> TrialEnd {
    let Some(began) = unconfirmed_since(facts) else { return TrialEnd::NothingToDo };
    // A daemon that lives ends the trial by itself; past twice the time it is not well either.
    let patience = if facts.state.in_use { facts.limit.saturating_mul(2) } else { facts.limit };
    if facts.since_boot < began.saturating_add(patience) {
        return TrialEnd::NotYet;
    }
    TrialEnd::Restarting
}

/// From when on the time of the running slot's trial counts, as time since boot; `None` if none is
/// under way.
fn unconfirmed_since(facts: &Facts) -> Option<Duration> {
    match &facts.state.saved {
        Some(saved) => in_trial(saved, facts).then(|| match &saved.state {
            // A daemon that waits for the network notes that it does, well within the limit.
            State::Trial { boot, began_s, outage, .. } if facts.boot.as_ref() == Some(boot) => {
                let seen_s = outage.as_ref().map_or(0, |outage| outage.seen_s);
                Duration::from_secs(seen_s.max(*began_s))
            }
            // The daemon never began it in this boot.
            _ => Duration::ZERO,
        }),
        // Perhaps the state is on a partition that the new image does not mount. A daemon that
        // lives watches over a slot without a past itself.
        None if facts.state.in_use => None,
        None => {
            let lost = facts.running.is_some() && facts.next == facts.running.map(Slot::other);
            lost.then_some(Duration::ZERO)
        }
    }
}

/// Whether the slot of an update that is under way runs.
fn in_trial(saved: &Saved, facts: &Facts) -> bool {
    let this_boot = |boot: &BootId| facts.boot.as_ref() == Some(boot);
    match (saved.state.run(), facts.running) {
        (None, _) => false,
        (Some(run), Some(running)) => running == run.target(),
        // Nothing else tells, so the state is believed where it is sure.
        (Some(_), None) => match &saved.state {
            State::Switching { ordered_in, armed, .. } => *armed && !this_boot(ordered_in),
            State::Trial { boot, .. } => this_boot(boot),
            State::RollingBack { ordered_in, .. } => this_boot(ordered_in),
            State::Idle | State::Fetching { .. } | State::Verifying { .. } => false,
        },
    }
}

/// Counts the restart of this `boot` that is to end `trial`, if there may be one.
fn may_restart(count: &Path, trial: &str, boot: Option<&BootId>) -> bool {
    let boot = boot.map(|boot| boot.0.as_str());
    let text = fs::read_to_string(count).unwrap_or_default();
    let mut words = text.split_whitespace();
    let (of, number, ordered_in) = (words.next(), words.next(), words.next());
    let so_far = number.filter(|_| of == Some(trial)).and_then(|number| number.parse().ok());
    let so_far: u8 = so_far.unwrap_or(0);
    if so_far > 0 && boot.is_some() && ordered_in == boot {
        // The machine did not take the order, or takes its time.
        return true;
    }
    if so_far >= MAX_RESTARTS {
        return false;
    }
    // Without a place to count in, going back matters more.
    let text = format!("{trial} {} {}\n", so_far.saturating_add(1), boot.unwrap_or("-"));
    if let Err(error) = os::replace_file(count, text.as_bytes(), 0o600) {
        warn!(error = %chain(&error), "the restart cannot be counted");
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::{Failure, FailureKind, Origin, Outage, Passage, Run, RunId, Source, Times};

    const LIMIT: u64 = 600;

    fn run() -> Run {
        Run {
            id: RunId("1".to_owned()),
            source: Source::OtherSlot { version: None },
            origin: Origin::Method,
            from: Slot::A,
            times: Times::default(),
            starts: 1,
            passage: Passage::default(),
        }
    }

    fn boot(name: &str) -> BootId {
        BootId(name.to_owned())
    }

    fn trial(boot: BootId) -> State {
        let (run, outage) = (run(), None);
        State::Trial { run, starts: 1, boot, began_s: 100, healthy: false, stopped: false, outage }
    }

    /// It waits for the network, and noted that 1000 seconds after the boot.
    fn waiting(boot: BootId) -> State {
        let outage = Some(Outage { what: "no carrier".to_owned(), seen_s: 1000, lasts: true });
        let run = run();
        State::Trial { run, starts: 1, boot, began_s: 100, healthy: false, stopped: false, outage }
    }

    fn switching(boot: BootId) -> State {
        let (run, attempt) = (run(), 1);
        State::Switching { run, ordered_in: boot, attempt, armed: true, left: true }
    }

    fn rolling_back(boot: BootId) -> State {
        let reason = Failure::new(FailureKind::Unhealthy, "sick");
        State::RollingBack { run: run(), reason, ordered_in: boot, attempt: 1 }
    }

    fn facts(state: Option<State>, running: Option<Slot>, next: Option<Slot>) -> Facts {
        let saved = state.map(|state| Saved { state, ..Saved::new() });
        Facts {
            state: Glimpse { in_use: false, saved },
            running,
            next,
            boot: Some(boot("now")),
            since_boot: Duration::MAX,
            limit: Duration::from_secs(LIMIT),
        }
    }

    /// The second from which on the guard restarts the machine; `None` if it never does.
    fn restarts_at(facts: &Facts) -> Option<u64> {
        let at = |since_boot| decide(&Facts { since_boot, ..facts.clone() });
        (at(Duration::MAX) == TrialEnd::Restarting).then(|| {
            let time = (0..10_000).find(|s| at(Duration::from_secs(*s)) == TrialEnd::Restarting);
            let time = time.unwrap();
            assert!((0..time).all(|s| at(Duration::from_secs(s)) == TrialEnd::NotYet));
            time
        })
    }

    #[test]
    fn a_lost_trial_is_left_by_whatever_still_tells_it() {
        use Slot::{A, B};
        let (now, before) = (|| boot("now"), || boot("before"));
        for (state, running, next, alone, beside_a_daemon) in [
            // The daemon began the trial in this boot, in another one, or never.
            (Some(trial(now())), Some(B), Some(A), Some(700), Some(1300)),
            (Some(trial(before())), Some(B), Some(A), Some(600), Some(1200)),
            (Some(switching(before())), Some(B), Some(A), Some(600), Some(1200)),
            (Some(rolling_back(now())), Some(B), None, Some(600), Some(1200)),
            // The network is missing: time counts from the last note of it in this boot.
            (Some(waiting(now())), Some(B), Some(A), Some(1600), Some(2200)),
            (Some(waiting(before())), Some(B), Some(A), Some(600), Some(1200)),
            // The old slot runs.
            (Some(trial(before())), Some(A), Some(A), None, None),
            (Some(switching(before())), Some(A), Some(A), None, None),
            (Some(State::Idle), Some(B), Some(A), None, None),
            // Nothing tells the slot but the state.
            (Some(trial(now())), None, None, Some(700), Some(1300)),
            (Some(trial(before())), None, None, None, None),
            (Some(switching(before())), None, None, Some(600), Some(1200)),
            (Some(switching(now())), None, None, None, None),
            (Some(rolling_back(now())), None, None, Some(600), Some(1200)),
            (Some(rolling_back(before())), None, None, None, None),
            // No state: the bootloader's word counts, but a daemon that lives watches by itself.
            (None, Some(B), Some(A), Some(600), None),
            (None, Some(B), Some(B), None, None),
            (None, Some(B), None, None, None),
            (None, None, Some(A), None, None),
        ] {
            let mut facts = facts(state, running, next);
            assert_eq!(restarts_at(&facts), alone, "{facts:?}");
            facts.state.in_use = true;
            assert_eq!(restarts_at(&facts), beside_a_daemon, "{facts:?}");
        }
    }
}
