//! The picture of `mesh-ctl top`: a state of the mesh with its rates, drawn into so many columns and lines. Pure.
//!
//! Invariant: no line is wider than the picture, and there are no more lines than it is high, whatever instances and routes say.

use std::time::Duration;

use mesh_proto::v1::{self, InstanceState};

use crate::{
    output::{Style, age, count},
    rates::{Flow, rate, short},
};

/// By what routes are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sort {
    /// Those first at which somebody should look, then by lag.
    #[default]
    Trouble,
    /// By their names.
    Name,
    /// The busiest first.
    Rate,
    /// The furthest behind first.
    Lag,
    /// Those with most dead letters first.
    Dead,
}

impl Sort {
    /// What comes after it.
    pub(crate) fn next(self) -> Self {
        match self {
            Self::Trouble => Self::Name,
            Self::Name => Self::Rate,
            Self::Rate => Self::Lag,
            Self::Lag => Self::Dead,
            Self::Dead => Self::Trouble,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Trouble => "trouble",
            Self::Name => "name",
            Self::Rate => "rate",
            Self::Lag => "lag",
            Self::Dead => "dead letters",
        }
    }

    /// Sorts routes; equals by name.
    pub(crate) fn apply(self, flows: &mut [Flow]) {
        let descending = |a: f64, b: f64| b.total_cmp(&a);
        flows.sort_by(|a, b| {
            let order = match self {
                Self::Trouble => b.is_bad().cmp(&a.is_bad()).then(b.lag_records.cmp(&a.lag_records)),
                Self::Name => std::cmp::Ordering::Equal,
                Self::Rate => descending(a.rate.unwrap_or(0.0), b.rate.unwrap_or(0.0)),
                Self::Lag => b.lag_records.cmp(&a.lag_records).then(descending(a.lag_seconds, b.lag_seconds)),
                Self::Dead => b.ended("dead_lettered").cmp(&a.ended("dead_lettered")),
            };
            order.then_with(|| a.route.cmp(&b.route))
        });
    }
}

/// What is shown.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) mesh: &'a v1::GetStatusResponse,
    /// Sorted.
    pub(crate) flows: &'a [Flow],
    /// How often it is looked.
    pub(crate) every: Duration,
    /// Why it is not of now. Empty: it is.
    pub(crate) stale: &'a str,
}

/// How it is shown.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    pub(crate) sort: Sort,
    /// The route that is marked, by its place in the list.
    pub(crate) marked: usize,
    /// Whether it stands still.
    pub(crate) held: bool,
}

/// A cell, and its style.
type Cell = (String, Style);

/// A column.
#[derive(Clone, Copy, Debug)]
struct Heading {
    name: &'static str,
    /// It holds numbers, which stand at its right.
    right: bool,
    /// Where there is no room for all, the highest goes first; 0 stays.
    goes: u8,
}

const fn text(name: &'static str) -> Heading {
    Heading { name, right: false, goes: 0 }
}

const fn number(name: &'static str, goes: u8) -> Heading {
    Heading { name, right: true, goes }
}

const ROUTES: [Heading; 12] = [
    text("ROUTE"),
    text("STATE"),
    Heading { name: "BREAKER", right: false, goes: 4 },
    number("IN/S", 0),
    number("FWD/S", 3),
    number("DEAD/S", 7),
    number("LAG", 0),
    number("BEHIND", 2),
    number("FLIGHT", 5),
    number("PARKED", 6),
    number("DEAD", 1),
    text("REASON"),
];
const INSTANCES: [Heading; 6] =
    [text("INSTANCE"), text("STATE"), number("GENERATION", 1), number("ROUTES", 2), number("AGE", 0), text("NOTE")];

/// A name is cut to this before columns go, and to the least where that is not enough.
const NAME: usize = 24;
const LEAST: usize = 6;

