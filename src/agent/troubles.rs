//! What goes wrong on the device while the agent runs: told in the twin for as long as it lasts.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::Agent;

/// What may go wrong and come right again.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Trouble {
    /// The state cannot be saved.
    Saving,
    /// The running slot cannot be marked good.
    Confirming,
    /// The machine does not restart.
    Restarting,
}

/// Each trouble there is, with what people should know of it.
pub type Troubles = BTreeMap<Trouble, String>;

impl Agent {
    /// Notes a trouble, or that it is over; tells when that is news.
    pub(super) fn trouble(&mut self, what: Trouble, text: Option<String>) {
        let before = self.troubles.get(&what);
        if before == text.as_ref() {
            return;
        }
        match text {
            Some(text) => {
                warn!("{text}");
                self.troubles.insert(what, text);
            }
            None => {
                info!(trouble = ?what, "that is over");
                self.troubles.remove(&what);
            }
        }
        self.publish();
    }
}
