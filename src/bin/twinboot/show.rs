//! The daemon's status as people read it.

use std::io;

use serde_json::Value;

use crate::{say, text};

/// Prints where things stand.
pub fn status(status: &Value, json: bool) -> io::Result<()> {
    if json {
        return say(format_args!("{status}"));
    }
    let has = |pointer: &str| status.pointer(pointer).is_some();
    let text = |pointer: &str| text(status, pointer);
    let line = |name: &str, value: String| say(format_args!("{name:<10} {value}"));
    say(format_args!("{}", text("/text")))?;
    let confirmed = status.pointer("/confirmed").and_then(Value::as_bool) == Some(true);
    let confirmed = if confirmed { "confirmed" } else { "not confirmed" };
    let version = version(status, "/runningVersion");
    line("running", format!("slot {}, {version}, {confirmed}", text("/bootedSlot")))?;
    line("hub", text("/hub/text"))?;
    if has("/update/id") {
        let what = what(status, "/update");
        line(
            "update",
            format!("{}: {what} into slot {}", text("/update/phase"), text("/update/slot")),
        )?;
    }
    if let Some(bytes) = bytes(status) {
        line("progress", bytes)?;
    }
    if has("/lastUpdate") {
        let ended = text("/lastUpdate/endedTime");
        let what = what(status, "/lastUpdate");
        line("last", format!("{}: {what}, ended {ended}", text("/lastUpdate/result")))?;
    }
    if has("/lastUpdate/reason") {
        line("reason", format!("{} ({})", text("/lastUpdate/reason"), text("/lastUpdate/code")))?;
    }
    let journal = status.pointer("/lastUpdate/journal").and_then(Value::as_array);
    for (at, words) in journal.into_iter().flatten().enumerate() {
        let name = if at == 0 { "journal" } else { "" };
        line(name, words.as_str().unwrap_or_default().to_owned())?;
    }
    if has("/lastUpdate/journalNote") {
        line("journal", text("/lastUpdate/journalNote"))?;
    }
    for notice in status.pointer("/notices").and_then(Value::as_array).into_iter().flatten() {
        line("notice", notice.as_str().unwrap_or_default().to_owned())?;
    }
    Ok(())
}

/// Prints both slots.
pub fn slots(status: &Value, json: bool) -> io::Result<()> {
    let slots = status.pointer("/slots").cloned().unwrap_or_default();
    if json {
        return say(format_args!("{slots}"));
    }
    say(format_args!("slot  state       version           digest"))?;
    for (name, slot) in slots.as_object().into_iter().flatten() {
        let running = status.pointer("/bootedSlot").and_then(Value::as_str) == Some(name);
        say(format_args!(
            "{name}{}    {:<11} {:<17} {}",
            if running { "*" } else { " " },
            text(slot, "/state"),
            text(slot, "/version"),
            text(slot, "/digest")
        ))?;
    }
    say(format_args!("* runs now"))
}

/// `version 2.0.0 from https://...`, as far as it is known.
fn what(status: &Value, run: &str) -> String {
    let version = version(status, &format!("{run}/version"));
    match status.pointer(&format!("{run}/uri")).and_then(Value::as_str) {
        Some(uri) => format!("{version} from {uri}"),
        None => version,
    }
}

fn version(status: &Value, pointer: &str) -> String {
    match status.pointer(pointer).and_then(Value::as_str) {
        Some(version) => format!("version {version}"),
        None => "unknown version".to_owned(),
    }
}

/// How much came in and was written; `None` while nothing does.
fn bytes(status: &Value) -> Option<String> {
    let written = status.pointer("/update/bytesWritten")?;
    let fetched = status.pointer("/update/bytesDownloaded")?;
    let of = status.pointer("/update/bytesTotal").map(|total| format!(" of {total}"));
    let percent = status.pointer("/update/percent").map(|percent| format!("{percent} %, "));
    Some(format!(
        "{}{fetched}{} bytes fetched, {written} bytes written",
        percent.unwrap_or_default(),
        of.unwrap_or_default()
    ))
}
