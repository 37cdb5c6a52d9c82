//! The last words of a failed boot: noted down as wanted when the update ends, looked for at every
//! start of the agent until they are read.

use super::{Facts, Order};
use crate::update::last_words::{FailedBoot, LastWords};
use crate::update::state::{OutcomeKind, Saved, State};

/// Boots that are remembered as not the failed one. Only power cuts within seconds of each start
/// make them more; beyond that the journal is let be.
const MAX_OTHERS: usize = 8;

/// An event was taken in a state in which `failed` is the boot to fail. If it ended the update, the
/// journal of that boot is wanted.
pub(super) fn want(book: &mut Saved, failed: Option<FailedBoot>) {
    if book.state == State::Idle
        && failed.is_some()
        && let Some(last) = &mut book.last
        && matches!(last.kind, OutcomeKind::RolledBack(_))
    {
        last.journal = failed.map(LastWords::Wanted);
    }
}

/// The agent started: what is still to be read, if anything.
pub(super) fn look_for(book: &mut Saved, facts: &Facts) -> Option<Order> {
    let journal = &mut book.last.as_mut()?.journal;
    let Some(LastWords::Wanted(failed)) = journal else { return None };
    if let FailedBoot::Unknown { others, .. } = failed
        && !others.contains(&facts.boot)
    {
        if others.len() >= MAX_OTHERS {
            *journal = None;
            return None;
        }
        others.push(facts.boot.clone());
    }
    Some(Order::ReadJournal(failed.clone()))
}

/// The journal was read for `failed`. Another update may have ended since: then nobody asks any
/// more.
pub(super) fn read(book: &mut Saved, failed: FailedBoot, result: Result<Vec<String>, String>) {
    if let Some(last) = &mut book.last
        && last.journal == Some(LastWords::Wanted(failed))
    {
        last.journal = Some(LastWords::read(result));
    }
}
