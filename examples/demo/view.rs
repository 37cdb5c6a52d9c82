//! What people see: a story with times, the twin as it changes, and a live bar on a terminal.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

/// Leaves of the twin that the bar shows better, or that only fill the screen.
const QUIET: [&str; 6] =
    ["percent", "bytesDownloaded", "bytesWritten", "bytesTotal", "logTime", "requestedTime"];

/// Between two plain lines of progress where there is no terminal.
const PLAIN_PROGRESS: Duration = Duration::from_secs(2);

/// The screen, or a pipe.
#[derive(Debug)]
pub struct View {
    begun: Instant,
    bars: Option<Bars>,
    shown: BTreeMap<String, Value>,
    last_sentence: String,
    last_progress: Instant,
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
        let bars = if std::io::stdout().is_terminal() && std::io::stderr().is_terminal() {
            let all = MultiProgress::new();
            let sentence = all.add(ProgressBar::new_spinner());
            sentence.set_style(ProgressStyle::with_template("{spinner:.green} {wide_msg}")?);
            sentence.enable_steady_tick(Duration::from_millis(120));
            let bar = all.add(ProgressBar::new(100));
            let template = "  {prefix:12} [{bar:44.green}] {pos:>3} %  {msg}";
            bar.set_style(ProgressStyle::with_template(template)?.progress_chars("━━─"));
            Some(Bars { all, sentence, bar })
        } else {
            None
        };
        Ok(View {
            begun: Instant::now(),
            bars,
            shown: BTreeMap::new(),
            last_sentence: String::new(),
            last_progress: Instant::now(),
        })
    }

    /// Something happened: who did what.
    pub fn tell(&self, who: &str, what: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.line(&format!("{seconds:7.2} s  {who:<9} {what}"));
    }

    /// A line as it is.
    pub fn line(&self, text: &str) {
        match &self.bars {
            Some(bars) => {
                // Fails only if the terminal has gone.
                let _ = bars.all.println(text);
            }
            None => println!("{text}"),
        }
    }

    /// The device reported; shows what is new in its twin.
    pub fn twin(&mut self, patch: &Value) {
        let mut leaves = Vec::new();
        flatten("", patch, &mut leaves);
        let mut who = "twin";
        for (path, value) in leaves {
            let name = path.rsplit('.').next().unwrap_or_default();
            let known = self.shown.insert(path.clone(), value.clone());
            let unchanged = known.as_ref() == Some(&value) || known.is_none() && value.is_null();
            if unchanged || QUIET.contains(&name) {
                continue;
            }
            let text = match &value {
                Value::Null => format!("{path} removed"),
                Value::String(text) if text.is_empty() => format!("{path} = (nothing)"),
                Value::String(text) => format!("{path} = {text}"),
                other => format!("{path} = {other}"),
            };
            self.tell(who, &text);
            who = "";
        }
    }

    /// What the device says of itself: its status sentence, and how far it is.
    pub fn progress(&mut self, status: &Value) {
        let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str);
        let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
        let sentence = text("/text").unwrap_or_default();
        let (phase, percent) = (text("/update/phase").unwrap_or("idle"), number("/update/percent"));
        let written = number("/update/bytesWritten").map(megabytes).unwrap_or_default();
        match &self.bars {
            Some(bars) => {
                bars.sentence.set_message(sentence.to_owned());
                bars.bar.set_prefix(phase.to_owned());
                bars.bar.set_position(percent.unwrap_or(0));
                bars.bar.set_message(written);
            }
            None => {
                let stage = sentence.split(", ").next().unwrap_or_default();
                let new_stage = stage != self.last_sentence;
                if !stage.is_empty() && (new_stage || self.last_progress.elapsed() > PLAIN_PROGRESS)
                {
                    self.tell("device", sentence);
                    stage.clone_into(&mut self.last_sentence);
                    self.last_progress = Instant::now();
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
    pub fn end(&self) {
        if let Some(bars) = &self.bars {
            bars.sentence.finish_and_clear();
            bars.bar.finish_and_clear();
        }
    }
}

/// `95.9 MB`.
pub fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

fn flatten(path: &str, value: &Value, leaves: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&below, member, leaves);
            }
        }
        leaf => leaves.push((path.to_owned(), leaf.clone())),
    }
}
