//! Times as people write them, with the zone that was taken.

use std::{str::FromStr, time::Duration};

use jiff::{SignedDuration, Timestamp, civil::DateTime, tz::TimeZone};

/// A moment, and how it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    time: Timestamp,
    how: &'static str,
}

impl Moment {
    /// So long ago; the beginning of 1970 if that is longer than time is.
    pub(crate) fn ago(ago: Duration) -> Self {
        let time = SignedDuration::try_from(ago).ok().and_then(|ago| Timestamp::now().checked_sub(ago).ok());
        Self { time: time.unwrap_or(Timestamp::UNIX_EPOCH), how: "UTC, counted from now" }
    }

    /// In milliseconds since 1970-01-01 UTC.
    pub(crate) fn millis(&self) -> i64 {
        self.time.as_millisecond()
    }
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.time, self.how)
    }
}

impl FromStr for Moment {
    type Err = String;

    /// Reads `2026-11-21T10:00:00+09:00`, `…Z`, the same without a zone (UTC), a date, `now`, or a duration: so long ago.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(Self { time, how: "UTC, from the zone that was named" });
        }
        if let Ok(civil) = text.parse::<DateTime>() {
            let time = civil.to_zoned(TimeZone::UTC).map_err(|error| error.to_string())?.timestamp();
            return Ok(Self { time, how: "UTC, since no zone was named" });
        }
        let ago = match text {
            "now" => Some(Duration::ZERO),
            ago => humantime::parse_duration(ago.strip_suffix(" ago").unwrap_or(ago)).ok(),
        };
        let ago = ago.and_then(|ago| SignedDuration::try_from(ago).ok());
        match ago.and_then(|ago| Timestamp::now().checked_sub(ago).ok()) {
            Some(time) => Ok(Self { time, how: "UTC, counted from now" }),
            None => Err(
                "use 2026-11-21T10:00:00Z, with +09:00 or any zone's offset in place of Z (none means UTC), a date, or `15m`: so long ago"
                    .into(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_with_or_without_a_zone_and_the_zone_that_was_taken() {
        let said = |text: &str| text.parse::<Moment>().map(|moment| moment.to_string());
        assert_eq!(said("2026-11-21T10:00:00Z").unwrap(), "2026-11-21T10:00:00Z (UTC, from the zone that was named)");
        assert_eq!(said("2026-11-21T10:00:00.5+09:00").unwrap(), "2026-11-21T01:00:00.5Z (UTC, from the zone that was named)");
        assert_eq!(said("2026-11-21T10:00:00-03:30").unwrap(), "2026-11-21T13:30:00Z (UTC, from the zone that was named)");
        for without in ["2026-11-21T10:00:00", "2026-11-21 10:00:00", "2026-11-21T10:00"] {
            assert_eq!(said(without).unwrap(), "2026-11-21T10:00:00Z (UTC, since no zone was named)", "{without}");
        }
        assert_eq!(said("2026-11-21").unwrap(), "2026-11-21T00:00:00Z (UTC, since no zone was named)");
        for wrong in ["yesterday", "", "10:00", "2026-13-01", "-5", "99999999999y"] {
            assert!(said(wrong).is_err(), "{wrong}");
        }
        let ago = "15m".parse::<Moment>().unwrap();
        assert!((Timestamp::now().as_millisecond() - ago.millis() - 900_000).abs() < 60_000);
        assert_eq!("15m ago".parse::<Moment>().unwrap().how, "UTC, counted from now");
    }
}
