//! The machine is shut down cleanly in the middle of a switch or a trial: that is nobody's failure.

use super::Facts;
use super::Order;
use super::moves::MAX_ORDERS;
use crate::update::slot::Slot;
use crate::update::state::{Passage, Run, State};

/// Restarts in the trials of one update that an operator asks for, and that do not count.
const MAX_OPERATOR_STOPS: u8 = 10;

/// The same by whosever order. It may be the image that restarts itself, which must not be tried
/// again and again.
const MAX_CLEAN_STOPS: u8 = 2;

/// The machine goes down cleanly; `restarts` tells whether through the bootloader and up again.
pub(super) fn machine_stops(state: State, restarts: bool, facts: &Facts) -> (State, Vec<Order>) {
    match state {
        // Whoever ordered the restart: it tries the slot, if it carries the argument.
        State::Switching { mut run, ordered_in, attempt, armed: true, .. } => {
            note_hub(&mut run, facts);
            let left = restarts;
            let orders = vec![Order::CarryArgument];
            (State::Switching { run, ordered_in, attempt, armed: true, left }, orders)
        }
        state => match stop_trial(&state, By::Anybody { restarts }) {
            Some((trial, target)) => (trial, vec![Order::TryNext(target), Order::CarryArgument]),
            None => (state, vec![]),
        },
    }
}

/// The old slot is about to be left. Whether it had the hub was measured when the image was read
/// back; it may have found it since, also after a start in which the slot is armed again. That it
/// has none in its first moments says nothing.
pub(super) fn note_hub(run: &mut Run, facts: &Facts) {
    if facts.hub_online {
        run.passage.hub_before = Some(true);
    }
}

/// Who restarts a machine in a trial.
#[derive(Clone, Copy)]
pub(super) enum By {
    /// An operator wants it. It is ordered now, and comes then.
    Operator,
    /// It comes, by whosever order; `restarts` as for [`machine_stops`].
    Anybody { restarts: bool },
}

/// The machine goes down cleanly in a trial: the slot is to be tried once more. `None` if that may
/// not be.
pub(super) fn stop_trial(state: &State, by: By) -> Option<(State, Slot)> {
    let mut trial = state.clone();
    let State::Trial { run, healthy: false, stopped, .. } = &mut trial else { return None };
    let passage = &mut run.passage;
    // What an operator ordered is counted already when it comes.
    if !*stopped {
        let (count, most) = match by {
            By::Operator => (&mut passage.operator_stops, MAX_OPERATOR_STOPS),
            By::Anybody { .. } => (&mut passage.clean_stops, MAX_CLEAN_STOPS),
        };
        if *count >= most {
            return None;
        }
        *count = count.saturating_add(1);
        passage.left = false;
        *stopped = true;
    }
    if let By::Anybody { restarts } = by {
        passage.left = restarts;
    }
    let target = run.target();
    Some((trial, target))
}

/// The machine did not go down after all: the slot is on trial for this boot only, as before.
pub(super) fn stays_up(state: State) -> (State, Vec<Order>) {
    match state {
        State::Trial { run, starts, boot, began_s, healthy, stopped: true, outage } => {
            let orders = vec![Order::CancelTry(run.target())];
            let stopped = false;
            (State::Trial { run, starts, boot, began_s, healthy, stopped, outage }, orders)
        }
        other => (other, vec![]),
    }
}

/// What is known of the way from the old slot to the new one.
#[derive(Clone, Copy)]
pub(super) struct Departure {
    /// The restart was ordered.
    pub armed: bool,
    /// The machine went down for it, with the bootloader's argument.
    pub left: bool,
}

/// Whether the old slot runs because the new one was not tried at all. The bootloader's own account
/// decides. Without one: nothing was tried before a restart was ordered, the one-shot argument is
/// lost with the power, and a bootloader that still means to try the slot did not.
pub(super) fn was_not_tried(run: &Run, departure: Departure, facts: &Facts) -> bool {
    let Departure { armed, left } = departure;
    let target_is_next = facts.next == Some(run.target());
    facts.tried.map_or(!armed || facts.by_argument && !left || target_is_next, |tried| !tried)
}

/// Whether a trial that ended by a clean stop may be taken up again.
pub(super) fn may_arm_again(run: &Run) -> bool {
    run.passage.armed_again.saturating_add(1) < MAX_ORDERS
}

/// Whether the trial has had all its clean restarts. What came after the last one, a clean restart or
/// a crash, nobody can tell.
pub(super) fn no_stops_left(run: &Run) -> bool {
    let Passage { clean_stops, operator_stops, .. } = run.passage;
    clean_stops >= MAX_CLEAN_STOPS || operator_stops >= MAX_OPERATOR_STOPS
}
