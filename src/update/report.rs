//! The twin as a picture of the saved state.
//!
//! Three contracts of Microsoft's tutorials and our own section, each written from the same state:
//! nothing is remembered here and nothing is sent from here.

use serde_json::{Map, Value, json};

use super::job::{Digest, Version};
use super::last_words::LastWords;
use super::slot::Slot;
use super::state::{Failure, FailureKind, Outcome, OutcomeKind, Run, Saved, State};
use super::time::WallTime;

/// Longest text in a report; a twin takes 4096 bytes in a string and 32 KiB in all.
const MAX_TEXT_BYTES: usize = 1000;

/// Largest number a twin takes; one more and the hub refuses the whole report.
const MAX_NUMBER: u64 = (1 << 52) - 1;

/// Most notices in a report; the first ones are the causes of the others.
const MAX_NOTICES: usize = 8;

/// Which of the tutorials' contracts are written, beside our own section.
#[derive(Clone, Copy, Debug)]
pub struct Contracts {
    /// `iothubDM` (Node and .NET tutorials, C samples).
    pub iothub_dm: bool,
    /// `firmwareStatus` and its times at the top level (Python tutorial).
    pub firmware_status: bool,
    /// `firmware` (automatic device management).
    pub firmware: bool,
}

/// What the report tells beside the saved state. Fixed while the agent runs.
#[derive(Clone, Debug)]
pub struct Device {
    /// Version of the agent.
    pub agent_version: &'static str,
    /// Slot that runs.
    pub running: Slot,
    /// Version read from the running image.
    pub running_version: Option<Version>,
    /// When this agent started, as far as the clock was set then.
    pub started: Option<WallTime>,
    /// Which contracts are written.
    pub contracts: Contracts,
    /// What an operator should know, such as a state file that was set aside.
    pub notices: Vec<String>,
}

/// How far the work of a phase is. Not saved.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Bytes of the file at the URL that came in, in all attempts.
    pub fetched_bytes: u64,
    /// Length of that file, where known.
    pub total_bytes: Option<u64>,
    /// Bytes of the image given to the slot.
    pub written_bytes: u64,
    /// Bytes of the image read back.
    pub read_back_bytes: u64,
    /// Per cent of the work of a service that brings the image into the slot; `None` where that is
    /// no step of its own.
    pub installed_percent: Option<u64>,
}

/// The phases of our own section.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// Nothing is under way.
    Idle,
    /// Accepted, no byte yet.
    Waiting,
    /// Bytes flow into the slot.
    Downloading,
    /// The slot is read back.
    Verifying,
    /// The bootloader is being told. While a service brings the image into the slot, our own
    /// section shows this, too.
    Applying,
    /// The restart into the new slot is ordered.
    Rebooting,
    /// The new slot runs and is being checked.
    Trial,
    /// The restart into the old slot is ordered.
    RollingBack,
}

impl Phase {
    /// The phase of a state.
    #[must_use]
    pub fn of(state: &State) -> Self {
        match state {
            State::Idle => Phase::Idle,
            State::Fetching { began: false, .. } => Phase::Waiting,
            State::Fetching { .. } => Phase::Downloading,
            State::Verifying { .. } => Phase::Verifying,
            State::Switching { armed: false, .. } => Phase::Applying,
            State::Switching { .. } => Phase::Rebooting,
            State::Trial { .. } => Phase::Trial,
            State::RollingBack { .. } => Phase::RollingBack,
        }
    }

    /// Its name in our section.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Waiting => "waiting",
            Phase::Downloading => "downloading",
            Phase::Verifying => "verifying",
            Phase::Applying => "applying",
            Phase::Rebooting => "rebooting",
            Phase::Trial => "trial",
            Phase::RollingBack => "rollingBack",
        }
    }

    /// How much of the phase is done, in whole percent, where that can be told.
    #[must_use]
    pub fn percent(self, state: &State, progress: &Progress) -> Option<u64> {
        let (done, all) = match (self, state) {
            (Phase::Verifying, _) if progress.installed_percent.is_some() => {
                (progress.installed_percent?, 100)
            }
            (Phase::Waiting | Phase::Downloading, _) => {
                (progress.fetched_bytes, progress.total_bytes?)
            }
            (Phase::Verifying, State::Verifying { written, .. }) => {
                (progress.read_back_bytes, written.image_bytes)
            }
            _ => return None,
        };
        Some(done.saturating_mul(100).checked_div(all).unwrap_or(100).min(100))
    }
}

