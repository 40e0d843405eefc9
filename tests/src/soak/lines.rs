//! The lines of a run: each is a route with topics, producers and ledgers of its own, and what it promises. All go through the same sidecars, brokers and service.
//!
//! Invariant: a record of one line never shows in the topics of another: each line is judged as if it were alone.

use std::fmt::Write as _;

use serde::Serialize;

use super::payload::{Name, Treatment};

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
    /// Attempts in place.
    pub attempts: u32,
    /// The pauses of its retry topics, in milliseconds; there is an attempt more after each.
    pub pauses: &'static [u32],
}

impl Line {
    /// All lines: both guarantees, each order, with batches and without, with retry topics and without.
    pub const ALL: [Self; 7] = [
        Self { name: "work", ..Self::PLAIN },
        Self { name: "exact", guarantee: Guarantee::ExactlyOnce, ..Self::PLAIN },
        Self { name: "batch", batch: Some(20), ..Self::PLAIN },
        Self { name: "free", guarantee: Guarantee::ExactlyOnce, order: Order::None, batch: Some(10), ..Self::PLAIN },
        Self { name: "even", order: Order::Partition, ..Self::PLAIN },
        Self { name: "later", attempts: 2, pauses: &[300, 2_000], ..Self::PLAIN },
        Self { name: "later-exact", guarantee: Guarantee::ExactlyOnce, attempts: 2, pauses: &[300, 2_000], ..Self::PLAIN },
    ];

    const PLAIN: Self = Self { name: "", guarantee: Guarantee::AtLeastOnce, order: Order::Key, batch: None, attempts: 10, pauses: &[] };

    /// The number of a record's last attempt: a failure of it is its end.
    pub fn last_attempt(&self) -> u32 {
        self.attempts + self.pauses.len() as u32
    }

    /// The topics beside the source: a retry topic for each pause, and the park topic last; none without pauses.
    pub fn sides(&self, source: &str) -> Vec<String> {
        let retries = (1..=self.pauses.len()).map(|tier| format!("retry-{tier}"));
        let kinds = retries.chain((!self.pauses.is_empty()).then(|| "park".to_owned()));
        kinds.map(|kind| format!("{}.{source}.{kind}", self.name)).collect()
    }

    /// What the service does with a record. On a line with retry topics more records fail, and up to each of their attempts.
    pub fn treatment(&self, name: Name) -> Treatment {
        match name.treatment() {
            Treatment::Fails(_) | Treatment::Slips if !self.pauses.is_empty() => {
                Treatment::Fails(1 + (name.seq + name.key) % self.last_attempt())
            }
            Treatment::Slips => Treatment::Reply,
            treatment => treatment,
        }
    }

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
        let topics = if self.pauses.is_empty() { "" } else { ", retry topics" };
        format!("{guarantee}, order {order}{batch}{topics}")
    }

    fn route(&self, concurrency: u32, order: Order) -> String {
        let (name, attempts) = (self.name, self.attempts);
        let pauses = self.pauses.iter().map(|pause| format!("{pause}ms")).collect::<Vec<_>>().join(", ");
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
  retry: {{ attempts: {attempts}, initial: 50ms, max: 1s, topics: [{pauses}] }}
  breaker: {{ failures: 20, open: 1s }}{batch}
"
        )
    }
}

/// The tables of a run: the one that is in force mostly, and others for swaps. All of them treat the records of the lines alike.
pub fn tables(lines: &[Line], partitions: i32) -> Vec<String> {
    let topics = lines.iter().fold("%idle: { partitions: 1 }".to_owned(), |mut text, line| {
        for topic in ["a", "b", "dlq"] {
            // Writing to a string cannot fail.
            let _ = write!(text, ", %{}.{topic}: {{ partitions: {partitions} }}", line.name);
        }
        text
    });
    let table = |routes: String, more: &str| format!("topics: {{ {topics} }}\nroutes:\n{routes}{more}\n");
    let as_usual = |line: &Line| line.route(64, line.order);
    let by_partition = |line: &Line| line.route(64, if line.order == Order::Key { Order::Partition } else { line.order });
    let idle = "- { name: idle, service: work, from: [%idle], handler: /idle, to: void }";
    vec![
        table(lines.iter().map(as_usual).collect(), ""),
        // Taken in place.
        table(lines.iter().map(|line| line.route(16, line.order)).collect(), ""),
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
            for table in tables(lines, 8) {
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
        assert!(Line::ALL.iter().any(|line| !line.pauses.is_empty()));
    }

    #[test]
    fn on_a_line_with_retry_topics_records_fail_up_to_each_attempt() {
        let line = Line::ALL.into_iter().find(|line| !line.pauses.is_empty()).unwrap();
        let of = |line: Line, fails| {
            (0..20)
                .flat_map(|key| (0..100).map(move |seq| Name { key, seq }))
                .filter(|name| line.treatment(*name) == Treatment::Fails(fails))
                .count()
        };
        for fails in 1..=line.last_attempt() {
            assert!((10..100).contains(&of(line, fails)), "{fails}: {}", of(line, fails));
        }
        assert_eq!((of(Line::ALL[0], 2), of(line, line.last_attempt() + 1)), (0, 0));
        assert!((10..200).contains(&of(Line::ALL[0], 1)));
        assert_eq!(line.sides("m.later.a"), ["later.m.later.a.retry-1", "later.m.later.a.retry-2", "later.m.later.a.park"]);
        assert!(Line::ALL[0].sides("m.work.a").is_empty());
    }
}
