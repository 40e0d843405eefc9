//! Topic names and settings, checked by Kafka's rules, so that what works here works there.

use std::collections::BTreeMap;

/// The longest topic name, in bytes.
const MAX_NAME: usize = 249;
/// The most partitions that a topic may have here.
const MAX_PARTITIONS: i32 = 10_000;
/// How long a compacted topic keeps a tombstone, unless `delete.retention.ms` says otherwise.
const TOMBSTONES_MS: i64 = 86_400_000;

/// Checks a topic name: 1–249 of letters, digits, `.`, `_`, `-`; neither `.` nor `..`.
pub(super) fn check_topic(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("a topic's name is empty; give it 1 to 249 letters, digits, '.', '_' or '-'".into());
    }
    if name.len() > MAX_NAME {
        let start: String = name.chars().take(40).collect();
        return Err(format!("the topic name '{start}…' has {} characters; at most {MAX_NAME} are allowed", name.len()));
    }
    if name == "." || name == ".." {
        return Err(format!("the topic name '{name}' is reserved; choose another"));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        Some(bad) => Err(format!("the topic name {name:?} contains {bad:?}; only letters, digits, '.', '_' and '-' are allowed")),
        None => Ok(()),
    }
}

/// Checks a partition count.
pub(super) fn check_partitions(topic: &str, partitions: i32) -> Result<(), String> {
    if (1..=MAX_PARTITIONS).contains(&partitions) {
        Ok(())
    } else {
        Err(format!("topic '{topic}': partitions = {partitions}; the embedded broker takes 1 to {MAX_PARTITIONS}"))
    }
}

/// A topic's settings, as far as this broker acts on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// Records older than this are deleted, in milliseconds; `None` keeps them. Counted from the append, not from the record's timestamp.
    pub(super) retention_ms: Option<i64>,
    /// Only the last record of a key is kept.
    pub(super) compact: bool,
    /// How long a tombstone of a compacted topic is kept, in milliseconds.
    pub(super) tombstones_ms: i64,
    /// The largest record, in bytes; `None` takes the broker's.
    pub(super) max_record: Option<usize>,
}

impl Settings {
    /// Reads the settings of a topic. Names that this broker does not act on are accepted and have no effect.
    pub(super) fn parse(topic: &str, config: &BTreeMap<String, String>, default_retention_ms: Option<i64>) -> Result<Self, String> {
        let policy = config.get("cleanup.policy").map_or("delete", String::as_str);
        let (mut compact, mut delete) = (false, false);
        for word in policy.split(',').map(str::trim) {
            match word {
                "compact" => compact = true,
                "delete" => delete = true,
                _ => return Err(format!("topic '{topic}': cleanup.policy = '{policy}'; use delete, compact or compact,delete")),
            }
        }
        let retention_ms = match integer(topic, config, "retention.ms")? {
            None => default_retention_ms,
            Some(-1) => None,
            Some(ms) if ms >= 0 => Some(ms),
            Some(ms) => return Err(format!("topic '{topic}': retention.ms = {ms}; use milliseconds, or -1 to keep everything")),
        };
        let max_record = integer(topic, config, "max.message.bytes")?;
        Ok(Self {
            retention_ms: retention_ms.filter(|_| delete),
            compact,
            tombstones_ms: integer(topic, config, "delete.retention.ms")?.unwrap_or(TOMBSTONES_MS),
            max_record: max_record.and_then(|bytes| usize::try_from(bytes).ok()),
        })
    }
}

fn integer(topic: &str, config: &BTreeMap<String, String>, name: &str) -> Result<Option<i64>, String> {
    let parse = |text: &String| text.parse().map_err(|_| format!("topic '{topic}': {name} = '{text}' is no whole number"));
    config.get(name).map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_kafkas_rules() {
        for good in ["a", "orders.dlq", "__mesh.control", "A-1_b", &"x".repeat(249)] {
            assert_eq!(check_topic(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", "a\0", &"x".repeat(250)] {
            assert!(check_topic(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_name_field_and_value() {
        let parse = |name: &str, value: &str| Settings::parse("t", &BTreeMap::from([(name.to_owned(), value.to_owned())]), Some(9));
        assert_eq!(parse("retention.ms", "-1").expect("valid").retention_ms, None);
        assert_eq!(parse("retention.ms", "5").expect("valid").retention_ms, Some(5));
        assert_eq!(parse("cleanup.policy", "compact").expect("valid").retention_ms, None);
        assert_eq!(parse("unknown.key", "x").expect("valid").retention_ms, Some(9));
        for (name, value) in [("retention.ms", "soon"), ("retention.ms", "-7"), ("cleanup.policy", "shred")] {
            let error = parse(name, value).expect_err("invalid");
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }
}
