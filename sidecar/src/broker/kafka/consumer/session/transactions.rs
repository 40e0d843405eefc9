//! What a consumer's session has to do with its transactions: it waits for their producer, begins anew when that failed, and keeps the group
//! metadata to which they are bound.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rdkafka::consumer::Consumer as _;

use super::{
    super::{
        super::{transaction::Stage, wakeup::lock},
        Client,
    },
    Cause, Session,
};

impl Session {
    /// Waits until the producer stands, so that nothing is read that could not be answered, and what an earlier holder of its identity left
    /// is over before the positions are asked for.
    pub(super) fn wait_for_transactions(&mut self, client: &Arc<Client>) {
        loop {
            let Some(transactor) = &self.shared.transactor else { return };
            match transactor.stage() {
                Stage::Ready => break,
                Stage::Beginning(error) => {
                    if error.is_some() {
                        self.trouble(Cause::Transactions, error);
                    }
                }
                Stage::Failed(error) => {
                    transactor.begin_again();
                    self.trouble(Cause::Transactions, Some(error));
                }
            }
            if self.shared.closing() {
                return;
            }
            self.tell_health();
            self.pump(client);
            self.shared.wakeup.wait(Duration::from_millis(500));
        }
        self.starting_over = false;
        self.trouble(Cause::Transactions, None);
    }

    /// Looks after the producer: when it failed for good, the end of its last transaction is not known, so the partitions begin anew at what
    /// is committed, once another stands. `rests`: what the client has to tell was not heard.
    pub(super) fn watch_transactions(&mut self, client: &Arc<Client>, rests: bool) {
        let Some(transactor) = &self.shared.transactor else { return };
        match transactor.stage() {
            Stage::Ready => {
                let late = transactor.late();
                self.trouble(Cause::Transactions, late);
                if std::mem::take(&mut self.starting_over) {
                    self.abandoned = false;
                    self.adopt(client);
                } else if !rests
                    && self.shared.stale_metadata.swap(false, Ordering::AcqRel)
                    && !client.context().rebalance_waits()
                    && lock(&self.shared.metadata).is_some()
                {
                    // Not before the queue was heard, which tells when it was refused since the membership had ended. With `group.protocol: consumer` the member's epoch grows without a rebalance here.
                    self.capture_metadata(client);
                }
            }
            Stage::Beginning(error) => {
                if error.is_some() {
                    self.trouble(Cause::Transactions, error);
                }
            }
            Stage::Failed(error) => {
                self.starting_over = true;
                self.trouble(Cause::Transactions, Some(error));
                // First: whoever asks for a transaction between the two must not have it done by the next producer.
                self.lose(self.locals.iter().map(|local| local.partition.clone()).collect());
                if let Some(transactor) = &self.shared.transactor {
                    transactor.begin_again();
                }
            }
        }
    }

    /// Keeps the group metadata under which the partitions are ours now.
    pub(super) fn capture_metadata(&mut self, client: &Arc<Client>) {
        if self.shared.transactor.is_some() {
            *lock(&self.shared.metadata) = client.group_metadata().map(Arc::new);
        }
    }
}
