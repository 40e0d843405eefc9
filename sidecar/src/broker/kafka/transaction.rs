//! Transactions: a producer of its own for a consumer, on an OS thread of its own, since each step of a transaction blocks.
//!
//! A job is one whole transaction: begin, produce, offsets, commit. The thread reports what the producer is able to do ([`Stage`]); the
//! consumer's session subscribes only when it stands, and starts its partitions anew when it failed for good.
//!
//! Invariant: offsets are sent under the group metadata that was captured with the assignment, never under newer one: the broker takes a
//! partition's offset from any member that shows current metadata, also from one to which it does not belong.
//! Invariant: once `commit_transaction` was called, the job ends only when the broker's decision is known, or as `Lost`.
//! Invariant: an aborted transaction is aborted at the broker before the job ends, so that the next one can begin.
//! Invariant: no request of an aborted transaction can become part of the next one. One whose answer did not come may still be on its way, and
//! the broker takes it for the next transaction's while the producer's epoch is the same: its offsets would be committed without their records, or
//! its sequence numbers be taken for a repeat of other records. So the next transaction is that of a new producer, which has a new epoch; but for
//! one that was aborted at once for records that the broker refused.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    consumer::ConsumerGroupMetadata,
    error::{KafkaError, RDKafkaError},
    message::Message as _,
    producer::{BaseProducer, DeliveryResult, Producer as _, ProducerContext},
    topic_partition_list::TopicPartitionList,
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::oneshot;

use super::{
    error::{broker_error, code_error, produce_error, produce_kind},
    health::Health,
    producer::base_record,
    settings::Settings,
    wakeup::{Wakeup, lock},
};
use crate::broker::{BrokerError, BrokerErrorKind, Outgoing, ProduceError, ProduceErrorKind, TransactionError};

/// How long one step may take before the thread looks whether it should end, and before it begins the step again.
const STEP: Duration = Duration::from_secs(1);
/// How long producing and sending offsets may take together; the broker ends the transaction not long after.
const LIMIT: Duration = Duration::from_secs(8);
/// How long a step may still take once the consumer is being closed.
const CLOSING: Duration = Duration::from_secs(3);
/// How long a producer that was fenced waits before it begins again: somebody else holds its identity.
const FENCED: Duration = Duration::from_secs(5);
/// How long after a transaction that failed the next ones send their offsets only when their records are acknowledged.
const CAREFUL: Duration = Duration::from_secs(30);

/// How long a step of a transaction takes until that is told.
const LATE: Duration = Duration::from_secs(5);

type Client = BaseProducer<Context>;

/// What the producer is able to do.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// It is being initialised; what keeps it from that, if something does.
    Beginning(Option<BrokerError>),
    /// It takes transactions.
    Ready,
    /// It failed for good in the middle of something. It begins again when it is told to.
    Failed(BrokerError),
}

/// A transaction to be done.
pub(super) struct Job {
    pub(super) records: Vec<Outgoing>,
    pub(super) offsets: TopicPartitionList,
    pub(super) metadata: Arc<ConsumerGroupMetadata>,
    /// Keeps the partitions from being given away; dropped when the transaction is over.
    pub(super) guard: Box<dyn Send>,
    pub(super) reply: Reply,
}

type Reply = oneshot::Sender<Result<(), TransactionError>>;

