//! What was measured, for people and for BENCHMARKS.md.

use std::fmt::Write as _;

use super::{
    measure::{Latency, Measured, cpu_of, median},
    rows::{Kind, Row},
};

/// The tables, as Markdown, which a terminal shows well enough.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = String::new();
    rates(rows, &mut out);
    latencies(rows, &mut out);
    figures(rows, &mut out);
    for row in rows {
        if let Some(failed) = &row.failed {
            let line = failed.lines().next().unwrap_or_default();
            put(&mut out, format_args!("- {} on {}: not measured: {line}\n", title(row.kind), row.broker));
        }
    }
    out
}

fn rates(rows: &[Row], out: &mut String) {
    let rated: Vec<&Row> = rows.iter().filter(|row| !row.mesh.is_empty() && row.mesh[0].latency.is_none()).collect();
    if rated.is_empty() {
        return;
    }
    let header = ["work", "broker", "records/s", "floors, records/s", "ratio to the floors", "CPU µs a record", "peak memory", "goal"];
    let lines = rated.iter().map(|row| {
        let floors = row.floors.iter().map(|floor| format!("{}: {}", floor.name, spread(&rate(&floor.runs), 0)));
        vec![
            title(row.kind).to_owned(),
            row.broker.to_owned(),
            format!("**{}**", spread(&rate(&row.mesh), 0)),
            floors.collect::<Vec<_>>().join("; "),
            spread(&row.ratios(), 2),
            cpu(&row.mesh),
            format!("{:.0} MiB", peak(&row.mesh)),
            goal(row.kind).to_owned(),
        ]
    });
    table(&header, lines, out);
}

fn latencies(rows: &[Row], out: &mut String) {
    let mut lines = Vec::new();
    for row in rows {
        let mut line = |name: &str, runs: &[Measured], goal: &str| {
            let latencies: Vec<Latency> = runs.iter().filter_map(|run| run.latency).collect();
            if !latencies.is_empty() {
                let of = |pick: fn(&Latency) -> f64| spread(&latencies.iter().map(pick).collect::<Vec<_>>(), 2);
                let cells = [of(|l| l.p50), of(|l| l.p99), of(|l| l.p999), of(|l| l.max), cpu(runs)];
                lines.push([name.to_owned(), row.broker.to_owned()].into_iter().chain(cells).chain([goal.to_owned()]).collect());
            }
        };
        line(title(row.kind), &row.mesh, goal(row.kind));
        for floor in &row.floors {
            line(&format!("floor: {}", floor.name), &floor.runs, "");
        }
    }
    if !lines.is_empty() {
        let header = ["latency", "broker", "p50 ms", "p99 ms", "p99.9 ms", "worst ms", "CPU µs a record", "goal"];
        table(&header, lines.into_iter(), out);
    }
}

fn figures(rows: &[Row], out: &mut String) {
    let mut lines = Vec::new();
    for row in rows {
        for figure in &row.figures {
            let value = format!("{:.1} {}", figure.value, figure.unit);
            lines.push(vec![title(row.kind).to_owned(), row.broker.to_owned(), figure.name.clone(), value, goal(row.kind).to_owned()]);
        }
    }
    if !lines.is_empty() {
        table(&["what", "broker", "figure", "value", "goal"], lines.into_iter(), out);
    }
}

/// A table, and an empty line.
pub(super) fn table(header: &[&str], lines: impl Iterator<Item = Vec<String>>, out: &mut String) {
    put(out, format_args!("| {} |\n|{}\n", header.join(" | "), "---|".repeat(header.len())));
    for line in lines {
        put(out, format_args!("| {} |\n", line.join(" | ")));
    }
    out.push('\n');
}

/// Writes formatted text.
pub(super) fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing into a string cannot fail.
    let _ = out.write_fmt(text);
}

fn rate(runs: &[Measured]) -> Vec<f64> {
    runs.iter().map(Measured::rate).collect()
}

fn peak(runs: &[Measured]) -> f64 {
    runs.iter().filter_map(|run| run.peak_mib.get("sidecar")).copied().fold(0.0, f64::max)
}

/// The medians of each process, the sidecar first.
fn cpu(runs: &[Measured]) -> String {
    let of = |name: &str| cpu_of(runs, name).map(|median| format!("{name} {}", number(median, 1)));
    let all: Vec<String> = ["sidecar", "broker", "service", "load"].into_iter().filter_map(of).collect();
    all.join(", ")
}

/// The median, with the least and the most of several.
fn spread(values: &[f64], decimals: usize) -> String {
    let middle = number(median(values), decimals);
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(*value), most.max(*value)));
    match values.len() {
        0 => "–".to_owned(),
        1 => middle,
        _ => format!("{middle} ({}–{})", number(least, decimals), number(most, decimals)),
    }
}

fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), String::new()), |(whole, rest)| (whole, format!(".{rest}")));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) && digit.is_ascii_digit() && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + &rest
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::PushHttp => "push over HTTP/1.1",
        Kind::PushStream => "push over `HandleStream`",
        Kind::Subscribe => "push over `Subscribe`",
        Kind::OnceHttp => "push over HTTP/1.1, exactly once",
        Kind::OnceStream => "push over `HandleStream`, exactly once",
        Kind::PublishHttp => "publish over HTTP, 64 connections",
        Kind::PublishUnary => "publish over gRPC, 64 calls at once",
        Kind::PublishStream => "publish on a gRPC stream",
        Kind::Hop => "whole hop at 1,000/s",
        Kind::HopIdle => "whole hop at 2/s",
        Kind::Hop10 => "whole hop at 10 % of its capacity",
        Kind::Hop50 => "whole hop at 50 % of its capacity",
        Kind::Hop80 => "whole hop at 80 % of its capacity",
        Kind::Idle => "one route at rest",
        Kind::Memory => "memory",
        Kind::Start => "start of the process to ready",
        Kind::Swap => "swap of a table of 1,000 routes",
        Kind::MeshScale => "a table for a simulated mesh",
        Kind::Kill => "three `kill -9` in 20,000 records",
        Kind::TlsHttp => "publish over HTTP with TLS",
        Kind::TlsStream => "publish on a gRPC stream with TLS",
        Kind::TraceHttp => "push over HTTP/1.1, every record traced",
    }
}

fn goal(kind: Kind) -> &'static str {
    match kind {
        Kind::PushHttp => "≥ 40,000/s, ≤ 22 µs",
        Kind::PushStream | Kind::Subscribe => "≥ 90,000/s, ≤ 12 µs",
        Kind::OnceHttp | Kind::OnceStream => "≥ 0.5 of at least once",
        Kind::PublishHttp => "≥ 50,000/s, ≤ 20 µs",
        Kind::PublishUnary => "≥ 30,000/s",
        Kind::PublishStream => "≥ 0.7 of librdkafka",
        Kind::Hop | Kind::HopIdle => "p50 ≤ 0.7 ms, p99 ≤ direct + 2 ms",
        Kind::Hop10 | Kind::Hop50 | Kind::Hop80 | Kind::TlsHttp | Kind::TlsStream | Kind::TraceHttp => "",
        Kind::Idle => "≤ 25 MB",
        Kind::Memory => "≤ 25 MB with one idle route, ≤ 1 MB each further one, ≤ 60 MB under a push",
        Kind::Start => "≤ 150 ms on Kafka, ≤ 100 ms embedded",
        Kind::Swap => "in force ≤ 50 ms, no pause above 1 ms",
        Kind::MeshScale => "SYNCED ≤ 1 s, ≤ 50 ms of processor a sidecar",
        Kind::Kill => "0 missing, ≤ about 300 duplicates a kill",
    }
}
