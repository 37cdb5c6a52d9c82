//! systemd's watchdog is fed by the working loop: not by a loop that is stuck.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use twinboot::agent::{
    Agent, HealthChecks, Identity, Images, Inputs, JobChannels, Ports, Restarter, Settings, Stop,
    Supervisor,
};
use twinboot::boot::{BootError, BootFacts, Bootloader};
use twinboot::clock::Clock;
use twinboot::hub::{Report, SessionStatus};
use twinboot::request::{Command, Request};
use twinboot::store::{Loaded, StateStore, StoreError};
use twinboot::update::{
    BootId, Checkpoint, Contracts, Device, Failure, Job, Limits, Saved, Slot, WallTime, Written,
};

/// What systemd's unit asks for: the shipped `WatchdogSec=`.
const UNIT: &str = include_str!("../systemd/twinbootd.service");

/// A device at rest whose disk, or bootloader's tool, may stop answering.
#[derive(Clone, Default)]
struct Board {
    stuck: Arc<(Mutex<bool>, Condvar)>,
    asked: Arc<AtomicBool>,
    fed: Arc<AtomicUsize>,
}

impl Board {
    /// The device stops answering, or answers again.
    fn set_stuck(&self, stuck: bool) {
        *self.stuck.0.lock().unwrap() = stuck;
        self.stuck.1.notify_all();
    }

    /// Something is asked of the device.
    fn answer(&self) {
        let mut stuck = self.stuck.0.lock().unwrap();
        self.asked.store(*stuck, Ordering::SeqCst);
        while *stuck {
            stuck = self.stuck.1.wait(stuck).unwrap();
        }
    }

    /// How often the watchdog is fed in this time.
    async fn fed_within(&self, time: Duration) -> usize {
        let before = self.fed.load(Ordering::SeqCst);
        for _ in 0..time.as_secs() {
            tokio::time::advance(Duration::from_secs(1)).await;
            // Whatever became due runs.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        }
        self.fed.load(Ordering::SeqCst) - before
    }
}

/// However the test ends: a call that never comes back would keep it from ending.
struct Released(Board);

impl Drop for Released {
    fn drop(&mut self) {
        self.0.set_stuck(false);
    }
}

impl Bootloader for Board {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        Ok(BootFacts { running: Slot::A, next: Some(Slot::A), tried: None })
    }

    fn retire(&mut self, _slot: Slot) -> Result<(), BootError> {
        Ok(())
    }

    fn try_next(&mut self, _slot: Slot) -> Result<(), BootError> {
        Ok(())
    }

    fn cancel_try(&mut self, _slot: Slot) -> Result<(), BootError> {
        Ok(())
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        Ok(())
    }
}

impl StateStore for Board {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let saved = Saved { home: Some(Slot::A), ..Saved::new() };
        Ok(Loaded { saved: Some(saved), set_aside: None })
    }

    fn save(&mut self, _saved: &Saved) -> Result<(), StoreError> {
        self.answer();
        Ok(())
    }
}

impl Clock for Board {
    fn wall(&self) -> Option<WallTime> {
        Some(WallTime::from_unix_ms(1_800_000_000_000))
    }

    fn since_boot(&self) -> Duration {
        Duration::from_secs(1000)
    }
}

impl Images for Board {
    fn fetch(
        &self,
        _job: Job,
        _slot: Slot,
        _checkpoint: Option<Checkpoint>,
        _channels: JobChannels,
    ) -> BoxFuture<'static, Result<Written, Failure>> {
        std::future::pending().boxed()
    }

    fn verify(
        &self,
        _written: Written,
        _slot: Slot,
        _channels: JobChannels,
    ) -> BoxFuture<'static, Result<(), Failure>> {
        std::future::pending().boxed()
    }
}

impl HealthChecks for Board {
    fn check(&self) -> BoxFuture<'static, Result<(), String>> {
        std::future::pending().boxed()
    }

    fn cut_off(&self) -> BoxFuture<'static, Option<String>> {
        std::future::ready(None).boxed()
    }
}

