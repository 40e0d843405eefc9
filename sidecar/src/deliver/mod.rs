//! Hands deliveries to handlers and brings their outcomes back. Floor 3.
//!
//! A route's loop owns one [`Leaf`]: `dispatch` hands a delivery over and returns at once, `answers` brings what came back. `dispatch_batch`
//! hands over many that travel in one call; their answers come together, in their order. What the loop
//! needs to decide about calling at all is pure and beside it: the [`breaker`], the [`limit`] and the [`retry`] pause. Retries wait in the loop, in their
//! lane, not here: a record that waits takes no place from another.
//!
//! Invariant: every delivery that goes in comes back as exactly one [`Answer`], within its route's timeout once it was taken.
//! Invariant: the loop has at most [`Leaf::room`] deliveries out, so no queue here can overflow.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::{
    config::AppAddress,
    outcome::{Answer, Delivery, Outcome},
    telemetry::metrics::RouteMetrics,
};

mod batch;
pub mod breaker;
pub mod budget;
mod connect;
pub mod desk;
pub(crate) mod forms;
pub mod grpc;
mod http;
pub mod limit;
mod push;
pub mod retry;
mod stream;

use desk::{Counters, Desk, Desks};
use push::PushPool;
use stream::HandlerStream;

/// The way to one route's handler.
pub struct Leaf {
    way: Way,
    room: usize,
    answers: mpsc::Receiver<Answer>,
    sender: mpsc::Sender<Answer>,
}

enum Way {
    Push(Box<PushPool>),
    Stream(HandlerStream),
    Desk(std::sync::Arc<Desk>, Desks),
    /// A service that a test plays.
    #[cfg(test)]
    Played(Box<dyn FnMut(Vec<Delivery>) + Send>),
}

impl std::fmt::Debug for Leaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leaf").field("room", &self.room).finish_non_exhaustive()
    }
}

/// What travels in one call.
#[derive(Debug)]
enum Call {
    One(Delivery),
    Many(Vec<Delivery>),
}

impl Call {
    fn deliveries(&self) -> &[Delivery] {
        match self {
            Self::One(delivery) => std::slice::from_ref(delivery),
            Self::Many(batch) => batch,
        }
    }

    /// How long the whole call may take.
    fn timeout(&self) -> Duration {
        self.deliveries().first().map_or(Duration::from_secs(10), |delivery| delivery.route.timeout)
    }

    /// Answers all of it with the same.
    fn answer(&self, answers: &mpsc::Sender<Answer>, outcome: &Outcome) {
        for delivery in self.deliveries() {
            // There is room: each of them was let in. A loop that is gone needs no answer.
            let _ = answers.try_send(Answer { id: delivery.id, outcome: outcome.clone() });
        }
    }
}

/// The most deliveries of one route that are out at the same time, whatever its concurrency says: the bound of the queues here. It is the
/// largest concurrency that a table may name.
const ROOM: usize = 10_000;

impl Leaf {
    /// The way to a service that is called. `limit` is the largest answer that is taken, in bytes; `unknown` counts outcomes that name no
    /// record of their batch.
    ///
    /// # Errors
    /// If the address cannot be an address.
    pub fn push(app: &AppAddress, limit: usize, unknown: Counter, tasks: &TaskTracker) -> Result<Self, String> {
        let (sender, answers) = mpsc::channel(ROOM);
        let pool = PushPool::new(app, limit, sender.clone(), unknown.clone(), tasks.clone())?;
        let way = match app {
            AppAddress::Grpc(address) => {
                let client = grpc::client(push::channel(address)?, limit);
                Way::Stream(HandlerStream::new(client, pool, ROOM, sender.clone(), unknown, tasks))
            }
            _ => Way::Push(Box::new(pool)),
        };
        Ok(Self { way, room: ROOM, answers, sender })
    }

    /// The way to a service that fetches its deliveries itself.
    pub fn desk(desks: &Desks, route: std::sync::Arc<mesh_routing::Route>, metrics: &RouteMetrics) -> Self {
        let (sender, answers) = mpsc::channel(ROOM);
        let counters = Counters { expired: metrics.expired_leases.clone(), late: metrics.late_outcomes.clone() };
        let desk = desks.open(route, sender.clone(), counters);
        Self { way: Way::Desk(desk, desks.clone()), room: ROOM, answers, sender }
    }

    /// The way to a service that a test plays: what takes the deliveries of a call, and where their answers go.
    #[cfg(test)]
    pub(crate) fn played(service: impl FnMut(Vec<Delivery>) + Send + 'static) -> (Self, mpsc::Sender<Answer>) {
        let (sender, answers) = mpsc::channel(ROOM);
        (Self { way: Way::Played(Box::new(service)), room: ROOM, answers, sender: sender.clone() }, sender)
    }

    /// How many deliveries may be out.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Hands a delivery over.
    pub fn dispatch(&mut self, delivery: Delivery) {
        self.call(Call::One(delivery));
    }

    /// Hands over deliveries of one route that travel in one call, within the timeout of one.
    pub fn dispatch_batch(&mut self, batch: Vec<Delivery>) {
        self.call(Call::Many(batch));
    }

    fn call(&mut self, call: Call) {
        match &mut self.way {
            Way::Push(pool) => pool.dispatch(call),
            Way::Stream(stream) => {
                if let Some(call) = stream.dispatch(call) {
                    call.answer(&self.sender, &Outcome::NoService { reason: "the stream's task is gone".to_owned(), after: None });
                }
            }
            Way::Desk(desk, _) => desk.put(match call {
                Call::One(delivery) => vec![delivery],
                Call::Many(batch) => batch,
            }),
            #[cfg(test)]
            Way::Played(service) => service(match call {
                Call::One(delivery) => vec![delivery],
                Call::Many(batch) => batch,
            }),
        }
    }

    /// Waits for answers, and adds all that are there to `into`. Cancel-safe.
    pub async fn answers(&mut self, into: &mut Vec<Answer>) {
        const AT_ONCE: usize = 512;
        match &self.way {
            Way::Desk(desk, _) => {
                tokio::select! {
                    // The other one never ends.
                    biased;
                    _ = self.answers.recv_many(into, AT_ONCE) => {}
                    () = desk.end_leases() => {}
                }
            }
            _ => {
                self.answers.recv_many(into, AT_ONCE).await;
            }
        }
    }

    /// Takes back the deliveries that no one has begun to handle.
    pub fn withdraw(&mut self) -> Vec<u64> {
        match &self.way {
            Way::Desk(desk, _) => desk.withdraw(),
            _ => Vec::new(),
        }
    }

    /// Why nobody takes deliveries, for a leaf that waits to be asked.
    pub fn unattended(&self) -> Option<String> {
        match &self.way {
            Way::Desk(desk, _) => desk.unattended(),
            _ => None,
        }
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        if let Way::Desk(desk, desks) = &self.way {
            desks.close(desk);
        }
    }
}
