//! What a report goes without while the hub refuses the whole of it. The reported section belongs
//! to all programs of a device together, and so do its 32 KiB: where another one has filled it, a
//! smaller report is better than none.

use serde_json::{Map, Value};

/// Leaves something out of a report.
type LeaveOut = fn(&mut Map<String, Value>);

/// What is left out, one after the other: first what is told elsewhere too, last what is not
/// needed to follow an update.
const STEPS: [(&str, LeaveOut); 7] = [
    ("the failed boot's journal", journal),
    ("notices", |report| drop(own(report).and_then(|own| own.remove("notices")))),
    ("the slots' digests", digests),
    ("firmwareStatus", |report| delete(report, &FIRMWARE_STATUS)),
    ("firmware", |report| delete(report, &["firmware"])),
    ("iothubDM", |report| delete(report, &["iothubDM"])),
    ("all of twinboot but bootedSlot, update and lastUpdate", |report| {
        if let Some(own) = own(report) {
            own.retain(|key, _| NEEDED.contains(&key.as_str()));
        }
    }),
];

/// Number of steps.
pub const ALL: usize = STEPS.len();

/// Contract B, which has no member of its own around it.
const FIRMWARE_STATUS: [&str; 5] =
    ["firmwareStatus", "logTime", "downloadComplete", "startedApplyingImage", "lastFirmwareUpdate"];

/// What tells of the failed boot's journal.
const JOURNAL: [&str; 2] = ["journal", "journalNote"];

/// Members of our own section that stay.
const NEEDED: [&str; 3] = ["bootedSlot", "update", "lastUpdate"];

/// `report` after the first `steps` steps. What is left out is taken out of the twin as well: an
/// old value would be a lie, and it needs room.
#[must_use]
pub fn reduced(report: &Map<String, Value>, steps: usize) -> Map<String, Value> {
    let mut report = report.clone();
    for (_, leave_out) in STEPS.iter().take(steps) {
        leave_out(&mut report);
    }
    report
}

/// What the first `steps` steps leave out, for people.
#[must_use]
pub fn left_out(steps: usize) -> String {
    let names: Vec<&str> = STEPS.iter().take(steps).map(|(name, _)| *name).collect();
    names.join(", ")
}

fn own(report: &mut Map<String, Value>) -> Option<&mut Map<String, Value>> {
    report.get_mut("twinboot").and_then(Value::as_object_mut)
}

fn journal(report: &mut Map<String, Value>) {
    let last = own(report).and_then(|own| own.get_mut("lastUpdate")).and_then(Value::as_object_mut);
    if let Some(last) = last {
        last.retain(|key, _| !JOURNAL.contains(&key.as_str()));
    }
}

fn digests(report: &mut Map<String, Value>) {
    let slots = own(report).and_then(|own| own.get_mut("slots")).and_then(Value::as_object_mut);
    for slot in slots.into_iter().flat_map(Map::values_mut).filter_map(Value::as_object_mut) {
        slot.remove("digest");
    }
}

/// Null deletes.
fn delete(report: &mut Map<String, Value>, members: &[&str]) {
    for (key, value) in report.iter_mut() {
        if members.contains(&key.as_str()) {
            *value = Value::Null;
        }
    }
}
