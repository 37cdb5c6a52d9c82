//! `make bench`: whole installs of a real image by the real daemon, against `curl | dd` with the
//! same final sync.
//!
//! The competitors take turns in each round, and only ratios within one round are compared: the
//! machine's mood changes from one minute to the next. The daemon's time runs from the method call
//! until the saved state says that the image is on the medium, so it holds everything that an
//! operator waits for; the read-back that follows is counted apart. Memory is the peak of each
//! process, summed over a pipeline.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a measurement that cannot be made must not go on"
)]

mod device;
#[path = "../../tests/support/machine.rs"]
mod machine;
#[path = "../../tests/support/nginx.rs"]
mod nginx;
mod pipeline;
mod process;
mod report;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::report::{Report, Round};
use crate::stage::{BIG, RAW, Stage, ZSTD};

/// Measures whole installs against `curl | dd`.
#[derive(Parser)]
struct Arguments {
    /// Where the images that tests/image/build.sh has built lie.
    #[arg(long, default_value = "build/images", value_name = "FOLDER")]
    images: PathBuf,
    /// Rounds; each runs every competitor once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Where the figures go.
    #[arg(long, default_value = "build/bench.json", value_name = "FILE")]
    json: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    // Whichever way this ends, what was started and written is dropped here, and gone with that.
    tokio::select! {
        () = bench(&arguments) => ExitCode::SUCCESS,
        _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        _ = terminate.recv() => ExitCode::FAILURE,
    }
}

async fn bench(arguments: &Arguments) {
    eprintln!("bench: setting up slots, a hub and an image server");
    let mut stage = Stage::build(&arguments.images).await;
    eprintln!("bench: the daemon idle, then asked");
    stage.start().await;
    let idle = stage.idle().await;
    let methods = stage.methods().await;
    let mut rounds = Vec::new();
    for round in 0..=arguments.rounds {
        let warm_up = if round == 0 { " (warm-up)" } else { "" };
        eprintln!("bench: round {round} of {}{warm_up}", arguments.rounds);
        let costs = Round {
            dd: stage.curl_dd(RAW, &[]),
            dd_direct: stage.curl_dd(RAW, &["oflag=direct"]),
            raw: stage.install(RAW).await,
            zstd_dd: stage.curl_zstd_dd(ZSTD),
            zstd: stage.install(ZSTD).await,
        };
        // The first round fills the caches that the others find full.
        if round > 0 {
            rounds.push(costs);
        }
    }
    eprintln!("bench: images of {} MiB, for the memory", stage::BIG_BYTES >> 20);
    let [empty, packed] = BIG;
    let big = [stage.install(empty).await, stage.install(packed).await];
    let report = Report { image_bytes: stage.image_bytes, idle, methods, rounds, big };
    println!("\n{}", report.table());
    std::fs::write(&arguments.json, format!("{:#}\n", report.json())).unwrap();
    println!("All figures are in {}.", arguments.json.display());
}
