//! Runs outside programs: no shell, a time limit, bounded output.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tracing::debug;

use crate::redact::one_line;

/// Bytes kept of each output stream if nothing else is said: enough for a person.
const OUTPUT_LIMIT: usize = 8 * 1024;
/// Characters kept of a program's last line.
const LAST_LINE: usize = 300;
/// Longest time after which the end of a program is noticed while something else keeps its
/// output open. Without that, the end of the output tells it at once.
pub const SLICE: Duration = Duration::from_millis(50);
/// How long a killed program may take to go before it is left to itself.
pub const KILL_LIMIT: Duration = Duration::from_secs(2);
/// What systemd tells the agent.
const PRIVATE_VARIABLES: [&str; 5] =
    ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM"];

/// A program to run.
#[derive(Clone, Debug)]
pub struct Tool {
    program: PathBuf,
    arguments: Vec<OsString>,
    input: Vec<u8>,
    limit: Duration,
    output_limit: usize,
}

impl Tool {
    /// `program` (found by `PATH` if it is a bare name), which may take `limit`.
    pub fn new(program: impl Into<PathBuf>, limit: Duration) -> Self {
        Tool {
            program: program.into(),
            arguments: Vec::new(),
            input: Vec::new(),
            limit,
            output_limit: OUTPUT_LIMIT,
        }
    }

    /// Adds arguments. They are logged and can be seen by every user: no secrets.
    #[must_use]
    pub fn arguments<W: Into<OsString>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.arguments.extend(words.into_iter().map(Into::into));
        self
    }

    /// Gives the program `bytes` to read. Without this there is nothing to read.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Keeps the last `bytes` of each output stream.
    #[must_use]
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Runs the program to its end. What it started and left behind does not hold this up, even
    /// if it keeps the output open.
    ///
    /// # Errors
    /// The program did not start, or did not end in time; then it was killed together with its
    /// process group.
    pub fn run(self) -> Result<Finished, ToolError> {
        debug!(program = %self.program.display(), arguments = ?self.arguments, "running a program");
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            // Messages are compared and shown: they must not be translated.
            .env("LC_ALL", "C")
            .stdin(if self.input.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        hide_private_variables(&mut command);
        let not_run = |source| ToolError::NotRun { program: self.program.clone(), source };
        let mut child = command.spawn().map_err(not_run)?;
        let mut stdout = Stream::of(child.stdout.take(), self.output_limit).map_err(not_run)?;
        let mut stderr = Stream::of(child.stderr.take(), self.output_limit).map_err(not_run)?;
        let mut stdin = Feed::of(child.stdin.take(), &self.input).map_err(not_run)?;

        let started = Instant::now();
        let mut slice = Duration::from_millis(1);
        loop {
            // Looked at before the last read: what came before the end is then not missed.
            let status = child.try_wait().map_err(not_run)?;
            stdin.pump();
            let moved = stdout.pump() | stderr.pump();
            if let Some(status) = status {
                debug!(program = %self.program.display(), %status, "a program ended");
                let Self { program, .. } = self;
                return Ok(Finished { program, status, stdout: stdout.tail, stderr: stderr.tail });
            }
            let Some(left) = self.limit.checked_sub(started.elapsed()) else {
                kill(&mut child);
                return Err(ToolError::TimedOut {
                    program: self.program,
                    limit: self.limit,
                    last_line: last_line(&stdout.tail, &stderr.tail),
                });
            };
            slice = if moved { Duration::from_millis(1) } else { (slice * 2).min(SLICE) };
            let ends = [stdin.writable(), stdout.readable(), stderr.readable()];
            wait(ends.into_iter().flatten(), slice.min(left));
        }
    }
}

/// Takes away what systemd tells the agent and what is not meant for the programs it runs.
pub fn hide_private_variables(command: &mut Command) {
    for variable in PRIVATE_VARIABLES {
        command.env_remove(variable);
    }
}

/// A program that came to its end.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The program.
    pub program: PathBuf,
    /// Exit code or signal.
    pub status: ExitStatus,
    /// The end of what it wrote.
    pub stdout: Tail,
    /// The end of what it complained.
    pub stderr: Tail,
}

impl Finished {
    /// The program, if it ended with exit code 0.
    ///
    /// # Errors
    /// [`ToolError::Failed`] otherwise.
    pub fn succeeded(self) -> Result<Self, ToolError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(ToolError::Failed {
            last_line: self.last_line(),
            status: self.status,
            program: self.program,
        })
    }

    /// The last line of its complaints, or else of its output; empty if it said nothing.
    #[must_use]
    pub fn last_line(&self) -> String {
        last_line(&self.stdout, &self.stderr)
    }
}

