//! How it ended: the twin as the operator reads it, what it took, and whether it is what was
//! promised.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::BinaryBytes;
use serde_json::{Map, Value};

use crate::Arguments;
use crate::machine::Machine;
use crate::stage::{Image, PROBLEM, Stage};
use crate::view::View;

/// What is shown of the twin at the end: a place, and which members of what is there (all, if none
/// is named).
const SHOWN: [(&str, &[&str]); 7] = [
    ("iothubDM.firmwareUpdate", &["status", "lastFirmwareUpdate", "error"]),
    ("firmware", &["currentFwVersion", "fwUpdateStatus"]),
    ("twinboot.bootedSlot", &[]),
    ("twinboot.confirmed", &[]),
    ("twinboot.slots.A", &["state", "version"]),
    ("twinboot.slots.B", &["state", "version", "digest"]),
    ("twinboot.lastUpdate", &["result", "version", "slot", "endedTime"]),
];

/// Moments and counts for the summary.
#[derive(Debug)]
pub struct Figures {
    called: Instant,
    in_slot: Option<Instant>,
    verified: Option<Instant>,
    ended: Option<Instant>,
    peak_memory_kib: u64,
    written_bytes: u64,
}

impl Figures {
    /// The method is being called.
    pub fn start() -> Self {
        Figures {
            called: Instant::now(),
            in_slot: None,
            verified: None,
            ended: None,
            peak_memory_kib: 0,
            written_bytes: 0,
        }
    }

    /// Since the method was called.
    pub fn elapsed(&self) -> Duration {
        self.called.elapsed()
    }

    /// The device reported this phase.
    pub fn phase(&mut self, phase: &str) {
        if !matches!(phase, "idle" | "waiting" | "downloading") {
            self.in_slot.get_or_insert_with(Instant::now);
            if phase != "verifying" {
                self.verified.get_or_insert_with(Instant::now);
            }
        }
    }

    /// The operator reads that the update is over.
    pub fn end(&mut self) {
        self.ended.get_or_insert_with(Instant::now);
    }