/// Draws: lines from the top, without their ends.
pub(crate) fn draw(view: &View<'_>, look: Look, width: usize, height: usize, colours: bool) -> Vec<String> {
    let mut lines: Vec<Vec<Cell>> = head(view);
    // The last two lines are of the marked route and of the keys; a blank one and the headings stand before each table.
    let room = height.saturating_sub(lines.len() + 2);
    let instances = view.mesh.instances.len();
    // Instances get a third, or what routes leave.
    let for_instances = instances.min((room / 3).max(room.saturating_sub(view.flows.len() + 2)).saturating_sub(2));
    let for_routes = room.saturating_sub(2 + if for_instances > 0 { for_instances + 2 } else { 0 });

    let first = first_shown(look.marked, view.flows.len(), for_routes);
    let rows: Vec<Vec<Cell>> = view.flows.iter().skip(first).take(for_routes).map(route_row).collect();
    lines.push(Vec::new());
    let mark = look.marked.checked_sub(first).filter(|_| !view.flows.is_empty());
    lines.extend(table(&ROUTES, rows, width, mark));
    if for_instances > 0 {
        let now = view.mesh.instances.iter().map(|instance| instance.reported_ms).max().unwrap_or(0);
        let mut shown: Vec<&v1::InstanceStatus> = view.mesh.instances.iter().collect();
        // Those that are not well come first: there may be no room for all.
        shown.sort_by_key(|instance| is_well(instance.state()));
        let rows = shown.into_iter().take(for_instances).map(|instance| instance_row(instance, now)).collect();
        lines.push(Vec::new());
        lines.extend(table(&INSTANCES, rows, width, None));
    }
    lines.resize(height.saturating_sub(2), Vec::new());
    lines.push(detail(view, look));
    lines.push(foot(view, look, first, for_routes));
    lines.truncate(height);
    lines.iter().map(|line| cut(line, width, colours)).collect()
}

/// The lines of both tables, as wide as they are, for who does not look at a terminal.
pub(crate) fn plain(view: &View<'_>, colours: bool) -> String {
    let mut lines = head(view);
    lines.push(Vec::new());
    lines.extend(table(&ROUTES, view.flows.iter().map(route_row).collect(), usize::MAX, None));
    let now = view.mesh.instances.iter().map(|instance| instance.reported_ms).max().unwrap_or(0);
    lines.push(Vec::new());
    lines.extend(table(&INSTANCES, view.mesh.instances.iter().map(|instance| instance_row(instance, now)).collect(), usize::MAX, None));
    lines.iter().map(|line| cut(line, usize::MAX, colours).trim_end().to_owned() + "\n").collect()
}

fn head(view: &View<'_>) -> Vec<Vec<Cell>> {
    let mesh = view.mesh;
    let bad = mesh.instances.iter().filter(|instance| !is_well(instance.state())).count();
    let mut first = vec![
        (format!("mesh {}", mesh.mesh), Style::Bold),
        (format!("  generation {}  {}", mesh.generation, count(mesh.instances.len() as u64, "instance")), Style::Plain),
    ];
    if bad > 0 {
        first.push((format!("  {bad} not well"), Style::Bad));
    }
    if !view.stale.is_empty() {
        first.push((format!("  {}", view.stale), Style::Bad));
    }
    let known = view.flows.iter().any(|flow| flow.rate.is_some());
    let sum = |of: fn(&Flow) -> f64| known.then(|| view.flows.iter().map(of).sum::<f64>());
    let total = |of: fn(&Flow) -> u64| view.flows.iter().map(of).sum::<u64>();
    let open = view.flows.iter().filter(|flow| flow.breaker_open).count();
    if open > 0 {
        first.push((format!("  {} open", count(open as u64, "breaker")), Style::Bad));
    }
    let all = format!(
        "{}  in {}/s  forwarded {}/s  dead letters {}/s  lag {}  in flight {}  parked {}",
        count(view.flows.len() as u64, "route"),
        rate(sum(|flow| flow.rate.unwrap_or(0.0))),
        rate(sum(|flow| flow.rate_of("forwarded").unwrap_or(0.0))),
        rate(sum(|flow| flow.rate_of("dead_lettered").unwrap_or(0.0))),
        short(total(|flow| flow.lag_records)),
        short(total(|flow| flow.in_flight)),
        short(total(|flow| flow.parked_records)),
    );
    vec![first, vec![(all, Style::Plain)]]
}

/// The marked route: where it runs, and what it waits for, for which its line may have no room.
fn detail(view: &View<'_>, look: Look) -> Vec<Cell> {
    let Some(flow) = view.flows.get(look.marked) else { return Vec::new() };
    let mut line = vec![(format!("{}: ", flow.route), Style::Bold)];
    if !flow.reason.is_empty() {
        line.push((format!("{}  ", flow.reason), if flow.is_bad() { Style::Bad } else { Style::Warn }));
    }
    let (at, partitions) = (count(flow.instances.into(), "instance"), count(flow.partitions.into(), "partition"));
    line.push((format!("service {}, {partitions} at {at}", flow.service), Style::Plain));
    line
}

