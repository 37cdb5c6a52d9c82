//! Tells the program when it was built: the earliest time that its clock can show.

use std::env;
use std::process::Command;
use std::time::SystemTime;

fn main() {
    // Not on the sources: a date that is a little too early does no harm, a new date would have
    // everything compiled again.
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let unix_s = source_date_epoch().or_else(commit_date).or_else(now).unwrap_or(0);
    println!("cargo::rustc-env=TWINBOOT_BUILD_UNIX_S={unix_s}");
}

/// What a distribution asks for, <https://reproducible-builds.org/specs/source-date-epoch/>.
fn source_date_epoch() -> Option<u64> {
    env::var("SOURCE_DATE_EPOCH").ok()?.trim().parse().ok()
}

/// When the sources were last changed, so that two builds of one commit are alike.
fn commit_date() -> Option<u64> {
    let git = Command::new("git").args(["log", "-1", "--format=%ct"]).output().ok()?;
    if !git.status.success() {
        return None;
    }
    String::from_utf8(git.stdout).ok()?.trim().parse().ok()
}

#[allow(clippy::disallowed_methods, reason = "a build has no Clock")]
fn now() -> Option<u64> {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok().map(|time| time.as_secs())
}
