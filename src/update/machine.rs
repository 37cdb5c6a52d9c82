//! Every transition, in one table. No I/O, no clock, no logging: facts in, orders out.
//!
//! The loop around it is in `agent`: step, save, act. Orders come after the save and may each be
//! carried out twice; `Started` is the event after every start of the agent, so there is one way
//! of recovery and it is walked every day.

use super::job::{Digest, Job, RunId, Version};
use super::slot::{BootId, Slot};
use super::state::{
    Checkpoint, Content, Failure, FailureKind, Origin, Outcome, OutcomeKind, Run, Saved, Source,
    State, Success, Times, Written,
};
use super::time::WallTime;

/// Orders for one restart or one switch before it counts as impossible.
const MAX_ORDERS: u8 = 3;

/// Agent starts in one run before it is ended, whatever the other counters say. Well above what
/// flaky power makes of an honest download, which has its own counter.
const MAX_STARTS: u16 = 500;

const ASKED_TO_GO_BACK: &str = "an operator asked to go back";

/// What the device looks like.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Slot that runs now. Fixed for a boot.
    pub running: Slot,
    /// What would boot next, as it was when the agent started; `None` if that is not known.
    pub next: Option<Slot>,
    /// This boot.
    pub boot: BootId,
    /// Version of the running image, read from it.
    pub running_version: Option<Version>,
    /// Seconds since the boot, at the event.
    pub since_boot_s: u64,
    /// Wall time at the event, if the clock is set.
    pub now: Option<WallTime>,
    /// The settings that bound it all.
    pub limits: Limits,
}

/// The settings that bound an update.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Agent starts without progress in a download or a verification.
    pub attempts: u8,
    /// Agent starts in one trial.
    pub trial_starts: u8,
    /// Seconds a trial may take.
    pub trial_s: u64,
}

/// What the desired properties ask for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Digest of the section, to know it again.
    pub fingerprint: Digest,
    /// The update, or why it cannot be one.
    pub job: Result<Job, Failure>,
}

/// Something happened.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one exists at a time")]
pub enum Event {
    /// The agent started.
    Started,
    /// A direct method or the device command asks for an update.
    Requested {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// The update.
        job: Job,
        /// Who asks.
        origin: Origin,
    },
    /// The desired properties are these, new or not.
    Desired {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// What they ask for; `None` if they ask for nothing.
        wanted: Option<Wanted>,
        /// Whether somebody wrote the section just now: that asks again even for what failed.
        rewritten: bool,
    },
    /// An operator takes the update back.
    CancelRequested,
    /// An operator declares the running slot good.
    ConfirmRequested,
    /// An operator wants the other slot.
    RollBackRequested {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// Who wants it.
        origin: Origin,
    },
    /// An operator wants a restart.
    RestartRequested,
    /// The first bytes of the image came.
    FetchBegan,
    /// Part of the image is proven to be on the medium.
    Checkpointed(Checkpoint),
    /// [`Order::Fetch`] or [`Order::Retire`] before it ended.
    Fetched(Result<Written, Failure>),
    /// [`Order::Verify`] ended.
    Verified(Result<(), Failure>),
    /// [`Order::TryNext`] ended.
    Switched(Result<(), Failure>),
    /// [`Order::Restart`] did not end the agent in time.
    RestartFailed(Failure),
    /// The running slot passed its checks.
    Healthy,
    /// It did not pass them in time; the text says which.
    TrialExpired(String),
    /// [`Order::Confirm`] is done.
    Confirmed,
    /// [`Order::Confirm`] failed; it is tried again.
    ConfirmFailed(Failure),
}

/// Something to do once the state is saved. Each may be carried out twice without harm.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a handful exist at a time")]
pub enum Order {
    /// Tell who asked.
    Answer(Verdict),
    /// Make sure that the slot does not boot. If that fails, what follows is not done.
    Retire(Slot),
    /// Stream the image into the slot, behind the checkpoint if there is one.
    Fetch(Job, Slot, Option<Checkpoint>),
    /// Read the slot back.
    Verify(Written, Slot),
    /// End [`Order::Fetch`] or [`Order::Verify`].
    StopWork,
    /// Boot the slot once.
    TryNext(Slot),
    /// Forget that the slot was to be tried.
    CancelTry(Slot),
    /// Mark the running slot good and make it the default.
    Confirm,
    /// Check the running slot until it is healthy; at the latest when the machine runs for this
    /// many seconds, if a number is given.
    Watch(Option<u64>),
    /// Restart the machine, with the bootloader's one-shot argument if it needs one to try a slot.
    RestartToTry,
    /// Restart the machine into what boots by default.
    Restart,
}

