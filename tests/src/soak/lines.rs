//! The lines of a run: each is a route with topics, producers and ledgers of its own, and what it promises. All go through the same sidecars, brokers and service.
//!
//! Invariant: a record of one line never shows in the topics of another: each line is judged as if it were alone.

use std::fmt::Write as _;

use serde::Serialize;

/// What a route promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Guarantee {
    /// Nothing is lost; what was in flight at a crash comes twice.
    AtLeastOnce,
    /// A `read_committed` reader sees each reply once.
    ExactlyOnce,
}

/// What waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A record waits for those before it of its key.
    Key,
    /// A record waits for those before it of its partition.
    Partition,
    /// Nothing waits.
    None,
}

/// A line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The name of its route, its handler and its topics.
    pub name: &'static str,
    /// What it promises.
    pub guarantee: Guarantee,
    /// What waits for what.
    pub order: Order,
    /// The most records of one call; `None`: one record a call.
    pub batch: Option<u32>,
}

impl Line {
    /// All lines: both guarantees, each order, with batches and without.
    pub const ALL: [Self; 5] = [
        Self { name: "work", guarantee: Guarantee::AtLeastOnce, order: Order::Key, batch: None },
        Self { name: "exact", guarantee: Guarantee::ExactlyOnce, order: Order::Key, batch: None },
        Self { name: "batch", guarantee: Guarantee::AtLeastOnce, order: Order::Key, batch: Some(20) },
        Self { name: "free", guarantee: Guarantee::ExactlyOnce, order: Order::None, batch: Some(10) },
        Self { name: "even", guarantee: Guarantee::AtLeastOnce, order: Order::Partition, batch: None },
    ];

    /// In a few words.
    pub fn text(&self) -> String {
        let guarantee = match self.guarantee {
            Guarantee::AtLeastOnce => "at_least_once",
            Guarantee::ExactlyOnce => "exactly_once",
        };
        let order = match self.order {
            Order::Key => "key",
            Order::Partition => "partition",
            Order::None => "none",
        };
        let batch = self.batch.map_or_else(String::new, |max| format!(", batch {max}"));
        format!("{guarantee}, order {order}{batch}")
    }

    fn route(&self, attempts: u32, concurrency: u32, order: Order) -> String {
        let name = self.name;
        let guarantee = match self.guarantee {
            Guarantee::AtLeastOnce => "at_least_once",
            Guarantee::ExactlyOnce => "exactly_once",
        };
        let order = match order {
            Order::Key => "key",
            Order::Partition => "partition",
            Order::None => "none",
        };
        let batch = self.batch.map_or_else(String::new, |max| format!("\n  batch: {{ max: {max}, wait: 5ms }}"));
        format!(
            "- name: {name}
  service: work
  from: [%{name}.a]
  handler: /{name}
  to: [%{name}.b]
  dead_letter: %{name}.dlq
  timeout: 4s
  guarantee: {guarantee}
  order: {order}
  concurrency: {concurrency}
  retry: {{ attempts: {attempts}, initial: 50ms, max: 1s }}
  breaker: {{ failures: 20, open: 1s }}{batch}
"
        )
    }
}

/// The tables of a run: the one that is in force mostly, and others for swaps. All of them treat the records of the lines alike.
pub fn tables(lines: &[Line], partitions: i32, attempts: u32) -> Vec<String> {
    let topics = lines.iter().fold("%idle: { partitions: 1 }".to_owned(), |mut text, line| {
        for topic in ["a", "b", "dlq"] {
            // Writing to a string cannot fail.
            let _ = write!(text, ", %{}.{topic}: {{ partitions: {partitions} }}", line.name);
        }
        text
    });
    let table = |routes: String, more: &str| format!("topics: {{ {topics} }}\nroutes:\n{routes}{more}\n");
    let as_usual = |line: &Line| line.route(attempts, 64, line.order);
    let by_partition = |line: &Line| line.route(attempts, 64, if line.order == Order::Key { Order::Partition } else { line.order });
    let idle = "- { name: idle, service: work, from: [%idle], handler: /idle, to: void }";
    vec![
        table(lines.iter().map(as_usual).collect(), ""),
        // Taken in place.
        table(lines.iter().map(|line| line.route(attempts, 16, line.order)).collect(), ""),
        // A route more.
        table(lines.iter().map(as_usual).collect(), idle),
        // Drained, and started anew.
        table(lines.iter().map(by_partition).collect(), ""),
        // All but one: it stops, and goes on later.
        table(lines.iter().skip(1).map(as_usual).collect(), idle),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::Broker, stage::Stage};

    #[test]
    fn the_tables_are_good_whatever_the_lines() {
        let stage = Stage::new(Broker::Embedded).unwrap();
        for lines in [&Line::ALL[..], &Line::ALL[1..2]] {
            for table in tables(lines, 8, 10) {
                let text = stage.table(&table);
                let table = mesh_routing::parse("table", &text).unwrap_or_else(|faults| panic!("{faults:?}\n{text}"));
                mesh_routing::compile(&table).unwrap_or_else(|faults| panic!("{faults:?}\n{text}"));
            }
        }
    }

    #[test]
    fn the_lines_have_both_guarantees_each_order_and_batches() {
        for guarantee in [Guarantee::AtLeastOnce, Guarantee::ExactlyOnce] {
            assert!(Line::ALL.iter().any(|line| line.guarantee == guarantee && line.batch.is_none()));
            assert!(Line::ALL.iter().any(|line| line.guarantee == guarantee && line.batch.is_some()));
        }
        for order in [Order::Key, Order::Partition, Order::None] {
            assert!(Line::ALL.iter().any(|line| line.order == order));
        }
    }
}
