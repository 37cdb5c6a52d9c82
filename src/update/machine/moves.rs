//! The moves that several events lead to: the next state, and what it takes to get there.

use super::{Facts, Order};
use crate::update::job::{Job, RunId};
use crate::update::slot::Slot;
use crate::update::state::{
    Checkpoint, Content, Failure, FailureKind, Origin, Outcome, OutcomeKind, Passage, Run, Saved,
    Source, State, Success, Times,
};
use crate::update::trial::TrialTime;

/// Orders for one restart or one switch before it counts as impossible.
pub const MAX_ORDERS: u8 = 3;

/// The run that led into the running slot: the last one if it was aimed here, else one that
/// stands for what nobody remembers.
pub(super) fn run_behind(book: &Saved, home: Slot, facts: &Facts) -> Run {
    let last = book.last.as_ref().and_then(|outcome| outcome.run.as_ref());
    match last.filter(|run| run.from == home) {
        Some(run) => Run { starts: 1, passage: Passage::default(), ..run.clone() },
        None => Run {
            id: RunId(format!("boot-{}", facts.boot.0)),
            source: Source::OtherSlot { version: book.slots.of(facts.running).identity().0 },
            origin: Origin::Local,
            from: home,
            times: Times::default(),
            starts: 1,
            passage: Passage::default(),
        },
    }
}

pub(super) fn start(
    book: &mut Saved,
    id: RunId,
    job: Job,
    origin: Origin,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let times = Times { requested: facts.now, ..Times::default() };
    let (source, from, passage) = (Source::Image(job), facts.running, Passage::default());
    let run = Run { id, source, origin, from, times, starts: 1, passage };
    *book.slots.of_mut(run.target()) = Content::Incomplete;
    let orders = fetch(&run, None);
    (State::Fetching { run, checkpoint: None, attempt: 1, began: false }, orders)
}

pub(super) fn fetch(run: &Run, checkpoint: Option<Checkpoint>) -> Vec<Order> {
    match &run.source {
        Source::Image(job) => {
            vec![Order::Retire(run.target()), Order::Fetch(job.clone(), run.target(), checkpoint)]
        }
        Source::OtherSlot { .. } => vec![],
    }
}

pub(super) fn switch(run: Run, attempt: u8, facts: &Facts) -> (State, Vec<Order>) {
    let orders = vec![Order::TryNext(run.target())];
    let ordered_in = facts.boot.clone();
    (State::Switching { run, ordered_in, attempt, armed: false, left: false }, orders)
}

/// The machine was started again without trying the slot: it is ordered once more.
pub(super) fn arm_again(mut run: Run, attempt: u8, facts: &Facts) -> (State, Vec<Order>) {
    run.passage.armed_again = run.passage.armed_again.saturating_add(1);
    switch(run, attempt.saturating_add(1), facts)
}

/// The machine did not restart when ordered for the `attempt`th time.
pub(super) fn switch_again(
    book: &mut Saved,
    run: Run,
    attempt: u8,
    cause: Failure,
    facts: &Facts,
) -> (State, Vec<Order>) {
    if attempt < MAX_ORDERS {
        return switch(run, attempt.saturating_add(1), facts);
    }
    let orders = vec![Order::CancelTry(run.target())];
    (conclude(book, run, OutcomeKind::Failed(cause), facts), orders)
}

pub(super) fn begin_trial(mut run: Run, facts: &Facts) -> (State, Vec<Order>) {
    run.times.rebooted = facts.now;
    let (boot, began_s) = (facts.boot.clone(), facts.since_boot_s);
    let (healthy, stopped, outage) = (false, false, None);
    watch(State::Trial { run, starts: 1, boot, began_s, healthy, stopped, outage }, facts)
}

pub(super) fn watch(trial: State, facts: &Facts) -> (State, Vec<Order>) {
    let time = TrialTime::of(&trial, &facts.limits);
    (trial, vec![Order::Watch(time)])
}

pub(super) fn roll_back(
    run: Run,
    reason: Failure,
    attempt: u8,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let orders = vec![Order::CancelTry(run.target()), Order::Restart];
    (State::RollingBack { run, reason, ordered_in: facts.boot.clone(), attempt }, orders)
}

/// The machine did not restart when ordered for the `attempt`th time.
pub(super) fn roll_back_again(
    book: &mut Saved,
    run: Run,
    reason: Failure,
    attempt: u8,
    cause: &Failure,
    facts: &Facts,
) -> (State, Vec<Order>) {
    if attempt < MAX_ORDERS {
        return roll_back(run, reason, attempt.saturating_add(1), facts);
    }
    let reason = failure(reason.kind, format!("{reason}; {cause}"));
    stuck(book, run, &reason, facts)
}

/// The new slot was lost and goes on running: nothing more can be done from here.
pub(super) fn stuck(
    book: &mut Saved,
    run: Run,
    reason: &Failure,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let detail = format!("{reason}; and the machine did not come back to slot {}", run.from);
    condemn(book, &run);
    let kind = OutcomeKind::Failed(failure(FailureKind::Stuck, detail));
    (conclude(book, run, kind, facts), vec![])
}

/// The old slot runs again.
pub(super) fn back_home(
    book: &mut Saved,
    mut run: Run,
    reason: Failure,
    facts: &Facts,
) -> (State, Vec<Order>) {
    run.times.rebooted = run.times.rebooted.or(facts.now);
    condemn(book, &run);
    let orders = vec![Order::CancelTry(run.target()), Order::Confirm];
    (conclude(book, run, OutcomeKind::RolledBack(reason), facts), orders)
}

/// What was tried is not to be tried again by itself.
pub(super) fn condemn(book: &mut Saved, run: &Run) {
    let (version, digest) = book.slots.of(run.target()).identity();
    *book.slots.of_mut(run.target()) = Content::Bad { version, digest };
}

pub(super) fn succeed(book: &mut Saved, run: Run, facts: &Facts) -> (State, Vec<Order>) {
    settle_home(book, facts);
    let version = facts.running_version.clone().or_else(|| run.version().cloned());
    book.last_success = Some(Success { version, at: facts.now });
    (conclude(book, run, OutcomeKind::Succeeded, facts), vec![])
}

/// The running slot is known good and boots by default.
pub(super) fn settle_home(book: &mut Saved, facts: &Facts) {
    book.home = Some(facts.running);
    let (version, digest) = book.slots.of(facts.running).identity();
    let version = facts.running_version.clone().or(version);
    *book.slots.of_mut(facts.running) = Content::Good { version, digest };
}

pub(super) fn conclude(book: &mut Saved, run: Run, kind: OutcomeKind, facts: &Facts) -> State {
    if let Origin::Desired(fingerprint) = run.origin {
        book.settled = Some(fingerprint);
    }
    book.last = Some(Outcome::new(Some(run), kind, facts.now));
    State::Idle
}

pub(super) fn failure(kind: FailureKind, detail: impl Into<String>) -> Failure {
    Failure::new(kind, detail)
}

pub(super) fn no_restart() -> Failure {
    failure(FailureKind::RestartFailed, "the machine did not restart when ordered")
}