struct Shared {
    id: String,
    settings: Settings,
    health: Arc<Health>,
    stage: Mutex<Stage>,
    /// What a transaction is at, and since when.
    doing: Mutex<Option<(&'static str, Instant)>>,
    stop: AtomicBool,
    /// Set with `stop`.
    ended: Wakeup,
    /// A failed producer may begin again.
    again: AtomicBool,
    /// Wakes the session, which waits for stages.
    session: Arc<Wakeup>,
}

/// The way to the thread.
pub(super) struct Transactor {
    shared: Arc<Shared>,
    jobs: Mutex<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Transactor {
    /// Starts the thread; it begins at once. `session` is woken with each change of the stage.
    pub(super) fn open(settings: &Settings, id: &str, health: Arc<Health>, session: Arc<Wakeup>) -> Result<Self, BrokerError> {
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            settings: settings.clone(),
            health,
            stage: Mutex::new(Stage::Beginning(None)),
            doing: Mutex::default(),
            stop: AtomicBool::new(false),
            ended: Wakeup::default(),
            again: AtomicBool::new(false),
            session,
        });
        // A setting that librdkafka refuses is found here, before there is a thread.
        let first = shared.create()?;
        let (jobs, queue) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("kafka-txn".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.run(first, &queue)
            })
            .map_err(|error| BrokerError::new(BrokerErrorKind::Other, format!("kafka: no thread for transactions: {error}")))?;
        Ok(Self { shared, jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)) })
    }

    /// What the producer is able to do now.
    pub(super) fn stage(&self) -> Stage {
        lock(&self.shared.stage).clone()
    }

    /// What a transaction waits for, if it has for long.
    pub(super) fn late(&self) -> Option<BrokerError> {
        let (what, since) = (*lock(&self.shared.doing))?;
        let detail = || format!("transactions of `{}`: the broker has not answered yet: {what}", self.shared.id);
        (since.elapsed() > LATE).then(|| BrokerError::new(BrokerErrorKind::Unreachable, detail()))
    }

    /// Lets a producer that failed begin again.
    pub(super) fn begin_again(&self) {
        let mut stage = lock(&self.shared.stage);
        if matches!(*stage, Stage::Failed(_)) {
            *stage = Stage::Beginning(None);
            self.shared.again.store(true, Ordering::Release);
        }
    }

    /// Hands a transaction over. One at a time.
    pub(super) fn submit(&self, job: Job) {
        let refused = match &*lock(&self.jobs) {
            Some(jobs) => jobs.try_send(job).err(),
            None => Some(TrySendError::Disconnected(job)),
        };
        if let Some(TrySendError::Full(job) | TrySendError::Disconnected(job)) = refused {
            self.shared.refuse(job, "the one before is not over, or the consumer is closed");
        }
    }

    /// Ends the thread once what it does is over.
    pub(super) fn stop(&self) -> Option<JoinHandle<()>> {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ended.set();
        drop(lock(&self.jobs).take());
        lock(&self.thread).take()
    }
}

impl Drop for Transactor {
    fn drop(&mut self) {
        // The thread ends by itself; waiting for it could block an async worker.
        drop(self.stop());
    }
}

/// Takes the delivery reports of a transaction.
struct Context {
    health: Arc<Health>,
    /// The records that failed, or of which it is not certain, by index.
    failed: Mutex<Vec<(usize, KafkaError)>>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.health.log(level, facility, text);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            self.health.report(code, reason);
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        match result {
            Err((error, _)) => lock(&self.failed).push((index, error.clone())),
            // Called stored, without a place: the broker knew the sequence number. Mostly it is this record's, sent again since the first answer
            // was lost; to be sure that it is not another's the transaction is done again.
            Ok(message) if message.offset() < 0 => {
                lock(&self.failed).push((index, KafkaError::MessageProduction(Code::DuplicateSequenceNumber)));
            }
            Ok(_) => {}
        }
    }
}

/// A transaction is stored, or aborted. `false`: the broker took long to say so, and a repeat of the question may still be on its way.
struct Prompt(bool);

/// How a transaction went wrong.
enum Failure {
    /// It must be aborted; then this is the answer. Every request of it was answered.
    Abort(TransactionError),
    /// The same; the group has a new generation, or this member is out of it. Whatever of the offsets may still be on its way is refused as well, so
    /// the producer stays.
    Stale(TransactionError),
    /// The same, and something of it may still be on its way: the producer goes with it.
    Renew(TransactionError),
    /// Its end is not known, or the producer is of no use any more.
    Fatal(BrokerError),
}

