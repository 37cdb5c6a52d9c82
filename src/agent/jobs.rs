//! The agent's long work: fetch, read back, watch a trial, restart, read the journal. Each runs
//! beside the loop and comes back as an event.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ports::{FetchEvent, HealthChecks, Images, JobChannels, Journal, Restarter};
use crate::clock::Clock;
use crate::hub::SessionStatus;
use crate::update::{
    Checkpoint, Event, FailedBoot, Failure, FailureKind, Job, Progress, Slot, Written,
};

/// Events of one job that may wait for the loop.
const EVENTS: usize = 8;

/// One job under way.
#[derive(Debug)]
pub struct Running {
    /// What it tells; ends when the job is done.
    pub events: mpsc::Receiver<Event>,
    cancel: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Running {
    fn start(
        work: impl FnOnce(mpsc::Sender<Event>, CancellationToken) -> BoxFuture<'static, ()>,
    ) -> Self {
        let (tell, events) = mpsc::channel(EVENTS);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(work(tell, cancel.clone()));
        Running { events, cancel, task: Some(task) }
    }

    /// Ends the job; the handle is done when the job no longer touches anything.
    pub fn stop(mut self) -> Option<JoinHandle<()>> {
        self.cancel.cancel();
        self.task.take()
    }
}

/// A job that nobody waits for any more is ended.
impl Drop for Running {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// The next event of `job`; never comes while there is none.
///
/// Cancel-safe, as `recv` is.
pub async fn next(job: &mut Option<Running>) -> Event {
    match job {
        Some(running) => match running.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// Streams an image into `slot`, once `earlier` work on slots has come to its end.
pub fn fetch(
    images: &Arc<dyn Images>,
    (job, slot, checkpoint): (Job, Slot, Option<Checkpoint>),
    progress: watch::Sender<Progress>,
    earlier: Option<JoinHandle<()>>,
) -> Running {
    let images = Arc::clone(images);
    Running::start(|tell, cancel| {
        Box::pin(async move {
            finished(earlier).await;
            let (events, mut told) = mpsc::channel(EVENTS);
            let stop = cancel.clone();
            let channels = JobChannels { events, progress, cancel };
            let work = images.fetch(job, slot, checkpoint, channels);
            tokio::pin!(work);
            let result = loop {
                // Cancel-safe: `recv` is, and `work` is pinned outside the loop.
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {
                        // The work sees the same token and leaves the slot alone when it is done.
                        let _ = work.await;
                        return;
                    }
                    Some(event) = told.recv() => {
                        let event = match event {
                            FetchEvent::Began => Event::FetchBegan,
                            FetchEvent::Checkpoint(checkpoint) => Event::Checkpointed(checkpoint),
                        };
                        if tell.send(event).await.is_err() {
                            let _ = work.await;
                            return;
                        }
                    }
                    result = &mut work => break result,
                }
            };
            let _ = tell.send(Event::Fetched(result)).await;
        })
    })
}

/// Reads `slot` back, once `earlier` work on slots has come to its end.
pub fn verify(
    images: &Arc<dyn Images>,
    (written, slot): (Written, Slot),
    progress: watch::Sender<Progress>,
    earlier: Option<JoinHandle<()>>,
) -> Running {
    let images = Arc::clone(images);
    Running::start(|tell, cancel| {
        Box::pin(async move {
            finished(earlier).await;
            let (events, _told) = mpsc::channel(EVENTS);
            let stop = cancel.clone();
            let channels = JobChannels { events, progress, cancel };
            let result = images.verify(written, slot, channels).await;
            if !stop.is_cancelled() {
                let _ = tell.send(Event::Verified(result)).await;
            }
        })
    })
}

async fn finished(task: Option<JoinHandle<()>>) {
    if let Some(task) = task {
        // A job that panicked has ended as well.
        let _ = task.await;
    }
}

/// A round that begins when the time is over, after a late start of the agent, gets this long.
const LEAST_ROUND: Duration = Duration::from_secs(1);

/// What a watch over the running slot goes by.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Seconds since boot at which the trial is lost; never if there is none.
    pub deadline_s: Option<u64>,
    /// Time between two rounds.
    pub interval: Duration,
    /// The hub must have answered this report in a live session, be it with a refusal, which is no
    /// fault of the image; `None` if the hub is not asked for.
    pub generation: Option<u64>,
    /// The session.
    pub session: watch::Receiver<SessionStatus>,
}

/// Checks the running slot until it is healthy, or its time is over.
pub fn watch(health: &Arc<dyn HealthChecks>, clock: &Arc<dyn Clock>, orders: Watch) -> Running {
    let (health, clock) = (Arc::clone(health), Arc::clone(clock));
    Running::start(|tell, cancel| {
        Box::pin(async move {
            loop {
                let round = async {
                    hub_is_well(&orders)?;
                    health.check().await?;
                    // The checks take time, and the session may have gone meanwhile.
                    hub_is_well(&orders)
                };
                let left = || match orders.deadline_s.map(Duration::from_secs) {
                    None => Duration::MAX,
                    Some(deadline) => deadline.saturating_sub(clock.since_boot()),
                };
                let problem = tokio::select! {
                    () = cancel.cancelled() => return,
                    result = tokio::time::timeout(left().max(LEAST_ROUND), round) => match result {
                        Ok(Ok(())) => {
                            let _ = tell.send(Event::Healthy).await;
                            return;
                        }
                        Ok(Err(problem)) => problem,
                        Err(_) => "the health checks were not done when the trial's time was over"
                            .to_owned(),
                    },
                };
                let pause = left().min(orders.interval);
                if pause.is_zero() {
                    let _ = tell.send(Event::TrialExpired(problem)).await;
                    return;
                }
                let mut session = orders.session.clone();
                session.mark_unchanged();
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                    Ok(()) = session.changed() => {}
                }
            }
        })
    })
}

fn hub_is_well(orders: &Watch) -> Result<(), String> {
    let Some(generation) = orders.generation else { return Ok(()) };
    let session = orders.session.borrow();
    if session.online && session.answered >= generation {
        Ok(())
    } else {
        Err(format!("no hub session with an answered report: {}", session.text))
    }
}

/// Reads the last lines of a failed boot.
pub fn read_journal(journal: &Arc<dyn Journal>, of: FailedBoot) -> Running {
    let journal = Arc::clone(journal);
    Running::start(|tell, cancel| {
        Box::pin(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                result = journal.last_words(of.clone()) => {
                    let _ = tell.send(Event::JournalRead { of, result }).await;
                }
            }
        })
    })
}

