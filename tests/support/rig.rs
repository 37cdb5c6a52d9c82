//! A device in memory: two slots, a bootloader, a state file, an operator, and a battery that
//! lasts a given number of operations. The agent that lives in it is the real one; only what
//! stands behind its ports is made up, and fails where a test wants it to.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use twinboot::agent::{
    Agent, FetchEvent, HealthChecks, Identity, Images, Inputs, JobChannels, Ports, Restarter,
    Settings, Supervisor,
};
use twinboot::boot::{BootError, BootFacts, Bootloader};
use twinboot::clock::Clock;
use twinboot::hub::{Desired, Report, SessionStatus};
use twinboot::request::{Answer, Command, Request};
use twinboot::store::{Loaded, StateStore, StoreError};
use twinboot::update::{
    BootId, Checkpoint, Contracts, Device, Digest, Failure, FailureKind, HashState, Job, Limits,
    Origin, Outcome, OutcomeKind, Progress, Saved, Slot, State, WallTime, Wanted, Written,
};

/// Chunks of an image.
const CHUNKS: usize = 5;
/// The chunk after which a download notes a checkpoint.
const CHECKPOINT: usize = 3;
/// What a write that was cut leaves behind.
const TORN: u8 = 0xee;
/// Starts of the agent after which a device counts as never coming to rest.
const MAX_LIVES: usize = 60;
/// The U-Boot script's attempts for a confirmed slot.
const ATTEMPTS: u8 = 3;

const LIMITS: Limits = Limits { attempts: 4, trial_starts: 3, trial_s: 60 };

// What a test chooses ---------------------------------------------------------------------------

/// Which boot script decides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Script {
    /// A default, and one start of another slot if the restart asks for it: Raspberry Pi.
    Tryboot,
    /// RAUC's script for U-Boot: every start takes one off the slot's counter.
    Uboot,
    /// RAUC's script for GRUB: every start marks the slot as tried.
    Grub,
}

impl Script {
    pub const ALL: [Script; 3] = [Script::Tryboot, Script::Uboot, Script::Grub];
}

/// What is wrong with the device, besides its power supply.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Version 2 starts and never gets healthy.
    SickSlot,
    /// Version 2 gets healthy, and no longer is once it was confirmed.
    SickAfterConfirm,
    /// Version 2 does not start at all.
    DeadSlot,
    /// The medium keeps something else than what is written to it.
    LyingDisk,
    /// The machine does not restart when told to.
    NoRestart,
    /// The bootloader takes the order to try a slot, and does not.
    NeverTries,
    /// The bootloader makes a slot its default as soon as it starts it.
    ConfirmsByItself,
    /// The bootloader stays with a slot that it once tried, whatever it is told.
    NeverGoesBack,
    /// The bootloader's variables can no longer be written after the first start.
    BootVariablesReadOnly,
    /// Every cut of the power takes the state file along.
    StateLost,
    /// Every cut of the power brings back the state before the last save.
    StateReverts,
    /// No state can be saved for a minute, again and again.
    StateFolderFull,
}

/// What an operator does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Act {
    /// The method `firmwareUpdate`.
    Install(u8),
    /// Writes the desired properties, or removes the section.
    Desire(Option<u8>),
    /// The method `cancelFirmwareUpdate`.
    Cancel,
    /// The method `confirmFirmware`.
    Confirm,
    /// The method `rollbackFirmware`.
    RollBack,
    /// The method `reboot`.
    Reboot,
}

/// When he does it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum When {
    /// Once the device has come to rest.
    AtRest,
    /// So many seconds after what he did before.
    After(u64),
}

/// How a life of the agent is cut short.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cut {
    /// The power goes before this operation is done.
    Power(usize),
    /// The agent is killed before this operation is done, and started again.
    Kill(usize),
}

/// A test's choice of all that.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub script: Script,
    pub fault: Fault,
    pub acts: Vec<(When, Act)>,
    /// The first counts operations from the beginning, each other one from the cut before it.
    pub cuts: Vec<Cut>,
}

// The machine ------------------------------------------------------------------------------------

