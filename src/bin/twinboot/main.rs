//! The device command: asks the daemon over its socket. Links no MQTT, TLS or HTTP.

mod follow;
mod show;

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use serde_json::Value;
use twinboot::config::{Config, ConfigError};
use twinboot::control::{Ask, Client, ClientError, Reply};
use twinboot::logging::chain;

/// The daemon refused, the update failed, or the configuration is wrong.
const FAILED: u8 = 1;
/// Something on the command line is wrong; clap uses the same.
const WRONG_USE: u8 = 2;
/// The daemon could not be asked.
const NO_DAEMON: u8 = 3;

const EXIT_CODES: &str = "\
Exit codes:
  0    done; `install`: the update is confirmed, or the machine restarts to try it
       (with --detach: it has begun)
  1    twinbootd refused, or the update failed; `config check`: the file is wrong
  2    something on the command line is wrong, and nothing was begun
  3    twinbootd is not there, keeps this user out, or went away
  130  `install` was interrupted; the update goes on without it";

/// Longest URL that `install -` reads; the daemon takes less.
const MAX_INPUT_BYTES: u64 = 16 * 1024;

/// Updates the firmware of this device: asks twinbootd, which does the work.
#[derive(Debug, Parser)]
#[command(name = "twinboot", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Arguments {
    /// Socket of twinbootd.
    #[arg(long, global = true, default_value = "/run/twinboot/control.sock", value_name = "FILE")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tell where things stand.
    Status {
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
        /// Again whenever something changes, until interrupted.
        #[arg(long)]
        watch: bool,
    },
    /// Install an image into the other slot, restart into it and try it.
    ///
    /// Shows the progress and waits for the end. Ctrl-C ends the waiting only: the update goes on,
    /// and `twinboot cancel` takes it back.
    #[command(after_help = EXIT_CODES)]
    Install {
        /// https URL, or a file of this device; `-` reads it from standard input, where no
        /// other user sees a secret in it.
        source: String,
        /// SHA-256 of that file; else it is looked for in SOURCE.sha256.
        #[arg(long, value_name = "DIGEST")]
        sha256: Option<String>,
        /// The version in it, for the reports.
        #[arg(long = "image-version", value_name = "VERSION")]
        version: Option<String>,
        /// Return as soon as the update has begun.
        #[arg(long)]
        detach: bool,
        /// Speak JSON, a line for each change.
        #[arg(long)]
        json: bool,
    },
    /// Take back an update that was not tried yet.
    Cancel {
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Mark the running slot good without waiting for its checks.
    Confirm {
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Go back to the other slot.
    Rollback {
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show both slots.
    Slots {
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Look after the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read a configuration file and tell what is wrong with it.
    Check {
        /// The file.
        #[arg(default_value = "/etc/twinboot/twinboot.toml")]
        file: PathBuf,
    },
}

/// Why the command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
enum Problem {
    /// The daemon said no.
    #[error("{}", refusal(.0))]
    Refused(Reply),
    /// The daemon could not be asked.
    #[error(transparent)]
    Unreachable(#[from] ClientError),
    /// The daemon went away in this phase of an update.
    #[error(
        "twinbootd went away in the phase {0}; the update goes on when it is back, see \
         `systemctl status twinbootd`"
    )]
    Gone(String),
    /// An argument is of no use.
    #[error("{0}")]
    Argument(String),
    /// The update did not end well.
    #[error("{0}")]
    Update(String),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What it had to say could not be written.
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
}

impl Problem {
    fn exit_code(&self) -> u8 {
        match self {
            Problem::Argument(_) => WRONG_USE,
            Problem::Refused(reply) if reply.status == 400 => WRONG_USE,
            Problem::Refused(reply) if reply.status == 503 => NO_DAEMON,
            Problem::Unreachable(_) | Problem::Gone(_) => NO_DAEMON,
            Problem::Refused(_) | Problem::Update(_) | Problem::Config(_) | Problem::Output(_) => {
                FAILED
            }
        }
    }
}

/// The refusal as a sentence, with its word for programs.
fn refusal(reply: &Reply) -> String {
    format!("{} ({})", text(&reply.body, "/message"), text(&reply.body, "/error"))
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads has seen enough, as `head` does.
        Err(Problem::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(problem) => {
            let _ = writeln!(io::stderr(), "twinboot: {}", chain(&problem));
            ExitCode::from(problem.exit_code())
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Problem> {
    let socket = &arguments.socket;
    match &arguments.command {
        Command::Status { json, watch: false } => show::status(&status(socket)?, *json)?,
        Command::Status { json, watch: true } => {
            follow::status(&mut Client::connect(socket)?, *json)?;
        }
        Command::Install { source, sha256, version, detach, json } => {
            let (sha256, version) = (sha256.clone(), version.clone());
            let ask = Ask::Install { url: url_of(source)?, sha256, version };
            follow::install(socket, &ask, *detach, *json)?;
        }
        Command::Cancel { json } => simple(socket, &Ask::Cancel, *json)?,
        Command::Confirm { json } => simple(socket, &Ask::Confirm, *json)?,
        Command::Rollback { json } => simple(socket, &Ask::Rollback, *json)?,
        Command::Slots { json } => show::slots(&status(socket)?, *json)?,
        Command::Config { command: ConfigCommand::Check { file } } => {
            Config::load(file)?;
            say(format_args!("{}: good", file.display()))?;
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "twinboot", &mut script);
            io::stdout().write_all(&script)?;
        }
    }
    Ok(())
}

/// A URL as it is; anything else is a file of this device.
fn url_of(source: &str) -> Result<String, Problem> {
    let mut input = String::new();
    let source = if source == "-" {
        let read = io::stdin().take(MAX_INPUT_BYTES).read_to_string(&mut input);
        read.map_err(|error| Problem::Argument(format!("standard input: {error}")))?;
        input.trim()
    } else {
        source
    };
    if source.contains("://") {
        return Ok(source.to_owned());
    }
    let wrong = |rule: String| Problem::Argument(format!("{source}: {rule}"));
    let path = Path::new(source).canonicalize().map_err(|error| {
        wrong(format!("must be an https URL or a file of this device ({error})"))
    })?;
    if !path.is_file() {
        return Err(wrong("must be a regular file".to_owned()));
    }
    let url = url::Url::from_file_path(&path);
    url.map(Into::into).map_err(|()| wrong("cannot be written as a URL".to_owned()))
}

/// The body of a good answer; a refusal is the error.
fn body(reply: Reply) -> Result<Value, Problem> {
    if reply.status == 200 { Ok(reply.body) } else { Err(Problem::Refused(reply)) }
}

fn status(socket: &Path) -> Result<Value, Problem> {
    body(Client::connect(socket)?.ask(&Ask::Status)?)
}

fn simple(socket: &Path, ask: &Ask, json: bool) -> Result<(), Problem> {
    let reply = Client::connect(socket)?.ask(ask)?;
    if json {
        say(format_args!("{}", reply.body))?;
    }
    let answer = body(reply)?;
    if !json {
        say(format_args!("{}", text(&answer, "/message")))?;
    }
    Ok(())
}

/// A line on standard output.
fn say(line: std::fmt::Arguments<'_>) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}

/// The value at `pointer` as people read it; `-` if there is none.
fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}
