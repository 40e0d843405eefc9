//! The history of the mesh's tables: who applied each generation, when, why, and what it changed.
//!
//! Invariant: it is the control log, nothing else: the generation in force and the [`KEEP`](super::log::KEEP) before it.
//! Invariant: what others wrote about themselves is bounded, and drives no terminal.

use mesh_proto::v1;
use mesh_routing::{Change, Table, channel::Channel};
use tokio::task::spawn_blocking;

use super::{
    Control,
    apply::ApplyError,
    rollout,
    snapshot::{About, Snapshot},
};

/// How many characters are kept of a word about oneself, and of a message.
const WORD: usize = 200;
const MESSAGE: usize = 1_000;
/// How many changes a conflict names, and how many characters of each: it travels in a header, whatever the characters are.
const CHANGES: usize = 6;
const CHANGE: usize = 120;
/// How many characters of each thing that the winner says of itself a conflict names.
const SAID: usize = 80;

/// Text of others, as one line of at most so many characters.
pub(super) fn clean(text: &str, most: usize) -> String {
    let mut line: String = text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(most).is_some() {
        line.push('…');
    }
    line
}

impl About {
    /// The same, bounded.
    pub(super) fn bounded(self) -> Self {
        let Self { by, source, message, .. } = &self;
        let (by, source, message) = (clean(by, WORD), clean(source, WORD), clean(message, MESSAGE));
        Self { by, source, message, ..self }
    }
}

/// Who applied a snapshot, in words.
pub(super) fn who(snapshot: &Snapshot) -> String {
    let About { by, source, message, .. } = &snapshot.about;
    let mut said = match clean(by, SAID) {
        by if by.is_empty() => format!("instance {}", clean(&snapshot.writer, SAID)),
        by => format!("{by} through instance {}", clean(&snapshot.writer, SAID)),
    };
    for (label, text) in [("from", source), ("saying", message)] {
        if !text.is_empty() {
            said += &format!(", {label} {:?}", clean(text, SAID));
        }
    }
    said
}

/// What a rival changed, as lines: not all of it if it is much.
pub(super) fn changed_lines(before: Option<&Table>, after: Option<&Table>) -> Vec<String> {
    let (Some(before), Some(after)) = (before, after) else { return Vec::new() };
    let changes: Vec<Change> = mesh_routing::diff(before, after);
    let mut lines: Vec<String> = changes.iter().take(CHANGES).map(|change| clean(&change.to_string(), CHANGE)).collect();
    if changes.len() > CHANGES {
        lines.push(format!("and {} more", changes.len() - CHANGES));
    }
    lines
}

/// A snapshot as an entry of the history.
pub(super) fn entry(snapshot: &Snapshot, refused: String) -> v1::Generation {
    let About { by, source, message, rollback_to, routes, limits: _, promotes } = snapshot.about.clone().bounded();
    let canary = match snapshot.channel.parse() {
        Ok(Channel::Canary(selector)) => selector.to_string(),
        Ok(Channel::Stable) | Err(_) => String::new(),
    };
    v1::Generation {
        generation: snapshot.generation,
        digest: snapshot.digest.clone(),
        applied_ms: snapshot.applied_ms,
        applied_by: by,
        source,
        instance: clean(&snapshot.writer, WORD),
        message,
        rollback_to: rollback_to.unwrap_or(0),
        routes: routes.map(|counts| v1::RouteCounts { added: counts.added, changed: counts.changed, removed: counts.removed }),
        signature: snapshot.signature.as_ref().map(v1::TableSignature::from),
        refused,
        canary,
        aborted: String::new(),
        promotes: promotes.unwrap_or(0),
    }
}

impl Control {
    /// The generations that the mesh keeps, the newest first; at most `limit`, 0: all.
    ///
    /// # Errors
    /// [`ApplyError::NotReady`] or [`ApplyError::Broker`] while the mesh cannot be read.
    pub async fn history(&self, limit: u32) -> Result<v1::GetHistoryResponse, ApplyError> {
        self.catch_up().await?;
        let limit = if limit == 0 { usize::MAX } else { limit as usize };
        let (head, winners) = self.0.log(|log| {
            let winner = |generation| {
                let aborted = log.aborted(generation).map(rollout::said).unwrap_or_default();
                Some((generation, log.winner(generation)?.clone(), aborted))
            };
            (log.head(), log.generations().take(limit).filter_map(winner).collect::<Vec<_>>())
        });
        let local = self.0.local.borrow().clone();
        let config = self.0.config.clone();
        // Why the newest is refused was found out with more effort than is made here.
        let judged = (local.target, local.refused.clone());
        let read = move || -> Vec<v1::Generation> {
            let read_one = |(generation, winner, aborted): (u64, super::log::Winner, String)| {
                let snapshot = Snapshot::read(&winner, &config.mesh, generation);
                let known = judged.1.clone().filter(|_| judged.0 == generation);
                match snapshot {
                    Ok(snapshot) => {
                        let distrusted = || snapshot.verify(&config.control.trusted_keys).err().map(|error| error.to_string());
                        v1::Generation { aborted, ..entry(&snapshot, known.or_else(distrusted).unwrap_or_default()) }
                    }
                    Err(error) => v1::Generation { generation, refused: error.to_string(), aborted, ..v1::Generation::default() },
                }
            };
            winners.into_iter().map(read_one).collect()
        };
        let generations = spawn_blocking(read).await.map_err(|error| ApplyError::Internal(error.to_string()))?;
        Ok(v1::GetHistoryResponse {
            mesh: self.0.config.mesh.to_string(),
            generation: local.generation().max(head),
            in_force: local.generation(),
            generations,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_one_short_line() {
        assert_eq!(clean("a\n\u{1b}[2Jb", 10), "a  [2Jb");
        assert_eq!(clean("äöüäöü", 3), "äöü…");
        let mut snapshot = Snapshot::new("shop", 1, 0, "a", mesh_routing::Parts::default()).unwrap();
        assert_eq!(who(&snapshot), "instance a");
        snapshot.about = About { by: "ann@desk".into(), source: "r.yaml".into(), message: "more\nroutes".into(), ..About::default() };
        assert_eq!(who(&snapshot), "ann@desk through instance a, from \"r.yaml\", saying \"more routes\"");
        let entry = entry(&snapshot, String::new());
        assert_eq!((&*entry.applied_by, &*entry.message, entry.routes, entry.rollback_to), ("ann@desk", "more routes", None, 0));
    }

    #[test]
    fn of_many_changes_some_are_named() {
        let table = |routes: usize| {
            let routes: String =
                (0..routes).map(|n| format!("  - {{ name: r{n}, service: s, from: [a], handler: /h, to: void }}\n")).collect();
            let text = format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  routes:\n{routes}");
            mesh_routing::parse("t", &text).unwrap()
        };
        let lines = changed_lines(Some(&table(1)), Some(&table(21)));
        assert_eq!((lines.len(), &*lines[CHANGES]), (CHANGES + 1, "and 14 more"));
        assert!(lines[0].starts_with("+ routes.r1: ") && lines.iter().all(|line| line.chars().count() <= CHANGE + 1), "{lines:?}");
        assert!(changed_lines(None, Some(&table(1))).is_empty());
    }
}