/// The boot script's variables.
#[derive(Clone, Debug)]
enum Variables {
    Tryboot { usual: Slot, one_shot: Slot },
    Uboot { order: Vec<Slot>, left: [u8; 2] },
    Grub { order: [Slot; 2], ok: [bool; 2], tried: [bool; 2] },
}

fn index(slot: Slot) -> usize {
    match slot {
        Slot::A => 0,
        Slot::B => 1,
    }
}

impl Variables {
    fn new(script: Script) -> Self {
        match script {
            Script::Tryboot => Variables::Tryboot { usual: Slot::A, one_shot: Slot::A },
            Script::Uboot => Variables::Uboot { order: vec![Slot::A], left: [ATTEMPTS, 0] },
            Script::Grub => Variables::Grub {
                order: [Slot::A, Slot::B],
                ok: [true, false],
                tried: [false, false],
            },
        }
    }

    /// What would start next, as far as it can be told.
    fn next(&self) -> Option<Slot> {
        match self {
            Variables::Tryboot { usual, .. } => Some(*usual),
            Variables::Uboot { order, left } => {
                order.iter().copied().find(|slot| left[index(*slot)] > 0)
            }
            Variables::Grub { order, ok, tried } => {
                order.iter().copied().find(|slot| ok[index(*slot)] && !tried[index(*slot)])
            }
        }
    }

    /// Whether any number of starts and cuts could lead into `slot`.
    fn may_start(&self, slot: Slot) -> bool {
        match self {
            Variables::Tryboot { usual, one_shot } => *usual == slot || *one_shot == slot,
            Variables::Uboot { order, .. } => order.contains(&slot),
            Variables::Grub { ok, .. } => ok[index(slot)],
        }
    }

    /// The machine starts: what RAUC's scripts and the Raspberry Pi's firmware do.
    fn start(&mut self, argument: Option<&str>) -> Slot {
        match self {
            Variables::Tryboot { usual, one_shot } => {
                if argument == Some("0 tryboot") {
                    *one_shot
                } else {
                    *usual
                }
            }
            Variables::Uboot { order, left } => {
                assert!(!order.is_empty(), "nothing to boot");
                if order.iter().all(|slot| left[index(*slot)] == 0) {
                    *left = [ATTEMPTS; 2];
                }
                let slot = order.iter().copied().find(|slot| left[index(*slot)] > 0).unwrap();
                left[index(slot)] -= 1;
                slot
            }
            Variables::Grub { order, ok, tried } => {
                // The rescue system is left by switching the machine off and on again.
                for _ in 0..2 {
                    for slot in *order {
                        let untried = !std::mem::replace(&mut tried[index(slot)], true);
                        if ok[index(slot)] && untried {
                            return slot;
                        }
                    }
                    for slot in Slot::BOTH {
                        tried[index(slot)] &= !ok[index(slot)];
                    }
                }
                panic!("nothing to boot");
            }
        }
    }

    fn retire(&mut self, slot: Slot) {
        let other = slot.other();
        match self {
            Variables::Tryboot { usual, one_shot } => (*usual, *one_shot) = (other, other),
            Variables::Uboot { order, left } => {
                *order = vec![other];
                left[index(slot)] = 0;
                if left[index(other)] == 0 {
                    left[index(other)] = ATTEMPTS;
                }
            }
            Variables::Grub { order, ok, tried } => {
                *order = [other, slot];
                ok[index(other)] = true;
                ok[index(slot)] = false;
                *tried = [false; 2];
            }
        }
    }

    fn try_next(&mut self, slot: Slot) {
        let other = slot.other();
        match self {
            Variables::Tryboot { usual, one_shot } => (*usual, *one_shot) = (other, slot),
            Variables::Uboot { order, left } => {
                *order = vec![slot, other];
                left[index(slot)] = 1;
                if left[index(other)] == 0 {
                    left[index(other)] = ATTEMPTS;
                }
            }
            Variables::Grub { order, ok, tried } => {
                *order = [slot, other];
                *ok = [true; 2];
                *tried = [false; 2];
            }
        }
    }

