//! The rig's machine: two slots, a boot script, a state file and a battery. It outlives the agents
//! and keeps the books on what they did.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use twinboot::agent::Stop;
use twinboot::request::Answer;
use twinboot::update::{Digest, FailureKind, OutcomeKind, Run, Saved, Slot, State};

use super::boot_script::{Variables, index};
use super::{Act, CABLE_OUT, CHUNKS, Cut, Fault, Scenario, When};

/// What must never happen, by how bad it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Wrong {
    /// Nothing that works boots, or a cut at the wrong moment would lead there.
    Brick,
    /// The twin or the state tells what is not so.
    Untruth,
    /// It does not come to rest, restarts without end, does what nobody asked for.
    Unrest,
}

/// Everything that outlives the agent, and what a test wants to know in the end.
#[derive(Debug)]
pub struct Machine {
    pub scenario: Scenario,
    pub slots: [Vec<u8>; 2],
    pub variables: Variables,
    /// Where a bootloader sticks that never goes back.
    pub stuck_in: Option<Slot>,
    /// The slot that runs.
    pub running: Slot,
    pub boot: u64,
    pub uptime: Duration,
    /// A clean shutdown that is under way.
    pub stopping: Option<Stop>,
    /// The argument that the restart would carry.
    pub argument: Option<&'static str>,
    /// The state file.
    pub saved: Option<Saved>,
    pub saved_before: Option<Saved>,
    pub desired: Option<u8>,
    pub acts: VecDeque<(When, Act)>,

    /// Operations left; none if the power is not going to fail any more.
    pub battery: Option<(usize, End)>,
    pub cuts: VecDeque<Cut>,
    pub life: u64,
    pub end: Option<End>,

    /// Operations done.
    pub operations: usize,
    pub restarts: usize,
    /// What was saved when each cut came.
    pub cut_in: Vec<Option<State>>,
    /// Names of all runs that were saved, and of those that have an outcome.
    pub runs: Vec<String>,
    pub ended: BTreeMap<String, Vec<OutcomeKind>>,
    /// Versions that passed a check, or that an operator vouched for.
    pub passed: Vec<u8>,
    /// Versions that ran while the bootloader was told to confirm the running slot.
    pub confirmed: Vec<u8>,
    /// The latest end of a trial that the session was told, to try the hub in time.
    pub trial_ends: Duration,
    /// Starts of a version that was not confirmed.
    pub tries: usize,
    /// What the operator was told.
    pub answers: Vec<(Act, Answer)>,
    pub wrongs: Vec<(Wrong, String)>,
    /// What happened, if somebody wants to read it.
    pub log: Option<Vec<String>>,
}

/// Why a life of the agent ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum End {
    PowerCut,
    Killed,
    Restart(Option<&'static str>),
    AtRest,
}

/// The power is gone, or the agent is.
pub struct Gone;

pub fn image(version: u8) -> Vec<u8> {
    vec![version; CHUNKS]
}

/// The version of a whole image.
pub fn version_in(content: &[u8]) -> Option<u8> {
    let version = *content.first()?;
    ((1..=9).contains(&version) && content == image(version)).then_some(version)
}

pub fn digest_of(content: &[u8]) -> Digest {
    let mut bytes = [0; 32];
    bytes[..content.len()].copy_from_slice(content);
    Digest::new(bytes)
}

