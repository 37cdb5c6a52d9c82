//! Wall time that may be wrong, and time since boot that never is.

use std::time::Duration;

use crate::update::WallTime;

/// The two clocks of a device without a battery.
pub trait Clock: Send + Sync {
    /// Wall time, if it can be trusted: the clock is synchronised, or shows more than the floor.
    /// For people, certificates and tokens; it may jump.
    fn wall(&self) -> Option<WallTime>;
    /// Time since the machine started, sleep included. For deadlines; never jumps.
    fn since_boot(&self) -> Duration;
}
