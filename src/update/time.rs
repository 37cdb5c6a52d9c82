//! Wall time, as the reports write it.

use std::fmt;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// Milliseconds since 1970-01-01 UTC. For people, certificates and tokens; never for deadlines.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WallTime {
    unix_ms: i64,
}

const ISO_8601: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
const PYTHON: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:6]");

impl WallTime {
    /// The moment `unix_ms` milliseconds after the epoch.
    #[must_use]
    pub const fn from_unix_ms(unix_ms: i64) -> Self {
        WallTime { unix_ms }
    }

    /// Milliseconds since the epoch.
    #[must_use]
    pub const fn unix_ms(self) -> i64 {
        self.unix_ms
    }

    /// Whole seconds since the epoch.
    #[must_use]
    pub const fn unix_s(self) -> i64 {
        self.unix_ms.div_euclid(1000)
    }

    /// `2017-10-11 10:12:13.123000`: the form the Python tutorial prints, here in UTC.
    #[must_use]
    pub fn python(self) -> String {
        self.format(PYTHON)
    }

    fn format(self, form: &[BorrowedFormatItem<'_>]) -> String {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.unix_ms) * 1_000_000)
            .ok()
            .and_then(|moment| moment.format(form).ok())
            .unwrap_or_else(|| format!("{} ms since 1970", self.unix_ms))
    }
}

/// ISO 8601 in UTC with milliseconds: `2017-09-07T10:00:00.000Z`.
impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(ISO_8601))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_the_forms_of_the_contracts() {
        let moment = WallTime::from_unix_ms(1_504_778_400_123);
        assert_eq!(moment.to_string(), "2017-09-07T10:00:00.123Z");
        assert_eq!(moment.python(), "2017-09-07 10:00:00.123000");
    }
}
