//! The agent: the loop around the core. Step, save, act.

mod answers;
mod jobs;
mod orders;
mod picture;
mod ports;
mod saving;
mod sentence;
mod trial;
mod troubles;
mod words;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::boot::{BootError, BootFacts, Bootloader};
use crate::clock::Clock;
use crate::hub::{Desired, Report, SessionStatus};
use crate::logging::chain;
use crate::redact::OwnSecrets;
use crate::request::{Answer, Command, Request};
use crate::store::{Loaded, StateStore, StoreError};
use crate::update::{
    BootId, Device, Event, Facts, Limits, Phase, Progress, RunId, Saved, State, Wanted, step,
};

pub use ports::{
    FetchEvent, HealthChecks, Images, JobChannels, Journal, Restarter, Stop, Supervisor,
};
pub use sentence::sentence;

use jobs::Running;
use troubles::{Trouble, Troubles};

/// How long an answer waits for the hub to acknowledge the first report of a new run. Operators'
/// programs look into the twin right after the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Between two tries of what the device itself refused: saving the state, marking a slot good.
const RETRY: Duration = Duration::from_secs(10);

/// Between two signs of life to the supervisor.
const ALIVE: Duration = Duration::from_secs(5);

/// The longest that a blocking call may keep the loop: the bootloader's program with its longest
/// limit, several times over. What takes longer is stuck, in a disk that does not answer any more.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// A hub session that was lost this short a time ago is being renewed, or will be back in a moment.
const HUB_GRACE: Duration = Duration::from_secs(60);

/// The settings of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What bounds an update.
    pub limits: Limits,
    /// Whether a new slot must have a hub session with an answered report.
    pub hub_must_be_well: bool,
    /// Time between two rounds of health checks.
    pub health_interval: Duration,
    /// Least time between two reports of mere progress.
    pub progress_interval: Duration,
    /// Least step between two reports of mere progress.
    pub progress_step_percent: u64,
    /// How long a restart waits for the hub to acknowledge the last report.
    pub restart_report_limit: Duration,
    /// How long a restart may take to end this process.
    pub restart_limit: Duration,
}

/// What the agent works with.
#[allow(missing_debug_implementations, reason = "a bundle of trait objects")]
pub struct Ports {
    /// Chooses what boots.
    pub boot: Box<dyn Bootloader>,
    /// Keeps the state.
    pub store: Box<dyn StateStore>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Fetches and reads back.
    pub images: Arc<dyn Images>,
    /// Checks the running system.
    pub health: Arc<dyn HealthChecks>,
    /// Restarts the machine.
    pub restarter: Arc<dyn Restarter>,
    /// Tells what a failed boot left behind, if that is to be told.
    pub journal: Option<Arc<dyn Journal>>,
    /// Watches over the process.
    pub supervisor: Arc<dyn Supervisor>,
    /// What must not be shown, wherever another program says it.
    pub secrets: OwnSecrets,
}

/// The agent's ends of the channels to the hub session and the control socket.
#[derive(Debug)]
pub struct Inputs {
    /// Direct methods and the device command.
    pub requests: mpsc::Receiver<Request>,
    /// Desired documents.
    pub desired: mpsc::Receiver<Desired>,
    /// How the session is.
    pub session: watch::Receiver<SessionStatus>,
    /// What the twin is to show.
    pub report: watch::Sender<Arc<Report>>,
}

/// Makes an update out of a desired document; `None` if it asks for none.
pub type ReadDesired = Box<dyn Fn(&Desired) -> Option<Wanted> + Send + Sync>;

