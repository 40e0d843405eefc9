//! The small values of a table: durations, times, names. Parsing and canonical printing.

use std::time::Duration;

/// The longest duration a table may name: 100 years.
pub(crate) const LONGEST: Duration = Duration::from_secs(36_525 * 86_400);

const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a duration such as `5s`, `100ms`, `7d` or `1h30m`: whole numbers, each with a unit
/// (`d`, `h`, `m`, `s`, `ms`), largest unit first.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let mut rest = text;
    let mut total: u64 = 0;
    let mut smallest = u64::MAX;
    if text.is_empty() {
        return Err("a duration is empty".into());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(|b| !b.is_ascii_digit()).count().min(tail.len());
        let Some((unit, tail)) = tail.split_at_checked(letters) else {
            return Err(format!("`{text}` is no duration"));
        };
        if number.is_empty() || unit.is_empty() {
            return Err(format!("`{text}` is no duration"));
        }
        let Some(&(_, millis)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("`{text}` has the unknown unit `{unit}`"));
        };
        if millis >= smallest {
            return Err(format!("`{text}`: units go from large to small, each once"));
        }
        smallest = millis;
        let part = number.parse::<u64>().ok().and_then(|n| n.checked_mul(millis));
        match part.and_then(|part| total.checked_add(part)) {
            Some(sum) if u128::from(sum) <= LONGEST.as_millis() => total = sum,
            _ => return Err(format!("`{text}` is longer than 100 years")),
        }
        rest = tail;
    }
    Ok(Duration::from_millis(total))
}

/// Prints a duration so that [`parse_duration`] reads it back; fractions of a millisecond are cut.
pub(crate) fn print_duration(duration: Duration) -> String {
    let mut millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return "0s".into();
    }
    let mut out = String::new();
    for (unit, size) in UNITS {
        let count = millis / size;
        if count > 0 {
            out.push_str(&format!("{count}{unit}"));
            millis %= size;
        }
    }
    out
}

/// Reads an RFC 3339 time as milliseconds since 1970-01-01 UTC.
pub(crate) fn parse_time(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond)
}

/// Prints milliseconds since 1970-01-01 UTC as an RFC 3339 time.
pub(crate) fn print_time(millis: i64) -> String {
    jiff::Timestamp::from_millisecond(millis).map_or_else(|_| millis.to_string(), |time| time.to_string())
}

/// Why the broker would refuse this topic name, if it would.
pub(crate) fn topic_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("a topic name is empty")
    } else if name.len() > 249 {
        Some("a topic name is longer than 249 characters")
    } else if name == "." || name == ".." {
        Some("a topic cannot be named `.` or `..`")
    } else if !name.bytes().all(is_topic_byte) {
        Some("a topic name may have letters, digits, `.`, `_` and `-` only")
    } else {
        None
    }
}

fn is_topic_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Why this is no good name of a mesh, a service or a route, if it is none. These names become
/// parts of topic names, groups and paths.
pub(crate) fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("a name is empty")
    } else if name.len() > 120 {
        Some("a name is longer than 120 characters")
    } else if !name.bytes().all(is_topic_byte) {
        Some("a name may have letters, digits, `.`, `_` and `-` only")
    } else if !name.bytes().any(|b| b.is_ascii_alphanumeric()) {
        Some("a name needs a letter or a digit")
    } else {
        None
    }
}

/// The known word nearest to `word`, when it is near enough to be a slip.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    let plain = |s: &str| s.to_ascii_lowercase().replace(['_', '-'], "");
    let wanted = plain(word);
    known
        .iter()
        .map(|candidate| (distance(&wanted, &plain(candidate)), *candidate))
        .filter(|(far, candidate)| *far <= 1 + candidate.len() / 4)
        .min_by_key(|(far, _)| *far)
        .map(|(_, candidate)| candidate)
}

/// Edits (insert, remove, replace, swap of neighbours) between two words.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read() {
        let millis = |text| parse_duration(text).map(|d| d.as_millis());
        assert_eq!(millis("5s"), Ok(5_000));
        assert_eq!(millis("100ms"), Ok(100));
        assert_eq!(millis("7d"), Ok(604_800_000));
        assert_eq!(millis("1h30m"), Ok(5_400_000));
        assert_eq!(millis("0s"), Ok(0));
        for bad in ["", "5", "s", "1.5s", "5 s", "-5s", "5s5s", "1m1h", "5sec", "1é", "é", "99999999999999999999s", "40000d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn topics_follow_the_brokers_rules() {
        for good in ["a", "orders.v1", "A_b-C.9", "...", &"x".repeat(249)] {
            assert_eq!(topic_fault(good), None, "{good}");
        }
        for bad in ["", ".", "..", "a b", "a/b", "é", &"x".repeat(250)] {
            assert!(topic_fault(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn slips_are_recognised() {
        let known = ["concurrency", "timeout", "ignore_status", "from", "to"];
        assert_eq!(nearest("concurency", &known), Some("concurrency"));
        assert_eq!(nearest("ignoreStatus", &known), Some("ignore_status"));
        assert_eq!(nearest("form", &known), Some("from"));
        assert_eq!(nearest("colour", &known), None);
    }

    proptest! {
        #[test]
        fn durations_print_and_read_back(millis in 0u64..4_000_000_000_000 / 2) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&print_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_breaks_durations(text in "\\PC*") {
            let _ = parse_duration(&text);
            let _ = parse_time(&text);
        }
    }
}