    fn confirm(&mut self, running: Slot) {
        let other = running.other();
        match self {
            Variables::Tryboot { usual, one_shot } => {
                let retired = *usual == running && *one_shot == running;
                (*usual, *one_shot) = (running, if retired { running } else { other });
            }
            Variables::Uboot { order, left } => {
                let others = order.iter().copied().filter(|slot| *slot == other);
                *order = std::iter::once(running).chain(others).collect();
                left[index(running)] = ATTEMPTS;
            }
            Variables::Grub { order, ok, tried } => {
                *order = [running, other];
                ok[index(running)] = true;
                tried[index(running)] = false;
            }
        }
    }
}

/// Everything that outlives the agent, and what a test wants to know in the end.
#[derive(Debug)]
pub struct Machine {
    scenario: Scenario,
    slots: [Vec<u8>; 2],
    variables: Variables,
    /// Where a bootloader sticks that never goes back.
    stuck_in: Option<Slot>,
    /// The slot that runs.
    pub running: Slot,
    boot: u64,
    uptime: Duration,
    /// The state file.
    pub saved: Option<Saved>,
    saved_before: Option<Saved>,
    desired: Option<u8>,
    acts: VecDeque<(When, Act)>,

    /// Operations left; none if the power is not going to fail any more.
    battery: Option<(usize, End)>,
    cuts: VecDeque<Cut>,
    life: u64,
    end: Option<End>,

    /// Operations done.
    pub operations: usize,
    restarts: usize,
    /// What was saved when each cut came.
    pub cut_in: Vec<Option<State>>,
    /// Names of all runs that were saved, and of those that have an outcome.
    runs: Vec<String>,
    ended: Vec<String>,
    /// Versions that ran while the bootloader was told to confirm the running slot.
    confirmed: Vec<u8>,
    /// What the operator was told.
    pub answers: Vec<(Act, Answer)>,
    violations: Vec<String>,
    log: Vec<String>,
}

/// Why a life of the agent ended.
#[derive(Clone, Debug, Eq, PartialEq)]
enum End {
    PowerCut,
    Killed,
    Restart(Option<&'static str>),
    AtRest,
}

/// The device, shared by everything that stands behind the ports.
#[derive(Clone)]
pub struct Rig {
    machine: Arc<Mutex<Machine>>,
    ended: Arc<Notify>,
    rested: Arc<Notify>,
}

/// The power is gone, or the agent is.
struct Gone;

fn image(version: u8) -> Vec<u8> {
    vec![version; CHUNKS]
}

/// The version of a whole image.
fn version_in(content: &[u8]) -> Option<u8> {
    let version = *content.first()?;
    ((1..=9).contains(&version) && content == image(version)).then_some(version)
}

fn digest_of(content: &[u8]) -> Digest {
    let mut bytes = [0; 32];
    bytes[..content.len()].copy_from_slice(content);
    Digest::new(bytes)
}

impl Machine {
    fn note(&mut self, what: String) {
        self.log
            .push(format!("{:>3} boot {} {}: {what}", self.operations, self.boot, self.running));
    }

    fn violation(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.note(format!("VIOLATION {what}"));
        self.violations.push(what);
    }

    /// One operation on a medium. `torn` is what it leaves if the power goes in the middle of it.
    fn spend(
        &mut self,
        life: u64,
        what: impl FnOnce() -> String,
        torn: impl FnOnce(&mut Self),
    ) -> Result<(), Gone> {
        if self.life != life || self.end.is_some() {
            return Err(Gone);
        }
        if let Some((left, end)) = &mut self.battery {
            if *left == 0 {
                let end = end.clone();
                self.battery = None;
                self.note(format!("{end:?} before: {}", what()));
                self.cut_in.push(self.saved.as_ref().map(|saved| saved.state.clone()));
                if end == End::PowerCut {
                    torn(self);
                }
                self.end = Some(end);
                return Err(Gone);
            }
            *left -= 1;
        }
        self.operations += 1;
        self.note(what());
        Ok(())
    }

    fn next_cut(&mut self) {
        self.battery = self.cuts.pop_front().map(|cut| match cut {
            Cut::Power(left) => (left, End::PowerCut),
            Cut::Kill(left) => (left, End::Killed),
        });
    }

    fn may_start(&self, slot: Slot) -> bool {
        self.variables.may_start(slot) || self.stuck_in == Some(slot)
    }

