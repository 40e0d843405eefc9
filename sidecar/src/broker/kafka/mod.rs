//! Kafka, through librdkafka.
//!
//! Threads of our own: one polls the producer, one keeps watch while a broker is away, and each consumer has one. None of librdkafka's
//! blocking calls runs on an async worker.
//!
//! Invariant: topics are created only by [`Admin::create_topics`], never by producing or reading.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use futures_util::future::BoxFuture;

use self::{
    admin::Asker,
    consumer::KafkaConsumer,
    health::Health,
    producer::{KafkaProducer, Topics},
    settings::Settings,
    wakeup::lock,
};
use super::{Admin, Broker, BrokerError, BrokerErrorKind, Consumer, ConsumerConfig, Producer, sync};

mod admin;
mod consumer;
mod error;
mod health;
#[cfg(test)]
mod interleavings;
mod producer;
mod settings;
mod together;
mod transaction;
mod wakeup;

/// What is not among librdkafka's own keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaOptions {
    /// How the clients name themselves to the broker, for its logs and quotas.
    pub client_id: String,
    /// The largest record that is published or fetched, in bytes.
    pub record_bytes: usize,
    /// How much may wait to be sent, in bytes; beyond that a send fails with `QueueFull`.
    pub queue_bytes: usize,
}

impl Default for KafkaOptions {
    fn default() -> Self {
        Self { client_id: "mesh-sidecar".to_owned(), record_bytes: 1024 * 1024, queue_bytes: 32 * 1024 * 1024 }
    }
}

/// A Kafka cluster.
#[derive(Debug)]
pub struct KafkaBroker {
    settings: Settings,
    health: Arc<Health>,
    asker: Arc<Asker>,
    producer: Arc<KafkaProducer>,
    keeper: Keeper,
    /// Counts the consumers: each holds it.
    consumers: Arc<()>,
}

impl KafkaBroker {
    /// Checks the settings without a connection.
    ///
    /// # Errors
    /// A key that the mesh sets itself, one that librdkafka does not know, or a value that it refuses.
    pub fn check(keys: BTreeMap<String, String>, options: KafkaOptions) -> Result<(), BrokerError> {
        Settings::new(keys, options)?.check()
    }

    /// Makes the clients; the keys are librdkafka's, as they are. Does not wait for a broker: one that is away is no error here.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Config`] names the key that librdkafka refuses, or that the mesh sets itself.
    pub fn open(keys: BTreeMap<String, String>, options: KafkaOptions) -> Result<Arc<Self>, BrokerError> {
        let settings = Settings::new(keys, options)?;
        let health = Arc::new(Health::new(settings.bootstrap()));
        let topics = Arc::new(Topics::default());
        let asker = Arc::new(Asker::open(settings.clone(), health.clone(), topics.clone())?);
        let producer = Arc::new(KafkaProducer::open(settings.clone(), health.clone(), asker.clone(), topics)?);
        let keeper = Keeper::start(health.clone(), asker.clone())?;
        Ok(Arc::new(Self { settings, health, asker, producer, keeper, consumers: Arc::default() }))
    }
}

impl Broker for KafkaBroker {
    fn system(&self) -> &'static str {
        "kafka"
    }

    fn producer(&self) -> Arc<dyn Producer> {
        self.producer.clone()
    }

    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        Ok(Box::new(KafkaConsumer::open(&self.settings, config, self.health.clone(), &self.consumers)?))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        self.asker.clone()
    }

    fn health(&self) -> Result<(), BrokerError> {
        self.health.check()
    }

    fn trouble_of(&self, topic: &str) -> Option<BrokerError> {
        self.health.trouble_of(topic)
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        let producer = self.producer.clone();
        Box::pin(async move {
            let closed = tokio::task::spawn_blocking(move || producer.close(deadline)).await;
            let keeper = self.keeper.stop();
            let kept = tokio::task::spawn_blocking(move || keeper.is_some_and(|thread| thread.join().is_err())).await;
            if !matches!(kept, Ok(false)) {
                tracing::error!("kafka: the keeper's thread did not end well");
            }
            closed.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("kafka: closing was cut short: {error}"))))
        })
    }
}

/// The thread that asks an absent broker whether it is back, and serves the shared client's log lines.
#[derive(Debug)]
struct Keeper {
    health: Arc<Health>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    fn start(health: Arc<Health>, asker: Arc<Asker>) -> Result<Self, BrokerError> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("kafka-keeper".to_owned()).spawn({
            let (health, stop) = (health.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Acquire) {
                    asker.serve();
                    let wait = if health.wants_probe() {
                        asker.probe();
                        Duration::from_secs(1)
                    } else {
                        Duration::from_secs(5)
                    };
                    health.keeper.wait(wait);
                }
            }
        });
        let thread =
            thread.map_err(|error| BrokerError::new(BrokerErrorKind::Other, format!("kafka: no thread for the keeper: {error}")))?;
        Ok(Self { health, stop, thread: Mutex::new(Some(thread)) })
    }

    fn stop(&self) -> Option<JoinHandle<()>> {
        self.stop.store(true, Ordering::Release);
        self.health.keeper.set();
        lock(&self.thread).take()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The thread ends by itself; waiting for it could block an async worker.
        drop(self.stop());
    }
}
