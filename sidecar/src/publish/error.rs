//! Why a record was not published.

use std::{sync::Arc, time::Duration};

use mesh_routing::Mismatch;

use crate::broker::{ProduceError, ProduceErrorKind};

/// Why a record was not published, or is not known to be. `api::problem` maps it to HTTP and gRPC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Kafka refuses the name.
    #[error("the topic name `{topic}` {reason}")]
    InvalidTopic {
        /// The name, shortened.
        topic: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// `void` is a word of the routing table.
    #[error("`void` is no topic: nothing can be published to it")]
    Void,
    /// A topic of the mesh or of the broker.
    #[error("the topic `{topic}` is internal: names that begin with `__` are not for services")]
    ReservedTopic {
        /// The topic.
        topic: String,
    },
    /// The allow-list of the service does not name the topic.
    #[error("the service `{service}` may not {verb} `{topic}`: it is not in `services[].{list}`")]
    Forbidden {
        /// The service.
        service: Arc<str>,
        /// The topic.
        topic: String,
        /// `publish to` or `subscribe to`.
        verb: &'static str,
        /// The list's field: `publish` or `subscribe`.
        list: &'static str,
    },
    /// Several services with allow-lists are configured and the caller named none.
    #[error("several services are configured and the caller named none, so that its allow-list is not known")]
    Unnamed,
    /// The broker has no such topic.
    #[error("there is no topic `{topic}`")]
    UnknownTopic {
        /// The topic.
        topic: String,
    },
    /// A header that cannot be published.
    #[error("the header `{name}` {reason}")]
    InvalidHeader {
        /// Its name, shortened.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A field of the record that cannot be published.
    #[error("the field `{field}` {reason}")]
    InvalidField {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The value does not match the topic's schema.
    #[error("the value does not match the schema of `{topic}`: {mismatch}")]
    Schema {
        /// The topic.
        topic: Arc<str>,
        /// Where, and what is wrong there.
        mismatch: Mismatch,
    },
    /// Beyond `limits.record_bytes`, or beyond what the broker takes.
    #[error("{detail}")]
    TooLarge {
        /// Names the size and the limit.
        detail: String,
    },
    /// The local queue is full.
    #[error("the queue to the broker is full: {detail}")]
    QueueFull {
        /// The broker's words.
        detail: String,
    },
    /// The broker cannot be reached.
    #[error("the broker is not there: {detail}")]
    Unavailable {
        /// The broker's words.
        detail: String,
    },
    /// No acknowledgement came in time.
    #[error("the broker did not acknowledge a record for `{topic}` within {}{}", humantime::format_duration(*after), reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    TimedOut {
        /// The topic.
        topic: Arc<str>,
        /// The deadline.
        after: Duration,
        /// What is known to keep records of this topic from being stored.
        reason: Option<String>,
    },
    /// The broker forbids it.
    #[error("the broker forbids it: {detail}")]
    Unauthorized {
        /// The broker's words.
        detail: String,
    },
    /// The broker refuses the record itself.
    #[error("the broker refuses the record: {detail}")]
    Refused {
        /// The broker's words.
        detail: String,
    },
    /// The producer failed for good, with the record on its way.
    #[error("the producer failed and is being rebuilt: {detail}")]
    Broken {
        /// The broker's words.
        detail: String,
    },
}

impl PublishError {
    /// From the broker's word about a record for this topic.
    pub(super) fn from_broker(error: ProduceError, topic: &Arc<str>, after: Duration) -> Self {
        let detail = error.detail;
        match error.kind {
            ProduceErrorKind::UnknownTopic | ProduceErrorKind::UnknownPartition => Self::UnknownTopic { topic: topic.to_string() },
            ProduceErrorKind::TooLarge => Self::TooLarge { detail },
            ProduceErrorKind::Unauthorized => Self::Unauthorized { detail },
            ProduceErrorKind::Refused => Self::Refused { detail },
            ProduceErrorKind::QueueFull => Self::QueueFull { detail },
            ProduceErrorKind::Unavailable => Self::Unavailable { detail },
            ProduceErrorKind::TimedOut => Self::TimedOut { topic: topic.clone(), after, reason: None },
            ProduceErrorKind::Fatal => Self::Broken { detail },
        }
    }

    /// The stable word for programs: the problem's `code`, and a label of the metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidTopic { .. } | Self::Void => "invalid-topic",
            Self::ReservedTopic { .. } | Self::Forbidden { .. } => "forbidden-topic",
            Self::Unnamed => "unnamed-service",
            Self::UnknownTopic { .. } => "unknown-topic",
            Self::InvalidHeader { .. } => "invalid-header",
            Self::InvalidField { .. } => "invalid-field",
            Self::Schema { .. } => "schema-mismatch",
            Self::TooLarge { .. } => "record-too-large",
            Self::QueueFull { .. } => "queue-full",
            Self::Unavailable { .. } => "broker-unavailable",
            Self::TimedOut { .. } => "publish-timeout",
            Self::Unauthorized { .. } => "broker-forbids",
            Self::Refused { .. } => "broker-refuses",
            Self::Broken { .. } => "producer-failed",
        }
    }
}
