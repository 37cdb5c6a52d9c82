//! Something that was ordered came to its end.

use super::moves::{
    conclude, failure, fetch, roll_back, roll_back_again, settle_home, succeed, switch,
    switch_again, watch,
};
use super::stops::{machine_stops, note_hub, stays_up};
use super::{Event, Facts, Order};
use crate::update::state::{Content, FailureKind, Outage, OutcomeKind, Saved, State};
use crate::update::trial::TrialTime;

/// Something that was ordered came to its end.
pub(super) fn happened(
    book: &mut Saved,
    state: State,
    event: Event,
    facts: &Facts,
) -> (State, Vec<Order>) {
    use Event as E;
    use State as S;

    let time = TrialTime::of(&state, &facts.limits);
    let time_is_over = time.is_some_and(|time| facts.since_boot_s >= time.ends_s());
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
            run.passage.hub_before = Some(facts.hub_online);
            let (version, digest) = (run.version().cloned(), Some(written.image_digest));
            *book.slots.of_mut(run.target()) = Content::Written { version, digest };
            switch(run, 1, facts)
        }

        (
            S::Switching { mut run, ordered_in, attempt, armed: false, left },
            E::Switched(Ok(())),
        ) => {
            note_hub(&mut run, facts);
            let state = S::Switching { run, ordered_in, attempt, armed: true, left };
            (state, vec![Order::RestartToTry])
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
        (
            S::Trial { run, starts, boot, began_s, healthy: false, stopped: false, outage },
            E::Healthy,
        ) => {
            // What was waited for the network is not missing when it is confirmed.
            let over = |outage| Outage { seen_s: facts.since_boot_s, lasts: false, ..outage };
            let outage = outage.map(over);
            let state =
                S::Trial { run, starts, boot, began_s, healthy: true, stopped: false, outage };
            (state, vec![Order::Confirm])
        }
        (S::Trial { run, healthy: true, .. }, E::Confirmed) => succeed(book, run, facts),
        // A slot that cannot be made the default is left at the next restart, whenever that comes.
        (S::Trial { run, healthy: true, .. }, E::ConfirmFailed(cause)) if time_is_over => {
            roll_back(run, cause, 1, facts)
        }
        (
            S::Trial { run, starts, boot, began_s, healthy: false, stopped, .. },
            E::Outage(outage),
        ) => {
            let outage = Some(outage);
            (S::Trial { run, starts, boot, began_s, healthy: false, stopped, outage }, vec![])
        }
        (S::Trial { run, healthy: false, .. }, E::TrialExpired(why)) => {
            roll_back(run, failure(FailureKind::Unhealthy, why), 1, facts)
        }
        // An operator's restart had ended the checks. One that would lead into the old slot is none.
        (trial @ S::Trial { stopped: true, .. }, E::RestartFailed(_) | E::Switched(Err(_))) => {
            let (trial, forget) = stays_up(trial);
            let (trial, orders) = watch(trial, facts);
            (trial, [forget, orders].concat())
        }
        // A trial whose time is over is left, whoever has the machine restarted.
        (lost, E::MachineStops { .. }) if time_is_over => (lost, vec![]),
        (state, E::MachineStops { restarts }) => machine_stops(state, restarts, facts),
        // Only where it is not known which slot is good is a slot watched without a run.
        (S::Idle, E::Healthy) if book.home.is_none() => (S::Idle, vec![Order::Confirm]),
        (S::Idle, E::Confirmed) if book.home.is_none_or(|home| home == facts.running) => {
            settle_home(book, facts);
            (S::Idle, vec![])
        }
        (unmoved, _) => (unmoved, vec![]),
    }
}