fn foot(view: &View<'_>, look: Look, first: usize, room: usize) -> Vec<Cell> {
    let every = if look.held { "held".to_owned() } else { format!("every {}", humantime::format_duration(view.every)) };
    let hidden = view.flows.len().saturating_sub(room);
    let place = if hidden > 0 {
        format!("  routes {}-{} of {}", first + 1, (first + room).min(view.flows.len()), view.flows.len())
    } else {
        String::new()
    };
    let keys = format!("q quit  ↑↓ move  s sort ({})  p hold  {every}{place}", look.sort.word());
    vec![(keys, if look.held { Style::Warn } else { Style::Plain })]
}

fn route_row(flow: &Flow) -> Vec<Cell> {
    let plain = |text: String| (text, Style::Plain);
    let behind = age(Duration::try_from_secs_f64(flow.lag_seconds).unwrap_or_default());
    let parked = match flow.exhausted_records {
        0 => plain(short(flow.parked_records)),
        // They wait for somebody.
        _ => (short(flow.parked_records), Style::Warn),
    };
    let style = match flow.state {
        "RUNNING" => Style::Good,
        _ if flow.is_bad() => Style::Bad,
        _ => Style::Warn,
    };
    let dead = flow.rate_of("dead_lettered");
    vec![
        plain(flow.route.clone()),
        (flow.state.to_owned(), style),
        if flow.breaker_open { ("open".to_owned(), Style::Bad) } else { plain("closed".to_owned()) },
        plain(rate(flow.rate)),
        plain(rate(flow.rate_of("forwarded"))),
        (rate(dead), if dead.is_some_and(|rate| rate > 0.0) { Style::Bad } else { Style::Plain }),
        plain(short(flow.lag_records)),
        plain(behind),
        plain(short(flow.in_flight)),
        parked,
        plain(short(flow.ended("dead_lettered"))),
        plain(flow.reason.clone()),
    ]
}

fn instance_row(instance: &v1::InstanceStatus, now_ms: i64) -> Vec<Cell> {
    let plain = |text: String| (text, Style::Plain);
    let state = instance.state();
    let style = if is_well(state) { Style::Good } else { Style::Bad };
    let notes: Vec<&str> = std::iter::once(instance.error.as_str())
        .filter(|error| !error.is_empty())
        .chain(instance.waiting.iter().map(String::as_str))
        .collect();
    let silent = u64::try_from(now_ms.saturating_sub(instance.reported_ms)).unwrap_or(0);
    vec![
        plain(instance.instance.clone()),
        (state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_owned(), style),
        plain(instance.generation.to_string()),
        plain(instance.routes.len().to_string()),
        plain(age(Duration::from_millis(silent))),
        plain(notes.join("; ")),
    ]
}

fn is_well(state: InstanceState) -> bool {
    matches!(state, InstanceState::Synced | InstanceState::Pinned)
}

/// The first row that is shown, so that the marked one is.
fn first_shown(marked: usize, rows: usize, room: usize) -> usize {
    let last = rows.saturating_sub(room);
    // The marked one stands in the middle, but at the ends.
    marked.saturating_sub(room / 2).min(last)
}

