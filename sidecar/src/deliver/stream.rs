//! Calls the service on one gRPC stream (`HandleStream`), and falls back to `Handle` where that is not implemented.
//!
//! What is ready together travels in one message; a batch is a message of its own. One task owns the stream; it answers every delivery: by the
//! handler's outcome, at its deadline, or when the stream breaks.
//!
//! Invariant: a delivery that was written to a stream which broke counts an attempt; one that never was counts none.
//! Invariant: the answers of a batch leave together, in its order, in whatever order its outcomes came.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mesh_proto::v1::{self, handler_client::HandlerClient};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{Call, batch::Gathering, grpc, push::PushPool};
use crate::outcome::{Answer, Delivery, Outcome};

/// How many records travel in one message at most: a handler that works message by message still gets pieces of a useful size. A batch is as
/// large as its route says.
const MESSAGE_RECORDS: usize = 32;

/// The stream of one route.
pub(crate) struct HandlerStream {
    calls: mpsc::Sender<Call>,
}

impl HandlerStream {
    /// Starts the owner's task. `room` is how many deliveries are ever out; `unknown` counts outcomes that name none of them.
    pub(super) fn new(
        client: HandlerClient<Channel>,
        fallback: PushPool,
        room: usize,
        answers: mpsc::Sender<Answer>,
        unknown: Counter,
        tasks: &TaskTracker,
    ) -> Self {
        let (calls, receiver) = mpsc::channel(room);
        let owner = Owner {
            client,
            fallback,
            room,
            answers,
            unknown,
            calls: receiver,
            out: HashMap::new(),
            batches: BTreeMap::new(),
            deadlines: VecDeque::new(),
            unary: false,
        };
        tasks.spawn(owner.run());
        Self { calls }
    }

    /// Hands a call over; there is room for each that may be out. It comes back if the owner is gone.
    pub(super) fn dispatch(&mut self, call: Call) -> Option<Call> {
        match self.calls.try_send(call) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Full(call) | mpsc::error::TrySendError::Closed(call)) => Some(call),
        }
    }
}

struct Owner {
    client: HandlerClient<Channel>,
    fallback: PushPool,
    room: usize,
    answers: mpsc::Sender<Answer>,
    unknown: Counter,
    calls: mpsc::Receiver<Call>,
    /// Written to the stream and not answered.
    out: HashMap<u64, Written>,
    /// The batches among them, by the id of their first record.
    batches: BTreeMap<u64, Gathering>,
    deadlines: VecDeque<(Instant, u64)>,
    unary: bool,
}

/// A delivery that was written to the stream.
struct Written {
    deadline: Instant,
    delivery: Delivery,
    /// The batch that it belongs to.
    batch: Option<u64>,
}

/// How a stream ended.
enum End {
    /// Nobody sends deliveries any more.
    Finished,
    /// It broke, or the handler closed it.
    Broken(Status),
}

impl Owner {
    async fn run(mut self) {
        while let Some(first) = self.calls.recv().await {
            if self.unary {
                self.fallback.dispatch(first);
                continue;
            }
            let status = match self.stream(first).await {
                End::Finished => return,
                End::Broken(status) => status,
            };
            if status.code() == Code::Unimplemented {
                tracing::info!("the handler does not implement HandleStream: using Handle");
                self.unary = true;
                self.fall_back();
                continue;
            }
            let reason = format!("the stream broke before an answer: {:?}: {}", status.code(), status.message());
            self.end_all(&Outcome::Retry { reason, after: None });
        }
    }

    /// Hands what was written to the calls of `Handle`.
    fn fall_back(&mut self) {
        self.deadlines.clear();
        for gathering in std::mem::take(&mut self.batches).into_values() {
            let batch = gathering.ids().iter().filter_map(|id| self.out.remove(id)).map(|written| written.delivery).collect();
            self.fallback.dispatch(Call::Many(batch));
        }
        let mut written: Vec<Delivery> = self.out.drain().map(|(_, written)| written.delivery).collect();
        written.sort_unstable_by_key(|delivery| delivery.id);
        written.into_iter().for_each(|delivery| self.fallback.dispatch(Call::One(delivery)));
    }

    /// Answers all that was written and has no outcome with this one.
    fn end_all(&mut self, outcome: &Outcome) {
        self.deadlines.clear();
        for first in self.batches.keys().copied().collect::<Vec<u64>>() {
            self.end_batch(first, outcome);
        }
        for id in self.out.drain().map(|(id, _)| id).collect::<Vec<u64>>() {
            self.answer(id, outcome.clone());
        }
    }

    fn answer(&mut self, id: u64, outcome: Outcome) {
        // There is room for every delivery that is out; a loop that is gone needs no answer.
        let _ = self.answers.try_send(Answer { id, outcome });
    }

