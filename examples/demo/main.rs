//! One firmware update, from the cloud call to the confirmed boot, in front of your eyes.
//!
//! `make demo` runs it. Real are: the root file system images (Debian 12), the HTTPS server
//! (nginx), the slots (loop devices), and twinbootd as it is shipped. Played are: Azure IoT Hub (by
//! hubsim, a server of this repository that Microsoft's own SDKs work with) and the machine, which
//! this program restarts when twinbootd orders it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it speaks to people")]

#[path = "../../tests/support/machine.rs"]
mod machine;
#[path = "../../tests/support/nginx.rs"]
mod nginx;
mod run;
mod service;
mod stage;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

/// Longer than the slowest machine takes; the demo gives up then.
const LIMIT: Duration = Duration::from_secs(900);

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
    // Whichever way this ends, everything that was started is dropped here, and ends with that.
    let result = tokio::select! {
        result = run::run(&arguments) => result,
        stopped = interrupted() => stopped,
        () = tokio::time::sleep(LIMIT) => Err(anyhow::anyhow!("no end within {LIMIT:?}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            let log = arguments.folder.join("twinbootd.log");
            if log.exists() {
                eprintln!("demo: the daemon's log is {}", log.display());
            }
            ExitCode::FAILURE
        }
    }
}

async fn interrupted() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed?,
        _ = terminate.recv() => {}
    }
    bail!("interrupted; everything that was started is stopped")
}
