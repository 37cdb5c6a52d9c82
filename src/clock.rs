//! Wall time that may be wrong, and time since boot that never is.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::os::{self, Sysroot};
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
    /// Wall time, if it was set from outside in this boot: then it is right, and may be kept as the
    /// floor for later boots. A clock that shows merely more than the floor may be far ahead.
    fn synchronised(&self) -> Option<WallTime> {
        self.wall()
    }
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

impl SystemClock {
    fn is_synchronised(&self) -> bool {
        // systemd's file stays when the network is lost later; the kernel knows of chrony, ntpd and
        // PTP, too.
        self.sysroot.path(SYNCHRONISED).exists() || os::kernel_clock_is_synchronised(&self.sysroot)
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> Option<WallTime> {
        let now = now()?;
        let trusted =
            now.unix_ms() > self.floor_unix_ms.load(Ordering::Relaxed) || self.is_synchronised();
        trusted.then_some(now)
    }

    fn synchronised(&self) -> Option<WallTime> {
        now().filter(|_| self.is_synchronised())
    }

    fn since_boot(&self) -> Duration {
        // Fails only on kernels before 2.6.39, which have no such clock.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
    }
}

fn now() -> Option<WallTime> {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).ok()?);
    i64::try_from(time.as_millis()).ok().map(WallTime::from_unix_ms)
}