    /// The machine starts, if need be more than once.
    fn start(&mut self, mut argument: Option<&str>) {
        for _ in 0..20 {
            self.boot += 1;
            self.uptime = Duration::ZERO;
            let tried = self.variables.start(argument.take());
            let slot = self.stuck_in.unwrap_or(tried);
            let was_running = std::mem::replace(&mut self.running, slot);
            let fault = self.scenario.fault;
            if fault == Fault::NeverGoesBack && slot != was_running {
                self.stuck_in = Some(slot);
            }
            if fault == Fault::ConfirmsByItself {
                self.variables.confirm(slot);
            }
            self.note("starts".into());
            let Some(version) = version_in(&self.slots[index(slot)]) else {
                let content = self.slots[index(slot)].clone();
                return self.violation(format!("started the broken image {content:?}"));
            };
            if !(fault == Fault::DeadSlot && version == 2) {
                return;
            }
        }
        self.violation("never started again");
    }

    fn running_version(&self) -> u8 {
        version_in(&self.slots[index(self.running)]).unwrap_or(0)
    }

    fn healthy(&self) -> bool {
        match self.scenario.fault {
            Fault::SickSlot | Fault::NeverGoesBack => self.running_version() != 2,
            Fault::SickAfterConfirm => self.running_version() != 2 || !self.confirmed.contains(&2),
            _ => true,
        }
    }
}

// Behind the ports -------------------------------------------------------------------------------

/// One life of the agent: whatever it leaves behind cannot touch the next.
#[derive(Clone)]
struct Life {
    rig: Rig,
    number: u64,
    began: Instant,
    uptime: Duration,
}

impl Life {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.rig.machine.lock().unwrap()
    }

    /// One operation; `act` is done only if it is not cut.
    fn operate<T>(
        &self,
        what: impl FnOnce() -> String,
        torn: impl FnOnce(&mut Machine),
        act: impl FnOnce(&mut Machine) -> T,
    ) -> Result<T, Gone> {
        let mut machine = self.machine();
        let result = machine.spend(self.number, what, torn).map(|()| act(&mut machine));
        if result.is_err() {
            self.rig.ended.notify_one();
        }
        result
    }

    fn boot_operation(
        &self,
        name: &str,
        slot: Slot,
        act: impl FnOnce(&mut Machine),
    ) -> Result<(), BootError> {
        let error = || BootError::Invalid { where_: "rig".into(), problem: "refused".into() };
        let fault = self.machine().scenario.fault;
        if fault == Fault::BootVariablesReadOnly && self.machine().boot > 1 {
            return Err(error());
        }
        self.operate(|| format!("{name} {slot}"), |_| (), act).map_err(|Gone| error())
    }
}

impl Bootloader for Life {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        let machine = self.machine();
        Ok(BootFacts { running: machine.running, next: machine.variables.next() })
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("retire", slot, |machine| machine.variables.retire(slot))
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("try next", slot, |machine| {
            if version_in(&machine.slots[index(slot)]).is_none() {
                machine.violation("is about to try a broken image");
            }
            if machine.scenario.fault != Fault::NeverTries {
                machine.variables.try_next(slot);
            }
        })
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("cancel the try of", slot, |machine| machine.variables.retire(slot))
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = self.machine().running;
        self.boot_operation("confirm", running, |machine| {
            machine.variables.confirm(running);
            let version = machine.running_version();
            machine.confirmed.push(version);
        })
    }

    fn restart_argument(&self) -> Option<&'static str> {
        (self.machine().scenario.script == Script::Tryboot).then_some("0 tryboot")
    }
}

impl StateStore for Life {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded { saved: self.machine().saved.clone(), set_aside: None })
    }

    fn save(&mut self, saved: &Saved) -> Result<(), StoreError> {
        let failed = || StoreError::Write {
            path: PathBuf::from("state.json"),
            source: std::io::Error::other("no room"),
        };
        let full = self.machine().scenario.fault == Fault::StateFolderFull;
        if full && self.since_boot().as_secs() / 60 % 2 == 0 {
            return Err(failed());
        }
        let what = || {
            let outcome = saved.last.as_ref().map(|last| &last.kind);
            format!("save {:?}, home {:?}, last {outcome:?}", saved.state, saved.home)
        };
        self.operate(
            what,
            |_| (),
            |machine| {
                let run = saved.state.run().map(|run| run.id.0.clone());
                machine.runs.extend(run.filter(|run| !machine.runs.contains(run)));
                let over = saved.last.as_ref().and_then(|last| last.run.as_ref());
                machine.ended.extend(over.map(|run| run.id.0.clone()));
                machine.saved_before = machine.saved.replace(saved.clone());
            },
        )
        .map_err(|Gone| failed())
    }
}