/// A table's lines: the headings and the rows, of which one may be marked. Where there is no room the first column gives way, then some go, then
/// the first two give way as far as they can.
fn table(headings: &[Heading], mut rows: Vec<Vec<Cell>>, width: usize, marked: Option<usize>) -> Vec<Vec<Cell>> {
    let mut headings = headings.to_vec();
    let mut widths: Vec<usize> = headings.iter().map(|heading| columns(heading.name)).collect();
    for row in &rows {
        for (known, (text, _)) in widths.iter_mut().zip(row) {
            *known = (*known).max(columns(&clean(text)));
        }
    }
    // The last column ends where it ends; two blanks stand between.
    let over = |widths: &[usize]| widths[..widths.len() - 1].iter().map(|width| width + 2).sum::<usize>().saturating_sub(width);
    let give_way = |widths: &mut [usize], column: usize, least: usize| {
        let least = least.min(widths[column]);
        widths[column] = widths[column].saturating_sub(over(widths)).max(least);
    };
    give_way(&mut widths, 0, NAME);
    while over(&widths) > 0 {
        let Some((index, _)) = headings.iter().enumerate().filter(|(_, heading)| heading.goes > 0).max_by_key(|(_, heading)| heading.goes)
        else {
            break;
        };
        headings.remove(index);
        widths.remove(index);
        for row in &mut rows {
            row.remove(index);
        }
    }
    give_way(&mut widths, 0, LEAST);
    give_way(&mut widths, 1, LEAST);

    let line = |cells: Vec<Cell>, style: Option<Style>| {
        let last = cells.len() - 1;
        let mut line: Vec<Cell> = Vec::with_capacity(cells.len());
        for (index, (text, own)) in cells.into_iter().enumerate() {
            let text = clean(&text);
            let style = style.unwrap_or(own);
            if index == last {
                line.push((text, style));
                break;
            }
            let (text, used) = fit(&text, widths[index]);
            let pad = " ".repeat(widths[index] - used);
            let text = if headings[index].right { format!("{pad}{text}  ") } else { format!("{text}{pad}  ") };
            line.push((text, style));
        }
        line
    };
    let mut lines = vec![line(headings.iter().map(|heading| (heading.name.to_owned(), Style::Bold)).collect(), None)];
    for (index, row) in rows.into_iter().enumerate() {
        lines.push(line(row, (marked == Some(index)).then_some(Style::Bold)));
    }
    lines
}

/// One line, that drives no terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// How many columns a character takes at most: what may be wide is taken to be.
fn column(c: char) -> usize {
    match c {
        '\u{0}'..='\u{10ff}' | '\u{2000}'..='\u{2bff}' => 1,
        _ => 2,
    }
}

fn columns(text: &str) -> usize {
    text.chars().map(column).sum()
}

/// As much of a text as fits, and how wide that is; what is cut ends in a mark.
fn fit(text: &str, width: usize) -> (String, usize) {
    let whole = columns(text);
    if whole <= width {
        return (text.to_owned(), whole);
    }
    let (mut out, mut used) = (String::new(), 0);
    for c in text.chars() {
        if used + column(c) + 1 > width {
            break;
        }
        used += column(c);
        out.push(c);
    }
    if width > 0 {
        out.push('…');
        used += 1;
    }
    (out, used)
}

