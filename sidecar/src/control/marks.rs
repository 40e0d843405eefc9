//! Marks in the control log: a route's pause, of which the last record counts, and the end of a canary, of which the first does.
//!
//! Invariant: a mark is stored, and was read back here, before it is answered.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::{apply::possibly_stored, reset::OperationError, state::Shared, topics::CONTROL_TOPIC};
use crate::{broker::Outgoing, record::Record};

/// How long the broker may take.
const BROKER: Duration = Duration::from_secs(15);
/// How long until what was stored is read back.
const READ_BACK: Duration = Duration::from_secs(15);
/// The longest text in a mark, in bytes.
const TEXT: usize = 500;

/// Whether a text of somebody can stand in a mark: one line.
pub(super) fn check(field: &str, text: &str) -> Result<(), OperationError> {
    if text.len() > TEXT || text.contains(char::is_control) {
        return Err(OperationError::Invalid(format!("{field}: give one line of at most {TEXT} bytes")));
    }
    Ok(())
}

/// Writes a mark, or with `None` takes it away, and waits until it was read here. `what` it says, as in "work is paused".
pub(super) async fn store(shared: &Shared, key: String, value: Option<Bytes>, what: &str) -> Result<(), OperationError> {
    let producer = shared.broker.producer();
    let refused = |error: &dyn std::fmt::Display| OperationError::Refused(format!("{CONTROL_TOPIC} takes no record: {error}"));
    producer.learn_topic(CONTROL_TOPIC, BROKER).await.map_err(|error| refused(&error))?;
    let record = Record { key: Some(key.into()), value, headers: Vec::new(), timestamp_ms: None };
    let unclear =
        |detail: &str| OperationError::Unclear(format!("it is not known whether that was stored: {detail}; give the command again"));
    let sending = producer.send(vec![Outgoing { topic: CONTROL_TOPIC.into(), partition: Some(0), record }]);
    let stored = timeout(BROKER, sending).await.map_err(|_| unclear(&format!("no answer of the broker within {} s", BROKER.as_secs())))?;
    let position = match stored.into_iter().next() {
        Some(Ok(position)) => position,
        Some(Err(error)) if possibly_stored(error.kind) => return Err(unclear(&error.to_string())),
        Some(Err(error)) => return Err(refused(&error)),
        None => return Err(unclear("the broker said nothing")),
    };
    let mut progress = shared.progress.subscribe();
    let read = timeout(READ_BACK, progress.wait_for(|progress| progress.caught_up && progress.next_offset > position.offset)).await;
    if !read.is_ok_and(|read| read.is_ok()) {
        return Err(OperationError::Unclear(format!(
            "that {what} is stored, and was not read back within {} s: {}",
            READ_BACK.as_secs(),
            shared.waiting_reasons().join("; ")
        )));
    }
    Ok(())
}
