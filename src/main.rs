//! The daemon: arguments, logging, runtime, exit code. Everything else is in the library.

#![allow(clippy::print_stderr, reason = "what goes wrong before logging is there")]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tracing::error;
use twinboot::app;
use twinboot::config::Config;
use twinboot::guard::{self, TrialEnd};
use twinboot::logging;
use twinboot::os::Sysroot;

/// `EX_TEMPFAIL` of sysexits.h: not yet, ask again.
const NOT_YET: u8 = 75;

/// Firmware update agent for embedded Linux on Azure IoT Hub.
#[derive(Debug, Parser)]
#[command(name = "twinbootd", version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = "/etc/twinboot/twinboot.toml")]
    config: PathBuf,
    /// Look for /proc, /run/systemd and /etc/os-release below this folder: for containers and
    /// tests that play a machine.
    #[arg(long, value_name = "DIR", default_value = "/")]
    sysroot: PathBuf,
    /// Check the configuration and end.
    #[arg(long)]
    check_config: bool,
    /// If a new image is on trial and the daemon is dead, restart the machine; for
    /// twinboot-trial.service. Exit code 75: the trial still has time.
    #[arg(long, conflicts_with = "check_config")]
    end_unconfirmed_trial: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("twinbootd: {}", logging::chain(&error));
            if !arguments.end_unconfirmed_trial {
                return ExitCode::FAILURE;
            }
            // Perhaps it is just this that the trial is to be ended for.
            Config::salvage(&arguments.config)
        }
    };
    if arguments.check_config {
        return ExitCode::SUCCESS;
    }
    if let Err(error) = logging::start(config.log.level) {
        eprintln!("twinbootd: {}", logging::chain(&error));
    }
    match run(&arguments, config) {
        Ok(code) => code,
        Err(problem) => {
            error!(error = format!("{problem:#}"), "twinbootd ends");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, config: Config) -> anyhow::Result<ExitCode> {
    let sysroot = Sysroot::new(&arguments.sysroot);
    if arguments.end_unconfirmed_trial {
        return Ok(match guard::end_unconfirmed_trial(&config, &sysroot)? {
            TrialEnd::NothingToDo | TrialEnd::Restarting => ExitCode::SUCCESS,
            TrialEnd::NotYet => ExitCode::from(NOT_YET),
        });
    }
    // One thread for everything that waits; disks and tools have tokio's blocking threads.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(app::run(config, sysroot));
    // A health program may still run; nothing that is left matters any more.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}
