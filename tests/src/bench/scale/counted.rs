//! A broker that counts what one sidecar of a simulated mesh reads and writes of the mesh's own topics.
//!
//! Invariant: nothing is changed on the way; bytes are those of keys, values and headers, without what a protocol puts around them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use mesh_sidecar::{
    broker::{
        Acks, Admin, Broker, BrokerError, Commit, Consumer, ConsumerConfig, Event, Outgoing, ProduceError, Producer, TransactionError,
    },
    record::{Record, TopicPartition},
};

/// What a sidecar read and wrote so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    control_read: AtomicU64,
    status_read: AtomicU64,
    reports_read: AtomicU64,
    control_written: AtomicU64,
    status_written: AtomicU64,
    reports_written: AtomicU64,
}

/// The same at a moment, or between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of the control topic that were read.
    pub control_read: u64,
    /// Bytes of reports that were read.
    pub status_read: u64,
    /// Reports that were read.
    pub reports_read: u64,
    /// Bytes written to the control topic.
    pub control_written: u64,
    /// Bytes of reports that were written.
    pub status_written: u64,
    /// Reports that were written.
    pub reports_written: u64,
}

impl Traffic {
    /// What came since an earlier moment.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            control_read: self.control_read - before.control_read,
            status_read: self.status_read - before.status_read,
            reports_read: self.reports_read - before.reports_read,
            control_written: self.control_written - before.control_written,
            status_written: self.status_written - before.status_written,
            reports_written: self.reports_written - before.reports_written,
        }
    }
}

impl std::iter::Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            control_read: sum.control_read + one.control_read,
            status_read: sum.status_read + one.status_read,
            reports_read: sum.reports_read + one.reports_read,
            control_written: sum.control_written + one.control_written,
            status_written: sum.status_written + one.status_written,
            reports_written: sum.reports_written + one.reports_written,
        })
    }
}

impl Counts {
    /// As it is now.
    pub(super) fn now(&self) -> Traffic {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Traffic {
            control_read: of(&self.control_read),
            status_read: of(&self.status_read),
            reports_read: of(&self.reports_read),
            control_written: of(&self.control_written),
            status_written: of(&self.status_written),
            reports_written: of(&self.reports_written),
        }
    }

    fn read(&self, topic: &str, record: &Record) {
        match topic {
            "__mesh.control" => drop(self.control_read.fetch_add(size(record), Ordering::Relaxed)),
            "__mesh.status" => {
                self.status_read.fetch_add(size(record), Ordering::Relaxed);
                self.reports_read.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn written(&self, topic: &str, record: &Record) {
        match topic {
            "__mesh.control" => drop(self.control_written.fetch_add(size(record), Ordering::Relaxed)),
            "__mesh.status" => {
                self.status_written.fetch_add(size(record), Ordering::Relaxed);
                self.reports_written.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

fn size(record: &Record) -> u64 {
    let length = |part: &Option<bytes::Bytes>| part.as_ref().map_or(0, bytes::Bytes::len);
    let headers: usize = record.headers.iter().map(|header| header.name.len() + length(&header.value)).sum();
    (length(&record.key) + length(&record.value) + headers) as u64
}

/// A broker for one sidecar.
pub(super) struct Counted {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) counts: Arc<Counts>,
}

impl Broker for Counted {
    fn system(&self) -> &'static str {
        self.broker.system()
    }

    fn producer(&self) -> Arc<dyn Producer> {
        Arc::new(CountedProducer { producer: self.broker.producer(), counts: self.counts.clone() })
    }

    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        Ok(Box::new(CountedConsumer { consumer: self.broker.consumer(config)?, counts: self.counts.clone() }))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        self.broker.admin()
    }

    fn health(&self) -> Result<(), BrokerError> {
        self.broker.health()
    }

    fn trouble_of(&self, topic: &str) -> Option<BrokerError> {
        self.broker.trouble_of(topic)
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        self.broker.close(deadline)
    }
}

struct CountedProducer {
    producer: Arc<dyn Producer>,
    counts: Arc<Counts>,
}

impl Producer for CountedProducer {
    fn send(&self, records: Vec<Outgoing>) -> Acks {
        records.iter().for_each(|out| self.counts.written(&out.topic, &out.record));
        self.producer.send(records)
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.producer.known_partitions(topic)
    }

    fn learn_topic(&self, topic: &str, deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        self.producer.learn_topic(topic, deadline)
    }
}

struct CountedConsumer {
    consumer: Box<dyn Consumer>,
    counts: Arc<Counts>,
}

impl Consumer for CountedConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async {
            let event = self.consumer.next().await;
            if let Event::Records(batch) = &event {
                batch.records.iter().for_each(|(_, record)| self.counts.read(&batch.partition.topic, record));
            }
            event
        })
    }

    fn hold(&mut self, partition: &TopicPartition) {
        self.consumer.hold(partition);
    }

    fn release(&mut self, partition: &TopicPartition) {
        self.consumer.release(partition);
    }

    fn assign(&mut self, partitions: Vec<(TopicPartition, i64)>) {
        self.consumer.assign(partitions);
    }

    fn unassign(&mut self, partitions: &[TopicPartition]) {
        self.consumer.unassign(partitions);
    }

    fn seek(&mut self, partition: &TopicPartition, offset: i64) {
        self.consumer.seek(partition, offset);
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        self.consumer.commit(offsets)
    }

    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        self.consumer.transact(records, offsets)
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        self.consumer.close()
    }
}
