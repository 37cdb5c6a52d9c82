//! Values that cannot be wrong: numbers in ranges, ports, proxies.

use std::fmt;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// A time of `MIN` to `MAX` seconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Seconds<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Seconds<MIN, MAX> {
    /// `value` seconds, moved into the range.
    #[must_use]
    pub const fn of(value: u64) -> Self {
        Seconds(if value < MIN {
            MIN
        } else if value > MAX {
            MAX
        } else {
            value
        })
    }

    /// The time.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Whole<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Whole<MIN, MAX> {
    /// `value`, moved into the range.
    #[must_use]
    pub const fn of(value: u64) -> Self {
        Whole(Seconds::<MIN, MAX>::of(value).0)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A whole number in a range, and how people call it.
struct InRange {
    range: RangeInclusive<u64>,
    unit: &'static str,
}

impl de::Visitor<'_> for InRange {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {} to {}{}", self.range.start(), self.range.end(), self.unit)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value)
            .ok()
            .filter(|value| self.range.contains(value))
            .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(value), &self))
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Seconds<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rule = InRange { range: MIN..=MAX, unit: " (seconds)" };
        deserializer.deserialize_i64(rule).map(Seconds)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Whole<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_i64(InRange { range: MIN..=MAX, unit: "" }).map(Whole)
    }
}

/// A TCP port, with the rule in words.
pub(super) fn port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<NonZeroU16>, D::Error> {
    let number = Whole::<1, 65_535>::deserialize(deserializer)?.get();
    Ok(u16::try_from(number).ok().and_then(NonZeroU16::new))
}

/// An HTTP proxy: `http://host:port`, without user and password, which are secrets and have no
/// place in the configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProxyUrl(url::Url);

impl ProxyUrl {
    /// The URL.
    #[must_use]
    pub fn url(&self) -> &url::Url {
        &self.0
    }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl<'de> Deserialize<'de> for ProxyUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        url::Url::parse(&text)
            .ok()
            .filter(|url| url.scheme() == "http" && url.has_host())
            .filter(|url| url.username().is_empty() && url.password().is_none())
            .map(ProxyUrl)
            .ok_or_else(|| de::Error::custom("must be http://host:port, without user and password"))
    }
}