    /// Answers a batch; records without an outcome get this one.
    fn end_batch(&mut self, first: u64, missing: &Outcome) {
        let Some(gathering) = self.batches.remove(&first) else { return };
        let ids = gathering.ids().to_vec();
        for (id, outcome) in ids.into_iter().zip(gathering.finish(|| missing.clone())) {
            self.out.remove(&id);
            self.answer(id, outcome);
        }
    }

    /// Takes what the handler said to a record.
    fn said(&mut self, id: u64, outcome: Outcome) {
        let Some(written) = self.out.remove(&id) else {
            self.unknown.inc();
            return;
        };
        let Some(first) = written.batch else {
            self.answer(id, outcome);
            return;
        };
        if let Some(gathering) = self.batches.get_mut(&first) {
            gathering.take(id, outcome);
            if gathering.is_complete() {
                self.end_batch(first, &super::batch::missing());
            }
        }
    }

    /// Opens a stream and works on it until it ends.
    async fn stream(&mut self, first: Call) -> End {
        let (sender, messages) = mpsc::channel::<v1::Delivery>(self.room.max(1));
        let mut client = self.client.clone();
        // The request's head, and the answer's, may wait for the first message: it is written at once.
        let timeout = first.timeout();
        for message in self.messages(first) {
            if sender.try_send(message).is_err() {
                return End::Broken(Status::internal("the stream's queue is full"));
            }
        }
        let opened = tokio::time::timeout(timeout, client.handle_stream(ReceiverStream::new(messages))).await;
        let mut outcomes = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) if status.code() == Code::Unavailable => {
                // Nothing was handled: no connection.
                self.end_all(&Outcome::NoService { reason: format!("{:?}: {}", status.code(), status.message()), after: None });
                return End::Broken(status);
            }
            Ok(Err(status)) => return End::Broken(status),
            Err(_) => return End::Broken(Status::deadline_exceeded(format!("no stream within {timeout:?}"))),
        };
        self.work(sender, &mut outcomes).await
    }

    async fn work(&mut self, sender: mpsc::Sender<v1::Delivery>, outcomes: &mut Streaming<v1::Outcomes>) -> End {
        loop {
            let deadline = self.next_deadline();
            tokio::select! {
                message = outcomes.message() => match message {
                    Ok(Some(message)) => for said in message.outcomes {
                        self.said(said.delivery_id, grpc::outcome(said));
                    },
                    Ok(None) => return End::Broken(Status::unavailable("the handler closed the stream")),
                    Err(status) => return End::Broken(status),
                },
                call = self.calls.recv() => {
                    let Some(call) = call else { return End::Finished };
                    for message in self.messages(call) {
                        if sender.try_send(message).is_err() {
                            return End::Broken(Status::unavailable("the stream takes no more messages"));
                        }
                    }
                }
                () = sleep_until(deadline) => self.end_overdue(),
            }
        }
    }

    /// Takes a call on the books, with what is ready already, and makes the messages of it: mostly one.
    fn messages(&mut self, call: Call) -> Vec<v1::Delivery> {
        let mut singles = match call {
            Call::Many(batch) => return self.write(batch, true).into_iter().collect(),
            Call::One(delivery) => vec![delivery],
        };
        let mut batch = Vec::new();
        while singles.len() < MESSAGE_RECORDS {
            match self.calls.try_recv() {
                Ok(Call::One(delivery)) => singles.push(delivery),
                Ok(Call::Many(many)) => {
                    batch = many;
                    break;
                }
                Err(_) => break,
            }
        }
        [self.write(singles, false), self.write(batch, true)].into_iter().flatten().collect()
    }

    /// Takes deliveries on the books, and makes their message.
    fn write(&mut self, deliveries: Vec<Delivery>, batch: bool) -> Option<v1::Delivery> {
        let first = deliveries.first()?;
        let (route, batch) = (Arc::clone(&first.route), batch.then_some(first.id));
        let message = grpc::message(&route, &deliveries);
        if let Some(first) = batch {
            self.batches.insert(first, Gathering::new(&deliveries));
        }
        let now = Instant::now();
        for delivery in deliveries {
            let deadline = now + delivery.route.timeout;
            self.deadlines.push_back((deadline, delivery.id));
            self.out.insert(delivery.id, Written { deadline, delivery, batch });
        }
        Some(message)
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        while let Some(&(deadline, id)) = self.deadlines.front() {
            if self.out.get(&id).is_some_and(|written| written.deadline == deadline) {
                return Some(deadline);
            }
            self.deadlines.pop_front();
        }
        None
    }

    fn end_overdue(&mut self) {
        let now = Instant::now();
        while let Some(deadline) = self.next_deadline().filter(|deadline| *deadline <= now) {
            let Some((_, id)) = self.deadlines.pop_front() else { return };
            let Some(written) = self.out.remove(&id) else { continue };
            let reason = format!("no answer within {:?} (since {:?})", written.delivery.route.timeout, deadline.elapsed());
            let outcome = Outcome::Retry { reason, after: None };
            match written.batch {
                Some(first) => self.end_batch(first, &outcome),
                None => self.answer(id, outcome),
            }
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
