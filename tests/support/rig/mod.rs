//! A device in memory: two slots, a bootloader, a state file, an operator, and a battery that
//! lasts a given number of operations. The agent that lives in it is the real one; only what
//! stands behind its ports is made up, and fails where a test wants it to.

mod boot_script;
mod machine;
mod ports;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use twinboot::agent::{Agent, Identity, Inputs, Ports, Settings, Stop};
use twinboot::clock::Clock;
use twinboot::hub::{Desired, Report, SessionStatus};
use twinboot::request::{Answer, Command, Request};
use twinboot::update::{
    BootId, Contracts, Device, Digest, Job, Limits, Origin, OutcomeKind, Slot, Wanted,
};

use boot_script::Variables;
use machine::{End, Machine, image};
use ports::{Life, Rest};

pub use machine::Wrong;

/// Chunks of an image.
const CHUNKS: usize = 5;
/// What a write that was cut leaves behind.
const TORN: u8 = 0xee;
/// Starts of the agent after which a device counts as never coming to rest.
const MAX_LIVES: usize = 60;

const LIMITS: Limits = Limits { attempts: 4, trial_starts: 3, trial_s: 60, trial_outage_s: 400 };

/// Between two tries to reach the hub.
const HUB_TRIES: Duration = Duration::from_secs(5);

/// How long a cable stays out; longer than a trial without an outage.
pub const CABLE_OUT: Duration = Duration::from_secs(200);

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
    /// No state can be saved for most of the time that a trial has, again and again.
    StateFolderFull,
    /// The system in slot B cannot save any state.
    StateReadOnlyInNewSlot,
    /// The same, and every second order of a restart is not heard.
    StateReadOnlyAndDeaf,
    /// The cable is out when version 2 comes up, and comes back.
    CablePulled,
    /// It does not come back.
    CableCut,
    /// It does not come back, and version 2 never gets healthy either.
    SickAndCableCut,
    /// There is no hub for anybody.
    HubGone,
    /// Version 2 does not know the network device.
    NoDriver,
    /// No restart carries an argument.
    LosesArgument,
}

impl Fault {
    pub const ALL: [Fault; 21] = [
        Fault::None,
        Fault::SickSlot,
        Fault::SickAfterConfirm,
        Fault::DeadSlot,
        Fault::LyingDisk,
        Fault::NoRestart,
        Fault::NeverTries,
        Fault::ConfirmsByItself,
        Fault::NeverGoesBack,
        Fault::BootVariablesReadOnly,
        Fault::StateLost,
        Fault::StateReverts,
        Fault::StateFolderFull,
        Fault::StateReadOnlyInNewSlot,
        Fault::StateReadOnlyAndDeaf,
        Fault::CablePulled,
        Fault::CableCut,
        Fault::SickAndCableCut,
        Fault::HubGone,
        Fault::NoDriver,
        Fault::LosesArgument,
    ];
}

impl Fault {
    /// Whether the device itself is well.
    pub fn is_outside(self) -> bool {
        use Fault as F;
        matches!(self, F::CablePulled | F::CableCut | F::HubGone | F::NoDriver | F::LosesArgument)
    }

    fn keeps_new_slot_read_only(self) -> bool {
        matches!(self, Fault::StateReadOnlyInNewSlot | Fault::StateReadOnlyAndDeaf)
    }
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
    /// Somebody on the device has it restarted, or switched off and on again.
    ShutDown(Stop),
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

/// The device, shared by everything that stands behind the ports.
#[derive(Clone)]
pub struct Rig {
    machine: Arc<Mutex<Machine>>,
}

impl Rig {
    /// `with_log` keeps the story of the device, which takes time.
    pub fn new(scenario: Scenario, with_log: bool) -> Self {
        // The names of runs, and with them the story of a scenario, are always the same.
        fastrand::seed(1);
        let mut machine = Machine {
            slots: [image(1), vec![TORN; 2]],
            variables: Variables::new(scenario.script),
            stuck_in: None,
            running: Slot::A,
            boot: 0,
            uptime: Duration::ZERO,
            stopping: None,
            argument: None,
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
            ended: BTreeMap::new(),
            passed: vec![1],
            confirmed: Vec::new(),
            trial_ends: Duration::ZERO,
            tries: 0,
            answers: Vec::new(),
            wrongs: Vec::new(),
            log: with_log.then(Vec::new),
            scenario,
        };
        machine.start(None);
        machine.next_cut();
        Rig { machine: Arc::new(Mutex::new(machine)) }
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
                End::Killed => {
                    machine.next_cut();
                    // It goes down without its agent, too.
                    if machine.stopping.is_some()
                        && let End::Restart(argument) = machine.is_down()
                    {
                        machine.start(argument);
                    }
                }
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
            if !machine.wrongs.is_empty() {
                return;
            }
        }
        self.machine().wrong(Wrong::Unrest, "never comes to rest");
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
                (machine.stopping, machine.argument) = (None, None);
                machine.note(|| "the agent starts".to_owned());
                Life {
                    machine: Arc::clone(&self.machine),
                    ended: Arc::new(Notify::new()),
                    stops: Arc::new(Notify::new()),
                    rested: Arc::new(Notify::new()),
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
            journal: Some(Arc::new(life.clone())),
            supervisor: Arc::new(Rest { life: life.clone(), seen: Mutex::new((0, 0)) }),
            secrets: Arc::new(Vec::new),
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
        let hub = self.hub(life, reports, status, &documents);
        let operator = self.operator(life, &requests, &documents);
        let cancel = CancellationToken::new();
        let run = agent.run(cancel.clone());
        tokio::pin!(hub, operator, run);
        loop {
            tokio::select! {
                biased;
                () = life.ended.notified() => break,
                () = &mut operator => break,
                () = &mut hub => break,
                () = life.stops.notified() => cancel.cancel(),
                result = &mut run => {
                    let mut machine = self.machine();
                    match result {
                        Ok(()) if machine.end.is_none() => machine.end = Some(machine.is_down()),
                        Ok(()) => {}
                        Err(error) => {
                            machine.wrong(Wrong::Unrest, format!("the agent gave up: {error:?}"));
                        }
                    }
                    break;
                }
            }
        }
        self.machine().end.clone().unwrap_or(End::AtRest)
    }

