//! The machine is shut down cleanly in the middle of a switch or a trial: that is nobody's failure.

use super::Facts;
use super::Order;
use super::moves::MAX_ORDERS;
use crate::update::state::{Run, State};

/// Clean restarts in one trial that do not count: an image that has itself restarted again and
/// again must be left in the end.
const MAX_CLEAN_STOPS: u8 = 10;

/// The machine goes down cleanly; `restarts` tells whether through the bootloader and up again.
pub(super) fn machine_stops(state: State, restarts: bool) -> (State, Vec<Order>) {
    match state {
        // Whoever ordered the restart: it tries the slot, if it carries the argument.
        State::Switching { run, ordered_in, attempt, armed: true, .. } => {
            let left = restarts;
            let orders = vec![Order::CarryArgument];
            (State::Switching { run, ordered_in, attempt, armed: true, left }, orders)
        }
        state => match stop_trial(&state) {
            Some((trial, mut orders)) => {
                orders.push(Order::CarryArgument);
                (trial, orders)
            }
            None => (state, vec![]),
        },
    }
}

/// Has the slot on trial tried once more, because the machine is restarted cleanly. `None` if that
/// may not be.
pub(super) fn stop_trial(state: &State) -> Option<(State, Vec<Order>)> {
    let mut trial = state.clone();
    let State::Trial { run, healthy: false, stopped, .. } = &mut trial else { return None };
    // An operator's restart is ordered first and then comes.
    if !*stopped {
        if run.passage.clean_stops >= MAX_CLEAN_STOPS {
            return None;
        }
        run.passage.clean_stops = run.passage.clean_stops.saturating_add(1);
        *stopped = true;
    }
    let orders = vec![Order::TryNext(run.target())];
    Some((trial, orders))
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

/// Whether the old slot runs because the new one was not tried at all: the one-shot argument is
/// lost with the power, and a bootloader that still means to try the slot did not.
pub(super) fn was_not_tried(run: &Run, tried_by_argument: bool, facts: &Facts) -> bool {
    facts.by_argument && !tried_by_argument || facts.next == Some(run.target())
}

/// Whether a trial that ended by a clean stop may be taken up again.
pub(super) fn may_arm_again(run: &Run) -> bool {
    run.passage.armed_again.saturating_add(1) < MAX_ORDERS
}

/// Whether the trial ended because it was restarted cleanly too often.
pub(super) fn too_many_stops(run: &Run) -> bool {
    run.passage.clean_stops >= MAX_CLEAN_STOPS
}