impl Shared {
    fn create(&self) -> Result<Client, BrokerError> {
        let context = Context { health: self.health.clone(), failed: Mutex::default() };
        BaseProducer::from_config_and_context(&self.settings.transactional(&self.id), context)
            .map_err(|error| broker_error(format!("kafka: producer `{}`", self.id), &error))
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Answers a transaction that was not begun.
    fn refuse(&self, job: Job, why: &str) {
        let error = BrokerError::new(BrokerErrorKind::Other, format!("transaction of `{}`: {why}", self.id));
        drop(job.guard);
        // The caller may have gone.
        drop(job.reply.send(Err(TransactionError::Aborted(error))));
    }

    fn doing(&self, what: &'static str) {
        *lock(&self.doing) = Some((what, Instant::now()));
    }

    fn enter(&self, stage: Stage) {
        *lock(&self.stage) = stage;
        self.session.set();
    }

    /// The thread's body.
    fn run(&self, first: Client, jobs: &Receiver<Job>) {
        let mut client = Some(first);
        while !self.stopping() {
            let Some(client) = client.take().or_else(|| self.recreate()) else { continue };
            if !self.initialise(&client) {
                continue;
            }
            self.enter(Stage::Ready);
            let Some(error) = self.serve(client, jobs) else { return };
            tracing::warn!(id = self.id, %error, "kafka: the producer of transactions failed for good and begins anew");
            self.wait_to_begin(jobs, if error.kind == BrokerErrorKind::Fenced { FENCED } else { Duration::ZERO });
        }
    }

    fn recreate(&self) -> Option<Client> {
        let created = self.create();
        if let Err(error) = &created {
            self.enter(Stage::Beginning(Some(error.clone())));
            self.ended.wait(STEP);
        }
        created.ok()
    }

    /// Ends what an earlier holder of the identity left, and fences it. Waits for the broker. `false` for a producer that cannot be used.
    fn initialise(&self, client: &Client) -> bool {
        while !self.stopping() {
            client.poll(Duration::ZERO);
            let Err(error) = client.init_transactions(STEP) else { return true };
            let retriable = transaction_error(&error).is_some_and(RDKafkaError::is_retriable);
            let error = self.named("cannot begin", &error);
            tracing::debug!("kafka: {error}");
            // That it takes longer than a step is no trouble yet.
            if !matches!(error.kind, BrokerErrorKind::Unreachable) {
                self.enter(Stage::Beginning(Some(error)));
            }
            if !retriable {
                self.ended.wait(STEP);
                return false;
            }
        }
        false
    }

    /// Does jobs until the consumer is closed (`None`) or the producer fails for good.
    fn serve(&self, mut client: Client, jobs: &Receiver<Job>) -> Option<BrokerError> {
        let mut careful_until = Instant::now();
        loop {
            let job = match jobs.recv_timeout(STEP) {
                Ok(job) => job,
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    client.poll(Duration::ZERO);
                    let Some((code, text)) = client.client().fatal_error() else { continue };
                    let error = fatal(&self.id, code, &text);
                    self.enter(Stage::Failed(error.clone()));
                    return Some(error);
                }
            };
            let Job { records, offsets, metadata, guard, reply } = job;
            let outcome = self.transact(&client, &records, &offsets, &metadata, Instant::now() < careful_until);
            if matches!(outcome, Err(Failure::Stale(_) | Failure::Renew(_))) {
                careful_until = Instant::now() + CAREFUL;
            }
            let (answer, next) = match outcome {
                Ok(Prompt(true)) => (Ok(()), Ok(client)),
                Ok(Prompt(false)) => (Ok(()), self.renew(client)),
                Err(Failure::Abort(error)) => {
                    let refused = matches!(error, TransactionError::Refused(_) | TransactionError::Split(_));
                    (Err(error), self.take_back(client, refused))
                }
                Err(Failure::Stale(error)) => (Err(error), self.take_back(client, true)),
                Err(Failure::Renew(error)) => (Err(error), self.renew(client)),
                Err(Failure::Fatal(error)) => (Err(TransactionError::Lost(error.clone())), Err(error)),
            };
            let answer = match (answer, &next) {
                (Err(_), Err(fatal)) => Err(TransactionError::Lost(fatal.clone())),
                (answer, _) => answer,
            };
            self.finish(guard, reply, answer, next.as_ref().err());
            client = match next {
                Ok(client) => client,
                Err(error) => return Some(error),
            };
        }
    }

    /// Aborts a transaction. The producer goes on if it may, and if the broker answered soon.
    fn take_back(&self, client: Client, stays: bool) -> Result<Client, BrokerError> {
        match self.abort(&client) {
            Ok(Prompt(true)) if stays => Ok(client),
            Ok(_) => self.renew(client),
            Err(fatal) => Err(fatal),
        }
    }