/// The answer to who asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// A run was started.
    Accepted(RunId),
    /// Just that update is under way; nothing was started.
    AlreadyRunning(RunId),
    /// Another update is under way.
    Busy(RunId),
    /// The running slot is not confirmed, so the other one may be the only good one.
    Unconfirmed,
    /// The update was taken back.
    Cancelled(RunId),
    /// There is nothing to take back, confirm or go back from.
    Nothing,
    /// The new slot is about to be tried, or is being tried.
    TooLate(RunId),
    /// The running slot is being confirmed.
    Confirming,
    /// The machine goes back to the other slot.
    RollingBack,
    /// The other slot holds no image known to be whole.
    NoWayBack,
    /// The machine restarts.
    Restarting,
}

/// What is known after `event`, and what to do once that is saved.
///
/// An event that means nothing in a state changes nothing: a late or doubled event must never
/// take the agent down.
#[must_use]
pub fn step(mut saved: Saved, event: Event, facts: &Facts) -> (Saved, Vec<Order>) {
    let state = std::mem::replace(&mut saved.state, State::Idle);
    let (state, orders) = match event {
        Event::Started => started(&mut saved, state, facts),
        Event::Desired { id, wanted, rewritten } => {
            desired(&mut saved, state, id, wanted, rewritten, facts)
        }
        event @ (Event::Requested { .. }
        | Event::CancelRequested
        | Event::ConfirmRequested
        | Event::RollBackRequested { .. }
        | Event::RestartRequested) => asked(&mut saved, state, event, facts),
        event => happened(&mut saved, state, event, facts),
    };
    saved.state = state;
    (saved, orders)
}

/// The agent started: the bootloader outranks what was saved.
fn started(book: &mut Saved, mut state: State, facts: &Facts) -> (State, Vec<Order>) {
    use State as S;

    let starts = state.run_mut().map_or(0, |run| {
        run.starts = run.starts.saturating_add(1);
        run.starts
    });
    // The old slot may have a counter of failed boots, which must not run out meanwhile.
    let at_home = book.home == Some(facts.running);
    let refresh = || if at_home { vec![Order::Confirm] } else { vec![] };

    match state {
        S::Idle => idle_start(book, facts),

        S::Fetching { run, .. } | S::Verifying { run, .. } if facts.running != run.from => {
            let why = "the bootloader started the slot that was being written";
            leave_or_stay(book, run, failure(FailureKind::FellBack, why), facts)
        }
        S::Fetching { run, .. } | S::Verifying { run, .. } if starts > MAX_STARTS => {
            let cause = failure(FailureKind::TooManyStarts, "the agent started too often in it");
            (conclude(book, run, OutcomeKind::Failed(cause), facts), refresh())
        }
        S::Fetching { run, attempt, .. } | S::Verifying { run, attempt, .. }
            if attempt >= facts.limits.attempts =>
        {
            let cause = failure(
                FailureKind::TooManyStarts,
                "the agent was restarted too often without progress in it",
            );
            (conclude(book, run, OutcomeKind::Failed(cause), facts), refresh())
        }
        S::Fetching { run, checkpoint, attempt, began } => {
            let mut orders = refresh();
            orders.extend(fetch(&run, checkpoint.clone()));
            (S::Fetching { run, checkpoint, attempt: attempt.saturating_add(1), began }, orders)
        }
        S::Verifying { run, written, attempt } => {
            let mut orders = refresh();
            orders.push(Order::Verify(written.clone(), run.target()));
            (S::Verifying { run, written, attempt: attempt.saturating_add(1) }, orders)
        }

        S::Switching { run, .. } if facts.running != run.from => begin_trial(run, facts),
        // Without `armed` the restart was not ordered: the power went before the slot was tried.
        S::Switching { run, ordered_in, attempt, armed }
            if facts.boot == ordered_in || !armed && attempt < MAX_ORDERS =>
        {
            let (state, orders) = switch_again(book, run, attempt, no_restart(), facts);
            (state, [refresh(), orders].concat())
        }
        S::Switching { run, .. } => back_home(
            book,
            run,
            failure(FailureKind::FellBack, "the bootloader came up in the old slot"),
            facts,
        ),

        S::Trial { run, .. } if facts.running == run.from => back_home(
            book,
            run,
            failure(
                FailureKind::FellBack,
                "the new slot started but was restarted before it was confirmed, and the \
                 bootloader went back to the old slot",
            ),
            facts,
        ),
        // It was found healthy, and the power went before the confirmation was saved.
        trial @ S::Trial { healthy: true, .. } => (trial, vec![Order::Confirm]),
        S::Trial { run, starts, .. } if starts >= facts.limits.trial_starts => {
            let reason = failure(
                FailureKind::TooManyStarts,
                "the agent was restarted too often in the trial",
            );
            roll_back(run, reason, 1, facts)
        }
        S::Trial { run, starts, boot, began_s, healthy } => {
            let began_s = if boot == facts.boot { began_s } else { facts.since_boot_s };
            let starts = starts.saturating_add(1);
            watch(S::Trial { run, starts, boot: facts.boot.clone(), began_s, healthy }, facts)
        }

        S::RollingBack { run, reason, .. } if facts.running == run.from => {
            back_home(book, run, reason, facts)
        }
        S::RollingBack { run, reason, ordered_in, attempt } if facts.boot == ordered_in => {
            roll_back_again(book, run, reason, attempt, &no_restart(), facts)
        }
        // The bootloader did not obey. Another restart would only make a loop of it.
        S::RollingBack { run, reason, .. } => stuck(book, run, &reason, facts),
    }
}