/// Our top-level members of the reported section, whole. A null member deletes the hub's.
#[must_use]
pub fn report(saved: &Saved, progress: &Progress, device: &Device) -> Map<String, Value> {
    let mut document = Map::new();
    if device.contracts.iothub_dm {
        document.insert("iothubDM".to_owned(), iothub_dm(saved, device));
    }
    if device.contracts.firmware_status {
        document.extend(firmware_status(saved, device));
    }
    if device.contracts.firmware {
        document.insert("firmware".to_owned(), firmware(saved, device));
    }
    document.insert("twinboot".to_owned(), own_section(saved, progress, device));
    document
}

/// Contracts A and D. `lastFirmwareUpdate` is absent during a run, so that nobody takes an old
/// one for the end of the new.
fn iothub_dm(saved: &Saved, device: &Device) -> Value {
    let last_success = saved.last_success.as_ref().and_then(|success| success.at);
    let mut update = Map::new();
    let mut put = |key: &str, value: Value| {
        if !value.is_null() {
            update.insert(key.to_owned(), value);
        }
    };
    let (status, error) = match (Phase::of(&saved.state), &saved.last) {
        (Phase::Waiting, _) => ("waiting", None),
        (Phase::Downloading, _) => ("downloading", None),
        (Phase::Verifying, _) => ("downloadComplete", None),
        (Phase::Applying | Phase::Rebooting | Phase::Trial | Phase::RollingBack, _) => {
            ("applying", None)
        }
        (Phase::Idle, Some(outcome)) => iothub_dm_outcome(saved, outcome),
        (Phase::Idle, None) => ("waiting", None),
    };
    put("status", json!(status));
    let run = latest_run(saved);
    put("fwPackageUri", json!(run.and_then(Run::url).map(ToString::to_string)));
    let times = run.map(|run| run.times.clone()).unwrap_or_default();
    put("startedWaitingTime", time(times.requested));
    put("downloadCompleteTime", time(times.downloaded));
    put("startedApplyingImage", time(times.applying));
    if saved.state == State::Idle {
        put("lastFirmwareUpdate", time(last_success));
    }
    if let Some(cause) = error {
        put("error", json!({ "code": cause.kind.name(), "message": clip(&cause.detail) }));
    }

    let mut all = Map::new();
    if let Some(version) = &device.running_version {
        all.insert("firmwareVersion".to_owned(), json!(version));
    }
    all.insert("firmwareUpdate".to_owned(), Value::Object(update));
    if let Some(at) = saved.last_reboot {
        all.insert("reboot".to_owned(), json!({ "lastReboot": at.to_string() }));
    }
    Value::Object(all)
}

fn iothub_dm_outcome<'a>(
    saved: &Saved,
    outcome: &'a Outcome,
) -> (&'static str, Option<&'a Failure>) {
    let reached_slot = outcome.run.as_ref().is_some_and(|run| {
        run.times.downloaded.is_some() || matches!(run.source, super::Source::OtherSlot { .. })
    });
    match &outcome.kind {
        OutcomeKind::Succeeded => ("applyComplete", None),
        OutcomeKind::UpToDate if saved.last_success.is_some() => ("applyComplete", None),
        OutcomeKind::UpToDate => ("waiting", None),
        // Spelt as the tutorial's code does; its text says downloadFailed.
        OutcomeKind::Failed(cause) if !reached_slot && !cause.kind.is_after_download() => {
            ("downloadfailed", Some(cause))
        }
        OutcomeKind::Failed(cause) | OutcomeKind::RolledBack(cause) => ("applyFailed", Some(cause)),
    }
}

