//! Looks at the daemon again and again: an update until its end, the status until interrupted.

use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use serde_json::Value;
use twinboot::control::{Ask, Client};

use crate::{Problem, body, say, show, text};

/// Between two looks at the daemon.
const LOOK: Duration = Duration::from_millis(200);

/// How long a daemon that went away may take to come back, as after an upgrade of its package.
const RETURN_LIMIT: Duration = Duration::from_secs(15);

/// Between two lines of mere progress, where there is no terminal for a bar.
const STEP_PERCENT: u64 = 10;

/// Exit code of shells for what Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Clears a terminal, so that the newest status takes the place of the last.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Prints the status whenever it changes. Ends when nobody reads any more.
///
/// # Errors
/// The daemon went away.
pub fn status(client: &mut Client, json: bool) -> Result<(), Problem> {
    at_interrupt(|| leave(0))?;
    let in_place = !json && stdout().is_terminal();
    let mut before = Value::Null;
    loop {
        let now = body(client.ask(&Ask::Status)?)?;
        let news = if in_place { now.clone() } else { without_bytes(now.clone()) };
        if news != before {
            if in_place {
                write!(stdout(), "{CLEAR}")?;
            } else if !json && before != Value::Null {
                say(format_args!(""))?;
            }
            show::status(&now, json)?;
            before = news;
        }
        if reader_goes_within(LOOK)? {
            return Ok(());
        }
    }
}

/// Bytes change all the time; where every status stays to be read, a step in percent is enough.
fn without_bytes(mut status: Value) -> Value {
    if let Some(Value::Object(update)) = status.pointer_mut("/update") {
        update.retain(|key, _| !key.starts_with("bytes"));
    }
    status
}

/// Whether the other end of our output was closed; waits that long for it.
fn reader_goes_within(limit: Duration) -> io::Result<bool> {
    let output = stdout();
    let mut output = [PollFd::new(output.as_fd(), PollFlags::empty())];
    let limit = PollTimeout::try_from(limit).map_err(io::Error::other)?;
    Ok(poll(&mut output, limit)? > 0)
}

/// Starts an update and follows it to its end.
///
/// # Errors
/// It was refused, or did not end well; or the daemon went away and did not come back.
pub fn install(socket: &Path, ask: &Ask, detach: bool, json: bool) -> Result<(), Problem> {
    let mut client = Client::connect(socket)?;
    let mut display = Display::new(json)?;
    let bar = display.bar.clone();
    at_interrupt(move || {
        bar.finish_and_clear();
        let _ = writeln!(
            stderr(),
            "twinboot: interrupted; the update goes on: `twinboot status --watch` shows it, \
             `twinboot cancel` takes it back"
        );
        leave(INTERRUPTED);
    })?;
    let reply = client.ask(ask)?;
    if json {
        display.say(format_args!("{}", reply.body));
    }
    let begun = body(reply)?;
    let id = text(&begun, "/id");
    if !json {
        display.say(format_args!("{} ({id})", text(&begun, "/message")));
    }
    if detach {
        return Ok(());
    }
    let mut phase = "waiting".to_owned();
    loop {
        // A daemon that is going down refuses.
        let Ok(status) = client.ask(&Ask::Status).map_err(Problem::from).and_then(body) else {
            match come_back(socket) {
                Some(again) => client = again,
                None => return gone(&display, &phase),
            }
            continue;
        };
        if text(&status, "/update/id") != id {
            display.bar.finish_and_clear();
            return outcome(&display, &status, &id);
        }
        phase = text(&status, "/update/phase");
        display.show(&status, &phase)?;
        std::thread::sleep(LOOK);
    }
}

fn come_back(socket: &Path) -> Option<Client> {
    let went = Instant::now();
    while went.elapsed() < RETURN_LIMIT {
        std::thread::sleep(LOOK);
        if let Ok(client) = Client::connect(socket) {
            return Some(client);
        }
    }
    None
}