impl Clock for Life {
    fn wall(&self) -> Option<WallTime> {
        let boot_ms = i64::try_from(self.machine().boot).unwrap() * 3_600_000;
        let ms = i64::try_from(self.since_boot().as_millis()).unwrap();
        Some(WallTime::from_unix_ms(1_800_000_000_000 + boot_ms + ms))
    }

    fn since_boot(&self) -> Duration {
        self.uptime + self.began.elapsed()
    }
}

impl Images for Life {
    fn fetch(
        &self,
        job: Job,
        slot: Slot,
        checkpoint: Option<Checkpoint>,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<Written, Failure>> {
        let life = self.clone();
        async move {
            let version: u8 = job.version.unwrap().to_string().parse().unwrap();
            let proven = checkpoint.map_or(0, |checkpoint| {
                let length = usize::try_from(checkpoint.written_bytes).unwrap();
                let found = life.machine().slots[index(slot)].clone();
                if found.starts_with(&image(version)[..length]) { length } else { 0 }
            });
            let _ = channels.events.send(FetchEvent::Began).await;
            for chunk in proven..CHUNKS {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if channels.cancel.is_cancelled() {
                    return Err(Failure::new(FailureKind::Cancelled, "stopped"));
                }
                life.write(version, slot, chunk)
                    .map_err(|Gone| Failure::new(FailureKind::SlotIo, "gone"))?;
                let bytes = u64::try_from(chunk + 1).unwrap();
                channels.progress.send_replace(Progress {
                    fetched_bytes: bytes,
                    written_bytes: bytes,
                    ..Progress::default()
                });
                if chunk + 1 == CHECKPOINT {
                    let _ =
                        channels.events.send(FetchEvent::Checkpoint(checkpoint_at(bytes))).await;
                }
            }
            Ok(Written {
                image_bytes: u64::try_from(CHUNKS).unwrap(),
                image_digest: digest_of(&image(version)),
                fetched_bytes: u64::try_from(CHUNKS).unwrap(),
            })
        }
        .boxed()
    }

    fn verify(
        &self,
        written: Written,
        slot: Slot,
        _channels: JobChannels,
    ) -> BoxFuture<'static, Result<(), Failure>> {
        let life = self.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let found = digest_of(&life.machine().slots[index(slot)]);
            if found == written.image_digest {
                Ok(())
            } else {
                Err(Failure::new(FailureKind::ReadBack, "the slot holds something else"))
            }
        }
        .boxed()
    }
}

fn checkpoint_at(bytes: u64) -> Checkpoint {
    Checkpoint {
        fetched_bytes: bytes,
        written_bytes: bytes,
        fetched_hash: HashState(String::new()),
        image_hash: HashState(String::new()),
        etag: None,
        total_bytes: None,
    }
}

impl Life {
    fn write(&self, version: u8, slot: Slot, chunk: usize) -> Result<(), Gone> {
        let put = |machine: &mut Machine, byte| {
            let content = &mut machine.slots[index(slot)];
            content.resize(CHUNKS, 0);
            content[chunk] = byte;
        };
        self.operate(
            || format!("write chunk {chunk} of version {version} to {slot}"),
            |machine| put(machine, TORN),
            |machine| {
                if slot == machine.running {
                    machine.violation("wrote over the running slot");
                }
                if machine.may_start(slot) {
                    machine.violation("wrote to a slot that may start");
                }
                let lies = machine.scenario.fault == Fault::LyingDisk && chunk == 1;
                put(machine, if lies { version ^ 0x40 } else { version });
            },
        )
    }
}

