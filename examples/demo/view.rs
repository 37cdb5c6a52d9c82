//! What people see: a story with times, the twin as it changes, and a live bar on a terminal.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{BinaryBytes, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

/// What is shown of each change of the twin; all of it would fill the screen. Places in the twin,
/// and the leaves below them.
const SHOWN: [(&str, &[&str]); 2] = [
    (
        "twinboot",
        &[
            "bootedSlot",
            "runningVersion",
            "confirmed",
            "slots.A.state",
            "slots.B.state",
            "update.phase",
            "update.percent",
            "lastUpdate.result",
            "lastUpdate.reason",
        ],
    ),
    ("iothubDM.firmwareUpdate", &["status", "lastFirmwareUpdate", "error.code"]),
];

/// Where the text of a line begins: behind the time and the one who acts.
const MARGIN: usize = 20;

/// Columns of a line of several leaves.
const COLUMNS: usize = 100;

/// Where there is no terminal, progress is told once for so many percent.
const PLAIN_STEP_PERCENT: u64 = 50;

/// Green, yellow and so on, as terminals number them.
const COLOURS: [(&str, u8); 4] = [("operator", 36), ("device", 32), ("machine", 33), ("twin", 35)];

/// The screen, or a pipe.
#[derive(Debug)]
pub struct View {
    begun: Instant,
    bars: Option<Bars>,
    colours: bool,
    twin: BTreeMap<String, Value>,
    told: (String, u64),
}

#[derive(Debug)]
struct Bars {
    all: MultiProgress,
    sentence: ProgressBar,
    bar: ProgressBar,
}

impl View {
    /// Lines on a pipe; a live bar below them on a terminal.
    pub fn new() -> Result<Self> {
        let bars = if io::stdout().is_terminal() && io::stderr().is_terminal() {
            let all = MultiProgress::new();
            let sentence = all.add(ProgressBar::new_spinner());
            sentence.set_style(ProgressStyle::with_template("{spinner:.green} {wide_msg}")?);
            let bar = all.add(ProgressBar::new(100));
            let template = "  {prefix:12} [{bar:36.green}] {pos:>3} %  {msg}";
            bar.set_style(ProgressStyle::with_template(template)?.progress_chars("━━─"));
            Some(Bars { all, sentence, bar })
        } else {
            None
        };
        let begun = Instant::now();
        let colours = bars.is_some();
        Ok(View { begun, bars, colours, twin: BTreeMap::new(), told: Default::default() })
    }

    /// Something happened: who did what.
    pub fn tell(&self, who: &str, what: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let mut name = format!("{who:<9}");
        let colour = COLOURS.iter().find(|(known, _)| *known == who);
        if let (Some((_, colour)), true) = (colour, self.colours) {
            name = format!("\x1b[{colour}m{name}\x1b[0m");
        }
        self.line(&format!("{seconds:6.2} s  {name} {what}"));
    }

    /// More of what was told last.
    pub fn more(&self, what: &str) {
        self.line(&format!("{:MARGIN$}{what}", ""));
    }

    /// A line as it is.
    pub fn line(&self, text: &str) {
        // Fails only if nobody reads any more; the update goes on, and the exit code tells.
        // Not `suspend`, which panics where the terminal has gone.
        let _ = match &self.bars {
            Some(bars) => bars.all.println(text),
            None => writeln!(io::stdout(), "{text}"),
        };
    }

    /// The device reported; shows what is new in its twin.
    pub fn twin(&mut self, patch: &Value) {
        let mut new = false;
        for (place, leaves) in SHOWN {
            let mut changes = Vec::new();
            for leaf in leaves {
                let path = format!("{place}.{leaf}");
                let pointer = format!("/{}", path.replace('.', "/"));
                let Some(value) = patch.pointer(&pointer).filter(|value| !value.is_object()) else {
                    continue;
                };
                let known = self.twin.insert(path, value.clone());
                if !value.is_null() && value != 0 && known.as_ref() != Some(value) {
                    let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    changes.push(format!("{leaf} = {value}"));
                }
            }
            for line in lines(place, &changes) {
                if new {
                    self.more(&line);
                } else {
                    self.tell("twin", &line);
                    new = true;
                }
            }
        }
    }

    /// What the device says of itself: its status sentence, and how far it is.
    pub fn progress(&mut self, status: &Value) {
        let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str);
        let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
        let sentence = text("/text").unwrap_or_default();
        let percent = number("/update/percent").unwrap_or(0);
        match &self.bars {
            Some(bars) => {
                bars.sentence.enable_steady_tick(Duration::from_millis(120));
                bars.sentence.set_message(sentence.to_owned());
                bars.bar.set_prefix(text("/update/phase").unwrap_or_default().to_owned());
                bars.bar.set_position(percent);
                let written = number("/update/bytesWritten").map(BinaryBytes);
                let written = written.map(|bytes| format!("{bytes} in the slot"));
                bars.bar.set_message(written.unwrap_or_default());
            }
            None => {
                let stage = sentence.split(", ").next().unwrap_or_default();
                let step = percent / PLAIN_STEP_PERCENT;
                let busy = text("/update/phase").is_some_and(|phase| phase != "idle");
                if busy && (self.told.0 != stage || self.told.1 != step) {
                    self.tell("device", sentence);
                    self.told = (stage.to_owned(), step);
                }
            }
        }
    }

    /// The machine is off.
    pub fn dark(&self) {
        if let Some(bars) = &self.bars {
            bars.sentence.set_message("the machine restarts");
            bars.bar.set_prefix("");
            bars.bar.set_message("");
            bars.bar.set_position(0);
        }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bars) = self.bars.take() {
            bars.sentence.finish_and_clear();
            bars.bar.finish_and_clear();
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.end();
    }
}

/// `place: change, change`, broken before it is too wide.
fn lines(place: &str, changes: &[String]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for change in changes {
        match lines.last_mut() {
            Some(line) if MARGIN + line.len() + change.len() + 2 <= COLUMNS => {
                line.push_str(", ");
                line.push_str(change);
            }
            Some(line) => {
                line.push(',');
                lines.push(format!("{:width$}{change}", "", width = place.len() + 2));
            }
            None => lines.push(format!("{place}: {change}")),
        }
    }
    lines
}