/// Why the agent gave up. The saved state is good to start from.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The state cannot be read.
    #[error("cannot start without the saved state")]
    Load(#[source] StoreError),
    /// The bootloader cannot be asked.
    #[error("cannot start without knowing which slot runs")]
    Boot(#[source] BootError),
    /// A blocking call was lost in a shutdown or a panic.
    #[error("a blocking call did not come back")]
    Blocking(#[source] tokio::task::JoinError),
}

/// What the device is, read once at the start.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This boot.
    pub boot: BootId,
    /// What the report tells beside the state; `running` is overwritten by the bootloader's word.
    pub device: Device,
}

/// The agent. Made by [`Agent::start`], which reads everything; [`Agent::run`] does the rest.
#[allow(missing_debug_implementations, reason = "holds trait objects")]
pub struct Agent {
    boot: Arc<Mutex<Box<dyn Bootloader>>>,
    restart_argument: Option<&'static str>,
    store: Arc<Mutex<Box<dyn StateStore>>>,
    clock: Arc<dyn Clock>,
    images: Arc<dyn Images>,
    health: Arc<dyn HealthChecks>,
    restarter: Arc<dyn Restarter>,
    journal: Option<Arc<dyn Journal>>,
    supervisor: Arc<dyn Supervisor>,
    secrets: OwnSecrets,
    settings: Settings,
    inputs: Inputs,
    read_desired: ReadDesired,

    facts: BootFacts,
    boot_id: BootId,
    device: Device,
    troubles: Troubles,
    /// When the agent started, in seconds since the boot.
    started_s: u64,
    saved: Saved,
    /// Events whose state could not be saved yet, oldest first.
    unsaved: VecDeque<Event>,
    desired: Option<Wanted>,

    work: Option<Running>,
    stopping: Option<JoinHandle<()>>,
    watching: Option<Running>,
    restarting: Option<Running>,
    reading: Option<Running>,
    retry_confirm: Option<Instant>,
    retry_save: Option<Instant>,
    hub_seen: Option<Instant>,

    progress: watch::Sender<Progress>,
    progress_seen: watch::Receiver<Progress>,
    reported_progress: (Instant, u64),
}

impl Agent {
    /// Loads the state and asks the bootloader. Nothing is changed yet.
    ///
    /// # Errors
    /// The state cannot be read or the running slot cannot be told: the service must not run.
    pub async fn start(
        ports: Ports,
        settings: Settings,
        inputs: Inputs,
        read_desired: ReadDesired,
        identity: Identity,
    ) -> Result<Self, AgentError> {
        let restart_argument = ports.boot.restart_argument();
        let boot = Arc::new(Mutex::new(ports.boot));
        let store = Arc::new(Mutex::new(ports.store));
        let Loaded { saved, set_aside } =
            blocking(&store, |store| store.load()).await?.map_err(AgentError::Load)?;
        let saved = saved.unwrap_or_default();
        let known = saved.home.is_some();
        let (facts, problem) = blocking(&boot, move |boot| ask(boot, known)).await??;

        let mut device = identity.device;
        device.running = facts.running;
        if let Some(problem) = problem {
            let problem = words::without_secrets(&ports.secrets, problem).await?;
            let notice = format!("{problem}; updates fail until it can be");
            error!(notice);
            device.notices.push(notice);
        }
        if let Some((path, problem)) = set_aside {
            let notice = format!(
                "the saved state could not be understood ({problem}); it lies at {} now, and the \
                 agent began anew",
                path.display()
            );
            error!(notice);
            device.notices.push(notice);
        }
        let none_yet = saving::none_yet(ports.images.as_ref(), Phase::of(&saved.state));
        let (progress, progress_seen) = watch::channel(none_yet);
        let started_s = ports.clock.since_boot().as_secs();
        Ok(Agent {
            boot,
            restart_argument,
            store,
            clock: ports.clock,
            images: ports.images,
            health: ports.health,
            restarter: ports.restarter,
            journal: ports.journal,
            supervisor: ports.supervisor,
            secrets: ports.secrets,
            settings,
            inputs,
            read_desired,
            facts,
            boot_id: identity.boot,
            device,
            troubles: Troubles::new(),
            started_s,
            saved,
            unsaved: VecDeque::new(),
            desired: None,
            work: None,
            stopping: None,
            watching: None,
            restarting: None,
            reading: None,
            retry_confirm: None,
            retry_save: None,
            hub_seen: None,
            progress,
            progress_seen,
            reported_progress: (Instant::now(), 0),
        })
    }

    /// What is known.
    #[must_use]
    pub fn saved(&self) -> &Saved {
        &self.saved
    }

    /// Works until `cancel`. A job under way is ended; what it proved so far is saved.
    ///
    /// # Errors
    /// Something failed that no transition covers; starting again is the way to recover.
    pub async fn run(mut self, cancel: CancellationToken) -> Result<(), AgentError> {
        info!(
            running = %self.facts.running,
            next = self.facts.next.map_or("unknown", |slot| slot.name()),
            phase = Phase::of(&self.saved.state).name(),
            "agent started"
        );
        self.publish();
        self.handle(Event::Started, None).await?;
        let mut alive = tokio::time::interval(ALIVE);
        while !cancel.is_cancelled() {
            // Cancel-safe: the receivers' `recv` and `changed`, `interval.tick` and sleeps with a
            // fixed end are; whatever follows runs to its end outside the select.
            let input = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                _ = alive.tick() => Input::Alive,
                Some(request) = self.inputs.requests.recv() => Input::Request(request),
                event = jobs::next(&mut self.work) => Input::Event(event),
                event = jobs::next(&mut self.watching) => Input::Event(event),
                event = jobs::next(&mut self.restarting) => Input::Event(event),
                event = jobs::next(&mut self.reading) => Input::Event(event),
                Some(desired) = self.inputs.desired.recv() => Input::Desired(desired),
                () = at(self.retry_save) => Input::RetrySave,
                () = at(self.retry_confirm) => Input::RetryConfirm,
                Ok(()) = self.progress_seen.changed() => Input::Progress,
            };
            if self.inputs.session.borrow().online {
                self.hub_seen = Some(Instant::now());
            }
            self.take(input).await?;
        }
        self.note_stop().await?;
        self.stop_jobs().await;
        Ok(())
    }

    /// The daemon is told to end. If the machine ends with it, a switch or a trial is prepared for
    /// that; a mere restart of the daemon changes nothing.
    async fn note_stop(&mut self) -> Result<(), AgentError> {
        let matters = match &self.saved.state {
            State::Switching { armed, .. } => *armed,
            State::Trial { healthy, .. } => !healthy,
            _ => false,
        };
        if !matters {
            return Ok(());
        }
        let stop = self.restarter.stopping().await.unwrap_or_else(|problem| {
            warn!(problem, "it is not known whether the machine goes down");
            // It does at least if that was just ordered.
            self.restarting.is_some().then_some(Stop::Restart)
        });
        let Some(stop) = stop else { return Ok(()) };
        info!(?stop, "the machine goes down");
        self.handle(Event::MachineStops { restarts: stop == Stop::Restart }, None).await
    }

    async fn take(&mut self, input: Input) -> Result<(), AgentError> {
        match input {
            Input::Alive => {
                self.supervisor.alive();
                self.supervisor.status(&self.sentence());
            }
            Input::Request(request) => self.answer(request).await?,
            Input::Event(event) => {
                let event = self.cleaned(event).await?;
                if let Event::RestartFailed(failure) = &event {
                    self.restarting = None;
                    self.trouble(Trouble::Restarting, Some(failure.detail.clone()));
                }
                self.handle(event, None).await?;
            }
            Input::Desired(desired) => {
                let wanted = (self.read_desired)(&desired);
                self.desired = wanted.clone();
                let rewritten = desired.patch.is_some_and(|patch| patch.contains_key("firmware"));
                let event = Event::Desired { id: run_id(), wanted, rewritten };
                self.handle(event, None).await?;
            }
            Input::RetrySave => self.retry_save().await?,
            Input::RetryConfirm if self.may_confirm() => {
                self.retry_confirm = None;
                let event = self.confirm().await?;
                self.handle(event, None).await?;
            }
            // Later, when what was ordered since has come to its end.
            Input::RetryConfirm => self.retry_confirm = Some(Instant::now() + RETRY),
            Input::Progress => self.progressed(),
        }
        Ok(())
    }

    /// One event and all that follows from it at once.
    async fn handle(
        &mut self,
        event: Event,
        mut reply: Option<oneshot::Sender<Answer>>,
    ) -> Result<(), AgentError> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if !self.unsaved.is_empty() {
                // Order matters more than speed: nothing overtakes what is not saved.
                self.unsaved.push_back(event);
                continue;
            }
            let phase = Phase::of(&self.saved.state);
            let home = self.saved.home;
            let needed_image = needs_image(&self.saved.state) || event == Event::Started;
            let (next, orders) = step(self.saved.clone(), event.clone(), &self.facts());
            if next != self.saved
                && let Err(error) = self.save(next, &event).await?
            {
                self.cannot_save(&error, event, &mut reply).await?;
                continue;
            }
            for order in orders {
                match self.carry_out(order, &mut reply).await? {
                    orders::Done::Quietly => {}
                    orders::Done::With(event) => events.push_back(event),
                    orders::Done::Failed(event) => {
                        events.push_back(event);
                        break;
                    }
                }
            }
            self.end_watch_if_pointless();
            if needed_image && !needs_image(&self.saved.state) {
                self.patiently(self.images.release()).await;
            }
            let settled = self.saved.state == State::Idle
                && (phase != Phase::Idle || home != self.saved.home);
            if settled
                && events.is_empty()
                && let Some(wanted) = self.desired.clone()
            {
                let wanted = Some(wanted);
                events.push_back(Event::Desired { id: run_id(), wanted, rewritten: false });
            }
        }
        if let Some(reply) = reply {
            let _ = reply.send(Answer::refused(409, "notNow", "That is not possible now"));
        }
        Ok(())
    }

    async fn answer(&mut self, request: Request) -> Result<(), AgentError> {
        let event = match request.command {
            Command::Status => {
                let _ = request.reply.send(self.status());
                return Ok(());
            }
            Command::Cancel if self.too_late_to_cancel().is_some() => {
                let why = self.too_late_to_cancel().unwrap_or_default();
                let _ = request.reply.send(Answer::refused(409, "tooLate", why));
                return Ok(());
            }
            Command::Install(job, origin) => Event::Requested { id: run_id(), job, origin },
            Command::Cancel => Event::CancelRequested,
            Command::Confirm => Event::ConfirmRequested,
            Command::RollBack(origin) => Event::RollBackRequested { id: run_id(), origin },
            Command::Reboot => Event::RestartRequested,
        };
        let mut reply = Some(request.reply);
        if !self.unsaved.is_empty() {
            if event == Event::RestartRequested {
                return self.restart_unsaved(&mut reply).await;
            }
            if let Some(reply) = reply {
                let _ = reply.send(self.not_saved());
            }
            return Ok(());
        }
        self.handle(event, reply).await
    }

    fn facts(&self) -> Facts {
        Facts {
            running: self.facts.running,
            next: self.facts.next,
            tried: self.facts.tried,
            by_argument: self.restart_argument.is_some(),
            boot: self.boot_id.clone(),
            hub_online: self.hub_seen.is_some_and(|seen| seen.elapsed() < HUB_GRACE),
            running_version: self.device.running_version.clone(),
            since_boot_s: self.clock.since_boot().as_secs(),
            now: self.clock.wall(),
            limits: self.settings.limits,
        }
    }

    /// Why the work under way goes on although somebody takes the update back.
    fn too_late_to_cancel(&self) -> Option<&'static str> {
        self.images
            .uninterruptible()
            .filter(|_| matches!(self.saved.state, State::Verifying { .. }))
    }

    /// A confirmation that comes late must not undo a switch or a way back that was ordered since.
    fn may_confirm(&self) -> bool {
        match &self.saved.state {
            State::Idle => self.saved.home.is_none_or(|home| home == self.facts.running),
            State::Fetching { .. } | State::Verifying { .. } => true,
            State::Switching { .. } | State::RollingBack { .. } => false,
            State::Trial { healthy, .. } => *healthy,
        }
    }

    /// Waits for a blocking call without looking dead to the supervisor, for as long as such a call
    /// may take.
    async fn patiently<T>(&self, call: impl Future<Output = T>) -> T {
        tokio::pin!(call);
        let began = Instant::now();
        loop {
            // Cancel-safe: `call` is pinned outside the loop.
            tokio::select! {
                biased;
                result = &mut call => return result,
                () = tokio::time::sleep(ALIVE) => {
                    if began.elapsed() <= PATIENCE {
                        self.supervisor.alive();
                    }
                }
            }
        }
    }

    /// Asks the bootloader, on a blocking thread.
    async fn with_boot<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut (dyn Bootloader + 'static)) -> R + Send + 'static,
    ) -> Result<R, AgentError> {
        self.patiently(blocking(&self.boot, work)).await
    }

    /// The checks are for a slot that is not known good yet.
    fn end_watch_if_pointless(&mut self) {
        let useful = match &self.saved.state {
            State::Trial { healthy, stopped, .. } => !healthy && !stopped,
            State::Idle => self.saved.home != Some(self.facts.running),
            _ => false,
        };
        if !useful {
            self.watching = None;
        }
    }

    async fn stop_jobs(&mut self) {
        self.watching = None;
        self.restarting = None;
        self.reading = None;
        if let Some(work) = self.work.take() {
            self.stopping = work.stop();
        }
        if let Some(task) = self.stopping.take()
            && let Err(error) = task.await
        {
            warn!(error = %chain(&error), "a job ended badly");
        }
    }
}

