//! Topic names: Kafka's rules, and the mesh's own.

use super::PublishError;
use crate::record::clip;

/// The word that stands for "forward nothing" in a routing table; never a topic.
const VOID: &str = "void";

/// Checks the decoded name of a topic that a service wants to publish to, or to read.
///
/// # Errors
/// [`PublishError::InvalidTopic`], [`PublishError::Void`] and [`PublishError::ReservedTopic`].
pub fn check_name(name: &str) -> Result<(), PublishError> {
    let invalid = |reason| Err(PublishError::InvalidTopic { topic: clip(name), reason });
    if name.is_empty() {
        return invalid("is empty");
    }
    if name.len() > 249 {
        return invalid("is longer than 249 characters");
    }
    if name == "." || name == ".." {
        return invalid("cannot be `.` or `..`");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        return invalid("has a character other than letters, digits, `.`, `_` and `-`");
    }
    if name == VOID {
        return Err(PublishError::Void);
    }
    if name.starts_with("__") {
        return Err(PublishError::ReservedTopic { topic: name.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_kafka() {
        for good in ["orders", "a.b_c-9", "_x", &"x".repeat(249)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(250)] {
            assert!(matches!(check_name(bad), Err(PublishError::InvalidTopic { .. })), "{bad}");
        }
        assert!(matches!(check_name("__mesh.control"), Err(PublishError::ReservedTopic { .. })));
        assert!(matches!(check_name("void"), Err(PublishError::Void)));
    }
}