    /// Acknowledges every report and looks into it; tells the desired section at the beginning.
    async fn hub(
        &self,
        life: &Life,
        mut reports: watch::Receiver<Arc<Report>>,
        status: watch::Sender<SessionStatus>,
        documents: &mpsc::Sender<Desired>,
    ) {
        let desired = self.machine().desired;
        let first = Desired { document: document(desired), version: 1, patch: None };
        let _ = documents.send(first).await;
        loop {
            if !self.machine().reaches_hub(life.since_boot()) {
                let trial_ends = reports.borrow().trial_ends.unwrap_or_default();
                {
                    let mut machine = self.machine();
                    machine.trial_ends = machine.trial_ends.max(trial_ends);
                }
                status.send_replace(SessionStatus { out_of_reach: true, ..Default::default() });
                tokio::time::sleep(HUB_TRIES).await;
                continue;
            }
            let report = reports.borrow_and_update().clone();
            if report.generation > 0 {
                self.look_into(&report.document);
            }
            let (acknowledged, answered) = (report.generation, report.generation);
            let text = String::new();
            let (online, out_of_reach) = (true, false);
            let now = SessionStatus { online, acknowledged, answered, out_of_reach, text };
            status.send_replace(now);
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
            let what = format!("reported a success that never was: {document:?}");
            machine.wrong(Wrong::Untruth, what);
        }
    }

    /// Does what is to be done; comes back when the device is at rest and nothing is left.
    async fn operator(
        &self,
        life: &Life,
        requests: &mpsc::Sender<Request>,
        documents: &mpsc::Sender<Desired>,
    ) {
        loop {
            let next = self.machine().acts.front().copied();
            match next {
                None => return life.rested.notified().await,
                Some((When::AtRest, _)) => life.rested.notified().await,
                Some((When::After(seconds), _)) => {
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                }
            }
            let Some((_, act)) = self.machine().acts.pop_front() else { return };
            self.machine().note(|| format!("the operator: {act:?}"));
            let command = match act {
                Act::Install(version) => Command::Install(job(version), Origin::Method),
                Act::Cancel => Command::Cancel,
                Act::Confirm => {
                    let mut machine = self.machine();
                    let version = machine.running_version();
                    machine.passed.push(version);
                    Command::Confirm
                }
                Act::RollBack => Command::RollBack(Origin::Method),
                Act::Reboot => Command::Reboot,
                Act::ShutDown(stop) => {
                    self.machine().shut_down(stop, None);
                    life.stops.notify_one();
                    continue;
                }
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

    /// Switches the machine off and on a few times, and lets it come to rest each time.
    pub fn power_cycle(&self, times: usize) {
        for _ in 0..times {
            if !self.machine().wrongs.is_empty() {
                return;
            }
            self.machine().start(None);
            self.live();
            self.machine().judge();
        }
    }

    /// Whether all cuts came.
    pub fn was_cut(&self) -> bool {
        let machine = self.machine();
        machine.battery.is_none() && machine.cuts.is_empty()
    }

    /// What was wrong, the worst first.
    pub fn wrong(&self) -> Option<(Wrong, String)> {
        self.machine().wrongs.iter().min_by_key(|(kind, _)| *kind).cloned()
    }

    /// What happened, one operation a line.
    pub fn story(&self) -> String {
        self.machine().log.as_deref().unwrap_or_default().join("\n")
    }

    /// The version that runs.
    pub fn version(&self) -> u8 {
        self.machine().running_version()
    }

    /// How the last update ended.
    pub fn last_end(&self) -> String {
        let machine = self.machine();
        match machine.saved.as_ref().and_then(|saved| saved.last.as_ref()).map(|last| &last.kind) {
            None => "none".into(),
            Some(OutcomeKind::Succeeded) => "succeeded".into(),
            Some(OutcomeKind::UpToDate) => "up to date".into(),
            Some(OutcomeKind::Failed(why)) => format!("failed: {}", why.kind.name()),
            Some(OutcomeKind::RolledBack(why)) => format!("rolled back: {}", why.kind.name()),
        }
    }

    /// What the operator was told: the result, or the error.
    pub fn answers(&self) -> Vec<String> {
        let machine = self.machine();
        let word = |(_, answer): &(Act, Answer)| {
            let body = &answer.body;
            let word = body.get("result").or(body.get("error")).and_then(Value::as_str);
            word.unwrap_or_default().to_owned()
        };
        machine.answers.iter().map(word).collect()
    }
}