impl Machine {
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            let (operations, boot, running) = (self.operations, self.boot, self.running);
            log.push(format!("{operations:>3} boot {boot} {running}: {}", what()));
        }
    }

    pub fn wrong(&mut self, kind: Wrong, what: impl Into<String>) {
        let what = what.into();
        self.note(|| format!("{kind:?}: {what}"));
        self.wrongs.push((kind, what));
    }

    /// One operation on a medium. `torn` is what it leaves if the power goes in the middle of it.
    pub fn spend(
        &mut self,
        life: u64,
        what: impl FnOnce() -> String,
        torn: impl FnOnce(&mut Self),
    ) -> Result<(), Gone> {
        if self.life != life || self.end.is_some() {
            return Err(Gone);
        }
        if let Some((left, end)) = &mut self.battery {
            if *left == 0 {
                let end = end.clone();
                self.battery = None;
                self.note(|| format!("{end:?} before: {}", what()));
                self.cut_in.push(self.saved.as_ref().map(|saved| saved.state.clone()));
                if end == End::PowerCut {
                    torn(self);
                }
                self.end = Some(end);
                return Err(Gone);
            }
            *left -= 1;
        }
        self.operations += 1;
        self.note(what);
        Ok(())
    }

    pub fn next_cut(&mut self) {
        self.battery = self.cuts.pop_front().map(|cut| match cut {
            Cut::Power(left) => (left, End::PowerCut),
            Cut::Kill(left) => (left, End::Killed),
        });
    }

    pub fn may_start(&self, slot: Slot) -> bool {
        self.variables.may_start(slot) || self.stuck_in == Some(slot)
    }

    /// The machine starts, if need be more than once.
    pub fn start(&mut self, mut argument: Option<&str>) {
        for _ in 0..20 {
            self.boot += 1;
            self.uptime = Duration::ZERO;
            let Some(tried) = self.variables.start(argument.take()) else {
                return self.wrong(Wrong::Brick, "nothing to boot");
            };
            let slot = self.stuck_in.unwrap_or(tried);
            let was_running = std::mem::replace(&mut self.running, slot);
            let fault = self.scenario.fault;
            if fault == Fault::NeverGoesBack && slot != was_running {
                self.stuck_in = Some(slot);
            }
            if fault == Fault::ConfirmsByItself {
                self.variables.confirm(slot);
            }
            self.note(|| "starts".to_owned());
            let Some(version) = version_in(&self.slots[index(slot)]) else {
                let content = self.slots[index(slot)].clone();
                return self.wrong(Wrong::Brick, format!("started the broken image {content:?}"));
            };
            self.tries += usize::from(version != 1 && !self.confirmed.contains(&version));
            if !(fault == Fault::DeadSlot && version == 2) {
                return;
            }
        }
        self.wrong(Wrong::Brick, "never started again");
    }

    /// Somebody has the machine go down cleanly.
    pub fn shut_down(&mut self, stop: Stop, argument: Option<&'static str>) {
        let keeps = self.scenario.fault != Fault::LosesArgument;
        (self.stopping, self.argument) = (Some(stop), argument.filter(|_| keeps));
    }

    /// Everything has ended in good order.
    pub fn is_down(&mut self) -> End {
        let argument = self.argument.take();
        End::Restart(argument.filter(|_| self.stopping.take() == Some(Stop::Restart)))
    }

    /// Whether the order of a restart, the one that was just counted, is taken.
    pub fn hears_restart(&self) -> bool {
        match self.scenario.fault {
            Fault::NoRestart => false,
            Fault::StateReadOnlyAndDeaf => self.restarts.is_multiple_of(2),
            _ => true,
        }
    }

    /// Whether a cable leads nowhere that led somewhere before the present system ran.
    pub fn cut_off(&self, uptime: Duration) -> bool {
        let new = self.running_version() == 2 && !self.confirmed.contains(&2);
        match self.scenario.fault {
            Fault::CablePulled => new && uptime < CABLE_OUT,
            Fault::CableCut | Fault::SickAndCableCut => new,
            _ => false,
        }
    }

    /// Whether the hub can be reached.
    pub fn reaches_hub(&self, uptime: Duration) -> bool {
        match self.scenario.fault {
            Fault::HubGone => false,
            Fault::NoDriver => self.running_version() != 2,
            _ => !self.cut_off(uptime),
        }
    }

    pub fn running_version(&self) -> u8 {
        version_in(&self.slots[index(self.running)]).unwrap_or(0)
    }

    pub fn healthy(&self) -> bool {
        match self.scenario.fault {
            Fault::SickSlot | Fault::NeverGoesBack | Fault::SickAndCableCut => {
                self.running_version() != 2
            }
            Fault::SickAfterConfirm => self.running_version() != 2 || !self.confirmed.contains(&2),
            _ => true,
        }
    }
}

/// The slot that runs if `run` ended like that.
fn slot_told(run: &Run, kind: &OutcomeKind) -> Slot {
    match kind {
        OutcomeKind::Succeeded => run.target(),
        OutcomeKind::Failed(cause) if cause.kind == FailureKind::Stuck => run.target(),
        OutcomeKind::UpToDate | OutcomeKind::Failed(_) | OutcomeKind::RolledBack(_) => run.from,
    }
}

// What must be true --------------------------------------------------------------------------------

