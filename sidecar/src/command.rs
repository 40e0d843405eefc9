//! Commands to the loops of this process's routes: what only the owner of a partition can do. Floor 0: the types, and the channel.
//!
//! `control` hears commands from the mesh, `consume` obeys them; neither knows the other. `app` gives each its end of the channel.
//!
//! Invariant: every command is answered, or its sender learns from the dropped reply that nobody obeys any more.
//! Invariant: the channel is bounded: a sender waits.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::record::TopicPartition;

/// Commands that wait for the supervisor, or for one route, at most.
pub const ROOM: usize = 64;

/// What a route's loop is told to do.
#[derive(Debug)]
pub struct Command {
    /// The route.
    pub route: Arc<str>,
    /// The partitions to read from elsewhere, each with the next offset to read.
    pub reset: Vec<(TopicPartition, i64)>,
    /// How long records at the service are waited for.
    pub deadline: Instant,
    /// The answer: one entry for each partition, in any order.
    pub answer: oneshot::Sender<Vec<(TopicPartition, Reset)>>,
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
        let command = Command { route: route.into(), reset: partitions, deadline: Instant::now() + wait, answer };
        // A process that ends gives its partitions away: their next owner has to be asked.
        let gone = || names.into_iter().map(|partition| (partition, Reset::NotOwner)).collect();
        match self.0.send(command).await {
            Ok(()) => answered.await.unwrap_or_else(|_| gone()),
            Err(_) => gone(),
        }
    }
}

impl Command {
    /// Answers that this process owns none of it.
    pub fn not_owner(self) {
        let answer = self.reset.into_iter().map(|(partition, _)| (partition, Reset::NotOwner)).collect();
        // Whoever asked may be gone.
        drop(self.answer.send(answer));
    }
}
