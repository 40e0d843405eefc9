//! The settings of librdkafka's clients: what the mesh needs, under what the operator configured.
//!
//! Invariant: an operator's key wins over a default; only the keys on which the promises of the seam rest are refused or overridden.

use std::collections::BTreeMap;

use rdkafka::{ClientConfig, config::RDKafkaLogLevel};

use super::{KafkaOptions, error::broker_error};
use crate::broker::{BrokerError, BrokerErrorKind, ConsumerConfig};

/// Keys that the mesh sets itself: the values that it sets anyhow, and the reason.
const RESERVED: [(&str, &[&str], &str); 12] = [
    ("group.id", &[], "a route's group is named by the routing table (`group`)"),
    ("group.instance.id", &[], "static membership is asked for by `instance`"),
    ("transactional.id", &[], "it is made of mesh, route and instance"),
    ("enable.auto.commit", &["false"], "the mesh commits what is complete, never what was read"),
    ("enable.auto.offset.store", &["false"], "the mesh commits what is complete, never what was read"),
    ("auto.offset.reset", &["error"], "where a group begins is a route's `start`; what was deleted unread is reported as `expired`"),
    ("enable.idempotence", &["true"], "without it records repeat and change their order"),
    ("acks", &["all", "-1"], "an acknowledged record is on all in-sync replicas"),
    ("request.required.acks", &["all", "-1"], "an acknowledged record is on all in-sync replicas"),
    ("partition.assignment.strategy", &["cooperative-sticky"], "only this one leaves the other partitions running in a rebalance"),
    ("isolation.level", &["read_committed"], "a record of a transaction that was aborted must reach no handler"),
    ("enable.partition.eof", &["false"], "the mesh asks for watermarks where it needs them"),
];

/// Keys of members that the broker decides on with `group.protocol: consumer`: librdkafka refuses them then.
const CLASSIC_ONLY: [&str; 4] = ["session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy", "group.protocol.type"];

/// How long the broker holds back the answer to a fetch that finds nothing, in milliseconds: for a few consumers, and at most. Longer is rarer; but a
/// partition that is assigned, sought or resumed meanwhile is not asked for before it is over.
const FETCH_WAIT_MS: (usize, usize) = (50, 500);
/// How many of them the consumers of a process make in a second together, about.
const FETCHES: usize = 100;

/// How long the broker lets a transaction be open, in milliseconds.
const TRANSACTION_MS: u64 = 10_000;
/// After how long an idle connection of a producer of transactions is closed. No less: one that waits for an answer counts as idle, too.
const IDLE_MS: &str = "10000";

/// The operator's settings, checked.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    keys: BTreeMap<String, String>,
    options: KafkaOptions,
}

impl Settings {
    /// Checks the keys against the reserved ones; their values are checked by librdkafka when a client is made.
    pub(super) fn new(keys: BTreeMap<String, String>, options: KafkaOptions) -> Result<Self, BrokerError> {
        if ["bootstrap.servers", "metadata.broker.list"].iter().all(|key| keys.get(*key).is_none_or(|list| list.trim().is_empty())) {
            return Err(BrokerError::new(
                BrokerErrorKind::Config,
                "kafka: `bootstrap.servers` is missing: name one or more brokers as `host:port,host:port`",
            ));
        }
        for (key, same, why) in RESERVED {
            if let Some(value) = keys.get(key).filter(|value| !same.contains(&value.as_str())) {
                return Err(BrokerError::new(BrokerErrorKind::Config, format!("kafka: `{key}: {value}` cannot be set: {why}")));
            }
        }
        match keys.get("group.protocol").map(String::as_str) {
            None | Some("classic") => {}
            Some("consumer") => {
                for key in CLASSIC_ONLY.iter().filter(|key| keys.contains_key(**key)) {
                    tracing::warn!("kafka: `{key}` is not used: with `group.protocol: consumer` the broker decides on it");
                }
            }
            Some(other) => {
                let detail = format!("kafka: `group.protocol: {other}` is not known: write `classic` or `consumer`");
                return Err(BrokerError::new(BrokerErrorKind::Config, detail));
            }
        }
        Ok(Self { keys, options })
    }

