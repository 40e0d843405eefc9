//! Reading: from the hot tail, or fetched from the store within the consumer's bound.
//!
//! Invariant: what is fetched, or asked for, is at most `buffer_bytes`, but one fetch is always allowed.
//! Invariant: a partition that must wait for room, or for a retry, waits in one place.

use std::sync::Arc;

use super::{Cursor, EmbeddedConsumer, closed};
use crate::{
    broker::{
        BrokerError, BrokerErrorKind, Event,
        embedded::{
            codec::{Corrupt, Decoder},
            inbox::Notice,
            log::{Found, Row, Subscription},
            store::Store,
            writer::{ROW_BYTES, ROW_RECORDS},
        },
    },
    record::{Batch, Record, TopicPartition},
};

/// The least that is read from the store at once.
const MIN_FETCH: usize = 64 << 10;
/// The most that is read from the store at once.
const MAX_FETCH: usize = 1 << 20;

impl EmbeddedConsumer {
    /// Reads the next batch of a partition.
    pub(super) fn read(&mut self, subscription: Arc<Subscription>) -> Option<Event> {
        subscription.looking();
        let name = &subscription.partition.name;
        let cursor = self.cursors.get_mut(name).filter(|cursor| Arc::ptr_eq(&cursor.subscription, &subscription))?;
        if self.held.contains(name) || cursor.fetching || cursor.parked {
            return None;
        }
        if cursor.rows.is_empty() {
            match subscription.partition.find(cursor.next, ROW_RECORDS as i64, ROW_BYTES) {
                Found::Nothing => return None,
                Found::Expired(to) => {
                    let from = std::mem::replace(&mut cursor.next, to);
                    subscription.ready();
                    return Some(Event::Expired { partition: name.clone(), from, to });
                }
                Found::Hot(rows) => cursor.rows.extend(rows),
                Found::Cold(until) => {
                    self.fetch(subscription, until);
                    return None;
                }
            }
        }
        let (records, corrupt) = take_records(cursor);
        if let Some(corrupt) = corrupt {
            let detail = format!("embedded broker: {name} cannot be read at offset {}: {corrupt}; restore the store", cursor.next);
            self.storage_trouble = Some(BrokerError::new(BrokerErrorKind::Storage, detail));
            self.report();
            self.retry_later(Vec::new(), Some(subscription.clone()));
        } else {
            // Behind the other partitions. If nothing is left, this is noticed at the next look.
            subscription.ready();
        }
        let partition = name.clone();
        self.settle(&partition);
        (!records.is_empty()).then_some(Event::Records(Batch { partition, records }))
    }

    /// Frees the room of fetched rows that were given out.
    pub(super) fn settle(&mut self, partition: &TopicPartition) {
        if let Some(cursor) = self.cursors.get_mut(partition)
            && !cursor.fetching
            && cursor.charged > 0
        {
            let left: usize = cursor.rows.iter().map(|row| row.data.len()).sum();
            let freed = cursor.charged.saturating_sub(left);
            cursor.charged -= freed;
            self.uncharge(freed);
        }
    }

    /// Lets partitions that waited look again.
    pub(super) fn unpark(&mut self, subscriptions: impl IntoIterator<Item = Arc<Subscription>>) {
        for subscription in subscriptions {
            if let Some(cursor) = self.cursors.get_mut(&subscription.partition.name) {
                cursor.parked = false;
            }
            subscription.ready();
        }
    }

    pub(super) fn uncharge(&mut self, bytes: usize) {
        self.fetched = self.fetched.saturating_sub(bytes);
        if bytes > 0 {
            let starved = std::mem::take(&mut self.starved);
            self.unpark(starved);
        }
    }

    fn fetch(&mut self, subscription: Arc<Subscription>, until: i64) {
        let bytes = (self.buffer_bytes / 4).clamp(MIN_FETCH, MAX_FETCH);
        let Some(cursor) = self.cursors.get_mut(&subscription.partition.name) else { return };
        if self.fetched > 0 && self.fetched + bytes > self.buffer_bytes {
            cursor.parked = true;
            self.starved.push(subscription);
            return;
        }
        let (id, from, inbox) = (subscription.partition.id, cursor.next, self.inbox.clone());
        let wanted = subscription.clone();
        let read = Box::new(move |store: &Store| {
            let rows = store.read(id, from, until, bytes).map_err(|error| store.failed("read from", &error));
            inbox.push(Notice::Fetched { subscription: wanted, until, rows });
        });
        // Before the call: without a thread of its own the reader answers within it.
        cursor.fetching = true;
        cursor.charged = bytes;
        self.fetched += bytes;
        if self.shared.read(read).is_err() {
            cursor.fetching = false;
            cursor.charged = 0;
            self.uncharge(bytes);
            self.storage_trouble = Some(closed());
            self.report();
            self.retry_later(Vec::new(), Some(subscription));
        }
    }

    pub(super) fn fetched(&mut self, subscription: Arc<Subscription>, until: i64, rows: Result<Vec<Row>, BrokerError>) {
        let name = &subscription.partition.name;
        // Its room was freed when the partition went.
        let Some(cursor) = self.cursors.get_mut(name).filter(|cursor| Arc::ptr_eq(&cursor.subscription, &subscription)) else { return };
        cursor.fetching = false;
        let charged = std::mem::take(&mut cursor.charged);
        match rows {
            Ok(rows) if !self.held.contains(name) => {
                if subscription.partition.watermarks().0 > cursor.next {
                    // Retention was faster: the next look reports it. The rows may have a hole by now.
                } else if rows.is_empty() {
                    // Compaction left nothing there.
                    cursor.next = cursor.next.max(until);
                } else {
                    cursor.charged = rows.iter().map(|row| row.data.len()).sum();
                    self.fetched += cursor.charged;
                    cursor.rows.extend(rows);
                }
                self.trouble_over();
                subscription.ready();
            }
            Ok(_) => {}
            Err(error) => {
                self.storage_trouble = Some(error);
                self.report();
                self.retry_later(Vec::new(), Some(subscription.clone()));
            }
        }
        self.uncharge(charged);
    }
}

/// Takes records from a cursor's rows, up to a batch, and moves it on.
fn take_records(cursor: &mut Cursor) -> (Vec<(i64, Record)>, Option<Corrupt>) {
    let (mut records, mut bytes) = (Vec::new(), 0);
    while let Some(row) = cursor.rows.front() {
        let span = usize::try_from(row.end - row.base).unwrap_or(usize::MAX);
        if !records.is_empty() && (records.len().saturating_add(span) > ROW_RECORDS || bytes + row.data.len() > ROW_BYTES) {
            break;
        }
        records.reserve(span.min(ROW_RECORDS));
        bytes += row.data.len();
        for record in Decoder::new(row.data.clone(), row.base) {
            match record {
                Ok((offset, record)) if offset >= cursor.next => records.push((offset, record)),
                Ok(_) => {}
                Err(corrupt) => {
                    cursor.next = records.last().map_or(cursor.next, |(offset, _)| offset + 1);
                    cursor.rows.clear();
                    return (records, Some(corrupt));
                }
            }
        }
        cursor.next = cursor.next.max(row.end);
        cursor.rows.pop_front();
    }
    (records, None)
}