/// A line within its width, painted.
fn cut(line: &[Cell], width: usize, colours: bool) -> String {
    let (mut out, mut left) = (String::new(), width);
    for (index, (text, style)) in line.iter().enumerate() {
        let text = clean(text);
        // What comes after a cell that was cut is not shown.
        let rest: usize = line[index + 1..].iter().map(|(text, _)| columns(text.trim_end())).sum();
        let text = if rest == 0 { text.trim_end().to_owned() } else { text };
        let (text, used) = fit(&text, left);
        let was_cut = used < columns(&clean(&line[index].0)) && text.ends_with('…');
        out += &style.paint(colours && !text.trim().is_empty(), text);
        left -= used;
        if was_cut || left == 0 {
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rates::{
        Rates, flows,
        tests::{mesh, report},
    };

    /// Two states of a mesh, ten seconds apart.
    fn states() -> (v1::GetStatusResponse, v1::GetStatusResponse) {
        let mut waits = report("b", 1, 100, 0, 0);
        waits.routes[0].route = "a-route-with-quite-a-long-name-that-says-what-it-does".into();
        waits.routes[0].state = v1::RouteState::WaitingForService.into();
        waits.routes[0].breaker_open = true;
        waits.routes[0].reason = "service pricing is not there: 127.0.0.1:8080: Connection refused (os error 111)\x1b[2J".into();
        let mut lost = report("c", 1, 5, 0, 0);
        lost.state = InstanceState::Lost.into();
        lost.routes.clear();
        let before = mesh(vec![report("a", 1, 100, 1_000, 0), waits.clone(), lost.clone()]);
        waits.reported_ms += 10_000;
        (before, mesh(vec![report("a", 1, 110, 4_120, 31), waits, lost]))
    }

    fn drawn(sort: Sort, width: usize, height: usize) -> Vec<String> {
        let (before, now) = states();
        let mut rates = Rates::default();
        rates.take(&before);
        rates.take(&now);
        let mut flows = flows(&now, None, &rates);
        sort.apply(&mut flows);
        let view = View { mesh: &now, flows: &flows, every: Duration::from_secs(2), stale: "" };
        draw(&view, Look { sort, ..Look::default() }, width, height, false)
    }

    #[test]
    fn a_small_terminal() {
        let lines = drawn(Sort::Trouble, 80, 24);
        assert_eq!(lines.len(), 24);
        assert_eq!(
            lines[..11],
            [
                "mesh shop  generation 3  3 instances  1 not well  1 breaker open",
                "2 routes  in 315/s  forwarded 312/s  dead letters 3.1/s  lag 80  in flight 2  p…",
                "",
                "ROUTE                     STATE                IN/S  FWD/S  LAG  BEHIND  DEAD  …",
                "a-route-with-quite-a-lo…  WAITING_FOR_SERVICE     0      0   40      3s     0  …",
                "price                     RUNNING               315    312   40      3s    31",
                "",
                "INSTANCE  STATE   GENERATION  ROUTES     AGE  NOTE",
                "c         LOST             3       0  1m 45s",
                "a         SYNCED           3       1      0s",
                "b         SYNCED           3       1      0s",
            ]
        );
        assert!(lines[11..22].iter().all(String::is_empty), "{lines:#?}");
        assert_eq!(lines[22], "a-route-with-quite-a-long-name-that-says-what-it-does: service pricing is not t…");
        assert_eq!(lines[23], "q quit  ↑↓ move  s sort (trouble)  p hold  every 2s");
    }

    #[test]
    fn a_large_terminal() {
        let lines = drawn(Sort::Rate, 160, 50);
        assert_eq!(lines.len(), 50);
        assert_eq!(
            lines[3..6],
            [
                "ROUTE                                                  STATE                BREAKER  IN/S  FWD/S  DEAD/S  LAG  BEHIND  FLIGHT  PARKED  DEAD  REASON",
                "price                                                  RUNNING              closed    315    312     3.1   40      3s       1       0    31",
                "a-route-with-quite-a-long-name-that-says-what-it-does  WAITING_FOR_SERVICE  open        0      0       0   40      3s       1       0     0  service pricing is…",
            ]
        );
        assert_eq!(lines[48], "price: service pricing, 2 partitions at 1 instance");
        assert_eq!(lines[49], "q quit  ↑↓ move  s sort (rate)  p hold  every 2s");
    }

    #[test]
    fn nothing_is_wider_or_higher_than_the_picture() {
        let (_, now) = states();
        let many: Vec<Flow> = (0..200)
            .map(|number| Flow {
                route: format!("route-{number:03}-경로"),
                state: "RUNNING",
                reason: "日本語".repeat(40),
                ..Flow::default()
            })
            .collect();
        let view = View { mesh: &now, flows: &many, every: Duration::from_secs(2), stale: "no answer: refused" };
        for (width, height) in [(1, 1), (0, 0), (10, 5), (40, 8), (80, 24), (160, 50), (300, 300)] {
            for marked in [0, 100, 199, 500] {
                let lines = draw(&view, Look { marked, ..Look::default() }, width, height, false);
                assert!(lines.len() <= height, "{width}x{height}: {}", lines.len());
                assert!(lines.iter().all(|line| columns(line) <= width), "{width}x{height}: {lines:#?}");
            }
        }
        // The marked one is always to be seen.
        for marked in [0, 57, 199] {
            let lines = draw(&view, Look { marked, ..Look::default() }, 160, 24, true);
            let wanted = format!("route-{marked:03}");
            assert!(lines.iter().any(|line| line.starts_with("\x1b[1m") && line.contains(&wanted)), "{marked}: {lines:#?}");
        }
    }

    #[test]
    fn routes_are_sorted() {
        let flow = |name: &str, state, lag, rate| Flow { route: name.into(), state, lag_records: lag, rate: Some(rate), ..Flow::default() };
        let all = [flow("a", "RUNNING", 5, 1.0), flow("b", "STOPPED", 0, 0.0), flow("c", "RUNNING", 9, 3.0), flow("d", "RUNNING", 9, 2.0)];
        let sorted = |sort: Sort| {
            let mut all = all.clone();
            sort.apply(&mut all);
            all.map(|flow| flow.route).concat()
        };
        let mut sort = Sort::default();
        let said: Vec<String> = (0..5)
            .map(|_| {
                let said = sorted(sort);
                sort = sort.next();
                said
            })
            .collect();
        assert_eq!(said, ["bcda", "abcd", "cdab", "cdab", "abcd"]);
        assert_eq!(sort, Sort::Trouble);
    }
}
