//! The last words of a failed boot: noted down as wanted when the update ends, looked for at every
//! start of the agent until they are read, or could not be a few times.

use super::{Facts, Order};
use crate::update::last_words::{FailedBoot, LastWords, Unread};
use crate::update::state::{Outcome, OutcomeKind, Saved, State};

/// Boots that are remembered as not the failed one. Only power cuts within seconds of each start
/// make them more; beyond that the journal is let be.
const MAX_OTHERS: usize = 8;

/// Failures after which the journal is let be: a slow card or a journal that is just being rotated is
/// no reason at the next start.
const MAX_FAILURES: u8 = 5;

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
    let Outcome { journal, journal_again, .. } = book.last.as_mut()?;
    let failed = match (&mut *journal, &mut *journal_again) {
        (Some(LastWords::Wanted(failed)), _) => failed,
        (_, Some(unread)) => &mut unread.of,
        _ => return None,
    };
    if let FailedBoot::Unknown { others, .. } = failed
        && !others.contains(&facts.boot)
    {
        if others.len() >= MAX_OTHERS {
            if journal_again.take().is_none() {
                *journal = None;
            }
            return None;
        }
        others.push(facts.boot.clone());
    }
    Some(Order::ReadJournal(failed.clone()))
}

/// The journal was read for `failed`. Another update may have ended since: then nobody asks any
/// more.
pub(super) fn read(book: &mut Saved, failed: FailedBoot, result: Result<Vec<String>, String>) {
    let Some(last) = &mut book.last else { return };
    let failures = match (&last.journal, &last.journal_again) {
        (Some(LastWords::Wanted(wanted)), _) if *wanted == failed => 0,
        (_, Some(unread)) if unread.of == failed => unread.failures,
        _ => return,
    };
    let failures = failures.saturating_add(1);
    let again = result.is_err() && failures < MAX_FAILURES;
    last.journal_again = again.then_some(Unread { of: failed, failures });
    last.journal = Some(LastWords::read(result));
}
