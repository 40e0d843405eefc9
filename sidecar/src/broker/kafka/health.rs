//! What is known of the brokers' reachability, and the clients' errors and log lines.
//!
//! Every client reports its errors here. One keeper thread asks the broker while something is wrong, and clears it: librdkafka says when
//! brokers went away, but not when they came back.
//!
//! Invariant: reading the state is one lock and no I/O.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{config::RDKafkaLogLevel, types::RDKafkaErrorCode as Code};

use super::wakeup::{Wakeup, lock};
use crate::{
    broker::{BrokerError, BrokerErrorKind},
    record::TopicPartition,
};

/// The state of the brokers, shared by all clients.
#[derive(Debug)]
pub(super) struct Health {
    bootstrap: String,
    state: Mutex<State>,
    version: AtomicU64,
    /// Wakes the keeper.
    pub(super) keeper: Wakeup,
    logs: LogGate,
}

#[derive(Debug)]
struct State {
    trouble: Option<Trouble>,
    /// The last connection failure's text: the reason behind "all brokers are down".
    reason: String,
    /// Whether the broker ever answered.
    reached: bool,
    /// All connections are gone, which an idle client sees too: the keeper finds out.
    suspect: bool,
    /// A partition did not answer: the keeper looks whether each has a leader.
    look_for_leaders: bool,
    /// The partitions that have none, in order.
    leaderless: Vec<Leaderless>,
}

/// A partition that nobody leads: it can be neither read nor written until a broker that holds it is back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaderless {
    pub(super) partition: TopicPartition,
    /// The brokers that hold it.
    pub(super) replicas: Vec<i32>,
}

impl std::fmt::Display for Leaderless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let replicas = self.replicas.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        write!(f, "LEADER_NOT_AVAILABLE: {} has no leader: no broker that holds it is up (broker {replicas})", self.partition)
    }
}

/// What is wrong.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    /// The error, for people.
    pub(super) error: BrokerError,
    /// The broker that cannot be reached while others can.
    pub(super) broker: Option<i32>,
}

impl Health {
    pub(super) fn new(bootstrap: &str) -> Self {
        Self {
            bootstrap: bootstrap.to_owned(),
            state: Mutex::new(State {
                trouble: None,
                reason: String::new(),
                reached: false,
                suspect: false,
                look_for_leaders: false,
                leaderless: Vec::new(),
            }),
            version: AtomicU64::new(0),
            keeper: Wakeup::default(),
            logs: LogGate::default(),
        }
    }