/// The daemon went away in `phase`. From the switch on that is what should happen.
fn gone(display: &Display, phase: &str) -> Result<(), Problem> {
    display.bar.finish_and_clear();
    if !matches!(phase, "applying" | "rebooting" | "rollingBack") {
        return Err(Problem::Gone(phase.to_owned()));
    }
    if !display.json {
        display.say(format_args!("The machine restarts; then `twinboot status` tells the end"));
    }
    Ok(())
}

fn outcome(display: &Display, status: &Value, id: &str) -> Result<(), Problem> {
    if display.json {
        display.say(format_args!("{}", status.pointer("/lastUpdate").unwrap_or(&Value::Null)));
    }
    if text(status, "/lastUpdate/id") != id {
        return Err(Problem::Update(
            "the update is over, and another one has ended since; see `twinboot status`".to_owned(),
        ));
    }
    let slot = text(status, "/bootedSlot");
    let why =
        format!("{} ({})", text(status, "/lastUpdate/reason"), text(status, "/lastUpdate/code"));
    let sentence = match text(status, "/lastUpdate/result").as_str() {
        "succeeded" => {
            if !display.json {
                display.say(format_args!("The update is confirmed; slot {slot} runs"));
            }
            return Ok(());
        }
        "cancelled" => format!("the update was cancelled; slot {slot} runs on"),
        "rolledBack" => format!("the update was rolled back, and slot {slot} runs again: {why}"),
        _ => format!("the update failed, and slot {slot} runs on: {why}"),
    };
    Err(Problem::Update(sentence))
}

/// Ends the program from the thread that waits for Ctrl-C.
#[allow(clippy::disallowed_methods, reason = "no destructor of this program matters")]
fn leave(code: i32) -> ! {
    std::process::exit(code)
}

/// Has `end` called at Ctrl-C, in a thread of its own.
fn at_interrupt(end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    // Threads inherit the mask, so the signal comes to the one that waits for it.
    signals.thread_block()?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            end();
        }
    });
    Ok(())
}

/// Shows an update: a bar on a terminal, else lines.
struct Display {
    json: bool,
    /// Hidden if there is no terminal.
    bar: ProgressBar,
    bars: [ProgressStyle; 2],
    /// What the last line told.
    told: Option<(String, u64)>,
}

impl Display {
    fn new(json: bool) -> io::Result<Self> {
        let template = |text| ProgressStyle::with_template(text).map_err(io::Error::other);
        let bars = [
            template("{msg:12} [{bar:40}] {pos:>3} %  {elapsed_precise}")?.progress_chars("=> "),
            template("{msg:12} {spinner} {elapsed_precise}")?,
        ];
        let hidden = json || !stderr().is_terminal();
        let target =
            if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        Ok(Display {
            json,
            bar: ProgressBar::with_draw_target(Some(100), target),
            bars,
            told: None,
        })
    }

    fn show(&mut self, status: &Value, phase: &str) -> io::Result<()> {
        let percent = status.pointer("/update/percent").and_then(Value::as_u64);
        if !self.bar.is_hidden() {
            let [with_percent, without] = &self.bars;
            let style = if percent.is_some() { with_percent } else { without };
            self.bar.set_style(style.clone());
            self.bar.set_message(phase.to_owned());
            self.bar.set_position(percent.unwrap_or(0));
            self.bar.tick();
            return Ok(());
        }
        let step = percent.unwrap_or(0) / STEP_PERCENT;
        let news = (phase.to_owned(), step);
        if self.told.as_ref() != Some(&news) {
            if self.json {
                self.say(format_args!("{}", status.pointer("/update").unwrap_or(&Value::Null)));
            } else {
                self.say(format_args!("{}", text(status, "/text")));
            }
            self.told = Some(news);
        }
        Ok(())
    }

    /// A line that does not disturb the bar. That nobody reads it does not end the following: the
    /// exit code still counts.
    fn say(&self, line: std::fmt::Arguments<'_>) {
        let _ = self.bar.suspend(|| say(line));
    }
}
