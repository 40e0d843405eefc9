//! The brokers that every flow is run on.

use anyhow::Result;

/// Which broker a test runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broker {
    /// The embedded one: one sidecar process serves all services.
    Embedded,
    /// Real Kafka, at these addresses.
    Kafka(String),
}

impl Broker {
    /// The shared Kafka; `None` where it cannot be had, after a line that says so.
    ///
    /// # Errors
    /// With `CI=true` where it cannot be had.
    pub async fn kafka() -> Result<Option<Self>> {
        Ok(crate::kafka::kafka().await.map(|kafka| Self::Kafka(kafka.bootstrap().to_owned())))
    }

    /// The addresses of Kafka.
    pub fn bootstrap(&self) -> Option<&str> {
        match self {
            Self::Embedded => None,
            Self::Kafka(bootstrap) => Some(bootstrap),
        }
    }
}

/// Makes two tests of one body: on the embedded broker, and on Kafka.
///
/// ```text
/// on_both!(a_chain_runs, chain);
/// async fn chain(stage: Stage) -> Result<()> { … }
/// ```
#[macro_export]
macro_rules! on_both {
    ($name:ident, $body:ident) => {
        mod $name {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_the_embedded_broker() -> anyhow::Result<()> {
                $crate::stage::Stage::run($crate::broker::Broker::Embedded, |stage| super::$body(stage)).await
            }

            $crate::on_kafka!(on_kafka, super::$body);
        }
    };
}

/// Makes a test of a body that takes Kafka: of topics that others read or write, of several processes.
///
/// ```text
/// on_kafka!(partitions_move, moved);
/// async fn moved(stage: Stage) -> Result<()> { … }
/// ```
#[macro_export]
macro_rules! on_kafka {
    ($name:ident, $body:path) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() -> anyhow::Result<()> {
            match $crate::broker::Broker::kafka().await? {
                Some(broker) => $crate::stage::Stage::run(broker, |stage| $body(stage)).await,
                None => Ok(()),
            }
        }
    };
}