    /// Adds up what the kernel counted for the daemon that is about to end.
    pub fn count(&mut self, machine: &Machine) {
        let Some(pid) = machine.pid() else { return };
        let value = |file: &str, key: &str| -> u64 {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        self.peak_memory_kib = self.peak_memory_kib.max(value("status", "VmHWM:"));
        self.written_bytes += value("io", "write_bytes:");
    }

    fn between(from: Option<Instant>, to: Option<Instant>) -> Option<Duration> {
        Some(to?.duration_since(from?))
    }
}

/// The important parts of the reported twin, one a line.
pub fn show_twin(view: &View, reported: &Value) {
    for (place, members) in SHOWN {
        let pointer = format!("/{}", place.replace('.', "/"));
        let Some(found) = reported.pointer(&pointer) else { continue };
        let shown = match found {
            Value::Object(all) if !members.is_empty() => {
                // In the order of the table.
                let some = members.iter().filter_map(|name| {
                    Some(format!("{}:{}", Value::from(*name), short(all.get(*name)?)))
                });
                format!("{{{}}}", some.collect::<Vec<_>>().join(","))
            }
            other => other.to_string(),
        };
        view.line(&format!("  {place:<24} {shown}"));
    }
}

/// A digest is told by its beginning.
fn short(value: &Value) -> String {
    let digest = value.as_str().and_then(|text| text.strip_prefix("sha256:"));
    match digest.and_then(|digits| digits.get(..12)) {
        Some(digits) => format!("\"sha256:{digits}…\""),
        None => value.to_string(),
    }
}

/// The whole reported twin for the file, without what the hub adds.
pub fn without_metadata(reported: &Value) -> Map<String, Value> {
    let mut members = reported.as_object().cloned().unwrap_or_default();
    members.retain(|name, _| !name.starts_with('$'));
    members
}

/// What the update took.
pub fn summary(view: &View, stage: &Stage, image: &Image, figures: &Figures) -> Result<()> {
    let mut transfers = stage.images.transfers()?;
    transfers.retain(|transfer| transfer.path.trim_start_matches('/') == image.file);
    let fetched: u64 = transfers.iter().map(|transfer| transfer.body).sum();
    let requests = if transfers.len() == 1 { "request" } else { "requests" };
    let row = |name: &str, text: String| view.line(&format!("  {name:<20} {text}"));
    // Rounded to kilobytes, which is exact enough for a rate and fits into a float without loss.
    let rate = |bytes: u64, took: Option<Duration>| -> Result<String> {
        let Some(took) = took else { return Ok("not reached".to_owned()) };
        let kib = f64::from(u32::try_from(bytes >> 10)?);
        let seconds = took.as_secs_f64();
        Ok(format!("{seconds:.2} s, {:.0} MiB/s", kib / 1024.0 / seconds.max(0.001)))
    };
    let called = Some(figures.called);
    let installed = Figures::between(called, figures.in_slot);
    view.line("\nSummary");
    row(
        "image",
        format!("{}, as {} {}", size(image.image_bytes), image.file, size(image.file_bytes)),
    );
    row("fetched", format!("{} over HTTPS, in {} {requests}", size(fetched), transfers.len()));
    row("written", format!("{} by twinbootd, all told", size(figures.written_bytes)));
    row("fetch and write", format!("{} of image, synced", rate(image.image_bytes, installed)?));
    let read_back = Figures::between(figures.in_slot, figures.verified);
    row("read back", rate(image.image_bytes, read_back)?);
    let all = Figures::between(called, figures.ended).unwrap_or_default();
    row("call to last report", format!("{:.2} s, restarts included", all.as_secs_f64()));
    let peak = size(figures.peak_memory_kib << 10);
    row("peak memory", format!("{peak} (twinbootd, VmHWM)"));
    let folder = stage.machine.folder.display();
    row("left behind", format!("{folder}: twinbootd.log, twinboot.toml, twin.json (all of it)"));
    Ok(())
}

fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// Whether the twin and the machine say what the demo promised.
///
/// # Errors
/// They do not.
pub fn judge(arguments: &Arguments, stage: &Stage, reported: &Value) -> Result<String> {
    let running = stage.machine.running().context("nothing runs")?;
    let default = stage.machine.variables()?.0;
    let last = at(reported, "/twinboot/lastUpdate");
    let reason = at(last, "/reason").as_str().unwrap_or_default();
    let here = (running.slot, running.version.as_str(), default.as_str());
    let result = at(last, "/result").as_str().unwrap_or_default();
    if arguments.fail {
        let back = here == ('A', "1.0.0", "A")
            && result == "rolledBack"
            && reason.contains(PROBLEM)
            && at(reported, "/iothubDM/firmwareUpdate/status") == "applyFailed"
            && at(reported, "/firmware/fwUpdateStatus") == "rolledback";
        if !back {
            bail!("the device did not go back and tell why: {here:?}, {last}");
        }
        Ok(format!(
            "ROLLED BACK: release 1.0.0 runs again from slot A, and the twin says why:\n  {reason}"
        ))
    } else {
        let confirmed = here == ('B', "2.0.0", "B")
            && result == "succeeded"
            && at(reported, "/iothubDM/firmwareUpdate/status") == "applyComplete"
            && at(reported, "/iothubDM/firmwareUpdate/lastFirmwareUpdate").is_string()
            && at(reported, "/firmware/currentFwVersion") == "2.0.0";
        if !confirmed {
            bail!("the update was not confirmed: {here:?}, {last}");
        }
        Ok("CONFIRMED: release 2.0.0 runs from slot B, which is the default from now on."
            .to_owned())
    }
}

/// The value at `pointer`; null if there is none.
pub fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or(&Value::Null)
}