/// The last bytes of a stream.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tail {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether there were more before them.
    pub truncated: bool,
}

/// As text; bytes that are not UTF-8 are replaced.
impl fmt::Display for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.bytes))
    }
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It did not start.
    #[error("cannot run {}", program.display())]
    NotRun {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{} did not end within {} s{}", program.display(), limit.as_secs_f32(), said(last_line))]
    TimedOut {
        /// The program.
        program: PathBuf,
        /// What it had.
        limit: Duration,
        /// Its last words.
        last_line: String,
    },
    /// It ended with another exit code than 0, or by a signal.
    #[error("{} ended with {status}{}", program.display(), said(last_line))]
    Failed {
        /// The program.
        program: PathBuf,
        /// Exit code or signal.
        status: ExitStatus,
        /// Its last words.
        last_line: String,
    },
}

fn said(last_line: &str) -> String {
    if last_line.is_empty() { String::new() } else { format!(": {last_line}") }
}

fn last_line(stdout: &Tail, stderr: &Tail) -> String {
    [stderr, stdout]
        .into_iter()
        .find_map(|tail| {
            let text = tail.to_string();
            let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
            // Goes into reports and terminals.
            Some(one_line(line, LAST_LINE))
        })
        .unwrap_or_default()
}

/// An output stream of a program, read without waiting.
#[derive(Debug)]
pub struct Stream<R> {
    pipe: Option<R>,
    /// The end of what came so far.
    pub tail: Tail,
    limit: usize,
}

impl<R: Read + AsFd> Stream<R> {
    /// Reads from `pipe` and keeps the last `limit` bytes.
    ///
    /// # Errors
    /// The pipe cannot be told not to wait.
    pub fn of(pipe: Option<R>, limit: usize) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Stream { pipe, tail: Tail::default(), limit })
    }

    /// Something to wait for, until the stream is at its end.
    pub fn readable(&self) -> Option<PollFd<'_>> {
        self.pipe.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN))
    }

    /// Takes what is there; true if there was something.
    pub fn pump(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let mut moved = false;
        // More than a pipe holds, but a program that never stops writing must not keep us here.
        for _ in 0..64 {
            let Some(pipe) = &mut self.pipe else { break };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(read) => {
                    moved = true;
                    self.tail.bytes.extend(buffer.iter().take(read));
                    let surplus = self.tail.bytes.len().saturating_sub(self.limit);
                    if surplus > 0 {
                        self.tail.bytes.drain(..surplus);
                        self.tail.truncated = true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.pipe = None,
            }
        }
        moved
    }
}

/// What the program is to read, written without waiting.
struct Feed<'a> {
    pipe: Option<ChildStdin>,
    rest: &'a [u8],
}

impl<'a> Feed<'a> {
    fn of(pipe: Option<ChildStdin>, bytes: &'a [u8]) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Feed { pipe, rest: bytes })
    }

    fn writable(&self) -> Option<PollFd<'_>> {
        self.pipe.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT))
    }

    /// Gives what is taken. A program that does not read to the end has its reasons; its exit
    /// code tells them.
    fn pump(&mut self) {
        while let Some(pipe) = &mut self.pipe {
            match pipe.write(self.rest) {
                Ok(written) => self.rest = self.rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.rest = &[],
            }
            if self.rest.is_empty() {
                self.pipe = None;
            }
        }
    }
}

/// Waits until one of these is ready, or `time` has passed.
///
/// A process handle (pidfd) would tell the end of a program as well, but vendor kernels before 5.3
/// have none.
pub fn wait<'a>(ends: impl IntoIterator<Item = PollFd<'a>>, time: Duration) {
    let mut ends: Vec<PollFd<'_>> = ends.into_iter().collect();
    let time = time.max(Duration::from_millis(1));
    // Interrupted by a signal: the caller's loop comes back.
    let _ = poll(&mut ends, PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
}

/// Kills the program and what it started, and takes its exit code away.
fn kill(child: &mut Child) {
    if let Ok(group) = i32::try_from(child.id()) {
        // Fails only if it is gone already.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let started = Instant::now();
    // A program that hangs in the kernel does not even die.
    while matches!(child.try_wait(), Ok(None)) && started.elapsed() < KILL_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
}
