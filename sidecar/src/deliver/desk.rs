//! Desks: where a service fetches deliveries itself (`deliver: stream` and `deliver: pull`).
//!
//! A route's loop puts deliveries on its desk; the API takes them and brings the answers.
//!
//! Invariant: a delivery that was taken is answered, or its lease ends (the route's timeout) and it counts as an attempt.

use std::{sync::Arc, time::Duration};

use crate::outcome::{Answer, Delivery};

/// The desks of all routes of this process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Desks {}

impl Desks {
    /// The desk of a route that runs here with `deliver: stream` or `pull`.
    pub fn get(&self, _route: &str) -> Option<Arc<Desk>> {
        None
    }
}

/// The desk of one route.
#[derive(Debug)]
pub struct Desk {}

impl Desk {
    /// The service that owns the route.
    pub fn service(&self) -> &Arc<str> {
        unreachable!()
    }

    /// Whether it is a `pull` route (else `stream`).
    pub fn is_pull(&self) -> bool {
        false
    }

    /// The route's concurrency: a sensible first credit.
    pub fn concurrency(&self) -> usize {
        0
    }

    /// The consumer group.
    pub fn group(&self) -> &str {
        ""
    }

    /// Tells the desk that a subscriber is attached, until the guard is dropped: status says so.
    pub fn attach(self: &Arc<Self>) -> Attachment {
        Attachment {}
    }

    /// Takes up to `max` deliveries, and waits up to `wait` for the first one. Empty if none came. `None`: the route is gone or drains.
    /// Cancel-safe: nothing is taken by a future that is dropped before it is ready.
    pub async fn take(&self, _max: usize, _wait: Duration) -> Option<Vec<Delivery>> {
        None
    }

    /// Answers deliveries. One `false` for each that is not known (any more): its lease ended, or it never was.
    pub fn answer(&self, _answers: Vec<Answer>) -> Vec<bool> {
        Vec::new()
    }

    /// The taker went away without answering: these are delivered again, and count an attempt.
    pub fn abandon(&self, _ids: Vec<u64>) {}
}

/// Keeps a subscriber on the books.
#[derive(Debug)]
pub struct Attachment {}
