//! Routes that somebody paused: they stay in their groups, and deliver nothing. Floor 0.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// That a route is paused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pause {
    /// Who did it.
    pub by: String,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub since_ms: i64,
    /// Why; may be empty.
    pub reason: String,
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("paused")?;
        if !self.by.is_empty() {
            write!(f, " by {}", self.by)?;
        }
        if let (true, Ok(since)) = (self.since_ms > 0, jiff::Timestamp::from_millisecond(self.since_ms)) {
            write!(f, " at {since:.0}")?;
        }
        if !self.reason.is_empty() {
            write!(f, ": {}", self.reason)?;
        }
        Ok(())
    }
}

/// The paused routes, by name.
pub type Pauses = BTreeMap<String, Pause>;

/// The routes that are paused now. One writer (`control`), any number of readers.
pub type PauseWatch = watch::Receiver<Arc<Pauses>>;

/// A watch in which no route ever is paused.
pub fn never() -> PauseWatch {
    watch::channel(Arc::default()).1
}
