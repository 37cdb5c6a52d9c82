//! Wall time that may be wrong, and time since boot that never is.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::os::Sysroot;
use crate::update::WallTime;

/// When this program was built. No right clock shows less.
pub const BUILD_TIME: WallTime =
    WallTime::from_unix_ms(match i64::from_str_radix(env!("TWINBOOT_BUILD_UNIX_S"), 10) {
        Ok(unix_s) => unix_s.saturating_mul(1000),
        Err(_) => 0,
    });

/// Made by systemd-timesyncd(8) once it has set the clock from the network in this boot.
const SYNCHRONISED: &str = "/run/systemd/timesync/synchronized";

/// The two clocks of a device without a battery.
pub trait Clock: Send + Sync {
    /// Wall time, if it can be trusted: the clock is synchronised, or shows more than the floor.
    /// For people, certificates and tokens; it may jump.
    fn wall(&self) -> Option<WallTime>;
    /// Time since the machine started, sleep included. For deadlines; never jumps.
    fn since_boot(&self) -> Duration;
}

/// The kernel's clocks.
#[derive(Debug)]
pub struct SystemClock {
    sysroot: Sysroot,
    floor_unix_ms: AtomicI64,
}

impl SystemClock {
    /// The kernel's clocks, with [`BUILD_TIME`] as the floor.
    #[must_use]
    pub fn new(sysroot: Sysroot) -> Self {
        SystemClock { sysroot, floor_unix_ms: AtomicI64::new(BUILD_TIME.unix_ms()) }
    }

    /// Makes `time` the floor, unless the floor is higher already: from now on a clock that is
    /// not synchronised is trusted only if it shows more. For the newest time that was saved.
    pub fn raise_floor(&self, time: WallTime) {
        self.floor_unix_ms.fetch_max(time.unix_ms(), Ordering::Relaxed);
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> Option<WallTime> {
        let now = milliseconds(clock_gettime(ClockId::CLOCK_REALTIME).ok()?)?;
        let trusted = now > self.floor_unix_ms.load(Ordering::Relaxed)
            || self.sysroot.path(SYNCHRONISED).exists();
        trusted.then_some(WallTime::from_unix_ms(now))
    }

    fn since_boot(&self) -> Duration {
        // Fails only on kernels before 2.6.39, which have no such clock.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
    }
}

fn milliseconds(time: TimeSpec) -> Option<i64> {
    i64::try_from(Duration::from(time).as_millis()).ok()
}
