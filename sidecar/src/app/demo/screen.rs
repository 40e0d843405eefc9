//! What the demo prints. Colours only on a terminal, and never with `NO_COLOR`.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use mesh_routing::{CompiledTable, Destinations};

use super::services::Hop;

/// The demo's voice.
pub(super) struct Screen {
    colour: bool,
}

impl Screen {
    pub(super) fn new() -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: std::io::stdout().is_terminal() && !plain }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(super) fn faint(&self, text: &str) -> String {
        self.paint("2", text)
    }

    /// Prints a line. A reader that went away ends the demo's talking, not the demo.
    pub(super) fn line(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{text}");
        let _ = out.flush();
    }

    /// A record that went in.
    pub(super) fn published(&self, since: Duration, key: &str, what: &str, at: &str) {
        self.line(&format!(
            "  {} {} {} {}",
            self.faint(&format!("{:>7.1} ms", since.as_secs_f64() * 1e3)),
            self.paint("35", &format!("{key:<8}")),
            format_args!("{:>13} →   {} {what:<30}", "you", self.paint("32", "publish  ")),
            format_args!("→ {}", self.paint("36", at)),
        ));
    }

    /// A hop: when, whose record, who worked on it, where its answer goes.
    pub(super) fn hop(&self, since: Duration, hop: &Hop, table: &CompiledTable) {
        let route = table.routes_from(&hop.topic).iter().find(|route| *route.service == *hop.service);
        let to = match route.map(|route| &route.to) {
            _ if hop.status == 204 => self.paint("33", "∅ 204 forwards nothing"),
            Some(Destinations::Void) => self.faint("∅ void"),
            Some(Destinations::Topics(topics)) => topics.iter().map(|topic| self.paint("36", topic)).collect::<Vec<_>>().join(" + "),
            None => self.faint("?"),
        };
        let to = if hop.status.is_success() { format!("→ {to}") } else { self.paint("31", &format!("✗ {}", hop.status)) };
        let round = if route.is_some_and(|route| matches!(&route.to, Destinations::Topics(to) if to.contains(&route.from[0]))) {
            "↻"
        } else {
            " "
        };
        self.line(&format!(
            "  {} {} {} {round} {} {} {}",
            self.faint(&format!("{:>7.1} ms", since.as_secs_f64() * 1e3)),
            self.paint("35", &format!("{:<8}", hop.order)),
            self.paint("36", &format!("{:>13} →", hop.topic)),
            self.bold(&format!("{:<9}", hop.service)),
            format_args!("{:<30}", hop.said),
            to,
        ));
    }
}
