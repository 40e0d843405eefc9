//! `--wait`: waits until a generation runs everywhere, and shows how far it is, a line per state.
//!
//! Invariant: lines are drawn anew on a terminal; elsewhere a line is written only when it changed.
//! Invariant: it ends: when all live instances run the generation, when one refuses it, or in time.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use mesh_proto::v1;

use super::Context;
use crate::{
    client::{self, Client},
    output::{Code, Failure, Style, age, count},
};

/// How often the state is asked for.
const LOOK: Duration = Duration::from_millis(300);
/// How long the others may still say whether they refuse it, once one did.
const GRACE: Duration = Duration::from_secs(5);
/// How many instances a line names, and how wide it is at most: one that wraps cannot be drawn anew.
const NAMED: usize = 8;
const WIDTH: usize = 79;

/// How an instance stands to the generation that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// It runs it, or a newer one.
    Synced,
    /// It does not yet.
    Pending,
    /// It refuses it.
    Nacked,
    /// It runs its copy on disk, and cannot know of it.
    Cached,
    /// It runs another table under the same number.
    Drift,
    /// It has not reported for long: not waited for.
    Lost,
    /// Its config pins a table: not waited for.
    Pinned,
}

impl Stand {
    const ALL: [Self; 7] = [Self::Synced, Self::Pending, Self::Nacked, Self::Cached, Self::Drift, Self::Lost, Self::Pinned];

    fn of(instance: &v1::InstanceStatus, generation: u64) -> Self {
        use v1::InstanceState as State;
        match instance.state() {
            State::Lost => Self::Lost,
            State::Pinned => Self::Pinned,
            State::Cached => Self::Cached,
            State::Drift if instance.generation == generation => Self::Drift,
            // However it stands to what was applied since.
            _ if instance.generation >= generation => Self::Synced,
            State::Nacked if instance.refused_generation >= generation => Self::Nacked,
            _ => Self::Pending,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Synced => "SYNCED",
            Self::Pending => "PENDING",
            Self::Nacked => "NACKED",
            Self::Cached => "CACHED",
            Self::Drift => "DRIFT",
            Self::Lost => "LOST",
            Self::Pinned => "PINNED",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Synced | Self::Pinned => Style::Good,
            Self::Pending | Self::Cached => Style::Warn,
            Self::Nacked | Self::Drift | Self::Lost => Style::Bad,
        }
    }

    /// Whether the end waits for instances of this state.
    fn is_awaited(self) -> bool {
        matches!(self, Self::Pending | Self::Cached | Self::Drift)
    }
}

/// The lines of all states, in order, without colours.
fn lines(instances: &[v1::InstanceStatus], generation: u64) -> Vec<(Stand, String)> {
    let line = |stand: Stand| {
        let of: Vec<&str> = instances.iter().filter(|one| Stand::of(one, generation) == stand).map(|one| one.instance.as_str()).collect();
        let mut line = format!("{:<8} {}", stand.word(), of.len());
        if !of.is_empty() {
            let total = instances.iter().filter(|one| !matches!(Stand::of(one, generation), Stand::Lost | Stand::Pinned)).count();
            let share = if matches!(stand, Stand::Lost | Stand::Pinned) { String::new() } else { format!(" of {total}") };
            let more = if of.len() > NAMED { ", …" } else { "" };
            line += &format!("{share}: {}{more}", of.iter().take(NAMED).copied().collect::<Vec<_>>().join(", "));
        }
        let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        match line.char_indices().nth(WIDTH) {
            Some(_) => (stand, line.chars().take(WIDTH - 1).chain(['…']).collect()),
            None => (stand, line),
        }
    };
    Stand::ALL.into_iter().map(line).collect()
}

/// What was shown last.
#[derive(Debug, Default)]
struct Picture {
    lines: Vec<(Stand, String)>,
    drawn: usize,
    problem: String,
}