/// Contract B: at the top level, times in Python's form. It knows no failure: after one the
/// device stands by again.
fn firmware_status(saved: &Saved, device: &Device) -> Map<String, Value> {
    let python = |moment: Option<WallTime>| json!(moment.map(WallTime::python));
    let mut fields = Map::new();
    let times = latest_run(saved).map(|run| run.times.clone()).unwrap_or_default();
    let succeeded = match saved.last.as_ref().map(|outcome| &outcome.kind) {
        Some(OutcomeKind::Succeeded) => true,
        Some(OutcomeKind::UpToDate) => saved.last_success.is_some(),
        _ => false,
    };
    let status = match Phase::of(&saved.state) {
        Phase::Idle if succeeded => "completed",
        Phase::Idle => "standBy",
        Phase::Waiting | Phase::Downloading => "downloading",
        _ => "applying",
    };
    fields.insert("firmwareStatus".to_owned(), json!(status));
    fields.insert("logTime".to_owned(), python(device.started));
    fields.insert("downloadComplete".to_owned(), python(times.downloaded));
    fields.insert("startedApplyingImage".to_owned(), python(times.applying));
    let last_success = saved.last_success.as_ref().and_then(|success| success.at);
    let shown = if saved.state == State::Idle { last_success } else { None };
    fields.insert("lastFirmwareUpdate".to_owned(), python(shown));
    fields
}

/// Contract C. An empty text stands for nothing.
fn firmware(saved: &Saved, device: &Device) -> Value {
    let current = device
        .running_version
        .clone()
        .or_else(|| saved.slots.of(device.running).identity().0)
        .map(|version| version.to_string())
        .unwrap_or_default();
    let (status, substatus) = match (&saved.state, &saved.last) {
        (State::Fetching { .. }, _) => ("downloading", "Start downloading".to_owned()),
        (State::Verifying { .. }, _) => ("verifying", "Start verifying download".to_owned()),
        (State::Switching { armed: false, .. }, _) => {
            ("applying", "Start applying image".to_owned())
        }
        (State::Switching { .. }, _) => ("rebooting", "Start reboot".to_owned()),
        (State::Trial { .. }, _) => ("rebooting", "Finished reboot".to_owned()),
        (State::RollingBack { reason, .. }, _) => ("error", reason.detail.clone()),
        (State::Idle, None) => ("current", String::new()),
        (State::Idle, Some(outcome)) => match &outcome.kind {
            OutcomeKind::Succeeded => ("current", String::new()),
            OutcomeKind::UpToDate => ("current", "Firmware already up to date".to_owned()),
            OutcomeKind::Failed(cause) => ("error", cause.detail.clone()),
            OutcomeKind::RolledBack(cause) => {
                ("rolledback", format!("Rolled back to: {current} ({})", cause.detail))
            }
        },
    };
    let running = saved.state.run();
    let text = |moment: Option<WallTime>| moment.map(|at| at.to_string()).unwrap_or_default();
    let ended = if running.is_some() { None } else { saved.last.as_ref().and_then(|last| last.at) };
    json!({
        "currentFwVersion": current,
        "pendingFwVersion": running
            .and_then(Run::version)
            .map(ToString::to_string)
            .unwrap_or_default(),
        "fwUpdateStatus": status,
        "fwUpdateSubstatus": clip(&substatus),
        "lastFwUpdateStartTime": text(latest_run(saved).and_then(|run| run.times.requested)),
        "lastFwUpdateEndTime": text(ended),
    })
}

/// Our own section: everything there is to know.
#[must_use]
pub fn own_section(saved: &Saved, progress: &Progress, device: &Device) -> Value {
    let slots: Map<String, Value> = Slot::BOTH
        .map(|slot| (slot.name().to_owned(), slot_report(saved, slot)))
        .into_iter()
        .collect();
    let mut section = Map::new();
    section.insert("agentVersion".to_owned(), json!(device.agent_version));
    section.insert("bootedSlot".to_owned(), json!(device.running));
    section.insert("runningVersion".to_owned(), json!(device.running_version));
    section.insert("confirmed".to_owned(), json!(saved.home == Some(device.running)));
    section.insert("slots".to_owned(), Value::Object(slots));
    section.insert("update".to_owned(), update(saved, progress));
    section.insert("lastUpdate".to_owned(), last_update(saved));
    let notices: Vec<String> =
        device.notices.iter().take(MAX_NOTICES).map(|notice| clip(notice)).collect();
    if !notices.is_empty() {
        section.insert("notices".to_owned(), json!(notices));
    }
    section.retain(|_, value| !value.is_null());
    Value::Object(section)
}

fn slot_report(saved: &Saved, slot: Slot) -> Value {
    let content = saved.slots.of(slot);
    let (version, digest): (Option<Version>, Option<Digest>) = content.identity();
    let mut fields = Map::new();
    fields.insert("state".to_owned(), json!(content.name()));
    fields.insert("version".to_owned(), json!(version));
    fields.insert("digest".to_owned(), json!(digest));
    fields.retain(|_, value| !value.is_null());
    Value::Object(fields)
}