    /// Ends a job.
    fn finish(&self, guard: Box<dyn Send>, reply: Reply, answer: Result<(), TransactionError>, failed: Option<&BrokerError>) {
        if let Some(error) = failed {
            // Before the answer: who asks again hears of it.
            self.enter(Stage::Failed(error.clone()));
        }
        *lock(&self.doing) = None;
        drop(guard);
        // The caller may have gone.
        drop(reply.send(answer));
    }

    /// A new producer in the place of one of which something may still be on its way. It aborts what that one left.
    fn renew(&self, old: Client) -> Result<Client, BrokerError> {
        self.doing("ending a producer");
        drop(old);
        self.doing("beginning with another producer");
        while !self.stopping() {
            let client = self.create()?;
            if self.initialise(&client) {
                self.enter(Stage::Ready);
                return Ok(client);
            }
        }
        Err(BrokerError::new(BrokerErrorKind::Other, format!("transactions of `{}`: closed before the one under way was aborted", self.id)))
    }

    /// Waits until the session lets the producer begin again, and refuses transactions meanwhile.
    fn wait_to_begin(&self, jobs: &Receiver<Job>, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.stopping() && (Instant::now() < until || !self.again.load(Ordering::Acquire)) {
            match jobs.recv_timeout(Duration::from_millis(50)) {
                Ok(job) => self.refuse(job, "its producer is being made anew"),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        self.again.store(false, Ordering::Release);
        // What came before the partitions were reported as lost is of an assignment that is over.
        while let Ok(job) = jobs.try_recv() {
            self.refuse(job, "its producer is being made anew");
        }
    }

    fn transact(
        &self,
        client: &Client,
        records: &[Outgoing],
        offsets: &TopicPartitionList,
        metadata: &ConsumerGroupMetadata,
        careful: bool,
    ) -> Result<Prompt, Failure> {
        let failure = match self.attempt(client, records, offsets, metadata, careful) {
            Err(failure @ (Failure::Abort(_) | Failure::Stale(_) | Failure::Renew(_))) => failure,
            other => return other,
        };
        if let Some((code, text)) = client.client().fatal_error() {
            // Somebody else may hold its identity: a new producer would take it back at once.
            return Err(Failure::Fatal(fatal(&self.id, code, &text)));
        }
        if matches!(failure, Failure::Renew(_)) {
            return Err(failure);
        }
        self.drain(client);
        let certain = |code: Option<Code>| code.is_some_and(|code| is_certain(produce_kind(code)));
        let unknown = lock(&client.context().failed).iter().any(|(_, error)| !certain(error.rdkafka_error_code()));
        Err(match failure {
            Failure::Abort(error) | Failure::Stale(error) if unknown || client.in_flight_count() > 0 => Failure::Renew(error),
            certain => certain,
        })
    }

    fn attempt(
        &self,
        client: &Client,
        records: &[Outgoing],
        offsets: &TopicPartitionList,
        metadata: &ConsumerGroupMetadata,
        careful: bool,
    ) -> Result<Prompt, Failure> {
        let limit = Instant::now() + LIMIT;
        self.doing("beginning");
        self.drain(client);
        lock(&client.context().failed).clear();
        client.begin_transaction().map_err(|error| self.failure("begin", &error))?;
        self.doing("records");
        self.produce(client, records, limit)?;
        if careful {
            self.acknowledged(client, limit)?;
            self.check_reports(client, records)?;
        }
        self.doing("offsets");
        // While the records are under way; but when the group changes often, and refuses offsets of the generation before, not until they are
        // acknowledged: else nobody knows what became of them, and another producer has to be made each time.
        if offsets.count() > 0
            && let Err(failure) = self.retrying(limit, "offsets", || client.send_offsets_to_transaction(offsets, metadata, STEP))
        {
            // A record that was refused meanwhile fails this too: then that is the reason.
            self.drain(client);
            return Err(match (self.check_reports(client, records), failure) {
                (Ok(()), failure) | (_, failure @ Failure::Fatal(_)) => failure,
                (Err(Failure::Abort(answer)), Failure::Renew(_)) => Failure::Renew(answer),
                (Err(reported), _) => reported,
            });
        }
        self.acknowledged(client, limit)?;
        self.check_reports(client, records)?;
        self.commit(client)
    }

    /// Waits until each record is answered.
    fn acknowledged(&self, client: &Client, limit: Instant) -> Result<(), Failure> {
        self.doing("acknowledgements of records");
        // `commit_transaction` would wait in steps of 100 ms for reports that nobody takes.
        while client.in_flight_count() > 0 {
            if Instant::now() > limit {
                let detail = format!("transaction of `{}`: no acknowledgement within {LIMIT:?}", self.id);
                return Err(Failure::Abort(TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Unreachable, detail))));
            }
            client.poll(Duration::from_millis(1));
        }
        Ok(())
    }