/// No update is under way. Which slot is home?
fn idle_start(book: &mut Saved, facts: &Facts) -> (State, Vec<Order>) {
    let running = facts.running;
    match book.home {
        Some(home) if home == running => {
            came_home_late(book);
            (State::Idle, vec![Order::Confirm])
        }
        Some(home) => away_from_home(book, home, facts),
        // Perhaps a trial whose state file was lost: good only if it passes the checks. There is
        // no deadline, because the other slot may as well never have held a system.
        None if facts.next == Some(running.other()) => (State::Idle, vec![Order::Watch(None)]),
        None => {
            settle_home(book, facts);
            (State::Idle, vec![Order::Confirm])
        }
    }
}

/// A slot runs that is not the good one, and no state tells how that came.
fn away_from_home(book: &mut Saved, home: Slot, facts: &Facts) -> (State, Vec<Order>) {
    let run = run_behind(book, home, facts);
    let aims_home = facts.next == Some(home);
    match book.slots.of(facts.running) {
        // Leaving was tried: a machine that comes back here may have no other slot.
        Content::Bad { .. } | Content::Incomplete if is_stuck(book) => (State::Idle, vec![]),
        Content::Bad { .. } | Content::Incomplete => {
            let why = "the bootloader started a slot that was given up";
            leave_or_stay(book, run, failure(FailureKind::FellBack, why), facts)
        }
        // It never passed the checks, or the bootloader itself takes it for a trial.
        Content::Written { .. } => begin_trial(run, facts),
        Content::Unknown | Content::Good { .. } if aims_home => begin_trial(run, facts),
        Content::Unknown | Content::Good { .. } => {
            let detail = format!(
                "slot {home} had been confirmed, but the bootloader left it: look at its boot attempts"
            );
            let kind = OutcomeKind::RolledBack(failure(FailureKind::LeftConfirmedSlot, detail));
            book.last = Some(Outcome { run: None, kind, at: facts.now });
            settle_home(book, facts);
            (State::Idle, vec![Order::Confirm])
        }
    }
}

/// The running slot is known to be no good. Where the bootloader would take the good one next, a
/// restart leads there.
fn leave_or_stay(
    book: &mut Saved,
    run: Run,
    reason: Failure,
    facts: &Facts,
) -> (State, Vec<Order>) {
    if facts.next == Some(run.from) {
        roll_back(run, reason, 1, facts)
    } else {
        stuck(book, run, &reason, facts)
    }
}

