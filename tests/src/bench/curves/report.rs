//! A curve as a table, as JSON and as a picture.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{Curve, Measurement, Point};
use crate::bench::{
    plot::{self, Panel},
    report::{put, table},
};

impl Curve {
    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Partitions => "partitions",
            Self::Routes => "routes",
            Self::Keys => "keys",
            Self::Concurrency => "concurrency",
            Self::Latency => "latency",
            Self::Backlog => "backlog",
            Self::Subscribers => "subscribers",
        }
    }

    fn x_title(self) -> &'static str {
        match self {
            Self::Size => "bytes of a value",
            Self::Partitions => "partitions",
            Self::Routes => "routes, of which one has records",
            Self::Keys => "keys",
            Self::Concurrency => "concurrency",
            Self::Latency => "ms of the handler",
            Self::Backlog => "records that wait",
            Self::Subscribers => "subscribers",
        }
    }
}

/// A column of the table: its head, and the value of a point.
type Column = (&'static str, fn(&Measurement, &Point) -> Option<f64>);

const COLUMNS: [Column; 9] = [
    ("records/s", |_, point| Some(point.measured.as_ref()?.rate())),
    ("concurrency ÷ latency", |_, point| point.ideal),
    ("MB/s", |of, point| (of.curve == Curve::Size).then_some(point.measured.as_ref()?.rate() * point.x as f64 / 1e6)),
    ("sidecar, CPU µs a record", |_, point| point.cpu("sidecar")),
    ("against the first", |of, point| Some(point.cpu("sidecar")? / of.points.iter().find_map(|first| first.cpu("sidecar"))?)),
    ("broker, CPU µs a record", |_, point| point.cpu("broker")),
    ("resident at rest, MiB", |_, point| point.rest_mib),
    ("resident, MiB", |_, point| point.measured.as_ref()?.resident_mib.get("sidecar").copied()),
    ("peak, MiB", |_, point| point.measured.as_ref()?.peak_mib.get("sidecar").copied()),
];

impl Point {
    fn cpu(&self, process: &str) -> Option<f64> {
        self.measured.as_ref()?.cpu_us.get(process).copied()
    }
}

/// The table as Markdown. Columns in which nothing stands are left out.
pub fn markdown(of: &Measurement) -> String {
    let value = |column: &Column, point: &Point| (column.1)(of, point);
    let columns: Vec<&Column> = COLUMNS.iter().filter(|column| of.points.iter().any(|point| value(column, point).is_some())).collect();
    let heads: Vec<&str> = [of.curve.x_title()].into_iter().chain(columns.iter().map(|column| column.0)).collect();
    let line = |point: &Point| {
        let cells = columns.iter().map(|column| value(column, point).map_or_else(|| "–".to_owned(), figure));
        [point.x.to_string()].into_iter().chain(cells).collect()
    };
    let mut out = format!("**{}** on {}\n\n", of.curve.name(), of.broker);
    table(&heads, of.points.iter().map(line), &mut out);
    for note in notes(of) {
        put(&mut out, format_args!("- {note}\n"));
    }
    out
}

/// What the table says in words: how straight it is, what a route costs, what failed.
fn notes(of: &Measurement) -> Vec<String> {
    let mut notes = Vec::new();
    let costs: Vec<(u64, f64)> = of.points.iter().filter_map(|point| Some((point.x, point.cpu("sidecar")?))).collect();
    let by_cost = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
    if let (Some(least), Some(most)) = (costs.iter().min_by(by_cost), costs.iter().max_by(by_cost)) {
        let factor = most.1 / least.1.max(1e-9);
        notes.push(format!(
            "The sidecar's cost of a record goes from {:.1} µs (at {}) to {:.1} µs (at {}): a factor of {factor:.2}.",
            least.1, least.0, most.1, most.0
        ));
    }
    let rests: Vec<(u64, f64)> = of.points.iter().filter_map(|point| Some((point.x, point.rest_mib?))).collect();
    if let (Some(first), Some(last)) = (rests.first(), rests.last())
        && last.0 > first.0
    {
        let each = (last.1 - first.1) / (last.0 - first.0) as f64;
        notes.push(format!("A further idle route takes {:.2} MiB at rest ({} to {} routes).", each, first.0, last.0));
    }
    for point in &of.points {
        if let Some(failed) = &point.failed {
            notes.push(format!("{}: not measured: {}", point.x, failed.lines().next().unwrap_or_default()));
        }
    }
    notes
}

/// All of it as JSON.
///
/// # Errors
/// Never: the values are plain.
pub fn json(of: &[Measurement]) -> Result<String> {
    Ok(serde_json::to_string_pretty(of)?)
}

/// Writes `<curve>-<broker>.md`, `.json` and `.svg` into a folder, which is made if need be.
///
/// # Errors
/// If a file cannot be written.
pub fn write(of: &Measurement, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let files = [("md", markdown(of)), ("json", serde_json::to_string_pretty(of)? + "\n"), ("svg", picture(of))];
    for (end, text) in files {
        let path = folder.join(format!("{}-{}.{end}", of.curve.name(), of.broker));
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn picture(of: &Measurement) -> String {
    let xs: Vec<f64> = of.points.iter().map(|point| point.x as f64).collect();
    let line = |name: &str, column: &Column| {
        let values: Vec<Option<f64>> = of.points.iter().map(|point| (column.1)(of, point)).collect();
        values.iter().any(Option::is_some).then(|| (name.to_owned(), values))
    };
    let [rate, ideal, _, sidecar, _, broker, rest, resident, peak] = &COLUMNS;
    let panel = |title: &str, lines: Vec<Option<(String, Vec<Option<f64>>)>>| Panel {
        title: title.to_owned(),
        lines: lines.into_iter().flatten().collect(),
    };
    let panels = [
        panel("records/s", vec![line("measured", rate), line("conc. ÷ latency", ideal)]),
        panel("CPU µs a record", vec![line("sidecar", sidecar), line("broker", broker)]),
        panel("sidecar, MiB", vec![line("peak", peak), line("at the end", resident), line("at rest", rest)]),
    ];
    plot::svg(&format!("{}, {}", of.curve.x_title(), of.broker), of.curve.x_title(), &xs, &panels)
}

/// Three figures, or whole numbers.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Measured;

    fn point(x: u64, cpu: f64) -> Point {
        let measured = Measured { records: 1_000, seconds: 0.5, cpu_us: [("sidecar".to_owned(), cpu)].into(), ..Measured::default() };
        Point { x, measured: Some(measured), rest_mib: Some(20.0 + x as f64), ideal: None, failed: None }
    }

    #[test]
    fn a_table_has_the_columns_that_were_measured_and_says_what_failed() {
        let lost = Point { x: 100, measured: None, rest_mib: None, ideal: None, failed: Some("no more files\nat all".into()) };
        let of = Measurement { curve: Curve::Routes, broker: "kafka", points: vec![point(1, 20.0), point(11, 30.0), lost] };
        let text = markdown(&of);
        assert!(text.contains("| 11 | 2000 | 30.0 | 1.50 | 31.0 |"), "{text}");
        assert!(text.contains("| 100 | – | – | – | – |"), "{text}");
        assert!(text.contains("a factor of 1.50") && text.contains("takes 1.00 MiB at rest (1 to 11 routes)"), "{text}");
        assert!(text.contains("100: not measured: no more files\n"), "{text}");
        assert!(!text.contains("MB/s") && !text.contains("÷"), "{text}");
    }

    #[test]
    fn a_picture_has_every_point() {
        let of = Measurement { curve: Curve::Latency, broker: "embedded", points: vec![point(0, 20.0), point(10, 30.0)] };
        // The rate, the processor time, and the memory at rest.
        assert_eq!(picture(&of).matches("<circle").count(), 6);
    }
}
