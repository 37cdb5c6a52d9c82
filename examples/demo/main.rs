//! One firmware update, from the cloud call to the confirmed boot, in front of your eyes.
//!
//! `make demo` runs it. Real are: the root file system images (Debian 12), the HTTPS server
//! (nginx), the slots (loop devices), and twinbootd as it is shipped. Played are: Azure IoT Hub (by
//! hubsim, a server of this repository that Microsoft's own SDKs work with) and the machine, which
//! this program restarts when twinbootd orders it.

#[path = "../../tests/support/machine.rs"]
mod machine;
#[path = "../../tests/support/nginx.rs"]
mod nginx;
mod outcome;
mod run;
mod service;
mod stage;
mod view;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Longer than the slowest machine takes; the demo gives up then.
const LIMIT: Duration = Duration::from_secs(900);

/// A key press reaches the tools that this program runs, too: how long a signal may come after the
/// failure that it has caused.
const SIGNAL_DELAY: Duration = Duration::from_millis(200);

/// Shows one firmware update, from the cloud call to the confirmed boot.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// Let the new system fail its health check, and watch the device go back to the old one.
    #[arg(long)]
    fail: bool,
    /// How the image travels.
    #[arg(long, value_enum, default_value_t = Packing::Zst)]
    image: Packing,
    /// Slow the download down to so many megabytes a second, to watch it in peace.
    #[arg(long, value_name = "MB_PER_S", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: Option<u32>,
    /// Slots in plain files, even if loop devices can be had.
    #[arg(long)]
    plain_files: bool,
    /// Where slots, state and log lie while it runs. The log and the last twin stay there.
    #[arg(long, default_value = "build/demo", value_name = "FOLDER")]
    folder: PathBuf,
    /// The images that tests/image/build.sh has built.
    #[arg(long, default_value = "build/images", value_name = "FOLDER")]
    images: PathBuf,
}

/// How an image travels.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Packing {
    /// As it is.
    Raw,
    /// Compressed by zstd.
    Zst,
    /// Compressed by gzip.
    Gz,
    /// Compressed by xz.
    Xz,
}

impl Packing {
    /// The name of release 2 in this form.
    fn file(self) -> &'static str {
        match self {
            Packing::Raw => "rootfs-2.0.0.img",
            Packing::Zst => "rootfs-2.0.0.img.zst",
            Packing::Gz => "rootfs-2.0.0.img.gz",
            Packing::Xz => "rootfs-2.0.0.img.xz",
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Caught before anything is started, so that nothing that was started is left behind.
    let mut signals = match Signals::catch() {
        Ok(signals) => signals,
        Err(error) => return failed(&anyhow!(error).context("signals cannot be caught")),
    };
    // Whichever way this ends, everything that was started is dropped here, and ends with that.
    let result = tokio::select! {
        biased;
        number = signals.next() => return interrupted(number, &arguments),
        result = run::run(&arguments) => result,
        () = tokio::time::sleep(LIMIT) => Err(anyhow!("no end within {LIMIT:?}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match tokio::time::timeout(SIGNAL_DELAY, signals.next()).await {
            Ok(number) => interrupted(number, &arguments),
            Err(_) => failed(&error),
        },
    }
}

/// What asks this program to end: the keyboard, another program, a terminal that closes.
#[derive(Debug)]
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The number of the next one. Cancel-safe.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hang_up.recv() => 1,
        }
    }
}

fn interrupted(number: u8, arguments: &Arguments) -> ExitCode {
    let folder = arguments.folder.display();
    complain(&format!("interrupted; everything it had started is stopped. What is left: {folder}"));
    // As a shell tells a program that a signal has ended.
    ExitCode::from(128 + number)
}

fn failed(error: &anyhow::Error) -> ExitCode {
    complain(&format!("{error:#}"));
    ExitCode::FAILURE
}

fn complain(text: &str) {
    // If not even this can be written, the exit code still tells.
    let _ = writeln!(io::stderr(), "\ndemo: {text}");
}