impl HealthChecks for Life {
    fn check(&self) -> BoxFuture<'static, Result<(), String>> {
        let healthy = self.machine().healthy();
        let result = if healthy { Ok(()) } else { Err("sick".to_owned()) };
        std::future::ready(result).boxed()
    }
}

impl Restarter for Life {
    fn restart(&self, argument: Option<&'static str>) -> BoxFuture<'static, Result<(), String>> {
        let result = self
            .operate(
                || format!("restart {argument:?}"),
                |_| (),
                |machine| {
                    machine.restarts += 1;
                    if machine.scenario.fault != Fault::NoRestart {
                        machine.end = Some(End::Restart(argument));
                    }
                },
            )
            .map_err(|Gone| "gone".to_owned());
        self.rig.ended.notify_one();
        std::future::ready(result).boxed()
    }
}

/// Knows when nothing happens any more: the loop gives a sign of life every few seconds.
struct Rest {
    life: Life,
    seen: Mutex<(usize, usize)>,
}

impl Supervisor for Rest {
    fn alive(&self) {
        let operations = self.life.machine().operations;
        let mut seen = self.seen.lock().unwrap();
        *seen = if seen.0 == operations { (operations, seen.1 + 1) } else { (operations, 0) };
        // Longer than a trial, a retry and a restart may take.
        if seen.1 >= 30 {
            seen.1 = 0;
            self.life.rig.rested.notify_one();
        }
    }

    fn status(&self, _sentence: &str) {}
}

// The life of the device ---------------------------------------------------------------------------

fn job(version: u8) -> Job {
    Job {
        url: format!("https://h/{version}.img").parse().unwrap(),
        version: Some(version.to_string().parse().unwrap()),
        digest: None,
        size_bytes: None,
    }
}

fn document(version: Option<u8>) -> Map<String, Value> {
    version.map(|version| ("firmware".to_owned(), Value::from(version))).into_iter().collect()
}

fn read_desired(desired: &Desired) -> Option<Wanted> {
    let version = u8::try_from(desired.document.get("firmware")?.as_u64()?).unwrap();
    Some(Wanted { fingerprint: Digest::new([version; 32]), job: Ok(job(version)) })
}

fn settings() -> Settings {
    Settings {
        limits: LIMITS,
        hub_must_be_well: true,
        health_interval: Duration::from_secs(10),
        progress_interval: Duration::from_secs(5),
        progress_step_percent: 5,
        restart_report_limit: Duration::from_secs(5),
        restart_limit: Duration::from_secs(30),
    }
}

impl Rig {
    pub fn new(scenario: Scenario) -> Self {
        let mut machine = Machine {
            slots: [image(1), vec![TORN; 2]],
            variables: Variables::new(scenario.script),
            stuck_in: None,
            running: Slot::A,
            boot: 0,
            uptime: Duration::ZERO,
            saved: None,
            saved_before: None,
            desired: None,
            acts: scenario.acts.iter().copied().collect(),
            battery: None,
            cuts: scenario.cuts.iter().copied().collect(),
            life: 0,
            end: None,
            operations: 0,
            restarts: 0,
            cut_in: Vec::new(),
            runs: Vec::new(),
            ended: Vec::new(),
            confirmed: Vec::new(),
            answers: Vec::new(),
            violations: Vec::new(),
            log: Vec::new(),
            scenario,
        };
        machine.start(None);
        machine.next_cut();
        let machine = Arc::new(Mutex::new(machine));
        Rig { machine, ended: Arc::new(Notify::new()), rested: Arc::new(Notify::new()) }
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// Lets the device live until it comes to rest and the operator has nothing more to do.
    pub fn live(&self) {
        for _ in 0..MAX_LIVES {
            let end = self.one_life();
            let mut machine = self.machine();
            match end {
                End::AtRest => return,
                End::Restart(argument) => machine.start(argument),
                End::Killed => machine.next_cut(),
                End::PowerCut => {
                    match machine.scenario.fault {
                        Fault::StateLost => machine.saved = None,
                        Fault::StateReverts => machine.saved = machine.saved_before.clone(),
                        _ => {}
                    }
                    machine.next_cut();
                    machine.start(None);
                }
            }
            if !machine.violations.is_empty() {
                return;
            }
        }
        self.machine().violation("never comes to rest");
    }

    /// From one start of the agent to its end. Its runtime ends with it, and with that all that it
    /// still had in hand.
    fn one_life(&self) -> End {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let life = {
                let mut machine = self.machine();
                machine.life += 1;
                machine.end = None;
                machine.note("the agent starts".into());
                Life {
                    rig: self.clone(),
                    number: machine.life,
                    began: Instant::now(),
                    uptime: machine.uptime,
                }
            };
            let end = self.until_it_ends(&life).await;
            self.machine().uptime = life.since_boot();
            end
        })
    }