impl Picture {
    /// Shows the lines: all of them in place on a terminal, else those that changed and are not empty from the beginning.
    fn show(&mut self, context: &Context, lines: Vec<(Stand, String)>, generation: u64, waited: Duration) {
        if context.progress {
            // Back to the first line, and clear what is below.
            let mut text = if self.drawn > 0 { format!("\x1b[{}A\r\x1b[J", self.drawn) } else { String::new() };
            text += &format!("generation {generation}, {}\n", age(waited));
            self.drawn = 1;
            for (stand, line) in &lines {
                let none = *line == empty(*stand);
                if none && *stand == Stand::Pinned {
                    continue;
                }
                let (word, rest) = line.split_at(stand.word().len());
                let style = if none { Style::Plain } else { stand.style() };
                text += &format!("  {}{rest}\n", style.paint(context.error_colours, word));
                self.drawn += 1;
            }
            let mut err = std::io::stderr().lock();
            // Nobody is there to be told when stderr is closed.
            drop(err.write_all(text.as_bytes()).and_then(|()| err.flush()));
        } else {
            for line in news(&self.lines, &lines) {
                context.note(line);
            }
        }
        self.lines = lines;
    }

    /// Says what keeps the state from being known, once.
    fn trouble(&mut self, context: &Context, problem: String) {
        if self.problem != problem {
            context.note(&problem);
            // What is drawn next stands below it.
            (self.problem, self.drawn) = (problem, 0);
        }
    }
}

/// How a canary was ended; `None` while it is open.
fn ended(rollout: &v1::Rollout) -> Option<String> {
    rollout.entry.as_ref().map(|entry| entry.aborted.clone()).filter(|aborted| !aborted.is_empty())
}

/// The line of a state that no instance has.
fn empty(stand: Stand) -> String {
    format!("{:<8} 0", stand.word())
}

/// The lines that changed; at first those of states that some instance has.
fn news<'a>(before: &[(Stand, String)], now: &'a [(Stand, String)]) -> Vec<&'a str> {
    let changed = now.iter().enumerate().filter(|(at, (stand, line))| match before.get(*at) {
        Some((_, known)) => known != line,
        None => *line != empty(*stand),
    });
    changed.map(|(_, (_, line))| line.as_str()).collect()
}

/// Those that ought to run the generation: all, or those that a canary chooses.
fn concerned(mut instances: Vec<v1::InstanceStatus>, generation: u64) -> Vec<v1::InstanceStatus> {
    // A sidecar of an older version does not tell: there every instance ought to run the newest.
    instances.retain(|instance| instance.target_generation == 0 || instance.target_generation >= generation);
    instances
}