    fn produce(&self, client: &Client, records: &[Outgoing], limit: Instant) -> Result<(), Failure> {
        let mut refused = Vec::new();
        for (index, outgoing) in records.iter().enumerate() {
            // What is wrong with a record by itself is said of all of them at once.
            loop {
                let sent = match base_record(outgoing, index) {
                    Ok(base) => client.send(base).map_err(|(error, _)| produce_error(&outgoing.topic, self.health.bootstrap(), &error)),
                    Err(error) => Err(error),
                };
                match sent {
                    Ok(()) => {}
                    Err(error) if error.kind == ProduceErrorKind::QueueFull && Instant::now() < limit => {
                        client.poll(Duration::from_millis(1));
                        continue;
                    }
                    Err(error) if is_refusal(error.kind) => refused.push((index, error)),
                    Err(error) => return Err(Failure::Abort(aborted(error))),
                }
                break;
            }
        }
        if refused.is_empty() { Ok(()) } else { Err(Failure::Abort(TransactionError::Refused(refused))) }
    }

    /// What the broker said of the records.
    fn check_reports(&self, client: &Client, records: &[Outgoing]) -> Result<(), Failure> {
        let failed = std::mem::take(&mut *lock(&client.context().failed));
        if failed.is_empty() {
            return Ok(());
        }
        let named = failed.into_iter().map(|(index, error)| {
            let topic = records.get(index).map_or("", |record| &record.topic);
            (index, produce_error(topic, self.health.bootstrap(), &error))
        });
        let named: Vec<(usize, ProduceError)> = named.collect();
        let unknown = named.iter().any(|(_, error)| !is_certain(error.kind));
        let mut refused: Vec<_> = named.iter().filter(|(_, error)| is_refusal(error.kind)).cloned().collect();
        let answer = match (refused.len(), named.into_iter().next()) {
            // The broker refuses a batch as a whole: of several that it held, it is not said which is at fault.
            (2.., _) => TransactionError::Split(refused.swap_remove(0).1),
            (1, _) => TransactionError::Refused(refused),
            (_, Some((_, error))) => aborted(error),
            (_, None) => return Ok(()),
        };
        Err(if unknown { Failure::Renew(answer) } else { Failure::Abort(answer) })
    }

    fn commit(&self, client: &Client) -> Result<Prompt, Failure> {
        self.doing("commit");
        let (mut closing, begun) = (None, Instant::now());
        loop {
            let Err(error) = client.commit_transaction(STEP) else { return Ok(Prompt(begun.elapsed() < STEP)) };
            client.poll(Duration::ZERO);
            let inner = transaction_error(&error);
            // Also what asks to be aborted: the broker may have heard of the commit, and then there is nothing to abort.
            let patient = !self.stopping() || Instant::now() < *closing.get_or_insert_with(|| Instant::now() + CLOSING);
            if !patient || inner.is_some_and(|inner| inner.is_fatal() || inner.txn_requires_abort() || !inner.is_retriable()) {
                return Err(Failure::Fatal(self.named("commit", &error)));
            }
        }
    }

    /// Aborts at the broker.
    fn abort(&self, client: &Client) -> Result<Prompt, BrokerError> {
        self.doing("abort");
        let (mut closing, begun) = (None, Instant::now());
        // The first call takes back what was not sent yet, and ends early so that the reports of that can be taken here. (To take it back by
        // `purge` would leave a gap in the sequence, which makes the next transaction fail.)
        let mut step = Duration::from_millis(10);
        loop {
            let Err(error) = client.abort_transaction(step) else {
                self.drain(client);
                return Ok(Prompt(begun.elapsed() < STEP));
            };
            step = STEP;
            self.drain(client);
            let patient = !self.stopping() || Instant::now() < *closing.get_or_insert_with(|| Instant::now() + CLOSING);
            if !patient || transaction_error(&error).is_none_or(|inner| inner.is_fatal() || !inner.is_retriable()) {
                return Err(self.named("abort", &error));
            }
        }
    }

