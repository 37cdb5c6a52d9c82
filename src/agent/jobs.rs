//! The agent's long work: fetch, read back, restart, read the journal, and in `trial` the checks of
//! a new slot. Each runs beside the loop and comes back as an event.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ports::{FetchEvent, Images, JobChannels, Journal, Restarter};
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
    pub(super) fn start(
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
