//! The device command: asks the daemon over its socket. Links no MQTT, TLS or HTTP.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to people")]

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use twinboot::config::Config;
use twinboot::control::{Ask, Client, Reply};

/// Between two looks at a running update.
const LOOK: Duration = Duration::from_millis(300);

/// Updates the firmware of this device: asks twinbootd, which does the work.
#[derive(Debug, Parser)]
#[command(name = "twinboot", version, arg_required_else_help = true)]
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
    Install {
        /// https URL, or a file of this device.
        source: String,
        /// SHA-256 of that file; else it is looked for in SOURCE.sha256.
        #[arg(long, value_name = "DIGEST")]
        sha256: Option<String>,
        /// The version in it, for the reports.
        #[arg(long = "image-version", value_name = "VERSION")]
        version: Option<String>,
        /// Return as soon as the update has started.
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

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twinboot: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let connect = || Client::connect(&arguments.socket);
    match &arguments.command {
        Command::Status { json, watch: false } => show(&status(&mut connect()?)?, *json),
        Command::Status { json, watch: true } => watch(&mut connect()?, *json),
        Command::Install { source, sha256, version, detach, json } => {
            let url = url_of(source)?;
            let ask = Ask::Install { url, sha256: sha256.clone(), version: version.clone() };
            install(&mut connect()?, &ask, *detach, *json)
        }
        Command::Cancel { json } => simple(&mut connect()?, &Ask::Cancel, *json),
        Command::Confirm { json } => simple(&mut connect()?, &Ask::Confirm, *json),
        Command::Rollback { json } => simple(&mut connect()?, &Ask::Rollback, *json),
        Command::Slots { json } => slots(&status(&mut connect()?)?, *json),
        Command::Config { command: ConfigCommand::Check { file } } => check(file),
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(*shell, &mut command, "twinboot", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// A URL as it is; anything else is a file of this device.
fn url_of(source: &str) -> Result<String> {
    if source.contains("://") {
        return Ok(source.to_owned());
    }
    let path = std::fs::canonicalize(source)
        .with_context(|| format!("{source} is neither a URL nor a file that can be found"))?;
    match url::Url::from_file_path(&path) {
        Ok(url) => Ok(url.into()),
        Err(()) => bail!("{} cannot be written as a URL", path.display()),
    }
}

/// The body of a good answer; a refusal becomes the error.
fn body(reply: Reply) -> Result<Value> {
    if reply.status == 200 {
        return Ok(reply.body);
    }
    let text = |key: &str| reply.body.get(key).and_then(Value::as_str).unwrap_or("unknown");
    bail!("{} ({} {})", text("message"), reply.status, text("error"))
}

fn status(client: &mut Client) -> Result<Value> {
    body(client.ask(&Ask::Status)?)
}

fn simple(client: &mut Client, ask: &Ask, json: bool) -> Result<()> {
    let reply = client.ask(ask)?;
    if json {
        println!("{}", reply.body);
    }
    let answer = body(reply)?;
    if !json {
        println!("{}", text(&answer, "/message"));
    }
    Ok(())
}

fn show(status: &Value, json: bool) -> Result<()> {
    if json {
        println!("{status}");
        return Ok(());
    }
    let version = |value: String| if value == "-" { "unknown version".to_owned() } else { value };
    println!("{}", text(status, "/text"));
    let confirmed = status.pointer("/confirmed").and_then(Value::as_bool) == Some(true);
    println!(
        "running    slot {}, {}, {}",
        text(status, "/bootedSlot"),
        version(text(status, "/runningVersion")),
        if confirmed { "confirmed" } else { "not confirmed" }
    );
    println!("hub        {}", text(status, "/hub/text"));
    if status.pointer("/update/id").is_some() {
        println!(
            "update     {} to {} from {}",
            text(status, "/update/phase"),
            version(text(status, "/update/version")),
            text(status, "/update/uri")
        );
        if status.pointer("/update/percent").is_some() {
            println!(
                "progress   {} %, {} of {} bytes fetched, {} bytes written",
                text(status, "/update/percent"),
                text(status, "/update/bytesDownloaded"),
                text(status, "/update/bytesTotal"),
                text(status, "/update/bytesWritten")
            );
        }
    }
    if status.pointer("/lastUpdate").is_some() {
        println!(
            "last       {} to {}, ended {}",
            text(status, "/lastUpdate/result"),
            version(text(status, "/lastUpdate/version")),
            text(status, "/lastUpdate/endedTime")
        );
        if status.pointer("/lastUpdate/reason").is_some() {
            println!(
                "reason     {} ({})",
                text(status, "/lastUpdate/reason"),
                text(status, "/lastUpdate/code")
            );
        }
    }
    for notice in status.pointer("/notices").and_then(Value::as_array).into_iter().flatten() {
        println!("notice     {}", notice.as_str().unwrap_or_default());
    }
    Ok(())
}

fn slots(status: &Value, json: bool) -> Result<()> {
    let slots = status.pointer("/slots").cloned().unwrap_or_default();
    if json {
        println!("{slots}");
        return Ok(());
    }
    println!("slot  state       version           digest");
    for (name, slot) in slots.as_object().into_iter().flatten() {
        let running = status.pointer("/bootedSlot").and_then(Value::as_str) == Some(name);
        println!(
            "{name}{}    {:<11} {:<17} {}",
            if running { "*" } else { " " },
            text(slot, "/state"),
            text(slot, "/version"),
            text(slot, "/digest")
        );
    }
    println!("* runs now");
    Ok(())
}

fn watch(client: &mut Client, json: bool) -> Result<()> {
    let mut before = Value::Null;
    loop {
        let now = status(client)?;
        if now != before {
            if !json && before != Value::Null {
                println!();
            }
            show(&now, json)?;
            before = now;
        }
        std::thread::sleep(LOOK);
    }
}

fn check(file: &Path) -> Result<()> {
    Config::load(file).map_err(anyhow::Error::new)?;
    println!("{}: good", file.display());
    Ok(())
}

/// Starts an update and follows it until it ends or the machine restarts.
fn install(client: &mut Client, ask: &Ask, detach: bool, json: bool) -> Result<()> {
    let started = body(client.ask(ask)?)?;
    if json {
        println!("{started}");
    } else {
        println!("{}", text(&started, "/message"));
    }
    if detach {
        return Ok(());
    }
    let id = text(&started, "/id");
    let bar = progress_bar(json)?;
    let mut before = String::new();
    loop {
        let status = match status(client) {
            Ok(status) => status,
            Err(_) if before == "rebooting" => {
                bar.finish_and_clear();
                if !json {
                    println!(
                        "The machine restarts into the new slot; `twinboot status` tells the rest"
                    );
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if text(&status, "/update/id") != id {
            bar.finish_and_clear();
            return outcome(&status, &id, json);
        }
        let phase = text(&status, "/update/phase");
        if json && phase != before {
            println!("{}", status.pointer("/update").unwrap_or(&Value::Null));
        }
        let percent = status.pointer("/update/percent").and_then(Value::as_u64);
        bar.set_message(phase.clone());
        bar.set_position(percent.unwrap_or(0));
        before = phase;
        std::thread::sleep(LOOK);
    }
}

fn progress_bar(json: bool) -> Result<ProgressBar> {
    if json || !std::io::stderr().is_terminal() {
        return Ok(ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::hidden()));
    }
    let bar = ProgressBar::new(100);
    bar.set_style(
        ProgressStyle::with_template("{msg:12} [{bar:40}] {pos:>3} %  {elapsed_precise}")
            .context("the progress bar's template is wrong")?
            .progress_chars("=> "),
    );
    Ok(bar)
}

fn outcome(status: &Value, id: &str, json: bool) -> Result<()> {
    if json {
        println!("{}", status.pointer("/lastUpdate").unwrap_or(&Value::Null));
    }
    if text(status, "/lastUpdate/id") != id {
        bail!("the update is over, and another one has ended since; see `twinboot status`");
    }
    let result = text(status, "/lastUpdate/result");
    if result == "succeeded" {
        if !json {
            println!("The update is confirmed");
        }
        return Ok(());
    }
    bail!(
        "the update ended as {result}: {} ({})",
        text(status, "/lastUpdate/reason"),
        text(status, "/lastUpdate/code")
    )
}

/// The value at `pointer` as people read it; `-` if there is none.
fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}