/// The run that led into the running slot: the last one if it was aimed here, else one that
/// stands for what nobody remembers.
fn run_behind(book: &Saved, home: Slot, facts: &Facts) -> Run {
    let last = book.last.as_ref().and_then(|outcome| outcome.run.as_ref());
    match last.filter(|run| run.from == home) {
        Some(run) => Run { starts: 1, ..run.clone() },
        None => Run {
            id: RunId(format!("boot-{}", facts.boot.0)),
            source: Source::OtherSlot { version: book.slots.of(facts.running).identity().0 },
            origin: Origin::Local,
            from: home,
            times: Times::default(),
            starts: 1,
        },
    }
}

fn is_stuck(book: &Saved) -> bool {
    book.last.as_ref().is_some_and(
        |last| matches!(&last.kind, OutcomeKind::Failed(cause) if cause.kind == FailureKind::Stuck),
    )
}

/// The bootloader came back to the good slot after all.
fn came_home_late(book: &mut Saved) {
    if is_stuck(book)
        && let Some(Outcome { kind, .. }) = &mut book.last
        && let OutcomeKind::Failed(cause) = kind
    {
        *kind = OutcomeKind::RolledBack(cause.clone());
    }
}

/// Somebody asks for something.
fn asked(book: &mut Saved, state: State, event: Event, facts: &Facts) -> (State, Vec<Order>) {
    use Event as E;
    use State as S;

    let at_home = book.home == Some(facts.running);
    match (state, event) {
        (S::Idle, E::Requested { .. }) if !at_home => answer(S::Idle, Verdict::Unconfirmed),
        (S::Idle, E::Requested { id, job, origin }) => {
            let verdict = Order::Answer(Verdict::Accepted(id.clone()));
            let (state, orders) = start(book, id, job, origin, facts);
            (state, [vec![verdict], orders].concat())
        }
        (busy, E::Requested { job, .. }) => {
            let verdict = busy.run().map_or(Verdict::Nothing, |run| {
                if run.source == Source::Image(job) {
                    Verdict::AlreadyRunning(run.id.clone())
                } else {
                    Verdict::Busy(run.id.clone())
                }
            });
            answer(busy, verdict)
        }

        (S::Fetching { run, .. } | S::Verifying { run, .. }, E::CancelRequested) => {
            let orders = vec![Order::StopWork, Order::Answer(Verdict::Cancelled(run.id.clone()))];
            let cause = failure(FailureKind::Cancelled, "an operator took the update back");
            (conclude(book, run, OutcomeKind::Failed(cause), facts), orders)
        }
        (state, E::CancelRequested) => {
            let verdict = late(&state, Verdict::TooLate);
            answer(state, verdict)
        }

        (S::Idle, E::ConfirmRequested) if !at_home => {
            let state = match book.home {
                // The run that was given up succeeds after all.
                Some(home) => {
                    let (boot, began_s) = (facts.boot.clone(), facts.since_boot_s);
                    let run = run_behind(book, home, facts);
                    S::Trial { run, starts: 1, boot, began_s, healthy: true }
                }
                None => S::Idle,
            };
            (state, vec![Order::Answer(Verdict::Confirming), Order::Confirm])
        }
        (S::Trial { run, starts, boot, began_s, .. }, E::ConfirmRequested) => (
            S::Trial { run, starts, boot, began_s, healthy: true },
            vec![Order::Answer(Verdict::Confirming), Order::Confirm],
        ),
        (state, E::ConfirmRequested) => answer(state, Verdict::Nothing),

        (S::Idle, E::RollBackRequested { id, origin }) if at_home => {
            go_back(book, id, origin, facts)
        }
        (S::Idle, E::RollBackRequested { .. }) => match book.home {
            Some(home) => {
                let run = run_behind(book, home, facts);
                let reason = failure(FailureKind::RolledBackByOperator, ASKED_TO_GO_BACK);
                let (state, orders) = roll_back(run, reason, 1, facts);
                (state, [vec![Order::Answer(Verdict::RollingBack)], orders].concat())
            }
            None => answer(S::Idle, Verdict::Unconfirmed),
        },
        // Also while it is being confirmed: the bootloader may refuse that for good.
        (S::Trial { run, .. }, E::RollBackRequested { .. }) => {
            let reason = failure(FailureKind::RolledBackByOperator, ASKED_TO_GO_BACK);
            let (state, orders) = roll_back(run, reason, 1, facts);
            (state, [vec![Order::Answer(Verdict::RollingBack)], orders].concat())
        }
        (back @ S::RollingBack { .. }, E::RollBackRequested { .. }) => {
            answer(back, Verdict::RollingBack)
        }
        (busy, E::RollBackRequested { .. }) => {
            let verdict = late(&busy, Verdict::Busy);
            answer(busy, verdict)
        }

        (state @ (S::Idle | S::Fetching { .. } | S::Verifying { .. }), E::RestartRequested) => {
            book.last_reboot = facts.now;
            (state, vec![Order::Answer(Verdict::Restarting), Order::Restart])
        }
        (busy, E::RestartRequested) => {
            let verdict = late(&busy, Verdict::TooLate);
            answer(busy, verdict)
        }
        (unmoved, _) => (unmoved, vec![]),
    }
}