    /// Whether librdkafka knows the keys and takes their values.
    pub(super) fn check(&self) -> Result<(), BrokerError> {
        let reader = ConsumerConfig::reader(Vec::new(), crate::broker::StartOffset::Earliest, 1 << 20);
        for config in [self.producer(), self.consumer(&reader, 0)] {
            config.create_native_config().map_err(|error| broker_error("kafka", &error))?;
        }
        Ok(())
    }

    /// The brokers to begin with, for messages.
    pub(super) fn bootstrap(&self) -> &str {
        self.keys.get("bootstrap.servers").or_else(|| self.keys.get("metadata.broker.list")).map_or("", String::as_str)
    }

    fn base(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        let debug = self.keys.contains_key("debug");
        config.set_log_level(if debug { RDKafkaLogLevel::Debug } else { RDKafkaLogLevel::Info });
        config.set("client.id", &self.options.client_id);
        // A broker that returns is found within a second instead of ten.
        config.set("reconnect.backoff.ms", "50").set("reconnect.backoff.max.ms", "1000");
        // Closing an idle connection and opening it again is no news.
        config.set("log.connection.close", "false");
        config
    }

    /// Whether members of groups follow the older protocol.
    fn classic(&self) -> bool {
        self.keys.get("group.protocol").is_none_or(|protocol| protocol == "classic")
    }

    fn overlay(&self, config: &mut ClientConfig) {
        let classic = self.classic();
        for (key, value) in self.keys.iter().filter(|(key, _)| classic || !CLASSIC_ONLY.contains(&key.as_str())) {
            config.set(key, value);
        }
    }

    /// For the shared producer.
    pub(super) fn producer(&self) -> ClientConfig {
        let mut config = self.base();
        config
            // At once when idle, in batches under load: while two requests are under way, the next one gathers. With more of them under way, a
            // busy sidecar sends its records nearly one by one, which costs it and the broker a multiple.
            .set("linger.ms", "0")
            .set("max.in.flight.requests.per.connection", "2")
            .set("message.timeout.ms", "0")
            .set("partitioner", "murmur2_random")
            .set("queue.buffering.max.kbytes", (self.options.queue_bytes / 1024).max(1024).to_string())
            .set("queue.buffering.max.messages", "500000")
            .set("message.max.bytes", (self.options.record_bytes + 64 * 1024).to_string())
            // A topic that was deleted under its producer fails within seconds.
            .set("topic.metadata.propagation.max.ms", "5000")
            .set("allow.auto.create.topics", "false");
        self.overlay(&mut config);
        config.set("enable.idempotence", "true").set("acks", "all");
        config
    }

    /// For the producer of a consumer's transactions.
    pub(super) fn transactional(&self, id: &str) -> ClientConfig {
        let mut config = self.producer();
        // A transaction is over, one way or the other, well before its partitions can be another member's for long: until then their
        // offsets, and the records behind it, are kept from readers.
        let timeout = config.get("transaction.timeout.ms").and_then(|timeout| timeout.parse().ok()).unwrap_or(TRANSACTION_MS);
        let message = timeout * 4 / 5;
        config.set("transactional.id", id).set("transaction.timeout.ms", timeout.to_string());
        // Also where the operator set another for the shared producer: librdkafka refuses one that is longer than the transaction.
        config.set("message.timeout.ms", message.to_string());
        config.remove("delivery.timeout.ms");
        // librdkafka (2.12) gives up looking for a group's coordinator after three answers that there is none, knows no timeout there, and looks
        // again when some connection comes or goes: with brokers that are well again, `send_offsets_to_transaction` would never return. So
        // connections go when they are idle.
        config.set("connections.max.idle.ms", IDLE_MS);
        config
    }

    /// For questions to the broker, of a group or of none. Never a member.
    pub(super) fn admin(&self, group: Option<&str>) -> ClientConfig {
        let mut config = self.base();
        self.overlay(&mut config);
        config.set("allow.auto.create.topics", "false").set("enable.auto.commit", "false");
        if let Some(group) = group {
            config.set("group.id", group);
        }
        config
    }