fn update(saved: &Saved, progress: &Progress) -> Value {
    let phase = Phase::of(&saved.state);
    let Some(run) = saved.state.run() else { return json!({ "phase": phase.name() }) };
    let mut fields = run_fields(run);
    let mut put = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    let is_installing = phase == Phase::Verifying && progress.installed_percent.is_some();
    put("phase", json!(if is_installing { Phase::Applying } else { phase }.name()));
    put("percent", json!(phase.percent(&saved.state, progress)));
    match &saved.state {
        State::Fetching { attempt, .. } => {
            put("attempt", json!(attempt));
            put("bytesDownloaded", number(progress.fetched_bytes));
            put("bytesWritten", number(progress.written_bytes));
            put("bytesTotal", json!(progress.total_bytes.map(number)));
        }
        State::Verifying { written, attempt, .. } => {
            put("attempt", json!(attempt));
            put("bytesDownloaded", number(written.fetched_bytes));
            put("bytesWritten", number(written.image_bytes));
        }
        State::Switching { run, attempt, .. } => {
            put("attempt", json!(attempt));
            put("reason", json!(run.why_armed_again(*attempt)));
        }
        State::Trial { starts, .. } => {
            put("attempt", json!(starts));
            put("waitsFor", json!(saved.state.waits_for().map(clip)));
        }
        State::RollingBack { reason, attempt, .. } => {
            put("attempt", json!(attempt));
            put("reason", json!(clip(&reason.detail)));
        }
        State::Idle => {}
    }
    fields.retain(|_, value| !value.is_null());
    Value::Object(fields)
}

fn last_update(saved: &Saved) -> Value {
    let Some(outcome) = &saved.last else { return Value::Null };
    let mut fields = outcome.run.as_ref().map(run_fields).unwrap_or_default();
    let (result, cause) = match &outcome.kind {
        OutcomeKind::Succeeded => ("succeeded", None),
        OutcomeKind::UpToDate => ("upToDate", None),
        OutcomeKind::Failed(cause) => match cause.kind {
            FailureKind::Cancelled | FailureKind::Withdrawn => ("cancelled", Some(cause)),
            _ => ("failed", Some(cause)),
        },
        OutcomeKind::RolledBack(cause) => ("rolledBack", Some(cause)),
    };
    fields.insert("result".to_owned(), json!(result));
    fields.insert("code".to_owned(), json!(cause.map(|cause| cause.kind.name())));
    fields.insert("reason".to_owned(), json!(cause.map(|cause| clip(&cause.detail))));
    fields.insert("endedTime".to_owned(), time(outcome.at));
    match &outcome.journal {
        Some(LastWords::Lines(lines)) => fields.insert("journal".to_owned(), json!(lines)),
        Some(LastWords::Missing(why)) => fields.insert("journalNote".to_owned(), json!(clip(why))),
        Some(LastWords::Wanted(_)) | None => None,
    };
    fields.retain(|_, value| !value.is_null());
    Value::Object(fields)
}

fn run_fields(run: &Run) -> Map<String, Value> {
    let origin = match run.origin {
        super::Origin::Method => "method",
        super::Origin::Desired(_) => "desired",
        super::Origin::Local => "local",
    };
    let fields = [
        ("id", json!(run.id)),
        ("origin", json!(origin)),
        ("uri", json!(run.url().map(ToString::to_string))),
        ("version", json!(run.version())),
        ("slot", json!(run.target())),
        ("requestedTime", time(run.times.requested)),
        ("armedAgain", json!(Some(run.passage.armed_again).filter(|times| *times > 0))),
    ];
    fields
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// The run under way, else the last one.
fn latest_run(saved: &Saved) -> Option<&Run> {
    saved.state.run().or_else(|| saved.last.as_ref().and_then(|outcome| outcome.run.as_ref()))
}

fn time(moment: Option<WallTime>) -> Value {
    json!(moment.map(|at| at.to_string()))
}

fn number(value: u64) -> Value {
    json!(value.min(MAX_NUMBER))
}

fn clip(text: &str) -> String {
    match text.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_TEXT_BYTES).last() {
        Some(end) if text.len() > MAX_TEXT_BYTES => {
            format!("{}…", text.get(..end).unwrap_or_default())
        }
        _ => text.to_owned(),
    }
}
