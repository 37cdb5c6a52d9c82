//! Somebody asks for something: an operator from the cloud, or a person on the device.

use super::moves::{conclude, failure, roll_back, run_behind, start, switch};
use super::stops::{By, stop_trial};
use super::{Event, Facts, Order, Verdict};
use crate::update::job::RunId;
use crate::update::state::{
    Content, FailureKind, Origin, OutcomeKind, Passage, Run, Saved, Source, State, Times,
};

const ASKED_TO_GO_BACK: &str = "an operator asked to go back";

/// Somebody asks for something.
pub(super) fn asked(
    book: &mut Saved,
    state: State,
    event: Event,
    facts: &Facts,
) -> (State, Vec<Order>) {
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
                    let (healthy, stopped, outage) = (true, false, None);
                    S::Trial { run, starts: 1, boot, began_s, healthy, stopped, outage }
                }
                None => S::Idle,
            };
            (state, vec![Order::Answer(Verdict::Confirming), Order::Confirm])
        }
        // The restart that is under way would meet a bootloader that was told something else.
        (trial @ S::Trial { stopped: true, .. }, E::ConfirmRequested) => {
            let verdict = late(&trial, Verdict::TooLate);
            answer(trial, verdict)
        }
        (S::Trial { run, starts, boot, began_s, stopped, outage, .. }, E::ConfirmRequested) => (
            S::Trial { run, starts, boot, began_s, healthy: true, stopped, outage },
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
        (busy, E::RestartRequested) => match stop_trial(&busy, By::Operator) {
            // A bootloader that refuses ends it before the answer.
            Some((trial, target)) => {
                book.last_reboot = facts.now;
                let answer = Order::Answer(Verdict::Restarting);
                (trial, vec![Order::TryNext(target), answer, Order::RestartToTry])
            }
            None => {
                let verdict = late(&busy, Verdict::TooLate);
                answer(busy, verdict)
            }
        },
        (unmoved, _) => (unmoved, vec![]),
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
    let passage = Passage { hub_before: Some(facts.hub_online), ..Passage::default() };
    let run = Run { id, source, origin, from: facts.running, times, starts: 1, passage };
    let (state, orders) = switch(run, 1, facts);
    (state, [vec![Order::Answer(Verdict::RollingBack)], orders].concat())
}

fn answer(state: State, verdict: Verdict) -> (State, Vec<Order>) {
    (state, vec![Order::Answer(verdict)])
}

fn late(state: &State, verdict: fn(RunId) -> Verdict) -> Verdict {
    state.run().map_or(Verdict::Nothing, |run| verdict(run.id.clone()))
}