    async fn until_it_ends(&self, life: &Life) -> End {
        let (requests, incoming) = mpsc::channel(16);
        let (documents, desired) = mpsc::channel(16);
        let (report, reports) = watch::channel(Arc::new(Report::default()));
        let (status, session) = watch::channel(SessionStatus::default());
        let ports = Ports {
            boot: Box::new(life.clone()),
            store: Box::new(life.clone()),
            clock: Arc::new(life.clone()),
            images: Arc::new(life.clone()),
            health: Arc::new(life.clone()),
            restarter: Arc::new(life.clone()),
            supervisor: Arc::new(Rest { life: life.clone(), seen: Mutex::new((0, 0)) }),
        };
        let inputs = Inputs { requests: incoming, desired, session, report };
        let running_version = self.machine().running_version();
        let identity = Identity {
            boot: BootId(format!("boot {}", self.machine().boot)),
            device: Device {
                agent_version: "0",
                running: Slot::A,
                running_version: running_version.to_string().parse().ok(),
                started: None,
                contracts: Contracts { iothub_dm: true, firmware_status: true, firmware: true },
                notices: Vec::new(),
            },
        };
        let agent = Agent::start(ports, settings(), inputs, Box::new(read_desired), identity)
            .await
            .unwrap();
        let hub = self.hub(reports, status, &documents);
        let operator = self.operator(&requests, &documents);
        tokio::select! {
            biased;
            () = self.ended.notified() => {}
            () = operator => {}
            () = hub => {}
            result = agent.run(CancellationToken::new()) => {
                self.machine().violation(format!("the agent gave up: {result:?}"));
            }
        }
        self.machine().end.clone().unwrap_or(End::AtRest)
    }

