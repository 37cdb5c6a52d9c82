//! Hands the image to an outside program, which answers for the slot's content.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::{ImageSink, InstallError, Installer, Interrupter, device_of};
use crate::config;
use crate::os::{self, KILL_LIMIT, SLICE, Stream};
use crate::redact::one_line;
use crate::update::Slot;

/// Lines of the program's standard error that are reported.
const LAST_LINES: usize = 5;
/// Characters of such a line.
const MAX_LINE: usize = 400;
/// What is kept of its standard error for that.
const STDERR_BYTES: usize = 8 * 1024;

/// Runs a program for each image: the image on its standard input, `TWINBOOT_SLOT` (`A` or `B`)
/// and `TWINBOOT_DEVICE` in its environment. Exit code 0 means that the whole image is on the
/// medium. It gets a process group of its own, which is killed if the image is abandoned.
///
/// It is killed, too, if it takes nothing for the stall limit, or does not end for so long after the
/// last byte. What it started and left behind outside its group holds nothing up.
#[derive(Clone, Debug)]
pub struct CommandInstaller {
    command: Vec<String>,
    stall_limit: Duration,
    slots: config::Slots,
}

impl CommandInstaller {
    /// An installer that runs the command of `install` (the program and its arguments; no shell).
    #[must_use]
    pub fn new(install: &config::Install, slots: &config::Slots) -> Self {
        CommandInstaller {
            command: install.command.clone(),
            stall_limit: install.stall_limit_s.duration(),
            slots: slots.clone(),
        }
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
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env("TWINBOOT_SLOT", slot.name())
            .env("TWINBOOT_DEVICE", device_of(&self.slots, slot))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        os::hide_private_variables(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let group = i32::try_from(child.id()).ok().map(Pid::from_raw);
        let mut sink = CommandSink {
            program: program.clone(),
            child,
            status: None,
            group: Arc::new(Mutex::new(group)),
            stdin: None,
            stderr: Stream::of(stderr, STDERR_BYTES).map_err(failed)?,
            stall_limit: self.stall_limit,
        };
        if let Some(stdin) = &stdin {
            fcntl(stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|error| failed(error.into()))?;
        }
        sink.stdin = stdin;
        Ok(Box::new(sink))
    }
}

/// An image on its way into a program.
struct CommandSink {
    program: PathBuf,
    child: Child,
    /// How it ended, once that was taken.
    status: Option<ExitStatus>,
    /// The program's process group, as long as its number cannot belong to somebody else.
    group: Arc<Mutex<Option<Pid>>>,
    stdin: Option<ChildStdin>,
    stderr: Stream<ChildStderr>,
    stall_limit: Duration,
}

impl fmt::Debug for CommandSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandSink").field("program", &self.program).finish_non_exhaustive()
    }
}

impl CommandSink {
    /// The exit code, if the program has ended. Its children are killed then.
    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        let process = Pid::from_raw(i32::try_from(self.child.id()).map_err(io::Error::other)?);
        // Looks without reaping, so that the number stays taken until the group is forgotten.
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        match waitid(Id::Pid(process), look) {
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = group.take() {
            // Fails if there are no children left, which is the rule.
            let _ = killpg(group, Signal::SIGKILL);
        }
        self.status = Some(self.child.wait()?);
        Ok(self.status)
    }

    /// Waits for the end of the program for `limit`; `None` if it does not come.
    fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let since = Instant::now();
        let mut slice = Duration::from_millis(1);
        loop {
            // Looked at before the last read: what came before the end is then not missed.
            let ended = self.ended()?;
            let moved = self.stderr.pump();
            if ended.is_some() || since.elapsed() >= limit {
                return Ok(ended);
            }
            slice = if moved { Duration::from_millis(1) } else { (slice * 2).min(SLICE) };
            os::wait(self.stderr.readable(), slice);
        }
    }

    /// Waits for the program and says how it ended. `early` if it should not have ended yet.
    fn result(&mut self, early: bool) -> Result<(), InstallError> {
        let how = match self.wait(self.stall_limit) {
            Ok(Some(status)) if status.success() && !early => return Ok(()),
            Ok(Some(status)) if early => {
                format!("it ended before it had read the whole image ({status})")
            }
            Ok(Some(status)) => format!("{status}"),
            Ok(None) => return Err(self.stalled("did not end")),
            Err(error) => format!("its end cannot be waited for: {error}"),
        };
        Err(self.failed(&how))
    }

    /// It is killed for what it `did`.
    fn stalled(&mut self, did: &str) -> InstallError {
        self.abandon();
        let limit = self.stall_limit.as_secs_f32();
        self.failed(&format!("it {did} for {limit} s (install.stall_limit_s) and was killed"))
    }

    fn failed(&self, how: &str) -> InstallError {
        let text = self.stderr.tail.to_string();
        let lines: Vec<String> = text
            .lines()
            .map(|line| one_line(line, MAX_LINE))
            .filter(|line| !line.is_empty())
            .collect();
        let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
        let words = match last {
            [] => "it said nothing".to_owned(),
            words => format!("its last words: {}", words.join(" / ")),
        };
        let message = format!("{how}; {words}");
        InstallError::Command { program: self.program.clone(), message }
    }

    /// Kills the program and takes its exit code away. One that hangs in the kernel does not even
    /// die, and is left to itself.
    fn abandon(&mut self) {
        self.stdin = None;
        if self.status.is_none() {
            kill(&self.group);
            let _ = self.wait(KILL_LIMIT);
        }
    }
}

impl ImageSink for CommandSink {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), InstallError> {
        let mut moved = Instant::now();
        while !bytes.is_empty() {
            let written = match &mut self.stdin {
                Some(stdin) => stdin.write(bytes),
                None => Err(io::ErrorKind::BrokenPipe.into()),
            };
            match written {
                Ok(written) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    moved = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stderr.pump();
                    // Somebody else may hold the other end of the pipe and never read.
                    if !matches!(self.ended(), Ok(None)) {
                        self.stdin = None;
                    } else if moved.elapsed() >= self.stall_limit {
                        return Err(self.stalled("took nothing"));
                    }
                    let room = self.stdin.as_ref();
                    let room = room.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
                    os::wait(room.into_iter().chain(self.stderr.readable()), SLICE);
                }
                // It closed its input. It may still run, but it will not get the image any more.
                Err(_) => {
                    self.stdin = None;
                    return self.result(true);
                }
            }
        }
        Ok(())
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
        self.abandon();
    }
}

fn kill(group: &Mutex<Option<Pid>>) {
    if let Some(group) = *group.lock().unwrap_or_else(PoisonError::into_inner) {
        // Fails only if it is gone.
        let _ = killpg(group, Signal::SIGKILL);
    }
}
