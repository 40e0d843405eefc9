//! `mesh-ctl lag`: how far consumer groups are behind.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use mesh_proto::v1;
use serde::Serialize;

use super::{Context, looks::Looks};
use crate::{
    client::{self, Client},
    flags::Lag,
    output::{Code, Columns, Failure, Style, age, count},
    window::{Sample, State, judge},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    groups: Vec<Group>,
    lag_records: u64,
    lag_seconds: f64,
    left_out: String,
}

#[derive(Debug, Serialize)]
struct Group {
    group: String,
    /// The route whose group it is.
    route: Option<String>,
    members: Option<u32>,
    /// The worst of its partitions.
    state: &'static str,
    lag_records: u64,
    lag_seconds: f64,
    partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
struct Partition {
    topic: String,
    partition: i32,
    committed: Option<i64>,
    low: i64,
    end: i64,
    lag_records: u64,
    /// The age of the first record that is to be read; absent: not known.
    lag_seconds: Option<f64>,
    state: &'static str,
}

/// The last looks at each partition of each group.
type Windows = HashMap<(String, String, i32), VecDeque<Sample>>;

pub(super) async fn run(context: &Context, flags: &Lag) -> Result<Code, Failure> {
    let message = v1::GetLagRequest { routes: flags.routes.clone(), groups: flags.groups.clone(), all_groups: flags.all_groups };
    let mut windows = Windows::new();
    let looks = Looks { every: flags.watch, count: flags.count };
    let see = async |client: &mut Client| {
        let request = client::request(message.clone(), client::APPLY);
        let response = client.get_lag(request).await.map_err(|status| client::refused(&status))?.into_inner();
        Ok::<_, Failure>(look(&mut windows, usize::from(flags.window), response))
    };
    let show = |said: &Said, again| {
        looks.print(context, again, said, || text(context.colours, context.quiet, said))?;
        if !said.left_out.is_empty() {
            context.note(&format!("left out: {}", said.left_out));
        }
        Ok(())
    };
    looks.run(context, see, show).await
}

/// Takes a look into the windows, and judges.
fn look(windows: &mut Windows, most: usize, response: v1::GetLagResponse) -> Said {
    let v1::GetLagResponse { groups, now_ms, left_out } = response;
    let mut seen = Windows::new();
    let mut told = Vec::with_capacity(groups.len());
    for v1::GroupLag { group, route, members, partitions } in groups {
        let mut worst = State::Ok;
        let mut all = Vec::with_capacity(partitions.len());
        for lag in partitions {
            let v1::PartitionLag { topic, partition, committed, low, end, lag, first_unread_ms } = lag;
            let key = (group.clone(), topic.clone(), partition);
            let mut window = windows.remove(&key).unwrap_or_default();
            window.push_back(Sample { committed, lag, members: members.is_none_or(|members| members > 0) });
            while window.len() > most {
                window.pop_front();
            }
            let state = judge(&window);
            seen.insert(key, window);
            worst = worst.max(state);
            let lag_seconds = match lag {
                0 => Some(0.0),
                _ => first_unread_ms.map(|first| (now_ms - first).max(0) as f64 / 1_000.0),
            };
            all.push(Partition { topic, partition, committed, low, end, lag_records: lag, lag_seconds, state: state.word() });
        }
        told.push(Group {
            group,
            route: Some(route).filter(|route| !route.is_empty()),
            members,
            state: worst.word(),
            lag_records: all.iter().map(|one| one.lag_records).sum(),
            lag_seconds: all.iter().filter_map(|one| one.lag_seconds).fold(0.0, f64::max),
            partitions: all,
        });
    }
    // What is not there any more is forgotten.
    *windows = seen;
    Said {
        lag_records: told.iter().map(|group| group.lag_records).sum(),
        lag_seconds: told.iter().map(|group| group.lag_seconds).fold(0.0, f64::max),
        groups: told,
        left_out,
    }
}

fn seconds(seconds: f64) -> String {
    age(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

fn text(colours: bool, quiet: bool, said: &Said) -> String {
    let mut columns = Columns::new(&["GROUP", "ROUTE", "TOPIC", "PARTITION", "COMMITTED", "END", "LAG", "BEHIND", "STATE"]);
    let plain = |text: String| (text, Style::Plain);
    let dash = || "-".to_owned();
    for group in &said.groups {
        let (name, route) = (group.group.clone(), group.route.clone().unwrap_or_else(dash));
        if group.partitions.is_empty() {
            let none = (0..7).map(|_| plain(dash()));
            columns.row([plain(name), plain(route)].into_iter().chain(none).collect());
            continue;
        }
        for one in &group.partitions {
            let style = match one.state {
                "OK" => Style::Good,
                "LAG" => Style::Plain,
                "WARN" => Style::Warn,
                _ => Style::Bad,
            };
            columns.row(vec![
                plain(name.clone()),
                plain(route.clone()),
                plain(one.topic.clone()),
                plain(one.partition.to_string()),
                plain(one.committed.map_or_else(dash, |committed| committed.to_string())),
                plain(one.end.to_string()),
                plain(one.lag_records.to_string()),
                plain(one.lag_seconds.map_or_else(|| "?".to_owned(), seconds)),
                (one.state.to_owned(), style),
            ]);
        }
    }
    let mut out = columns.render(colours);
    if !quiet {
        out += &format!("total: {} behind, the oldest by {}\n", count(said.lag_records, "record"), seconds(said.lag_seconds));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(committed: i64, end: i64) -> v1::GetLagResponse {
        let lag = |partition, committed: Option<i64>, end: i64| v1::PartitionLag {
            topic: "orders".into(),
            partition,
            committed,
            low: 0,
            end,
            lag: u64::try_from(end - committed.unwrap_or(0)).unwrap(),
            first_unread_ms: Some(1_000),
        };
        let group = |group: &str, route: &str, members, partitions| v1::GroupLag {
            group: group.into(),
            route: route.into(),
            members: Some(members),
            partitions,
        };
        let groups = vec![
            group("shop.price", "price", 1, vec![lag(0, Some(committed), end), lag(1, Some(5), 5)]),
            group("connect", "", 0, vec![lag(0, None, end)]),
        ];
        v1::GetLagResponse { groups, now_ms: 66_000, left_out: String::new() }
    }

    #[test]
    fn each_partition_is_a_row_and_the_sum_is_told() {
        let said = look(&mut Windows::new(), 10, response(7, 10));
        assert_eq!(
            text(false, false, &said),
            "GROUP       ROUTE  TOPIC   PARTITION  COMMITTED  END  LAG  BEHIND  STATE\n\
             shop.price  price  orders  0          7          10   3    1m 5s   LAG\n\
             shop.price  price  orders  1          5          5    0    0s      OK\n\
             connect     -      orders  0          -          10   10   1m 5s   LAG\n\
             total: 13 records behind, the oldest by 1m 5s\n"
        );
        let json = serde_json::to_value(&said).unwrap();
        assert_eq!((&json["groups"][1]["route"], &json["groups"][0]["state"]), (&serde_json::Value::Null, &"LAG".into()));
    }

    #[test]
    fn looks_are_kept_as_far_as_the_window_goes() {
        let mut windows = Windows::new();
        for end in 10..30 {
            look(&mut windows, 4, response(7, end));
        }
        assert!(windows.values().all(|window| window.len() == 4), "{windows:?}");
        let said = look(&mut windows, 4, response(7, 31));
        assert_eq!(said.groups.iter().map(|group| group.state).collect::<Vec<_>>(), ["STALL", "STOP"]);
        look(&mut windows, 4, v1::GetLagResponse::default());
        assert!(windows.is_empty(), "what is gone is forgotten");
    }
}