/// Something that was ordered came to its end.
fn happened(book: &mut Saved, state: State, event: Event, facts: &Facts) -> (State, Vec<Order>) {
    use Event as E;
    use State as S;

    match (state, event) {
        (S::Fetching { mut run, checkpoint, attempt, began: false }, E::FetchBegan) => {
            run.times.downloading = run.times.downloading.or(facts.now);
            (S::Fetching { run, checkpoint, attempt, began: true }, vec![])
        }
        (S::Fetching { run, began, .. }, E::Checkpointed(checkpoint)) => {
            (S::Fetching { run, checkpoint: Some(checkpoint), attempt: 1, began }, vec![])
        }
        (S::Fetching { mut run, .. }, E::Fetched(Ok(written))) => {
            run.times.downloaded = facts.now;
            let verify = Order::Verify(written.clone(), run.target());
            (S::Verifying { run, written, attempt: 1 }, vec![verify])
        }
        (S::Fetching { run, .. }, E::Fetched(Err(cause)))
        | (S::Verifying { run, .. }, E::Verified(Err(cause))) => {
            (conclude(book, run, OutcomeKind::Failed(cause), facts), vec![])
        }
        (S::Verifying { mut run, written, .. }, E::Verified(Ok(()))) => {
            run.times.applying = facts.now;
            let (version, digest) = (run.version().cloned(), Some(written.image_digest));
            *book.slots.of_mut(run.target()) = Content::Written { version, digest };
            switch(run, 1, facts)
        }

        (S::Switching { run, ordered_in, attempt, armed: false }, E::Switched(Ok(()))) => {
            (S::Switching { run, ordered_in, attempt, armed: true }, vec![Order::RestartToTry])
        }
        (S::Switching { run, .. }, E::Switched(Err(cause))) => {
            let orders = vec![Order::CancelTry(run.target())];
            (conclude(book, run, OutcomeKind::Failed(cause), facts), orders)
        }
        (S::Switching { run, attempt, .. }, E::RestartFailed(cause)) => {
            switch_again(book, run, attempt, cause, facts)
        }
        // An operator's restart had ended the work.
        (S::Fetching { run, checkpoint, attempt, began }, E::RestartFailed(_)) => {
            let orders = fetch(&run, checkpoint.clone());
            (S::Fetching { run, checkpoint, attempt, began }, orders)
        }
        (S::Verifying { run, written, attempt }, E::RestartFailed(_)) => {
            let orders = vec![Order::Verify(written.clone(), run.target())];
            (S::Verifying { run, written, attempt }, orders)
        }
        (S::RollingBack { run, reason, attempt, .. }, E::RestartFailed(cause)) => {
            roll_back_again(book, run, reason, attempt, &cause, facts)
        }

        // Saved before it is carried out, so that a cut in between does not ask for a new trial.
        (S::Trial { run, starts, boot, began_s, healthy: false }, E::Healthy) => {
            (S::Trial { run, starts, boot, began_s, healthy: true }, vec![Order::Confirm])
        }
        (S::Trial { run, healthy: true, .. }, E::Confirmed) => succeed(book, run, facts),
        // A slot that cannot be made the default is left at the next restart, whenever that comes.
        (S::Trial { run, healthy: true, began_s, .. }, E::ConfirmFailed(cause))
            if facts.since_boot_s >= began_s.saturating_add(facts.limits.trial_s) =>
        {
            roll_back(run, cause, 1, facts)
        }
        (S::Trial { run, healthy: false, .. }, E::TrialExpired(why)) => {
            roll_back(run, failure(FailureKind::Unhealthy, why), 1, facts)
        }
        // Only where it is not known which slot is good is a slot watched without a run.
        (S::Idle, E::Healthy) if book.home.is_none() => (S::Idle, vec![Order::Confirm]),
        (S::Idle, E::Confirmed) if book.home.is_none_or(|home| home == facts.running) => {
            settle_home(book, facts);
            (S::Idle, vec![])
        }
        (unmoved, _) => (unmoved, vec![]),
    }
}

