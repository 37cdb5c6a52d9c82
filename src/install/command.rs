//! Hands the image to an outside program, which answers for the slot's content.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::{ImageSink, InstallError, Installer, Interrupter, device_of};
use crate::config;
use crate::update::{Digest, Slot};

/// Lines of the program's standard error that are reported.
const LAST_LINES: usize = 5;
/// Longest such line; the rest of a longer one counts as the next.
const MAX_LINE_BYTES: u64 = 400;

/// Runs a program for each image: the image on its standard input, `TWINBOOT_SLOT` (`A` or `B`)
/// and `TWINBOOT_DEVICE` in its environment. Exit code 0 means that the whole image is on the
/// medium. It gets a process group of its own, which is killed if the image is abandoned.
#[derive(Clone, Debug)]
pub struct CommandInstaller {
    command: Vec<String>,
    slots: config::Slots,
}

impl CommandInstaller {
    /// An installer that runs `command` (the program and its arguments; no shell).
    #[must_use]
    pub fn new(command: &[String], slots: &config::Slots) -> Self {
        CommandInstaller { command: command.to_vec(), slots: slots.clone() }
    }
}

impl Installer for CommandInstaller {
    fn capacity(&mut self, _: Slot) -> Result<Option<u64>, InstallError> {
        Ok(None)
    }

    fn begin(&mut self, slot: Slot) -> Result<Box<dyn ImageSink>, InstallError> {
        let (program, arguments) = self.command.split_first().ok_or_else(|| {
            let message = "install.command names no program".to_owned();
            InstallError::Command { program: PathBuf::new(), message }
        })?;
        let program = PathBuf::from(program);
        let failed = |error: io::Error| InstallError::Command {
            program: program.clone(),
            message: format!("it cannot be started: {error}"),
        };
        let mut child = Command::new(&program)
            .args(arguments)
            .env("TWINBOOT_SLOT", slot.name())
            .env("TWINBOOT_DEVICE", device_of(&self.slots, slot))
            // What systemd told the agent is not meant for its children.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            .env_remove("CREDENTIALS_DIRECTORY")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let group = i32::try_from(child.id()).ok().map(Pid::from_raw);
        let stdin = child.stdin.take();
        let stderr = child.stderr.take();
        let mut sink = CommandSink {
            program: program.clone(),
            child,
            group: Arc::new(Mutex::new(group)),
            stdin,
            last_words: None,
        };
        let listener = thread::Builder::new().name("installer-stderr".to_owned());
        let listener = listener.spawn(move || stderr.map(last_words).unwrap_or_default());
        sink.last_words = Some(listener.map_err(failed)?);
        Ok(Box::new(sink))
    }

    fn resume(
        &mut self,
        _: Slot,
        _: u64,
        _: Digest,
        _: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Box<dyn ImageSink>>, InstallError> {
        Ok(None)
    }

    fn digest(
        &mut self,
        _: Slot,
        _: u64,
        _: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Digest>, InstallError> {
        Ok(None)
    }
}

/// The last lines that come from `stderr`, until everybody who holds its other end is gone.
fn last_words(stderr: ChildStderr) -> Vec<String> {
    let mut lines = VecDeque::new();
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    while reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&line);
        let text: String = text.trim_end().chars().filter(|c| !c.is_control()).collect();
        if !text.is_empty() {
            lines.push_back(text);
        }
        if lines.len() > LAST_LINES {
            lines.pop_front();
        }
        line.clear();
    }
    lines.into()
}

/// An image on its way into a program.
struct CommandSink {
    program: PathBuf,
    child: Child,
    /// The program's process group, as long as its number cannot belong to somebody else.
    group: Arc<Mutex<Option<Pid>>>,
    stdin: Option<ChildStdin>,
    last_words: Option<JoinHandle<Vec<String>>>,
}

impl fmt::Debug for CommandSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandSink").field("program", &self.program).finish_non_exhaustive()
    }
}

impl CommandSink {
    /// Waits for the program. Its children are killed: whatever they hold open ends with it.
    fn wait(&mut self) -> io::Result<ExitStatus> {
        let process = Pid::from_raw(i32::try_from(self.child.id()).map_err(io::Error::other)?);
        // Waits without reaping, so that the number stays taken until the group is forgotten.
        while let Err(error) = waitid(Id::Pid(process), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        {
            if error != nix::errno::Errno::EINTR {
                return Err(error.into());
            }
        }
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = group.take() {
            // Fails if there are no children left, which is the rule.
            let _ = killpg(group, Signal::SIGKILL);
        }
        self.child.wait()
    }

    /// Waits for the program and says how it ended. `early` if it should not have ended yet.
    fn result(&mut self, early: bool) -> Result<(), InstallError> {
        let status = self.wait();
        let words = self.last_words.take().and_then(|listener| listener.join().ok());
        let how = match status {
            Ok(status) if status.success() && !early => return Ok(()),
            Ok(status) if early => {
                format!("it ended before it had read the whole image ({status})")
            }
            Ok(status) => format!("{status}"),
            Err(error) => format!("its end cannot be waited for: {error}"),
        };
        let words = words.filter(|words| !words.is_empty()).map(|words| words.join(" / "));
        let message = match words {
            Some(words) => format!("{how}; its last words: {words}"),
            None => format!("{how}; it said nothing"),
        };
        Err(InstallError::Command { program: self.program.clone(), message })
    }
}

impl ImageSink for CommandSink {
    fn write(&mut self, bytes: &[u8]) -> Result<(), InstallError> {
        let written = match &mut self.stdin {
            Some(stdin) => stdin.write_all(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match written {
            Ok(()) => Ok(()),
            // It closed its input. It may still run, but it will not get the image any more.
            Err(_) => {
                self.stdin = None;
                self.result(true)
            }
        }
    }

    fn checkpoint(&mut self) -> Result<bool, InstallError> {
        Ok(false)
    }

    fn finish(mut self: Box<Self>) -> Result<(), InstallError> {
        self.stdin = None;
        self.result(false)
    }

    fn interrupter(&self) -> Option<Interrupter> {
        let group = Arc::clone(&self.group);
        Some(Box::new(move || kill(&group)))
    }
}

impl Drop for CommandSink {
    fn drop(&mut self) {
        self.stdin = None;
        if self.last_words.is_some() {
            kill(&self.group);
            // Killed, it cannot be anything but reaped.
            let _ = self.wait();
        }
    }
}

fn kill(group: &Mutex<Option<Pid>>) {
    if let Some(group) = *group.lock().unwrap_or_else(PoisonError::into_inner) {
        // Fails only if it is gone.
        let _ = killpg(group, Signal::SIGKILL);
    }
}
