//! The last words of a failed boot: which boot that was, and what it left in the journal.

use serde::{Deserialize, Serialize};

use super::slot::BootId;
use super::state::State;

/// What is told of a failed boot that left nothing.
const LEFT_NOTHING: &str = "the failed boot left nothing in the journal: the new system did not get \
                            that far, or keeps its journal elsewhere";

/// What a failed boot left in the journal: still to be read, or read.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LastWords {
    /// To be read: of this boot.
    Wanted(FailedBoot),
    /// Lines for people, oldest first: short, without secrets.
    Lines(Vec<String>),
    /// There are none; one sentence says why.
    Missing(String),
}

impl LastWords {
    /// What came of reading the journal.
    #[must_use]
    pub fn read(result: Result<Vec<String>, String>) -> Self {
        match result {
            Ok(lines) if lines.is_empty() => LastWords::Missing(LEFT_NOTHING.to_owned()),
            Ok(lines) => LastWords::Lines(lines),
            Err(why) => LastWords::Missing(format!("the journal could not be read: {why}")),
        }
    }
}

/// A journal that could not be read yet.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Unread {
    /// Of this boot.
    pub of: FailedBoot,
    /// How often that failed.
    pub failures: u8,
}

/// A boot of a new system that ended without being confirmed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailedBoot {
    /// The agent ran in it.
    Known(BootId),
    /// The agent did not get that far. If the journal knows it, it is the first boot there that
    /// came after `after` and is none of `others`.
    Unknown {
        /// The boot of the old system in which the new one was ordered.
        after: BootId,
        /// Boots in which the agent ran since: not the failed one.
        others: Vec<BootId>,
    },
}

impl FailedBoot {
    /// The boot that has failed if the update in `state` ends in the old slot.
    #[must_use]
    pub fn behind(state: &State) -> Option<Self> {
        match state {
            State::Switching { ordered_in, .. } => {
                Some(FailedBoot::Unknown { after: ordered_in.clone(), others: Vec::new() })
            }
            // It was left cleanly, to come back: what failed is the boot after it.
            State::Trial { boot: after, stopped: true, .. } => {
                Some(FailedBoot::Unknown { after: after.clone(), others: Vec::new() })
            }
            State::Trial { boot, .. } => Some(FailedBoot::Known(boot.clone())),
            State::RollingBack { ordered_in, .. } => Some(FailedBoot::Known(ordered_in.clone())),
            State::Idle | State::Fetching { .. } | State::Verifying { .. } => None,
        }
    }
}