/// The desired properties were read, or changed.
fn desired(
    book: &mut Saved,
    state: State,
    id: RunId,
    wanted: Option<Wanted>,
    rewritten: bool,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let pursued = match &state {
        State::Fetching { run, .. } | State::Verifying { run, .. } => match run.origin {
            Origin::Desired(fingerprint) => Some((fingerprint, run.clone())),
            Origin::Method | Origin::Local => None,
        },
        _ => None,
    };
    match (state, pursued) {
        (busy, Some((fingerprint, _)))
            if wanted.as_ref().is_some_and(|wanted| wanted.fingerprint == fingerprint) =>
        {
            (busy, vec![])
        }
        (_, Some((_, run))) => {
            let cause = failure(
                FailureKind::Withdrawn,
                "the desired properties no longer ask for this update",
            );
            conclude(book, run, OutcomeKind::Failed(cause), facts);
            book.settled = None;
            let (state, orders) = pursue(book, id, wanted, facts);
            (state, [vec![Order::StopWork], orders].concat())
        }
        (State::Idle, None) => {
            if rewritten || wanted.is_none() {
                book.settled = None;
            }
            pursue(book, id, wanted, facts)
        }
        (busy, None) => {
            if rewritten {
                // It comes again when nothing is under way any more.
                book.settled = None;
            }
            (busy, vec![])
        }
    }
}

/// Nothing is under way: starts what the desired properties ask for, unless that is settled.
fn pursue(
    book: &mut Saved,
    id: RunId,
    wanted: Option<Wanted>,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let Some(Wanted { fingerprint, job }) = wanted else { return (State::Idle, vec![]) };
    if book.settled == Some(fingerprint) {
        return (State::Idle, vec![]);
    }
    let mut close = |kind| {
        book.last = Some(Outcome { run: None, kind, at: facts.now });
        book.settled = Some(fingerprint);
        (State::Idle, vec![])
    };
    match job {
        Err(cause) => close(OutcomeKind::Failed(cause)),
        // The other slot may be the only good one. The same document comes again later.
        Ok(_) if book.home != Some(facts.running) => (State::Idle, vec![]),
        Ok(job) if job.version.is_some() && job.version == facts.running_version => {
            close(OutcomeKind::UpToDate)
        }
        Ok(job) => start(book, id, job, Origin::Desired(fingerprint), facts),
    }
}

fn start(
    book: &mut Saved,
    id: RunId,
    job: Job,
    origin: Origin,
    facts: &Facts,
) -> (State, Vec<Order>) {
    let times = Times { requested: facts.now, ..Times::default() };
    let run = Run { id, source: Source::Image(job), origin, from: facts.running, times, starts: 1 };
    *book.slots.of_mut(run.target()) = Content::Incomplete;
    let orders = fetch(&run, None);
    (State::Fetching { run, checkpoint: None, attempt: 1, began: false }, orders)
}

fn fetch(run: &Run, checkpoint: Option<Checkpoint>) -> Vec<Order> {
    match &run.source {
        Source::Image(job) => {
            vec![Order::Retire(run.target()), Order::Fetch(job.clone(), run.target(), checkpoint)]
        }
        Source::OtherSlot { .. } => vec![],
    }
}