    /// The brokers to begin with, for messages.
    pub(super) fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    /// Changes whenever [`Health::trouble`] does.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// What is wrong, if something is.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        lock(&self.state).trouble.clone()
    }

    /// `Ok` if the broker answered, and nothing is known to be wrong since.
    pub(super) fn check(&self) -> Result<(), BrokerError> {
        let state = lock(&self.state);
        match &state.trouble {
            Some(trouble) => Err(trouble.error.clone()),
            None if state.reached => Ok(()),
            None => Err(BrokerError::new(BrokerErrorKind::Unreachable, format!("Kafka {} has not answered yet", self.bootstrap))),
        }
    }

    /// Whether the keeper has to ask.
    pub(super) fn wants_probe(&self) -> bool {
        let state = lock(&self.state);
        !state.reached || state.suspect || state.trouble.is_some() || state.look_for_leaders || !state.leaderless.is_empty()
    }

    /// Whether the keeper has to look for the leaders of partitions, which is a larger question.
    pub(super) fn wants_leaders(&self) -> bool {
        let state = lock(&self.state);
        state.look_for_leaders || !state.leaderless.is_empty() || state.trouble.as_ref().is_some_and(|trouble| trouble.broker.is_some())
    }

    /// A partition did not answer.
    pub(super) fn look_for_leaders(&self) {
        lock(&self.state).look_for_leaders = true;
        self.keeper.set();
    }

    /// What the keeper found.
    pub(super) fn set_leaderless(&self, found: Vec<Leaderless>) {
        let mut state = lock(&self.state);
        state.look_for_leaders = false;
        if state.leaderless == found {
            return;
        }
        match found.first() {
            Some(first) => tracing::warn!(partitions = found.len(), "kafka: {first}"),
            None => tracing::info!("kafka: every partition has a leader again"),
        }
        state.leaderless = found;
    }

    /// What keeps a topic from being read or written while others are.
    pub(super) fn trouble_of(&self, topic: &str) -> Option<BrokerError> {
        let state = lock(&self.state);
        let mut of_topic = state.leaderless.iter().filter(|one| *one.partition.topic == *topic);
        let first = of_topic.next()?;
        let more = match of_topic.count() {
            0 => String::new(),
            more => format!(", and {more} more of its partitions"),
        };
        Some(BrokerError::new(BrokerErrorKind::Unreachable, format!("{first}{more}")))
    }

    /// The broker answered.
    pub(super) fn recovered(&self) {
        let mut state = lock(&self.state);
        // A broker that was gone before this process began gives no sign of it.
        state.look_for_leaders |= !std::mem::replace(&mut state.reached, true);
        state.suspect = false;
        state.reason.clear();
        if state.trouble.take().is_some() {
            self.version.fetch_add(1, Ordering::Release);
            tracing::info!(bootstrap = %self.bootstrap, "kafka: the broker answers again");
        }
    }

    /// The keeper got no answer.
    pub(super) fn unanswered(&self, error: BrokerError) {
        let mut state = lock(&self.state);
        state.suspect = false;
        if state.trouble.is_none() {
            let error = match (&state.reason, error.kind) {
                (reason, BrokerErrorKind::Unreachable) if !reason.is_empty() => self.down(reason),
                _ => error,
            };
            self.set(&mut state, Trouble { error, broker: None });
        }
    }

    /// Takes a client's error.
    pub(super) fn report(&self, code: Code, reason: &str) {
        match code {
            Code::AllBrokersDown => {
                let mut state = lock(&self.state);
                if state.reason.is_empty() {
                    reason.clone_into(&mut state.reason);
                }
                state.suspect = true;
                self.keeper.set();
            }
            Code::BrokerTransportFailure | Code::Resolve => {
                let mut state = lock(&self.state);
                state.reason = shorten(reason).to_owned();
                // A connection that is lost is no news: the next attempt shows whether the broker is there.
                let cannot = code == Code::Resolve || reason.contains("Connect to") || reason.contains("setup timed out");
                if let (true, true, Some((broker, address))) = (cannot, state.trouble.is_none(), named_broker(reason)) {
                    let detail = format!(
                        "Kafka {} answers, but broker {broker} advertises `{address}`, which cannot be reached from here ({}): if the \
                         broker is up, check its `advertised.listeners`",
                        self.bootstrap,
                        shorten(reason)
                    );
                    self.set(&mut state, Trouble { error: BrokerError::new(BrokerErrorKind::Unreachable, detail), broker: Some(broker) });
                }
            }
            Code::Authentication | Code::SaslAuthenticationFailed | Code::SSL | Code::UnsupportedSASLMechanism => {
                let kind = if code == Code::SSL { BrokerErrorKind::Unreachable } else { BrokerErrorKind::Unauthorized };
                let detail =
                    format!("Kafka {}: {code}: {}: check `security.protocol`, `sasl.*` and `ssl.*`", self.bootstrap, shorten(reason));
                let mut state = lock(&self.state);
                state.reason = shorten(reason).to_owned();
                self.set(&mut state, Trouble { error: BrokerError::new(kind, detail), broker: None });
            }
            _ => tracing::debug!(%code, reason, "kafka: client error"),
        }
    }

    fn down(&self, reason: &str) -> BrokerError {
        BrokerError::new(BrokerErrorKind::Unreachable, format!("no broker of Kafka {} can be reached: {reason}", self.bootstrap))
    }

    fn set(&self, state: &mut State, trouble: Trouble) {
        let changed =
            state.trouble.as_ref().is_none_or(|before| before.error.kind != trouble.error.kind || before.broker != trouble.broker);
        if changed {
            tracing::warn!(bootstrap = %self.bootstrap, "kafka: {}", trouble.error);
            state.trouble = Some(trouble);
            self.version.fetch_add(1, Ordering::Release);
            self.keeper.set();
        }
    }

    /// Takes a log line of librdkafka.
    pub(super) fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        // Connection failures are reported, once, by `set`; and all clients get all of the operator's keys, whichever they are for.
        let quiet = matches!(facility, "FAIL" | "ERROR") || (facility == "CONFWARN" && text.contains("will be ignored by this"));
        let level = if quiet { RDKafkaLogLevel::Debug } else { level };
        match level {
            RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", "{facility} {text}"),
            RDKafkaLogLevel::Info | RDKafkaLogLevel::Notice => {
                if let Some(more) = self.logs.admit(facility) {
                    tracing::info!(target: "librdkafka", suppressed = more, "{facility} {text}");
                }
            }
            _ => {
                if let Some(more) = self.logs.admit(facility) {
                    tracing::warn!(target: "librdkafka", suppressed = more, "{facility} {text}");
                }
            }
        }
    }
}

/// librdkafka's text without the suffix that changes each time.
fn shorten(reason: &str) -> &str {
    reason.find(" (after ").map_or(reason, |end| &reason[..end])
}

