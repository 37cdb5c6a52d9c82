//! A shutdown of the machine that somebody else ordered.

use std::path::Path;
use std::time::Duration;

use super::file::{FileError, replace_file};
use super::machine::Sysroot;
use super::tool::{Tool, ToolError};

/// systemd answers at once; it waits for this process while it does not.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// The kernel's argument of the restart, which systemd reads when everything else has ended. An
/// older one is removed when the restart is ordered, which is before services are told to stop
/// (systemd, src/shared/reboot-util.c).
const PARAMETER: &str = "/run/systemd/reboot-param";

/// The unit that every kind of shutdown starts (systemd.special(7)).
const SHUTDOWN: &str = "shutdown.target";
/// The unit that a restart through the firmware starts.
const RESTART: &str = "reboot.target";

/// How a machine goes down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shutdown {
    /// It restarts through the firmware.
    Restart,
    /// It is switched off, or starts another system without the firmware.
    Other,
}

/// The shutdown that is under way, as the program `systemctl` tells it, if there is one.
///
/// # Errors
/// It cannot be asked.
pub fn shutdown(systemctl: &Path) -> Result<Option<Shutdown>, ToolError> {
    // By name: a shutdown has some hundred jobs.
    let words = ["list-jobs", "--no-legend", "--no-pager", SHUTDOWN, RESTART];
    let tool = Tool::new(systemctl, ASK_LIMIT).arguments(words);
    let finished = tool.run()?.succeeded()?;
    Ok(shutdown_in(&finished.stdout.to_string()))
}

/// Lines of number, unit, kind and state.
fn shutdown_in(jobs: &str) -> Option<Shutdown> {
    let mut starts = jobs.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (unit, kind) = (words.nth(1)?, words.next()?);
        (kind == "start").then_some(unit)
    });
    if !starts.clone().any(|unit| unit == SHUTDOWN) {
        return None;
    }
    let restarts = starts.any(|unit| unit == RESTART);
    Some(if restarts { Shutdown::Restart } else { Shutdown::Other })
}

/// Has the restart that is under way carry `argument` to the firmware.
///
/// # Errors
/// It carries none.
pub fn carry_argument(argument: &str, sysroot: &Sysroot) -> Result<(), FileError> {
    replace_file(&sysroot.path(PARAMETER), format!("{argument}\n").as_bytes(), 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_restart_from_other_ways_down_and_from_daily_work() {
        for (jobs, expected) in [
            ("", None),
            ("No jobs running.\n", None),
            ("  7 twinbootd.service restart running\n", None),
            ("97 shutdown.target stop waiting\n", None),
            (
                "  901 twinbootd.service         stop  running\n  902 reboot.target start waiting\n  \
                 903 shutdown.target start waiting\n",
                Some(Shutdown::Restart),
            ),
            (
                "903 shutdown.target start waiting\n902 poweroff.target start waiting\n",
                Some(Shutdown::Other),
            ),
            (
                "903 shutdown.target start waiting\n902 kexec.target start waiting\n",
                Some(Shutdown::Other),
            ),
        ] {
            assert_eq!(shutdown_in(jobs), expected, "{jobs}");
        }
    }
}
