//! Tells systemd how the service is: ready, alive, and what it does in one sentence.

use std::sync::{Mutex, PoisonError};

use sd_notify::NotifyState;
use tracing::debug;

use crate::agent::Supervisor;

/// systemd, or nobody when the daemon was started by hand.
#[derive(Debug, Default)]
pub struct Systemd {
    told: Mutex<String>,
}

impl Systemd {
    /// The configuration and the state are good, and the loop is about to run.
    pub fn ready(&self) {
        notify(&[NotifyState::Ready]);
    }

    /// The service is about to end.
    pub fn stopping(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

impl Supervisor for Systemd {
    fn alive(&self) {
        notify(&[NotifyState::Watchdog]);
    }

    fn status(&self, sentence: &str) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != sentence {
            notify(&[NotifyState::Status(sentence)]);
            sentence.clone_into(&mut told);
        }
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!(%error, "systemd could not be told");
    }
}
