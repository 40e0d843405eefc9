//! Commands to the loops of this process's routes: what only the owner of a partition can do. Floor 0: the types, and the channel.
//!
//! `control` hears commands from the mesh, `consume` obeys them; neither knows the other. `app` gives each its end of the channel.
//!
//! Invariant: every command is answered, or its sender learns from the dropped reply that nobody obeys any more.
//! Invariant: the channel is bounded: a sender waits.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    parking::Release,
    record::{Position, TopicPartition},
};

/// Commands that wait for the supervisor, or for one route, at most.
pub const ROOM: usize = 64;

/// What a route's loop is told to do.
#[derive(Debug)]
pub struct Command {
    /// The route.
    pub route: Arc<str>,
    /// What to do.
    pub task: Task,
}

/// See [`Command`].
#[derive(Debug)]
pub enum Task {
    /// Read partitions from elsewhere.
    Reset {
        /// The partitions, each with the next offset to read.
        partitions: Vec<(TopicPartition, i64)>,
        /// How long records at the service are waited for.
        deadline: Instant,
        /// The answer: one entry for each partition, in any order.
        answer: oneshot::Sender<Vec<(TopicPartition, Reset)>>,
    },
    /// Let records go on whose attempts are used up.
    Release {
        /// Those of this key (`Some(None)`: of records without one); `None`: all. Ignored unless the route keeps the order of keys.
        key: Option<Option<Bytes>>,
        /// Again, or to the dead letters.
        how: Release,
        /// On these partitions alone; none: on all.
        only: Vec<TopicPartition>,
        /// The answer.
        answer: oneshot::Sender<Released>,
    },
    /// Say how far a record of a source is.
    LookUp {
        /// Where it lies.
        at: Position,
        /// The answer; `None` if this process does not own its partition.
        answer: oneshot::Sender<Option<Held>>,
    },
}

/// How far a record is at the owner of its partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Where it is.
    pub stage: RecordStage,
    /// Attempts that were begun; one at the service included.
    pub attempts: u32,
    /// Why the last one failed; empty if none did.
    pub failure: String,
    /// What the whole route waits for; empty if for nothing.
    pub waits_for: String,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordStage {
    /// It was not read yet.
    Unread,
    /// It waits for its turn, or for a place at the service.
    Waiting,
    /// It is at the service, for so long.
    AtService(Duration),
    /// It waits for its next attempt, for so long yet.
    BackingOff(Duration),
    /// Its attempts are used up, and it waits to be released.
    Exhausted,
    /// What was made of it is on its way to the broker.
    Publishing,
    /// It is done.
    Complete,
}

/// What a release did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// How many records were released.
    pub records: u64,
    /// The partitions of sources that were looked through: those that this process owns, and knows.
    pub partitions: Vec<TopicPartition>,
}

/// What became of a partition that was to be reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The offset is committed, and reading goes on there.
    Done {
        /// What was committed, or about to be, before.
        from: i64,
    },
    /// This process does not own the partition, or gave it away meanwhile: its owner has to be asked.
    NotOwner,
    /// Nothing was changed; why.
    Failed(String),
}

/// The sender's end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Commands(mpsc::Sender<Command>);

/// A channel for commands.
pub fn channel() -> (Commands, mpsc::Receiver<Command>) {
    let (sender, receiver) = mpsc::channel(ROOM);
    (Commands(sender), receiver)
}

impl Commands {
    /// Resets partitions of a route, those of them that this process owns. Waits for records at the service until `wait` is over.
    /// Dropping the future does not take the command back.
    pub async fn reset(&self, route: &str, partitions: Vec<(TopicPartition, i64)>, wait: Duration) -> Vec<(TopicPartition, Reset)> {
        let (answer, answered) = oneshot::channel();
        let names: Vec<TopicPartition> = partitions.iter().map(|(partition, _)| partition.clone()).collect();
        let task = Task::Reset { partitions, deadline: Instant::now() + wait, answer };
        let command = Command { route: route.into(), task };
        // A process that ends gives its partitions away: their next owner has to be asked.
        let gone = || names.into_iter().map(|partition| (partition, Reset::NotOwner)).collect();
        match self.0.send(command).await {
            Ok(()) => answered.await.unwrap_or_else(|_| gone()),
            Err(_) => gone(),
        }
    }

    /// Releases records of a route whose attempts are used up (`on_exhausted: park` and `stop`), on the partitions that this process owns, or on
    /// `only` those of them, if there are some. Dropping the future does not take the command back.
    pub async fn release(&self, route: &str, key: Option<Option<Bytes>>, how: Release, only: Vec<TopicPartition>) -> Released {
        let (answer, answered) = oneshot::channel();
        let command = Command { route: route.into(), task: Task::Release { key, how, only, answer } };
        match self.0.send(command).await {
            Ok(()) => answered.await.unwrap_or_default(),
            Err(_) => Released::default(),
        }
    }

    /// How far a record of a source of a route is; `None` if this process does not own its partition.
    pub async fn look_up(&self, route: &str, at: Position) -> Option<Held> {
        let (answer, answered) = oneshot::channel();
        let command = Command { route: route.into(), task: Task::LookUp { at, answer } };
        self.0.send(command).await.ok()?;
        answered.await.ok()?
    }
}

impl Command {
    /// Answers that this process owns none of it.
    pub fn not_owner(self) {
        // Whoever asked may be gone.
        match self.task {
            Task::Reset { partitions, answer, .. } => {
                drop(answer.send(partitions.into_iter().map(|(partition, _)| (partition, Reset::NotOwner)).collect()));
            }
            Task::Release { answer, .. } => drop(answer.send(Released::default())),
            Task::LookUp { answer, .. } => drop(answer.send(None)),
        }
    }
}
