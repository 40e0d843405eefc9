//! What is wrong and what is over; topics that do not exist yet.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::types::RDKafkaErrorCode as Code;

use super::{
    super::{
        super::{admin, error::code_error},
        Client,
    },
    ASK, Cause, Session,
};
use crate::{
    broker::{BrokerError, BrokerErrorKind, Event},
    record::TopicPartition,
};

/// How often a reader without a group looks for new partitions.
const PARTITIONS: Duration = Duration::from_secs(5);
/// How long an error of access is believed when it is not repeated.
const ACCESS: Duration = Duration::from_secs(90);

impl Session {
    pub(super) fn client_error(&mut self, code: Code, reason: &str) {
        match code {
            Code::AutoOffsetReset => self.out_of_range = true,
            Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition | Code::UnknownTopicId => self.check_topics = true,
            Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed | Code::InconsistentGroupProtocol => {
                self.access_until = Instant::now() + ACCESS;
                let error = code_error(format!("{}: {reason}", self.name()), code);
                self.trouble(Cause::Access, Some(error));
            }
            _ => {}
        }
    }

    pub(super) fn tick(&mut self, client: &Arc<Client>) {
        self.tell_health();
        if !self.starting_over && std::mem::take(&mut self.abandoned) {
            self.adopt(client);
        }
        if self.troubles.contains_key(&Cause::Access) && Instant::now() > self.access_until {
            self.trouble(Cause::Access, None);
        }
        if self.troubles.contains_key(&Cause::Broker) {
            return;
        }
        let look = self.check_topics || !self.missing.is_empty() || (!self.grouped() && Instant::now() >= self.next_partitions);
        if look {
            self.next_partitions = Instant::now() + PARTITIONS;
            self.look_at_topics(client);
        }
    }

    /// Looks which topics exist; a reader without a group takes their new partitions.
    fn look_at_topics(&mut self, client: &Arc<Client>) {
        let all = self.check_topics || !self.grouped();
        let topics: Vec<Arc<str>> = if all { self.shared.config.topics.clone() } else { self.missing.iter().cloned().collect() };
        let asked = topics.clone();
        let counts = self.beside(client, ASK, move |client| {
            asked.iter().map(|topic| admin::partition_count(client, topic, Duration::from_secs(5))).collect::<Result<Vec<_>, _>>()
        });
        let counts = match counts {
            Some(Ok(counts)) => counts,
            Some(Err(error)) => {
                if error.kind == BrokerErrorKind::Unauthorized {
                    self.access_until = Instant::now() + ACCESS;
                    self.trouble(Cause::Access, Some(error));
                }
                return;
            }
            None => return,
        };
        self.check_topics = false;
        let mut again = false;
        for (topic, count) in topics.iter().zip(&counts) {
            if count.is_some() {
                if self.missing.remove(topic) {
                    again = true;
                    self.appeared.insert(topic.clone());
                    self.trouble(Cause::Topic(topic.clone()), None);
                }
            } else if self.missing.insert(topic.clone()) {
                let detail = format!(
                    "topic `{topic}` does not exist at Kafka {}: it is waited for; create it, or correct the name",
                    self.health.bootstrap()
                );
                self.trouble(Cause::Topic(topic.clone()), Some(BrokerError::new(BrokerErrorKind::UnknownTopic, detail)));
            }
        }
        if !self.grouped() {
            self.take_new_partitions(client, &topics, &counts);
        } else if again {
            // librdkafka would look for it within its metadata interval only.
            self.subscribe(client);
            self.check_topics = false;
        }
    }

    fn take_new_partitions(&mut self, client: &Arc<Client>, topics: &[Arc<str>], counts: &[Option<i32>]) {
        let mut new = Vec::new();
        for (topic, count) in topics.iter().zip(counts) {
            let known = self.index.get(topic);
            new.extend(
                (0..count.unwrap_or(0))
                    .filter(|number| known.is_none_or(|known| !known.contains_key(number)))
                    .map(|number| TopicPartition { topic: topic.clone(), partition: number }),
            );
        }
        if new.is_empty() {
            return;
        }
        if let Some(assigned) = self.positions(client, &new) {
            self.begin(client, assigned);
            // Partitions that a topic gets from now on are new, and so are their records.
            self.appeared.extend(topics.iter().zip(counts).filter(|(_, count)| count.is_some()).map(|(topic, _)| topic.clone()));
        }
    }

    pub(super) fn tell_health(&mut self) {
        let version = self.health.version();
        if version != self.health_seen {
            self.health_seen = version;
            let trouble = self.health.trouble().map(|trouble| trouble.error);
            self.trouble(Cause::Broker, trouble);
        }
    }

    /// Notes what is wrong or no longer wrong, and tells it if that is news.
    pub(super) fn trouble(&mut self, cause: Cause, error: Option<BrokerError>) {
        match error {
            Some(error) => self.troubles.insert(cause, error),
            None => self.troubles.remove(&cause),
        };
        let now = self.troubles.values().next();
        let same = match (&self.told, now) {
            (None, None) => true,
            (Some(told), Some(now)) => told.kind == now.kind && told.detail == now.detail,
            _ => false,
        };
        if !same {
            self.told = now.cloned();
            self.shared.event(self.told.clone().map_or(Event::Recovered, Event::Trouble));
        }
    }
}
