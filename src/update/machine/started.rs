//! The agent started: there is one way of recovery, and it is walked at every start.

use super::moves::{
    MAX_ORDERS, arm_again, back_home, begin_trial, conclude, failure, fetch, no_restart, roll_back,
    roll_back_again, run_behind, settle_home, stuck, switch_again, watch,
};
use super::stops::{Departure, may_arm_again, no_stops_left, stays_up, was_not_tried};
use super::{Facts, Order};
use crate::update::slot::Slot;
use crate::update::state::{
    Content, Failure, FailureKind, Outcome, OutcomeKind, Run, Saved, State,
};

/// Agent starts in one run before it is ended, whatever the other counters say. Well above what
/// flaky power makes of an honest download, which has its own counter.
const MAX_STARTS: u16 = 500;

/// The agent started: the bootloader outranks what was saved.
pub(super) fn started(book: &mut Saved, mut state: State, facts: &Facts) -> (State, Vec<Order>) {
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
        S::Switching { run, ordered_in, attempt, .. } if facts.boot == ordered_in => {
            let (state, orders) = switch_again(book, run, attempt, no_restart(), facts);
            (state, [refresh(), orders].concat())
        }
        S::Switching { run, attempt, armed, left, .. }
            if attempt < MAX_ORDERS && was_not_tried(&run, Departure { armed, left }, facts) =>
        {
            let (state, orders) = arm_again(run, attempt, facts);
            (state, [refresh(), orders].concat())
        }
        S::Switching { run, armed, left, .. }
            if was_not_tried(&run, Departure { armed, left }, facts) =>
        {
            let orders = vec![Order::CancelTry(run.target()), Order::Confirm];
            let cause = format!(
                "the old slot came up {MAX_ORDERS} times, and as far as can be told slot {} was \
                 never tried: look at its power supply and at what restarts it",
                run.target()
            );
            let kind = OutcomeKind::Failed(failure(FailureKind::FellBack, cause));
            (conclude(book, run, kind, facts), orders)
        }
        S::Switching { run, .. } => back_home(
            book,
            run,
            failure(FailureKind::FellBack, "the bootloader came up in the old slot"),
            facts,
        ),

        // A machine that was switched off cleanly forgets the one-shot argument; one that was
        // restarted had it.
        S::Trial { run, stopped: true, .. }
            if facts.running == run.from
                && may_arm_again(&run)
                && was_not_tried(
                    &run,
                    Departure { armed: true, left: run.passage.left },
                    facts,
                ) =>
        {
            let orders_so_far = run.passage.armed_again.saturating_add(1);
            let (state, orders) = arm_again(run, orders_so_far, facts);
            (state, [refresh(), orders].concat())
        }
        S::Trial { run, .. } if facts.running == run.from => {
            let reason = failure(FailureKind::FellBack, why_trial_was_left(&run));
            back_home(book, run, reason, facts)
        }
        // It was found healthy, and the power went before the confirmation was saved.
        trial @ S::Trial { healthy: true, .. } => (trial, vec![Order::Confirm]),
        S::Trial { run, starts, stopped: false, .. } if starts >= facts.limits.trial_starts => {
            let reason = failure(
                FailureKind::TooManyStarts,
                "the agent was restarted too often in the trial",
            );
            roll_back(run, reason, 1, facts)
        }
        S::Trial { run, starts, boot, began_s, healthy, stopped, outage } => {
            let starts = if stopped { starts } else { starts.saturating_add(1) };
            let same_boot = boot == facts.boot;
            let (began_s, outage) =
                if same_boot { (began_s, outage) } else { (facts.since_boot_s, None) };
            let boot = facts.boot.clone();
            let stopped = stopped && same_boot;
            let trial = S::Trial { run, starts, boot, began_s, healthy, stopped, outage };
            let (trial, forget) = stays_up(trial);
            let (trial, orders) = watch(trial, facts);
            (trial, [forget, orders].concat())
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

fn why_trial_was_left(run: &Run) -> &'static str {
    if no_stops_left(run) {
        return "the new slot was restarted once more before it was confirmed, after as many clean \
                restarts as a trial may have, and the bootloader went back to the old slot";
    }
    "the new slot started but was restarted before it was confirmed, and the bootloader went back \
     to the old slot"
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
            let reason = why_given_up(book).unwrap_or_else(|| {
                let why = "the bootloader started a slot that was given up";
                failure(FailureKind::FellBack, why)
            });
            leave_or_stay(book, run, reason, facts)
        }
        // It never passed the checks, or the bootloader itself takes it for a trial.
        Content::Written { .. } => begin_trial(run, facts),
        Content::Unknown | Content::Good { .. } if aims_home => begin_trial(run, facts),
        Content::Unknown | Content::Good { .. } => {
            let detail = format!(
                "slot {home} had been confirmed, but the bootloader left it: look at its boot attempts"
            );
            let kind = OutcomeKind::RolledBack(failure(FailureKind::LeftConfirmedSlot, detail));
            book.last = Some(Outcome::new(None, kind, facts.now));
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

/// Why the image in the running slot had been given up: that stays the reason if its outcome was
/// saved, but the power went before the bootloader was told.
fn why_given_up(book: &Saved) -> Option<Failure> {
    match book.last.as_ref().map(|last| &last.kind) {
        Some(OutcomeKind::RolledBack(cause)) => Some(cause.clone()),
        _ => None,
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