impl Restarter for Board {
    fn restart(&self, _argument: Option<&'static str>) -> BoxFuture<'static, Result<(), String>> {
        std::future::pending().boxed()
    }

    fn stopping(&self) -> BoxFuture<'static, Result<Option<Stop>, String>> {
        std::future::ready(Ok(None)).boxed()
    }

    fn carry(&self, _argument: &'static str) -> BoxFuture<'static, Result<(), String>> {
        std::future::ready(Ok(())).boxed()
    }
}

impl Supervisor for Board {
    fn alive(&self) {
        self.fed.fetch_add(1, Ordering::SeqCst);
    }

    fn status(&self, _sentence: &str) {}
}

/// `WatchdogSec=` of the shipped unit.
fn watchdog() -> Duration {
    let line = UNIT.lines().find_map(|line| line.strip_prefix("WatchdogSec=")).unwrap();
    Duration::from_secs(line.parse().unwrap())
}

/// The agent on `board`, and where requests go.
async fn agent(board: &Board) -> (Agent, mpsc::Sender<Request>) {
    let (requests, incoming) = mpsc::channel(16);
    let ports = Ports {
        boot: Box::new(board.clone()),
        store: Box::new(board.clone()),
        clock: Arc::new(board.clone()),
        images: Arc::new(board.clone()),
        health: Arc::new(board.clone()),
        restarter: Arc::new(board.clone()),
        journal: None,
        supervisor: Arc::new(board.clone()),
        secrets: Arc::new(Vec::new),
    };
    let inputs = Inputs {
        requests: incoming,
        desired: mpsc::channel(16).1,
        session: watch::channel(SessionStatus::default()).1,
        report: watch::channel(Arc::new(Report::default())).0,
    };
    let settings = Settings {
        limits: Limits { attempts: 3, trial_starts: 3, trial_s: 600, trial_outage_s: 600 },
        hub_must_be_well: false,
        health_interval: Duration::from_secs(5),
        progress_interval: Duration::from_secs(5),
        progress_step_percent: 5,
        restart_report_limit: Duration::ZERO,
        restart_limit: Duration::from_secs(300),
    };
    let contracts = Contracts { iothub_dm: true, firmware_status: true, firmware: true };
    let identity = Identity {
        boot: BootId("boot".to_owned()),
        device: Device {
            agent_version: "0",
            running: Slot::A,
            running_version: None,
            started: None,
            contracts,
            notices: Vec::new(),
        },
    };
    let agent = Agent::start(ports, settings, inputs, Box::new(|_| None), identity).await.unwrap();
    (agent, requests)
}

#[tokio::test(start_paused = true)]
async fn a_working_loop_feeds_it_and_a_stuck_one_does_not() {
    let board = Board::default();
    let _released = Released(board.clone());
    let (agent, requests) = agent(&board).await;
    let cancel = CancellationToken::new();
    let running = tokio::spawn(agent.run(cancel.clone()));
    // Often enough for one that gets lost.
    assert!(board.fed_within(watchdog()).await >= 2, "a loop at rest");

    // A restart is noted down first, and the disk does not answer any more.
    board.set_stuck(true);
    let (reply, _answer) = oneshot::channel();
    requests.send(Request { command: Command::Reboot, reply }).await.unwrap();
    let called = std::time::Instant::now();
    while !board.asked.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
        assert!(called.elapsed() < Duration::from_secs(60), "the state is never saved");
    }
    assert!(board.fed_within(watchdog()).await >= 2, "slow, but it may come");
    assert!(board.fed_within(Duration::from_secs(20 * 60)).await > 0);
    for _ in 0..5 {
        assert_eq!(board.fed_within(watchdog()).await, 0, "a stuck loop is ended by systemd");
    }

    // It did answer in the end, before systemd came.
    board.set_stuck(false);
    while board.fed_within(watchdog()).await == 0 {
        assert!(called.elapsed() < Duration::from_secs(60), "it never works again");
    }
    cancel.cancel();
    running.await.unwrap().unwrap();
}