    /// Takes the reports that are on their way: those that nobody takes would fail an abort, or be taken for the next transaction's.
    fn drain(&self, client: &Client) {
        let until = Instant::now() + STEP;
        while client.in_flight_count() > 0 && Instant::now() < until {
            client.poll(Duration::from_millis(1));
        }
    }

    /// Calls again what may be called again.
    fn retrying(&self, limit: Instant, what: &str, mut call: impl FnMut() -> Result<(), KafkaError>) -> Result<(), Failure> {
        let mut again = false;
        loop {
            let Err(error) = call() else { return Ok(()) };
            let retriable = transaction_error(&error).is_some_and(|inner| inner.is_retriable() && !inner.txn_requires_abort());
            if !retriable {
                return Err(match self.failure(what, &error) {
                    // What was asked before was not answered.
                    Failure::Abort(error) if again => Failure::Renew(error),
                    failure => failure,
                });
            }
            again = true;
            if Instant::now() > limit || self.stopping() {
                return Err(Failure::Renew(TransactionError::Aborted(self.named(what, &error))));
            }
        }
    }

    /// Before the commit: what is not fatal is aborted.
    fn failure(&self, what: &str, error: &KafkaError) -> Failure {
        let named = self.named(what, error);
        match transaction_error(error) {
            Some(inner) if inner.is_fatal() => Failure::Fatal(named),
            Some(inner) if is_stale(inner.code()) => Failure::Stale(TransactionError::Aborted(named)),
            _ => Failure::Abort(TransactionError::Aborted(named)),
        }
    }

    fn named(&self, what: &str, error: &KafkaError) -> BrokerError {
        let prefix = format!("transaction of `{}`: {what}", self.id);
        match transaction_error(error) {
            Some(inner) if inner.is_fatal() => fatal(&self.id, inner.code(), &inner.string()),
            Some(inner) => BrokerError { detail: format!("{prefix}: {}", inner.string()), ..code_error("", inner.code()) },
            None => broker_error(prefix, error),
        }
    }
}

/// Whether the group refuses a member's offsets, and will refuse them again.
fn is_stale(code: Code) -> bool {
    matches!(code, Code::IllegalGeneration | Code::UnknownMemberId | Code::FencedInstanceId)
}

fn fatal(id: &str, code: Code, text: &str) -> BrokerError {
    let fenced = matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch);
    let (kind, hint) = match fenced {
        true => (BrokerErrorKind::Fenced, ": another producer took its identity, or the transaction timed out"),
        false => (code_error("", code).kind, ""),
    };
    BrokerError::new(kind, format!("transactions of `{id}`: {text}{hint}"))
}

fn aborted(error: ProduceError) -> TransactionError {
    let kind = match error.kind {
        ProduceErrorKind::UnknownTopic => BrokerErrorKind::UnknownTopic,
        ProduceErrorKind::Unauthorized => BrokerErrorKind::Unauthorized,
        ProduceErrorKind::Unavailable | ProduceErrorKind::TimedOut => BrokerErrorKind::Unreachable,
        _ => BrokerErrorKind::Other,
    };
    TransactionError::Aborted(BrokerError::new(kind, error.detail))
}

/// Whether the broker will never take the record.
fn is_refusal(kind: ProduceErrorKind) -> bool {
    matches!(kind, ProduceErrorKind::TooLarge | ProduceErrorKind::Refused | ProduceErrorKind::UnknownPartition)
}

/// Whether a record that failed so is known not to be stored, and not to be on its way.
fn is_certain(kind: ProduceErrorKind) -> bool {
    is_refusal(kind) || matches!(kind, ProduceErrorKind::UnknownTopic | ProduceErrorKind::Unauthorized | ProduceErrorKind::QueueFull)
}

fn transaction_error(error: &KafkaError) -> Option<&RDKafkaError> {
    match error {
        KafkaError::Transaction(inner) => Some(inner),
        _ => None,
    }
}