    /// For a consumer beside so many others.
    pub(super) fn consumer(&self, consumer: &ConsumerConfig, others: usize) -> ClientConfig {
        const MIB: usize = 1024 * 1024;
        let (least, most) = FETCH_WAIT_MS;
        let wait = match consumer {
            // Nothing of these is ever paused, and every sidecar has three of them, idle nearly always.
            _ if is_of_the_mesh(consumer) => most,
            // What it is to read comes and goes.
            _ if consumer.topics.is_empty() => least,
            // Each that is idle costs the sidecar and the broker a fetch each time: a thousand would ask 20,000 times a second.
            _ => ((others + 1) * 1_000 / FETCHES).clamp(least, most),
        };
        let ahead = (consumer.buffer_bytes / 2).clamp(MIB, 8 * MIB);
        let mut config = self.base();
        config
            .set("fetch.wait.max.ms", wait.to_string())
            .set("fetch.queue.backoff.ms", "10")
            .set("queued.max.messages.kbytes", (ahead / 1024).to_string())
            // librdkafka counts the bytes of records only, and keeps some hundreds more for each: many small ones are bounded by number.
            .set("queued.min.messages", (ahead / 256).to_string())
            .set("fetch.max.bytes", ahead.max(self.options.record_bytes + 64 * 1024).to_string())
            .set("socket.timeout.ms", "15000")
            .set("topic.metadata.refresh.interval.ms", "30000");
        // With `group.protocol: consumer` the broker decides on both, and librdkafka refuses them.
        let classic = self.classic();
        if classic {
            config.set("session.timeout.ms", "10000");
        }
        self.overlay(&mut config);
        if classic && !self.keys.contains_key("heartbeat.interval.ms") {
            // A member learns by its heartbeat that others come or go: of librdkafka's 3 s the partitions that move would stand still most.
            let session = config.get("session.timeout.ms").and_then(|session| session.parse::<u64>().ok());
            let beat = session.map_or(1_000, |session| session / 10).clamp(100, 3_000);
            config.set("heartbeat.interval.ms", beat.to_string());
        }
        config
            .set("allow.auto.create.topics", "false")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "error");
        if classic {
            config.set("partition.assignment.strategy", "cooperative-sticky");
        }
        match &consumer.group {
            Some(group) => {
                config.set("group.id", group);
                if let Some(instance) = &consumer.instance {
                    config.set("group.instance.id", instance);
                }
                // So that it is told what the group does with this member: see `consumer::context`.
                let debug = config.get("debug").filter(|asked| !asked.is_empty()).map_or_else(String::new, |asked| format!("{asked},"));
                config.set("debug", format!("{debug}cgrp")).set_log_level(RDKafkaLogLevel::Debug);
            }
            // Assigning partitions by hand asks for a group's name too; nothing is ever committed or joined under it.
            None => {
                config.set("group.id", "mesh-reader");
            }
        }
        config
    }
}