impl Machine {
    /// Takes down what a save tells of runs, and whether that is so.
    pub fn keep_books(&mut self, saved: &Saved) {
        let run = saved.state.run().map(|run| run.id.0.clone());
        self.runs.extend(run.filter(|run| !self.runs.contains(run)));
        let Some(last) = &saved.last else { return };
        let Some(run) = &last.run else { return };
        let known = self.ended.entry(run.id.0.clone()).or_default();
        if known.last() == Some(&last.kind) {
            return;
        }
        known.push(last.kind.clone());
        let told = slot_told(run, &last.kind);
        if told != self.running {
            let what = format!("{:?} is saved while slot {} runs", last.kind, self.running);
            self.wrong(Wrong::Untruth, what);
        }
        if last.kind == OutcomeKind::Succeeded && !self.confirmed.contains(&self.running_version())
        {
            self.wrong(Wrong::Untruth, "a success is saved that the bootloader does not know");
        }
    }

    /// What is true of every device that came to rest, however it got there.
    pub fn judge(&mut self) {
        if !self.wrongs.is_empty() {
            return;
        }
        let fault = self.scenario.fault;
        let forgets = matches!(fault, Fault::StateLost | Fault::StateReverts);
        if !forgets {
            self.judge_runs();
        }
        let asked = self.scenario.acts.len();
        let cuts = self.scenario.cuts.len();
        let most_runs = asked + if forgets { cuts } else { 0 };
        if self.runs.len() > most_runs {
            let what = format!("{} runs, but {asked} acts", self.runs.len());
            self.wrong(Wrong::Unrest, what);
        }
        if self.restarts > 4 * (asked + cuts) {
            let what = format!("{} restarts", self.restarts);
            self.wrong(Wrong::Unrest, what);
        }
        // What was tried in vain is not tried again by itself, as far as anybody remembers it.
        let obeys = !matches!(fault, Fault::NeverGoesBack | Fault::BootVariablesReadOnly);
        let most_tries = asked + cuts;
        let obeys = obeys && !fault.keeps_new_slot_read_only();
        if obeys && !forgets && self.tries > most_tries {
            let what = format!("{} tries, but {asked} acts", self.tries);
            self.wrong(Wrong::Unrest, what);
        }
        match self.saved.clone() {
            Some(saved) => self.judge_rest(&saved),
            // Nothing was asked for since the file was lost.
            None if fault == Fault::StateLost => {}
            None => self.wrong(Wrong::Unrest, "nothing was saved"),
        }
    }

    /// Whatever was accepted has one outcome.
    fn judge_runs(&mut self) {
        let accepted = self.answers.iter().filter(|(_, answer)| answer.status == 200);
        let accepted =
            accepted.filter_map(|(_, answer)| Some(answer.body["id"].as_str()?.to_owned()));
        let runs: Vec<String> = self.runs.iter().cloned().chain(accepted).collect();
        if let Some(id) = runs.iter().find(|id| !self.ended.contains_key(*id)) {
            self.wrong(Wrong::Untruth, format!("run {id} has no outcome"));
        }
        let is_stuck = |kind: &OutcomeKind| matches!(kind, OutcomeKind::Failed(why) if why.kind == FailureKind::Stuck);
        let read_only = self.scenario.fault == Fault::BootVariablesReadOnly;
        let asked = |wanted| self.scenario.acts.iter().any(|(_, act)| *act == wanted);
        let (vouched, sent_back) = (asked(Act::Confirm), asked(Act::RollBack));
        let is_one = |kinds: &[OutcomeKind]| match kinds {
            [_] => true,
            // Nobody can tell the bootloader to forget a slot, so it comes up again and again. Each
            // outcome was true when it was saved.
            [_, ..] if read_only => true,
            // The bootloader went back at last, or was told to once more, and did not.
            [first, OutcomeKind::RolledBack(_)] => is_stuck(first),
            [first, second] if is_stuck(second) => is_stuck(first) && sent_back,
            // It was told that the machine does not restart; then the power went, and it did.
            [OutcomeKind::Failed(first), _] if first.kind == FailureKind::RestartFailed => true,
            [_, OutcomeKind::Succeeded] => vouched,
            _ => false,
        };
        if let Some(kinds) = self.ended.values().find(|kinds| !is_one(kinds)) {
            let what = format!("several outcomes of one run: {kinds:?}");
            self.wrong(Wrong::Untruth, what);
        }
    }

    fn judge_rest(&mut self, saved: &Saved) {
        if saved.state != State::Idle {
            self.wrong(Wrong::Unrest, format!("at rest in {:?}", saved.state));
        }
        let told =
            saved.last.as_ref().and_then(|last| Some(slot_told(last.run.as_ref()?, &last.kind)));
        let told = told.or(saved.home).unwrap_or(self.running);
        if self.running != told {
            let what = format!("tells of slot {told}, but {} runs: {saved:?}", self.running);
            self.wrong(Wrong::Untruth, what);
        }
    }
}