/// The id and the address of a broker that was learned from metadata, in `[protocol://]host:port/id: text`.
fn named_broker(reason: &str) -> Option<(i32, &str)> {
    let name = reason.split(": ").next()?;
    let name = name.split_once("://").map_or(name, |(_, rest)| rest);
    let (address, id) = name.rsplit_once('/')?;
    Some((id.parse().ok()?, address))
}

/// Lets one line of a facility pass in ten seconds.
#[derive(Debug, Default)]
struct LogGate(Mutex<HashMap<String, (Instant, u64)>>);

impl LogGate {
    const INTERVAL: Duration = Duration::from_secs(10);

    /// The number of lines that were suppressed before this one, if it may pass.
    fn admit(&self, facility: &str) -> Option<u64> {
        let mut seen = lock(&self.0);
        let now = Instant::now();
        if let Some((last, suppressed)) = seen.get_mut(facility) {
            if now.duration_since(*last) < Self::INTERVAL {
                *suppressed += 1;
                return None;
            }
            *last = now;
            return Some(std::mem::take(suppressed));
        }
        seen.insert(facility.to_owned(), (now, 0));
        Some(0)
    }
}

/// The context of clients that only report.
#[derive(Clone, Debug)]
pub(super) struct Reporter(pub(super) Arc<Health>);

impl rdkafka::ClientContext for Reporter {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.0.log(level, facility, text);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            self.0.report(code, reason);
        }
    }
}

impl rdkafka::consumer::ConsumerContext for Reporter {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_names() {
        assert_eq!(named_broker("kafka-0:9092/1: Failed to resolve 'kafka-0:9092': no name"), Some((1, "kafka-0:9092")));
        assert_eq!(named_broker("sasl_ssl://kafka-0:9092/12: Connect to x failed"), Some((12, "kafka-0:9092")));
        assert_eq!(named_broker("kafka-0:9092/bootstrap: Connect to x failed"), None);
        assert_eq!(named_broker("GroupCoordinator: kafka-0:9092: Connect to x failed"), None);
    }

    #[test]
    fn trouble_names_the_advertised_address_and_ends() {
        let health = Health::new("boot:9092");
        health.recovered();
        assert!(health.check().is_ok());
        health
            .report(Code::Resolve, "inner:9092/3: Failed to resolve 'inner:9092': Name or service not known (after 2ms in state CONNECT)");
        let error = health.check().unwrap_err();
        assert!(
            error.detail.contains("broker 3") && error.detail.contains("inner:9092") && error.detail.contains("advertised.listeners"),
            "{error}"
        );
        let version = health.version();
        health.recovered();
        assert!(health.check().is_ok());
        assert_ne!(version, health.version());
    }

    #[test]
    fn all_brokers_down_says_why() {
        let health = Health::new("boot:9092");
        health.report(
            Code::BrokerTransportFailure,
            "boot:9092/bootstrap: Connect to ipv4#1.2.3.4:9092 failed: Connection refused (after 0ms in state CONNECT)",
        );
        health.report(Code::AllBrokersDown, "1/1 brokers are down");
        assert!(health.trouble().is_none() && health.wants_probe(), "a broker closes idle connections: the keeper asks first");
        health.unanswered(BrokerError::new(BrokerErrorKind::Unreachable, "timed out"));
        let error = health.check().unwrap_err();
        assert!(error.detail.contains("Connection refused") && !error.detail.contains("after 0ms"), "{error}");
    }

    #[test]
    fn a_partition_without_a_leader_is_trouble_of_its_topic_alone() {
        let health = Health::new("boot:9092");
        health.recovered();
        assert!(health.wants_probe() && health.wants_leaders(), "once at the beginning");
        health.set_leaderless(Vec::new());
        assert!(!health.wants_probe());
        health.look_for_leaders();
        assert!(health.wants_probe() && health.wants_leaders());
        let of = |number| Leaderless { partition: TopicPartition::new("in", number), replicas: vec![2] };
        health.set_leaderless(vec![of(0), of(3)]);
        let error = health.trouble_of("in").unwrap().detail;
        for word in ["LEADER_NOT_AVAILABLE", "in/0", "broker 2", "1 more"] {
            assert!(error.contains(word), "{error}");
        }
        assert!(health.trouble_of("out").is_none() && health.check().is_ok(), "others go on");
        assert!(health.wants_probe(), "until there is one");
        health.set_leaderless(Vec::new());
        assert!(health.trouble_of("in").is_none() && !health.wants_probe());
    }

    #[test]
    fn log_lines_are_limited() {
        let gate = LogGate::default();
        assert_eq!(gate.admit("X"), Some(0));
        assert_eq!(gate.admit("X"), None);
        assert_eq!(gate.admit("Y"), Some(0));
    }
}