/// Whether it reads the mesh's own topics, by itself.
fn is_of_the_mesh(consumer: &ConsumerConfig) -> bool {
    consumer.group.is_none() && !consumer.topics.is_empty() && consumer.topics.iter().all(|topic| topic.starts_with("__mesh."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn reserved_and_missing_keys_are_named() {
        let error = Settings::new(keys(&[]), KafkaOptions::default()).unwrap_err();
        assert!(error.detail.contains("bootstrap.servers"), "{error}");
        let error = Settings::new(keys(&[("bootstrap.servers", " ")]), KafkaOptions::default()).unwrap_err();
        assert!(error.detail.contains("bootstrap.servers"), "{error}");
        let error = Settings::new(keys(&[("bootstrap.servers", "a:1"), ("acks", "1")]), KafkaOptions::default()).unwrap_err();
        assert_eq!(error.kind, BrokerErrorKind::Config);
        assert!(error.detail.contains("acks: 1"), "{error}");
        let same = keys(&[("bootstrap.servers", "a:1"), ("acks", "all"), ("enable.idempotence", "true")]);
        assert!(Settings::new(same, KafkaOptions::default()).is_ok(), "what is set anyhow may be said");
    }

    #[test]
    fn the_newer_group_protocol_drops_what_the_broker_decides() {
        let of = |pairs: &[(&str, &str)]| Settings::new(keys(pairs), KafkaOptions::default());
        let consumer = ConsumerConfig {
            group: Some("g".to_owned()),
            topics: vec!["t".into()],
            instance: None,
            start: crate::broker::StartOffset::Earliest,
            buffer_bytes: 1 << 20,
            transactional_id: None,
        };
        let all = [("bootstrap.servers", "a:1"), ("session.timeout.ms", "9000"), ("heartbeat.interval.ms", "1000")];
        let newer = of(&[&all[..], &[("group.protocol", "consumer"), ("group.remote.assignor", "uniform")]].concat()).unwrap();
        let config = newer.consumer(&consumer, 0);
        assert_eq!((config.get("group.protocol"), config.get("group.remote.assignor")), (Some("consumer"), Some("uniform")));
        assert!(CLASSIC_ONLY.iter().all(|key| config.get(key).is_none()));
        let classic = of(&all).unwrap().consumer(&consumer, 0);
        assert_eq!(
            (classic.get("session.timeout.ms"), classic.get("partition.assignment.strategy")),
            (Some("9000"), Some("cooperative-sticky"))
        );
        assert!(of(&[("bootstrap.servers", "a:1"), ("group.protocol", "newest")]).unwrap_err().detail.contains("`classic` or `consumer`"));
    }

    #[test]
    fn the_heartbeat_follows_the_session_unless_it_is_set() {
        let reader = ConsumerConfig::reader(Vec::new(), crate::broker::StartOffset::Earliest, 1 << 20);
        let beat = |pairs: &[(&str, &str)]| {
            let keys = keys(&[&[("bootstrap.servers", "a:1")], pairs].concat());
            Settings::new(keys, KafkaOptions::default()).unwrap().consumer(&reader, 0).get("heartbeat.interval.ms").map(str::to_owned)
        };
        assert_eq!(beat(&[]).as_deref(), Some("1000"));
        assert_eq!(beat(&[("session.timeout.ms", "45000")]).as_deref(), Some("3000"));
        assert_eq!(beat(&[("session.timeout.ms", "1500")]).as_deref(), Some("150"));
        assert_eq!(beat(&[("heartbeat.interval.ms", "2000")]).as_deref(), Some("2000"));
        assert_eq!(beat(&[("group.protocol", "consumer")]), None);
    }

    #[test]
    fn the_more_consumers_there_are_the_less_each_asks() {
        let wait = |group: Option<&str>, topics: &[&str], others: usize, pairs: &[(&str, &str)]| {
            let topics = topics.iter().map(|topic| (*topic).into()).collect();
            let reader = ConsumerConfig::reader(topics, crate::broker::StartOffset::Earliest, 1 << 20);
            let consumer = ConsumerConfig { group: group.map(str::to_owned), ..reader };
            let keys = keys(&[&[("bootstrap.servers", "a:1")], pairs].concat());
            let config = Settings::new(keys, KafkaOptions::default()).unwrap().consumer(&consumer, others);
            config.get("fetch.wait.max.ms").unwrap().parse::<u64>().unwrap()
        };
        assert_eq!([0, 4, 5, 19, 49, 1_000].map(|others| wait(Some("g"), &["orders"], others, &[])), [50, 50, 60, 200, 500, 500]);
        assert_eq!([0, 19].map(|others| wait(None, &["__mesh.status", "orders"], others, &[])), [50, 200]);
        assert_eq!(
            [0, 19].map(|others| wait(None, &["__mesh.status"], others, &[])),
            [500; 2],
            "nobody waits for what the mesh reads itself"
        );
        assert_eq!(wait(None, &[], 1_000, &[]), 50, "partitions are chosen as they are needed");
        assert_eq!(wait(Some("g"), &["orders"], 1_000, &[("fetch.wait.max.ms", "70")]), 70);
    }

    #[test]
    fn a_search_for_a_coordinator_that_librdkafka_gave_up_goes_on() {
        for keys in [&[("bootstrap.servers", "a:1")][..], &[("bootstrap.servers", "a:1"), ("connections.max.idle.ms", "0")]] {
            let settings = Settings::new(self::keys(keys), KafkaOptions::default()).unwrap();
            assert_eq!(settings.transactional("t").get("connections.max.idle.ms"), Some(IDLE_MS));
        }
    }

    #[test]
    fn unknown_keys_pass_and_the_operator_wins() {
        let settings =
            Settings::new(keys(&[("bootstrap.servers", "a:1"), ("linger.ms", "5"), ("odd.key", "x")]), KafkaOptions::default()).unwrap();
        assert_eq!(settings.producer().get("linger.ms"), Some("5"));
        assert_eq!(settings.producer().get("odd.key"), Some("x"));
        assert_eq!(settings.producer().get("acks"), Some("all"));
    }
}