/// What a restart goes by.
#[derive(Clone, Debug)]
pub struct Restart {
    /// The bootloader's one-shot argument.
    pub argument: Option<&'static str>,
    /// The report that the hub should have seen before.
    pub generation: u64,
    /// How long to wait for that.
    pub report_limit: Duration,
    /// How long the order may take to end this process.
    pub limit: Duration,
    /// The session.
    pub session: watch::Receiver<SessionStatus>,
}

/// Restarts the machine; comes back as an event only if that fails.
pub fn restart(restarter: &Arc<dyn Restarter>, orders: Restart) -> Running {
    let restarter = Arc::clone(restarter);
    Running::start(|tell, cancel| {
        Box::pin(async move {
            let mut session = orders.session.clone();
            let work = async {
                acknowledged(&mut session, orders.generation, orders.report_limit).await;
                let end = Instant::now() + orders.limit;
                let detail = match restarter.restart(orders.argument).await {
                    Ok(()) => {
                        tokio::time::sleep_until(end).await;
                        format!("the machine still runs {} s later", orders.limit.as_secs())
                    }
                    Err(problem) => problem,
                };
                let failure = Failure::new(
                    FailureKind::RestartFailed,
                    format!("the machine was ordered to restart and did not: {detail}"),
                );
                let _ = tell.send(Event::RestartFailed(failure)).await;
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                () = work => {}
            }
        })
    })
}

/// Waits until the hub has acknowledged report `generation`, at most `limit`; not at all while
/// there is no session.
pub async fn acknowledged(
    session: &mut watch::Receiver<SessionStatus>,
    generation: u64,
    limit: Duration,
) {
    let done = session.wait_for(|status| !status.online || status.acknowledged >= generation);
    // Too late, or the session is gone: who waits goes on either way.
    let _ = tokio::time::timeout(limit, done).await;
}
