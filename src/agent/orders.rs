//! Carries out what the core orders. Each order may come twice.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::error;

use super::troubles::Trouble;
use super::{ANSWER_LIMIT, Agent, AgentError, RETRY, answers, jobs, trial};
use crate::request::Answer;
use crate::update::{Event, Failure, Order, State, Verdict};

/// How an order ended.
pub enum Done {
    /// Nothing follows, or it follows later.
    Quietly,
    /// This follows.
    With(Event),
    /// This follows, and the rest of the orders makes no sense any more.
    Failed(Event),
}

impl Agent {
    pub(super) async fn carry_out(
        &mut self,
        order: Order,
        reply: &mut Option<oneshot::Sender<Answer>>,
    ) -> Result<Done, AgentError> {
        match order {
            Order::Answer(verdict) => {
                if let Some(reply) = reply.take() {
                    self.tell(reply, &verdict);
                }
            }
            Order::Retire(slot) => {
                let result = self.with_boot(move |boot| boot.retire(slot)).await?;
                if let Err(error) = result {
                    let what = "make sure that the slot does not boot";
                    let failure = self.bootloader_failed(what, &error).await?;
                    return Ok(Done::Failed(Event::Fetched(Err(failure))));
                }
            }
            Order::Fetch(job, slot, checkpoint) => {
                self.stop_work();
                let (progress, earlier) = (self.progress.clone(), self.stopping.take());
                let order = (job, slot, checkpoint);
                self.work = Some(jobs::fetch(&self.images, order, progress, earlier));
            }
            Order::Verify(written, slot) => {
                self.stop_work();
                let (progress, earlier) = (self.progress.clone(), self.stopping.take());
                self.work = Some(jobs::verify(&self.images, (written, slot), progress, earlier));
            }
            Order::StopWork => self.stop_work(),
            Order::TryNext(slot) => {
                let result = self.with_boot(move |boot| boot.try_next(slot)).await?;
                return Ok(match result {
                    Ok(()) => Done::With(Event::Switched(Ok(()))),
                    Err(error) => {
                        let what = "have the new slot tried";
                        let failure = self.bootloader_failed(what, &error).await?;
                        Done::Failed(self.cannot_try(failure, reply))
                    }
                });
            }
            Order::CancelTry(slot) => {
                let result = self.with_boot(move |boot| boot.cancel_try(slot)).await?;
                if let Err(error) = result {
                    // The try was for one boot only, so what follows is right all the same.
                    let failure = self.bootloader_failed("take the try back", &error).await?;
                    error!(%slot, error = %failure, "the bootloader still means to try it");
                }
            }
            Order::Confirm => return Ok(Done::With(self.confirm().await?)),
            Order::Watch(time) => {
                let generation = self.settings.hub_must_be_well.then(|| self.generation());
                let orders = trial::Watch {
                    time,
                    interval: self.settings.health_interval,
                    generation,
                    session: self.inputs.session.clone(),
                };
                self.watching = Some(trial::watch(&self.health, &self.clock, orders));
            }
            order @ (Order::RestartToTry | Order::Restart) => {
                self.stop_work();
                self.trouble(Trouble::Restarting, None);
                let trying = order == Order::RestartToTry;
                let orders = jobs::Restart {
                    argument: self.restart_argument.filter(|_| trying),
                    generation: self.generation(),
                    report_limit: self.settings.restart_report_limit,
                    limit: self.settings.restart_limit,
                    session: self.inputs.session.clone(),
                };
                self.restarting = Some(jobs::restart(&self.restarter, orders));
            }
            Order::CarryArgument => {
                if let Some(argument) = self.restart_argument
                    && let Err(problem) = self.restarter.carry(argument).await
                {
                    // The slot is not tried then, which is noticed at the next start.
                    error!(argument, problem, "the restart does not carry the one-shot argument");
                }
            }
            Order::ReadJournal(failed) => {
                self.reading =
                    self.journal.as_ref().map(|journal| jobs::read_journal(journal, failed));
            }
        }
        Ok(Done::Quietly)
    }

    /// Marks the running slot good; if the bootloader refuses, that is told, and tried again later.
    pub(super) async fn confirm(&mut self) -> Result<Event, AgentError> {
        match self.with_boot(|boot| boot.confirm()).await? {
            Ok(()) => {
                self.trouble(Trouble::Confirming, None);
                Ok(Event::Confirmed)
            }
            Err(error) => {
                let failure = self.bootloader_failed("mark the running slot good", &error).await?;
                self.trouble(Trouble::Confirming, Some(failure.detail.clone()));
                self.retry_confirm = Some(Instant::now() + RETRY);
                Ok(Event::ConfirmFailed(failure))
            }
        }
    }

    /// The slot will not be tried. Where the update ends with that, its outcome tells it.
    fn cannot_try(
        &mut self,
        failure: Failure,
        reply: &mut Option<oneshot::Sender<Answer>>,
    ) -> Event {
        if let State::Trial { .. } = self.saved.state {
            let detail = &failure.detail;
            let notice = format!("the restart would lead into the old slot: {detail}");
            if let Some(reply) = reply.take() {
                let _ = reply.send(Answer::refused(500, "bootloader", &notice));
            }
            self.trouble(Trouble::Restarting, Some(notice));
        }
        Event::Switched(Err(failure))
    }

    fn stop_work(&mut self) {
        if let Some(work) = self.work.take() {
            let ended = work.stop();
            let earlier = self.stopping.take();
            self.stopping = Some(tokio::spawn(async move {
                for task in [earlier, ended].into_iter().flatten() {
                    let _ = task.await;
                }
            }));
        }
    }

    /// A new run is answered when the hub has its first report, so that who looks into the twin
    /// after the answer sees the new run and not the end of the last.
    fn tell(&self, reply: oneshot::Sender<Answer>, verdict: &Verdict) {
        let answer = answers::answer(verdict);
        let limit =
            if matches!(verdict, Verdict::Accepted(_)) { ANSWER_LIMIT } else { Duration::ZERO };
        let mut session = self.inputs.session.clone();
        let generation = self.generation();
        tokio::spawn(async move {
            if !limit.is_zero() {
                jobs::acknowledged(&mut session, generation, limit).await;
            }
            // Who asked may be gone; the run goes on.
            let _ = reply.send(answer);
        });
    }
}
