//! The hub's clock: the machine's time plus an offset that tests move.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tokio::sync::watch;

/// The value Azure prints where something never happened.
pub(crate) const NEVER: &str = "0001-01-01T00:00:00Z";

const UTC: &[BorrowedFormatItem<'_>] = format_description!(
    version = 2,
    "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:7]Z"
);
const TRACKING: &[BorrowedFormatItem<'_>] =
    format_description!(version = 2, "[month]/[day]/[year] [hour]:[minute]:[second]");

/// Wall time as this hub sees it. Token expiry and time stamps follow it; network time limits do
/// not.
#[derive(Debug)]
pub(crate) struct Clock {
    offset_s: watch::Sender<i64>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { offset_s: watch::Sender::new(0) }
    }

    /// Sets how many seconds this clock is ahead of the machine's; negative is behind.
    pub(crate) fn set_offset(&self, seconds: i64) {
        self.offset_s.send_replace(seconds);
    }

    pub(crate) fn offset(&self) -> i64 {
        *self.offset_s.borrow()
    }

    fn now(&self) -> OffsetDateTime {
        let now = OffsetDateTime::now_utc();
        now.checked_add(time::Duration::seconds(self.offset())).unwrap_or(now)
    }

    /// Seconds since 1970.
    pub(crate) fn unix(&self) -> i64 {
        self.now().unix_timestamp()
    }

    /// ISO 8601 with seven digits of a second, as the service writes it.
    pub(crate) fn stamp(&self) -> String {
        self.now().format(UTC).unwrap_or_else(|_| NEVER.to_owned())
    }

    /// The American form inside tracking ids.
    pub(crate) fn tracking_stamp(&self) -> String {
        self.now().format(TRACKING).unwrap_or_else(|_| NEVER.to_owned())
    }

    /// Returns when this clock shows `unix_s` or later, also if that comes by moving the offset.
    pub(crate) async fn sleep_until(&self, unix_s: i64) {
        let mut moved = self.offset_s.subscribe();
        loop {
            let left = unix_s.saturating_sub(self.unix());
            let Ok(left @ 1..) = u64::try_from(left) else { return };
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(left.min(3600))) => {}
                _ = moved.changed() => {}
            }
        }
    }
}