/// What wakes the loop.
enum Input {
    Alive,
    Request(Request),
    Event(Event),
    Desired(Desired),
    RetrySave,
    RetryConfirm,
    Progress,
}

/// Whether what was fetched may be needed once more.
fn needs_image(state: &State) -> bool {
    matches!(state, State::Fetching { .. } | State::Verifying { .. })
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Asks the bootloader. A device that has been set up, as far as it is `known`, stays on the hub to be
/// mended where only the running slot can be told; the text says what is wrong.
fn ask(
    boot: &mut (dyn Bootloader + 'static),
    known: bool,
) -> Result<(BootFacts, Option<String>), AgentError> {
    boot.facts().map(|facts| (facts, None)).or_else(|error| match boot.running() {
        Ok(running) if known => {
            let problem = format!("the bootloader cannot be asked: {}", chain(&error));
            Ok((BootFacts { running, next: None, tried: None }, Some(problem)))
        }
        _ => Err(AgentError::Boot(error)),
    })
}

/// A name that two runs of one device do not share.
fn run_id() -> RunId {
    RunId(format!("{:016x}", fastrand::u64(..)))
}

/// Calls `work` on a blocking thread: the only place where a port may block.
async fn blocking<P, R>(
    port: &Arc<Mutex<Box<P>>>,
    work: impl FnOnce(&mut P) -> R + Send + 'static,
) -> Result<R, AgentError>
where
    P: ?Sized + Send + 'static,
    R: Send + 'static,
{
    let port = Arc::clone(port);
    tokio::task::spawn_blocking(move || work(port.blocking_lock().as_mut()))
        .await
        .map_err(AgentError::Blocking)
}
