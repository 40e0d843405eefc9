//! The records that dead letters were made of, for letters that were cut: read from where they came from.
//!
//! Invariant: what is found is the letter's own record, or nothing: another one that lies at its offset by now has another `mesh-id`, or another key.

use super::{
    letters::Letter,
    range::{Range, RangeReader, owned},
    reset::OperationError,
};
use crate::{
    broker::Broker,
    record::{Header, Position, Record, TopicPartition, header, mesh_id},
};

/// Finds them, one at a time.
pub(super) struct Originals<'a> {
    broker: &'a dyn Broker,
    /// One for all, since each costs a client.
    reader: Option<RangeReader>,
}

impl<'a> Originals<'a> {
    pub(super) fn new(broker: &'a dyn Broker) -> Self {
        Self { broker, reader: None }
    }

    /// The record that this letter was made of, with the identity that it had; or why it cannot be had.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub(super) async fn find(&mut self, letter: &Letter, cut: &Record) -> Result<Result<Record, String>, OperationError> {
        let Some(at) = place(letter) else {
            return Ok(Err("it was cut, and does not say where its record lies".to_owned()));
        };
        let Some(mut record) = self.read(&at).await? else {
            return Ok(Err(format!("it was cut, and its record is gone from {at}")));
        };
        // Where all of it was left out, the key was, too.
        let same_key = letter.cut != "value" || record.key == cut.key;
        let id = mesh_id(cut, &at);
        if mesh_id(&record, &at) != id || !same_key {
            return Ok(Err(format!("it was cut, and its record is gone from {at}: another one lies there")));
        }
        if record.header(header::MESH_ID).is_none() {
            record.headers.push(Header::new(header::MESH_ID, id));
        }
        Ok(Ok(record))
    }

    async fn read(&mut self, at: &Position) -> Result<Option<Record>, OperationError> {
        let admin = self.broker.admin();
        let count = admin.topics().await?.get(&*at.partition.topic).copied().unwrap_or(0);
        if !(0..count).contains(&at.partition.partition) {
            return Ok(None);
        }
        let (low, high) = admin.watermarks(&at.partition).await?;
        if !(low..high).contains(&at.offset) {
            return Ok(None);
        }
        let range = Range { partition: at.partition.clone(), from: at.offset, until: at.offset + 1 };
        let reader = match &mut self.reader {
            Some(reader) => {
                reader.add(range);
                reader
            }
            None => self.reader.insert(RangeReader::open(self.broker, vec![range])?),
        };
        let mut found = None;
        while let Some(batch) = reader.next().await? {
            found = batch.records.iter().find(|(offset, _)| *offset == at.offset).map(|(_, record)| owned(record)).or(found);
        }
        Ok(found)
    }

    pub(super) async fn close(self) {
        if let Some(reader) = self.reader {
            reader.close().await;
        }
    }
}

/// Where a letter's record lies.
pub(super) fn place(letter: &Letter) -> Option<Position> {
    let (partition, offset) = letter.partition.zip(letter.offset).filter(|_| !letter.topic.is_empty())?;
    Some(Position { partition: TopicPartition::new(&*letter.topic, partition), offset })
}
