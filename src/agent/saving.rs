//! The state: saved before anything is done, and what is done while it cannot be.

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::info;

use super::troubles::Trouble;
use super::{Agent, AgentError, Images, RETRY, blocking, sentence};
use crate::logging::chain;
use crate::request::Answer;
use crate::store::StoreError;
use crate::update::{Event, Order, Phase, Progress, Saved, State, Verdict, step};

/// The progress of a phase that has only begun.
pub(super) fn none_yet(images: &dyn Images, phase: Phase) -> Progress {
    let installs = phase == Phase::Verifying && images.uninterruptible().is_some();
    Progress { installed_percent: installs.then_some(0), ..Progress::default() }
}

impl Agent {
    /// Saves and publishes `next`, which `event` led to. The inner error leaves everything as it
    /// was.
    pub(super) async fn save(
        &mut self,
        mut next: Saved,
        event: &Event,
    ) -> Result<Result<(), StoreError>, AgentError> {
        // Not the latest: a clock that was once ahead must not be believed for ever.
        next.newest_time = self.clock.synchronised().or(next.newest_time);
        let copy = next.clone();
        let saved = self.patiently(blocking(&self.store, move |store| store.save(&copy))).await?;
        if let Err(error) = saved {
            return Ok(Err(error));
        }
        self.trouble(Trouble::Saving, None);
        let (old, new) = (Phase::of(&self.saved.state), Phase::of(&next.state));
        self.saved = next;
        if old != new {
            let none_yet = none_yet(self.images.as_ref(), new);
            // The download has told the length already when its first byte comes.
            if new != Phase::Downloading {
                self.progress.send_replace(none_yet);
            }
            let run = self.saved.state.run();
            info!(
                phase = new.name(),
                run = run.map(|run| run.id.to_string()),
                version = run.and_then(|run| run.version()).map(ToString::to_string),
                "{}",
                sentence(&self.saved, &none_yet),
            );
        }
        if matches!(event, Event::Checkpointed(_)) {
            self.progressed();
        } else {
            self.publish();
        }
        Ok(Ok(()))
    }

    /// A request is refused, a checkpoint is dropped, everything else waits.
    pub(super) async fn cannot_save(
        &mut self,
        error: &StoreError,
        event: Event,
        reply: &mut Option<oneshot::Sender<Answer>>,
    ) -> Result<(), AgentError> {
        self.retry_save = Some(Instant::now() + RETRY);
        let advice = "make room on its partition and see that it is writable; a restart may help";
        self.trouble(Trouble::Saving, Some(format!("{}; {advice}", chain(error))));
        match event {
            Event::RestartRequested => self.restart_unsaved(reply).await?,
            Event::Checkpointed(_) | Event::Outage(_) => {}
            event => match reply.take() {
                Some(reply) => {
                    let _ = reply.send(self.not_saved());
                }
                None => self.unsaved.push_back(event),
            },
        }
        Ok(())
    }

    pub(super) fn not_saved(&self) -> Answer {
        let problem = self.troubles.get(&Trouble::Saving).cloned().unwrap_or_default();
        Answer::refused(500, "stateNotSaved", problem)
    }

    /// A restart without a saved state is like a power cut, which is survived at any moment; it may
    /// be the way out.
    pub(super) async fn restart_unsaved(
        &mut self,
        reply: &mut Option<oneshot::Sender<Answer>>,
    ) -> Result<(), AgentError> {
        for order in [Order::Answer(Verdict::Restarting), Order::Restart] {
            let _ = self.carry_out(order, reply).await?;
        }
        Ok(())
    }

    /// What waited is tried again; if nothing waits, whether there is room again.
    pub(super) async fn retry_save(&mut self) -> Result<(), AgentError> {
        self.retry_save = None;
        let events = std::mem::take(&mut self.unsaved);
        if events.is_empty() && self.save(self.saved.clone(), &Event::Started).await?.is_err() {
            self.retry_save = Some(Instant::now() + RETRY);
        }
        for event in events {
            self.handle(event, None).await?;
        }
        if self.unsaved_trial_is_over() {
            let _ = self.carry_out(Order::Restart, &mut None).await?;
        }
        Ok(())
    }

    /// A slot that cannot even note down that it is on trial, or was given up, is left in time too:
    /// the bootloader takes the good one next.
    fn unsaved_trial_is_over(&self) -> bool {
        let facts = self.facts();
        let over = facts.since_boot_s >= self.started_s.saturating_add(facts.limits.trial_s);
        if self.unsaved.is_empty() || self.restarting.is_some() || !over {
            return false;
        }
        let (started, _) = step(self.saved.clone(), Event::Started, &facts);
        matches!(started.state, State::Trial { .. } | State::RollingBack { .. })
    }
}