/// An operator wants what the other slot holds: it is tried like a new image.
fn go_back(book: &mut Saved, id: RunId, origin: Origin, facts: &Facts) -> (State, Vec<Order>) {
    let other = facts.running.other();
    let (Content::Good { version, .. } | Content::Written { version, .. }) = book.slots.of(other)
    else {
        return answer(State::Idle, Verdict::NoWayBack);
    };
    let times = Times { requested: facts.now, applying: facts.now, ..Times::default() };
    let source = Source::OtherSlot { version: version.clone() };
    let run = Run { id, source, origin, from: facts.running, times, starts: 1 };
    let (state, orders) = switch(run, 1, facts);
    (state, [vec![Order::Answer(Verdict::RollingBack)], orders].concat())
}

fn switch(run: Run, attempt: u8, facts: &Facts) -> (State, Vec<Order>) {
    let orders = vec![Order::TryNext(run.target())];
    (State::Switching { run, ordered_in: facts.boot.clone(), attempt, armed: false }, orders)
}

/// The machine did not restart when ordered for the `attempt`th time.
fn switch_again(
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

fn begin_trial(mut run: Run, facts: &Facts) -> (State, Vec<Order>) {
    run.times.rebooted = facts.now;
    let (boot, began_s) = (facts.boot.clone(), facts.since_boot_s);
    watch(State::Trial { run, starts: 1, boot, began_s, healthy: false }, facts)
}

fn watch(trial: State, facts: &Facts) -> (State, Vec<Order>) {
    let deadline = match &trial {
        State::Trial { began_s, .. } => Some(began_s.saturating_add(facts.limits.trial_s)),
        _ => None,
    };
    (trial, vec![Order::Watch(deadline)])
}

fn roll_back(run: Run, reason: Failure, attempt: u8, facts: &Facts) -> (State, Vec<Order>) {
    let orders = vec![Order::CancelTry(run.target()), Order::Restart];
    (State::RollingBack { run, reason, ordered_in: facts.boot.clone(), attempt }, orders)
}

/// The machine did not restart when ordered for the `attempt`th time.
fn roll_back_again(
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
fn stuck(book: &mut Saved, run: Run, reason: &Failure, facts: &Facts) -> (State, Vec<Order>) {
    let detail = format!("{reason}; and the machine did not come back to slot {}", run.from);
    condemn(book, &run);
    let kind = OutcomeKind::Failed(failure(FailureKind::Stuck, detail));
    (conclude(book, run, kind, facts), vec![])
}

/// The old slot runs again.
fn back_home(
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
fn condemn(book: &mut Saved, run: &Run) {
    let (version, digest) = book.slots.of(run.target()).identity();
    *book.slots.of_mut(run.target()) = Content::Bad { version, digest };
}

fn succeed(book: &mut Saved, run: Run, facts: &Facts) -> (State, Vec<Order>) {
    settle_home(book, facts);
    let version = facts.running_version.clone().or_else(|| run.version().cloned());
    book.last_success = Some(Success { version, at: facts.now });
    (conclude(book, run, OutcomeKind::Succeeded, facts), vec![])
}

/// The running slot is known good and boots by default.
fn settle_home(book: &mut Saved, facts: &Facts) {
    book.home = Some(facts.running);
    let (version, digest) = book.slots.of(facts.running).identity();
    let version = facts.running_version.clone().or(version);
    *book.slots.of_mut(facts.running) = Content::Good { version, digest };
}

fn conclude(book: &mut Saved, run: Run, kind: OutcomeKind, facts: &Facts) -> State {
    if let Origin::Desired(fingerprint) = run.origin {
        book.settled = Some(fingerprint);
    }
    book.last = Some(Outcome { run: Some(run), kind, at: facts.now });
    State::Idle
}

fn failure(kind: FailureKind, detail: impl Into<String>) -> Failure {
    Failure::new(kind, detail)
}

fn no_restart() -> Failure {
    failure(FailureKind::RestartFailed, "the machine did not restart when ordered")
}

fn answer(state: State, verdict: Verdict) -> (State, Vec<Order>) {
    (state, vec![Order::Answer(verdict)])
}

fn late(state: &State, verdict: fn(RunId) -> Verdict) -> Verdict {
    state.run().map_or(Verdict::Nothing, |run| verdict(run.id.clone()))
}
