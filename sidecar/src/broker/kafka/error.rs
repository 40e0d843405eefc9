//! librdkafka's errors in the words of the seam.

use rdkafka::{error::KafkaError, types::RDKafkaErrorCode as Code};

use crate::broker::{BrokerError, BrokerErrorKind, ProduceError, ProduceErrorKind};

/// The kind of an error that a client met outside producing.
pub(super) fn broker_kind(code: Code) -> BrokerErrorKind {
    match code {
        Code::BrokerTransportFailure
        | Code::Resolve
        | Code::AllBrokersDown
        | Code::OperationTimedOut
        | Code::TimedOutQueue
        | Code::SSL
        | Code::WaitingForCoordinator
        | Code::RequestTimedOut
        | Code::BrokerNotAvailable
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::NetworkException
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::BrokerDestroy
        | Code::DestroyBroker => BrokerErrorKind::Unreachable,
        Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition | Code::UnknownTopicId => BrokerErrorKind::UnknownTopic,
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => BrokerErrorKind::Unauthorized,
        Code::IllegalGeneration
        | Code::UnknownMemberId
        | Code::FencedInstanceId
        | Code::FencedMemberEpoch
        | Code::StaleMemberEpoch
        | Code::UnreleasedInstanceId
        | Code::AssignmentLost
        | Code::Fenced => BrokerErrorKind::Fenced,
        Code::InvalidArgument
        | Code::UnsupportedVersion
        | Code::InvalidTopic
        | Code::InvalidPartitions
        | Code::InvalidReplicationFactor
        | Code::InvalidReplicaAssignment
        | Code::InvalidConfig
        | Code::PolicyViolation
        | Code::InvalidGroupId
        | Code::InvalidSessionTimeout
        | Code::InconsistentGroupProtocol
        | Code::OffsetMetadataTooLarge
        | Code::InvalidCommitOffsetSize
        | Code::UnsupportedSASLMechanism => BrokerErrorKind::Config,
        Code::KafkaStorageError | Code::FileSystem => BrokerErrorKind::Storage,
        _ => BrokerErrorKind::Other,
    }
}

/// What to do about it, where that is known.
fn hint(code: Code) -> &'static str {
    match code {
        Code::TopicAuthorizationFailed => ": grant the principal READ, WRITE and DESCRIBE on the topic",
        Code::GroupAuthorizationFailed => ": grant the principal READ on the group",
        Code::ClusterAuthorizationFailed => ": grant the principal IDEMPOTENT_WRITE or CREATE on the cluster",
        Code::Authentication | Code::SaslAuthenticationFailed => ": check `sasl.username`, `sasl.password` and `sasl.mechanism`",
        Code::InconsistentGroupProtocol => {
            ": another member of the group uses another assignment strategy (the mesh uses cooperative-sticky); stop it or use another group"
        }
        Code::MessageSizeTooLarge => {
            ": larger than the topic's `max.message.bytes`; a broker refuses a whole batch, so where that is below 1 MB set `batch.size` below it"
        }
        Code::InvalidReplicationFactor => ": fewer brokers are up than replicas are asked for",
        _ => "",
    }
}

/// An error of a call; `what` says what was tried, with topic or group.
pub(super) fn broker_error(what: impl std::fmt::Display, error: &KafkaError) -> BrokerError {
    match (error, error.rdkafka_error_code()) {
        (_, Some(code)) => code_error(what, code),
        (KafkaError::ClientConfig(_, text, key, value), None) => {
            let value = if is_secret(key) { "***" } else { value };
            BrokerError::new(BrokerErrorKind::Config, format!("{what}: kafka: `{key}: {value}`: {text}"))
        }
        (KafkaError::ClientCreation(text), None) => BrokerError::new(BrokerErrorKind::Config, format!("{what}: {text}")),
        _ => BrokerError::new(BrokerErrorKind::Other, format!("{what}: {error}")),
    }
}

/// The same, where only a code is known.
pub(super) fn code_error(what: impl std::fmt::Display, code: Code) -> BrokerError {
    BrokerError::new(broker_kind(code), format!("{what}: {code}{}", hint(code)))
}

/// Whether a setting's value must not be shown.
fn is_secret(key: &str) -> bool {
    ["password", "secret", "token", "key", "jaas", "pem"].iter().any(|word| key.contains(word))
}

/// Why a record was not acknowledged.
pub(super) fn produce_error(topic: &str, bootstrap: &str, error: &KafkaError) -> ProduceError {
    let kind = error.rdkafka_error_code().map_or(ProduceErrorKind::Refused, produce_kind);
    let text = error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| format!("{code}{}", hint(code)));
    ProduceError { kind, detail: format!("topic `{topic}` at Kafka {bootstrap}: {text}") }
}

/// The kind of a record's failure.
pub(super) fn produce_kind(code: Code) -> ProduceErrorKind {
    match code {
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownTopicId | Code::InvalidTopic => ProduceErrorKind::UnknownTopic,
        Code::UnknownPartition => ProduceErrorKind::UnknownPartition,
        Code::MessageSizeTooLarge | Code::InvalidMessageSize | Code::MessageBatchTooLarge => ProduceErrorKind::TooLarge,
        Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TransactionalIdAuthorizationFailed => ProduceErrorKind::Unauthorized,
        Code::InvalidRecord
        | Code::PolicyViolation
        | Code::InvalidTimestamp
        | Code::InvalidMessage
        | Code::InvalidArgument
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType => ProduceErrorKind::Refused,
        Code::QueueFull => ProduceErrorKind::QueueFull,
        Code::PurgeQueue
        | Code::TimedOutQueue
        | Code::AllBrokersDown
        | Code::BrokerNotAvailable
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::NotEnoughReplicas
        | Code::ISRInsufficient
        | Code::KafkaStorageError => ProduceErrorKind::Unavailable,
        Code::MessageTimedOut
        | Code::RequestTimedOut
        | Code::OperationTimedOut
        | Code::BrokerTransportFailure
        | Code::NetworkException
        | Code::NotEnoughReplicasAfterAppend => ProduceErrorKind::TimedOut,
        // Anything else is treated as what may have been stored: the safe side.
        _ => ProduceErrorKind::Fatal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_stored_is_never_called_not_stored() {
        for code in [Code::PurgeInflight, Code::OutOfOrderSequenceNumber, Code::Fatal, Code::UnknownProducerId] {
            assert_eq!(produce_kind(code), ProduceErrorKind::Fatal);
        }
        assert_eq!(produce_kind(Code::MessageTimedOut), ProduceErrorKind::TimedOut);
        assert_eq!(produce_kind(Code::PurgeQueue), ProduceErrorKind::Unavailable);
    }

    #[test]
    fn a_fenced_commit_is_fenced() {
        for code in [Code::IllegalGeneration, Code::UnknownMemberId, Code::FencedInstanceId, Code::AssignmentLost] {
            assert_eq!(broker_error("commit", &KafkaError::ConsumerCommit(code)).kind, BrokerErrorKind::Fenced);
        }
    }
}
