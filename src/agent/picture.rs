//! What the agent shows: in the twin, to who asks, and in systemd's status line.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::troubles::Trouble;
use super::{Agent, sentence};
use crate::hub::Report;
use crate::request::Answer;
use crate::update::{Device, Phase, Progress, State, TrialTime, own_section, report};

/// Progress intervals after which small progress is worth a report too.
const LONG_WHILE: u32 = 12;

impl Agent {
    /// Everything there is to know, with live figures.
    pub(super) fn status(&self) -> Answer {
        let progress = *self.progress_seen.borrow();
        let session = self.inputs.session.borrow().clone();
        let Value::Object(mut body) = own_section(&self.saved, &progress, &self.device()) else {
            return Answer::refused(500, "internal", "the status is no object");
        };
        body.insert("text".to_owned(), json!(self.doing()));
        body.insert("hub".to_owned(), json!({ "online": session.online, "text": session.text }));
        Answer::ok(body)
    }

    /// What goes on, for people.
    fn doing(&self) -> String {
        match self.troubles.get(&Trouble::Saving) {
            Some(problem) if !self.unsaved.is_empty() => problem.clone(),
            _ => sentence(&self.saved, &self.progress_seen.borrow()),
        }
    }

    /// The same, with the hub.
    pub(super) fn sentence(&self) -> String {
        let doing = self.doing();
        let session = self.inputs.session.borrow();
        if session.text.is_empty() { doing } else { format!("{doing}; {}", session.text) }
    }

    /// The device with the troubles it has now.
    fn device(&self) -> Device {
        let mut device = self.device.clone();
        // First what is wrong now: the number of notices in a report has a limit.
        device.notices.splice(..0, self.troubles.values().cloned());
        device
    }

    /// Shows the newest picture; the session sends what differs from the hub's.
    pub(super) fn publish(&mut self) {
        let progress = *self.progress_seen.borrow();
        self.reported_progress = (Instant::now(), self.percent(&progress));
        if self.device.started.is_none() {
            self.device.started = self.clock.wall();
        }
        let document = report(&self.saved, &progress, &self.device());
        let trial_ends = self.trial_ends();
        self.inputs.report.send_if_modified(|report| {
            let same = report.document == document && report.generation > 0;
            if same && report.trial_ends == trial_ends {
                return false;
            }
            let generation = report.generation.saturating_add(u64::from(!same));
            *report = Arc::new(Report { generation, document, trial_ends });
            true
        });
        self.supervisor.status(&self.sentence());
    }

    /// Since boot; only while the trial waits for the hub.
    fn trial_ends(&self) -> Option<Duration> {
        match &self.saved.state {
            trial @ State::Trial { healthy: false, .. } if self.settings.hub_must_be_well => {
                let time = TrialTime::of(trial, &self.settings.limits);
                time.map(|time| Duration::from_secs(time.ends_s()))
            }
            _ => None,
        }
    }

    /// Mere progress is thinned: it is worth a report after a while and a step, and after a longer
    /// while in any case, because the step may be large or, without a length, not be known.
    pub(super) fn progressed(&mut self) {
        let progress = *self.progress_seen.borrow_and_update();
        let (when, percent) = self.reported_progress;
        let step = self.percent(&progress).abs_diff(percent);
        let (elapsed, interval) = (when.elapsed(), self.settings.progress_interval);
        if elapsed >= interval
            && (step >= self.settings.progress_step_percent || elapsed >= interval * LONG_WHILE)
        {
            self.publish();
        }
    }

    fn percent(&self, progress: &Progress) -> u64 {
        Phase::of(&self.saved.state).percent(&self.saved.state, progress).unwrap_or(0)
    }

    pub(super) fn generation(&self) -> u64 {
        self.inputs.report.borrow().generation
    }
}