/// Waits until all live instances that ought to do so run the generation.
pub(super) async fn run(context: &Context, client: &mut Client, generation: u64, limit: Duration) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut picture = Picture::default();
    let mut refused_since: Option<Instant> = None;
    loop {
        let request = client::request(v1::GetStatusRequest { watch: false }, client::ASK);
        let status = match client.get_status(request).await {
            Ok(status) => status.into_inner(),
            // The table is applied, whatever happens to this sidecar: it may come back.
            Err(status) if begin.elapsed() < limit => {
                picture.trouble(context, format!("the sidecar does not answer: {}", status.message()));
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Err(status) => {
                return Err(Failure::Said {
                    code: Code::Unknown,
                    message: format!("generation {generation} is applied, but the sidecar does not tell who runs it: {}", status.message()),
                    hint: "ask another sidecar: `mesh-ctl status --admin URL`".into(),
                });
            }
        };
        if let Some(ended) = status.rollout.as_ref().filter(|rollout| rollout.generation == generation).and_then(ended) {
            return Err(Failure::Said {
                code: Code::No,
                message: format!("generation {generation} is a canary that is over: {ended}"),
                hint: "`mesh-ctl rollout status` tells what its instances reported".into(),
            });
        }
        let instances = concerned(status.instances, generation);
        picture.show(context, lines(&instances, generation), generation, begin.elapsed());
        let all = |wanted: Stand| instances.iter().filter(move |one| Stand::of(one, generation) == wanted);
        let awaited: Vec<_> = instances.iter().filter(|one| Stand::of(one, generation).is_awaited()).collect();

        let refused = all(Stand::Nacked).count();
        let refused_for = refused_since.filter(|_| refused > 0).map(|since| since.elapsed());
        refused_since = (refused > 0).then(|| refused_since.unwrap_or_else(Instant::now));
        let late = begin.elapsed() >= limit;
        if refused > 0 && (awaited.is_empty() || late || refused_for.is_some_and(|waited| waited >= GRACE)) {
            let reasons: Vec<_> = all(Stand::Nacked).map(|one| format!("{}: {}", one.instance, one.error)).collect();
            return Err(Failure::Said {
                code: Code::No,
                message: format!(
                    "{} refused generation {generation}, and the last good table stays in force there:\n  {}",
                    count(refused as u64, "instance"),
                    reasons.join("\n  ")
                ),
                hint: "correct the table (or `mesh-ctl rollback`), the sidecars' config or their version, and apply again".into(),
            });
        }
        if refused == 0 && awaited.is_empty() {
            for apart in all(Stand::Lost).chain(all(Stand::Pinned)) {
                context.note(&format!("instance {} was not waited for: {}", apart.instance, Stand::of(apart, generation).word()));
            }
            let synced = all(Stand::Synced).count() as u64;
            let run = if synced == 1 { "runs" } else { "run" };
            context.note(&format!("{} {run} generation {generation}", count(synced, "instance")));
            return Ok(());
        }
        if late {
            let name = |one: &&v1::InstanceStatus| {
                let notes = if one.waiting.is_empty() { String::new() } else { format!(": {}", one.waiting.join("; ")) };
                format!("{} ({}{notes})", one.instance, Stand::of(one, generation).word())
            };
            return Err(Failure::Said {
                code: Code::Unknown,
                message: format!(
                    "generation {generation} is applied, but after {} these do not run it yet: {}",
                    humantime::format_duration(limit),
                    awaited.iter().map(name).collect::<Vec<_>>().join(", ")
                ),
                hint: "`mesh-ctl status` tells what they wait for".into(),
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(name: &str, state: v1::InstanceState, generation: u64, refused: u64) -> v1::InstanceStatus {
        v1::InstanceStatus {
            instance: name.to_owned(),
            state: state.into(),
            generation,
            refused_generation: refused,
            ..v1::InstanceStatus::default()
        }
    }

    #[test]
    fn an_instance_stands_to_the_generation_that_is_waited_for() {
        use v1::InstanceState as State;
        let stand = |state, generation, refused| Stand::of(&instance("a", state, generation, refused), 8);
        assert_eq!(stand(State::Synced, 8, 0), Stand::Synced);
        assert_eq!(stand(State::Synced, 7, 0), Stand::Pending, "the sidecar that tells knows of no newer one yet");
        assert_eq!(stand(State::Pending, 8, 0), Stand::Synced, "somebody applied a newer one since");
        assert_eq!(stand(State::Pending, 7, 0), Stand::Pending);
        assert_eq!(stand(State::Nacked, 7, 8), Stand::Nacked);
        assert_eq!(stand(State::Nacked, 6, 7), Stand::Pending, "an old refusal");
        assert_eq!(stand(State::Nacked, 8, 9), Stand::Synced, "a refusal of a newer one");
        assert_eq!(stand(State::Drift, 8, 0), Stand::Drift);
        assert_eq!(stand(State::Drift, 9, 0), Stand::Synced, "it is ahead of the sidecar that tells");
        assert_eq!(stand(State::Cached, 8, 0), Stand::Cached);
        assert_eq!((stand(State::Lost, 8, 0), stand(State::Pinned, 0, 0)), (Stand::Lost, Stand::Pinned));
    }

    #[test]
    fn a_line_per_state_and_only_news_off_a_terminal() {
        use v1::InstanceState as State;
        let mut all: Vec<_> = ["a", "b"].map(|name| instance(name, State::Synced, 8, 0)).into();
        all.push(instance("c", State::Pending, 7, 0));
        all.push(instance("gone", State::Lost, 3, 0));
        let first = lines(&all, 8);
        let text: Vec<&str> = first.iter().map(|(_, line)| line.as_str()).collect();
        let expected =
            ["SYNCED   2 of 3: a, b", "PENDING  1 of 3: c", "NACKED   0", "CACHED   0", "DRIFT    0", "LOST     1: gone", "PINNED   0"];
        assert_eq!(text, expected);
        assert_eq!(news(&[], &first), [expected[0], expected[1], expected[5]]);
        assert!(news(&first, &first).is_empty());
        all[2] = instance("c", State::Nacked, 7, 8);
        let second = lines(&all, 8);
        assert_eq!(news(&first, &second), ["PENDING  0", "NACKED   1 of 3: c"]);

        let many: Vec<_> = (0..100).map(|n| instance(&format!("pricing\n{n}"), State::Synced, 8, 0)).collect();
        let line = &lines(&many, 8)[0].1;
        assert!(line.starts_with("SYNCED   100 of 100: pricing 0, ") && line.chars().count() == WIDTH && line.ends_with('…'), "{line}");
    }
}