    /// Acknowledges every report and looks into it; tells the desired section at the beginning.
    async fn hub(
        &self,
        mut reports: watch::Receiver<Arc<Report>>,
        status: watch::Sender<SessionStatus>,
        documents: &mpsc::Sender<Desired>,
    ) {
        let desired = self.machine().desired;
        let first = Desired { document: document(desired), version: 1, patch: None };
        let _ = documents.send(first).await;
        loop {
            let report = reports.borrow_and_update().clone();
            if report.generation > 0 {
                self.look_into(&report.document);
            }
            let acknowledged = report.generation;
            status.send_replace(SessionStatus { online: true, acknowledged, text: String::new() });
            if reports.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Nothing may look like success that the bootloader was not told to confirm.
    fn look_into(&self, document: &Map<String, Value>) {
        let update = &document["iothubDM"]["firmwareUpdate"];
        let claims = [
            update.get("lastFirmwareUpdate").is_some(),
            update["status"] == "applyComplete",
            document["firmwareStatus"] == "completed",
            document["lastFirmwareUpdate"].is_string(),
            document["twinboot"]["lastUpdate"]["result"] == "succeeded",
        ];
        let mut machine = self.machine();
        let version = machine.saved.as_ref().and_then(|saved| {
            saved.last_success.as_ref()?.version.as_ref()?.to_string().parse().ok()
        });
        let confirmed = version.is_some_and(|version| machine.confirmed.contains(&version));
        if claims.contains(&true) && !confirmed {
            machine.violation(format!("reported a success that never was: {document:?}"));
        }
    }

    /// Does what is to be done; comes back when the device is at rest and nothing is left.
    async fn operator(&self, requests: &mpsc::Sender<Request>, documents: &mpsc::Sender<Desired>) {
        loop {
            let next = self.machine().acts.front().copied();
            match next {
                None => return self.rested.notified().await,
                Some((When::AtRest, _)) => self.rested.notified().await,
                Some((When::After(seconds), _)) => {
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                }
            }
            let Some((_, act)) = self.machine().acts.pop_front() else { return };
            self.machine().note(format!("the operator: {act:?}"));
            let command = match act {
                Act::Install(version) => Command::Install(job(version), Origin::Method),
                Act::Cancel => Command::Cancel,
                Act::Confirm => Command::Confirm,
                Act::RollBack => Command::RollBack,
                Act::Reboot => Command::Reboot,
                Act::Desire(version) => {
                    self.machine().desired = version;
                    let document = document(version);
                    let patch = Some([("firmware".to_owned(), Value::Null)].into_iter().collect());
                    let _ = documents.send(Desired { document, version: 2, patch }).await;
                    continue;
                }
            };
            let (reply, answer) = oneshot::channel();
            if requests.send(Request { command, reply }).await.is_err() {
                return;
            }
            let rig = self.clone();
            tokio::spawn(async move {
                if let Ok(answer) = answer.await {
                    rig.machine().answers.push((act, answer));
                }
            });
        }
    }

    // In the end -----------------------------------------------------------------------------------

    /// What is true of every device that came to rest, however it got there.
    pub fn check(&self) {
        let accepted: Vec<String> = {
            let machine = self.machine();
            let ids = machine.answers.iter().filter(|(_, answer)| answer.status == 200);
            ids.filter_map(|(_, answer)| answer.body["id"].as_str().map(str::to_owned)).collect()
        };
        let mut machine = self.machine();
        let forgets = matches!(machine.scenario.fault, Fault::StateLost | Fault::StateReverts);
        let missing = accepted.iter().chain(&machine.runs).find(|id| !machine.ended.contains(id));
        if let Some(id) = missing.filter(|_| !forgets) {
            let what = format!("run {id} has no outcome");
            machine.violation(what);
        }
        let most = 4 * (machine.scenario.acts.len() + machine.scenario.cuts.len());
        if machine.restarts > most {
            let what = format!("{} restarts", machine.restarts);
            machine.violation(what);
        }
        let Some(saved) = machine.saved.clone() else {
            return machine.violation("nothing was saved");
        };
        if saved.state != State::Idle {
            machine.violation(format!("at rest in {:?}", saved.state));
        }
        self.check_outcome(&mut machine, &saved);
        drop(machine);
        self.fail_with_the_story();
    }

    /// The outcome agrees with what boots, now and from now on.
    fn check_outcome(&self, machine: &mut Machine, saved: &Saved) {
        let told = saved.last.as_ref().and_then(|last| {
            let run = last.run.as_ref()?;
            Some(match &last.kind {
                OutcomeKind::Succeeded => run.target(),
                OutcomeKind::Failed(cause) if cause.kind == FailureKind::Stuck => run.target(),
                OutcomeKind::UpToDate | OutcomeKind::Failed(_) | OutcomeKind::RolledBack(_) => {
                    run.from
                }
            })
        });
        let told = told.or(saved.home).unwrap_or(machine.running);
        if machine.running != told {
            let what = format!("tells of slot {told}, but {} runs: {saved:?}", machine.running);
            machine.violation(what);
        }
    }

    /// Switches the machine off and on a few times, and lets it come to rest each time.
    pub fn power_cycle(&self, times: usize) {
        for _ in 0..times {
            self.machine().start(None);
            self.live();
        }
    }

    pub fn fail_with_the_story(&self) {
        let machine = self.machine();
        if let Some(first) = machine.violations.first() {
            let story = machine.log.join("\n");
            panic!("{first}\n{:?}\n{story}", machine.scenario);
        }
    }

    /// The version that runs.
    pub fn version(&self) -> u8 {
        self.machine().running_version()
    }

    /// How the last update ended.
    pub fn last(&self) -> Option<Outcome> {
        self.machine().saved.as_ref().and_then(|saved| saved.last.clone())
    }

    /// Fails with the story of the device.
    pub fn complain(&self, what: &str) -> ! {
        self.machine().violation(what);
        self.fail_with_the_story();
        unreachable!("it has a violation now")
    }
}
