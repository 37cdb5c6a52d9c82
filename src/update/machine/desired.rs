//! The desired properties: pursued until they are settled.

use super::moves::{conclude, failure, start};
use super::{Facts, Order, Wanted};
use crate::update::job::RunId;
use crate::update::state::{FailureKind, Origin, Outcome, OutcomeKind, Saved, State};

/// The desired properties were read, or changed.
pub(super) fn desired(
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
        book.last = Some(Outcome::new(None, kind, facts.now));
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
