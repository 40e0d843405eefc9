//! Calls the service on one gRPC stream (`HandleStream`), and falls back to `Handle` where that is not implemented.
//!
//! What is ready together travels in one message. One task owns the stream; it answers every delivery: by the handler's outcome, at its
//! deadline, or when the stream breaks.
//!
//! Invariant: a delivery that was written to a stream which broke counts an attempt; one that never was counts none.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use mesh_proto::v1::{self, handler_client::HandlerClient};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{grpc, push::PushPool};
use crate::outcome::{Answer, Delivery, Outcome};

/// How many records travel in one message at most: a handler that works message by message still gets pieces of a useful size.
const MESSAGE_RECORDS: usize = 32;

/// The stream of one route.
pub(crate) struct HandlerStream {
    deliveries: mpsc::Sender<Delivery>,
}

impl HandlerStream {
    /// Starts the owner's task. `room` is how many deliveries are ever out.
    pub(crate) fn new(
        client: HandlerClient<Channel>,
        fallback: PushPool,
        room: usize,
        answers: mpsc::Sender<Answer>,
        tasks: &TaskTracker,
    ) -> Self {
        let (deliveries, receiver) = mpsc::channel(room);
        let owner =
            Owner { client, fallback, room, answers, deliveries: receiver, out: HashMap::new(), deadlines: VecDeque::new(), unary: false };
        tasks.spawn(owner.run());
        Self { deliveries }
    }

    /// Hands a delivery over; there is room for each that may be out. `false` if the owner is gone.
    pub(crate) fn dispatch(&mut self, delivery: Delivery) -> bool {
        self.deliveries.try_send(delivery).is_ok()
    }
}

struct Owner {
    client: HandlerClient<Channel>,
    fallback: PushPool,
    room: usize,
    answers: mpsc::Sender<Answer>,
    deliveries: mpsc::Receiver<Delivery>,
    /// Written to the stream, with their deadlines.
    out: HashMap<u64, (Instant, Delivery)>,
    deadlines: VecDeque<(Instant, u64)>,
    unary: bool,
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
        while let Some(first) = self.deliveries.recv().await {
            if self.unary {
                self.fallback.dispatch(first);
                continue;
            }
            let status = match self.stream(first).await {
                End::Finished => return,
                End::Broken(status) => status,
            };
            let written: Vec<Delivery> = self.out.drain().map(|(_, (_, delivery))| delivery).collect();
            self.deadlines.clear();
            if status.code() == Code::Unimplemented {
                tracing::info!("the handler does not implement HandleStream: using Handle");
                self.unary = true;
                let mut written = written;
                written.sort_unstable_by_key(|delivery| delivery.id);
                written.into_iter().for_each(|delivery| self.fallback.dispatch(delivery));
                continue;
            }
            for delivery in written {
                let reason = format!("the stream broke before an answer: {:?}: {}", status.code(), status.message());
                self.answer(delivery.id, Outcome::Retry { reason, after: None });
            }
        }
    }

    fn answer(&mut self, id: u64, outcome: Outcome) {
        // There is room for every delivery that is out; a loop that is gone needs no answer.
        let _ = self.answers.try_send(Answer { id, outcome });
    }

    /// Opens a stream and works on it until it ends.
    async fn stream(&mut self, first: Delivery) -> End {
        let (sender, messages) = mpsc::channel::<v1::Delivery>(self.room.max(1));
        let mut client = self.client.clone();
        // The request's head, and the answer's, may wait for the first message: it is written at once.
        let mut batch = vec![first];
        self.gather(&mut batch);
        let ids: Vec<u64> = batch.iter().map(|delivery| delivery.id).collect();
        let timeout = batch.first().map_or(std::time::Duration::from_secs(10), |delivery| delivery.route.timeout);
        if let Some(message) = self.write(batch)
            && sender.try_send(message).is_err()
        {
            return End::Broken(Status::internal("the stream's queue is full"));
        }
        let opened = tokio::time::timeout(timeout, client.handle_stream(ReceiverStream::new(messages))).await;
        let mut outcomes = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) if status.code() == Code::Unavailable => {
                // Nothing was handled: no connection.
                for id in ids {
                    self.out.remove(&id);
                    self.answer(id, Outcome::NoService { reason: format!("{:?}: {}", status.code(), status.message()) });
                }
                return End::Broken(status);
            }
            Ok(Err(status)) => return End::Broken(status),
            Err(_) => return End::Broken(Status::deadline_exceeded(format!("no stream within {timeout:?}"))),
        };
        self.work(sender, &mut outcomes).await
    }

    async fn work(&mut self, sender: mpsc::Sender<v1::Delivery>, outcomes: &mut Streaming<v1::Outcomes>) -> End {
        let mut batch = Vec::new();
        loop {
            let deadline = self.next_deadline();
            tokio::select! {
                message = outcomes.message() => match message {
                    Ok(Some(message)) => for said in message.outcomes {
                        let id = said.delivery_id;
                        if self.out.remove(&id).is_some() {
                            self.answer(id, grpc::outcome(said));
                        }
                    },
                    Ok(None) => return End::Broken(Status::unavailable("the handler closed the stream")),
                    Err(status) => return End::Broken(status),
                },
                delivery = self.deliveries.recv() => {
                    let Some(delivery) = delivery else { return End::Finished };
                    batch.push(delivery);
                    self.gather(&mut batch);
                    if let Some(message) = self.write(std::mem::take(&mut batch))
                        && sender.try_send(message).is_err()
                    {
                        return End::Broken(Status::unavailable("the stream takes no more messages"));
                    }
                }
                () = sleep_until(deadline) => self.end_overdue(),
            }
        }
    }

    /// Adds what is ready already.
    fn gather(&mut self, batch: &mut Vec<Delivery>) {
        while batch.len() < MESSAGE_RECORDS
            && let Ok(delivery) = self.deliveries.try_recv()
        {
            batch.push(delivery);
        }
    }

    /// Takes deliveries on the books, and makes their message.
    fn write(&mut self, batch: Vec<Delivery>) -> Option<v1::Delivery> {
        let route = Arc::clone(&batch.first()?.route);
        let message = grpc::message(&route, &batch);
        let now = Instant::now();
        for delivery in batch {
            let deadline = now + delivery.route.timeout;
            self.deadlines.push_back((deadline, delivery.id));
            self.out.insert(delivery.id, (deadline, delivery));
        }
        Some(message)
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        while let Some(&(deadline, id)) = self.deadlines.front() {
            if self.out.get(&id).is_some_and(|(current, _)| *current == deadline) {
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
            if let Some((_, delivery)) = self.out.remove(&id) {
                let reason = format!("no answer within {:?} (since {:?})", delivery.route.timeout, deadline.elapsed());
                self.answer(id, Outcome::Retry { reason, after: None });
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
