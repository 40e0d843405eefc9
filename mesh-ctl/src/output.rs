//! How things are said: failures with hints and exit codes, columns, colours.

use std::{fmt, process::ExitCode, time::Duration};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// Done.
    Done = 0,
    /// The answer is no.
    No = 1,
    /// An error.
    Error = 2,
    /// Somebody else was faster.
    Conflict = 3,
    /// Not known, or not complete in time.
    Unknown = 4,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// Why a command could not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// With its exit code, and what to do about it.
    Said {
        /// The exit code.
        code: Code,
        /// What happened.
        message: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// The reader of stdout is gone.
    ClosedPipe,
}

impl Failure {
    /// An error.
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Said { code: Code::Error, message: message.into(), hint: hint.into() }
    }

    /// What happened; empty if only the reader of stdout is gone.
    pub(crate) fn message(&self) -> &str {
        match self {
            Self::Said { message, .. } => message,
            Self::ClosedPipe => "",
        }
    }

    /// The same, said otherwise; its hint stays.
    pub(crate) fn with(self, code: Code, message: String) -> Self {
        match self {
            Self::Said { hint, .. } => Self::Said { code, message, hint },
            Self::ClosedPipe => Self::ClosedPipe,
        }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Said { code, .. } => *code,
            Self::ClosedPipe => Code::Done,
        }
    }
}

/// A style of text; none where there are no colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// As it is.
    Plain,
    /// Headings.
    Bold,
    /// Fine.
    Good,
    /// Deserves a look.
    Warn,
    /// Wrong.
    Bad,
}

impl Style {
    /// The text in this style.
    pub(crate) fn paint(self, colours: bool, text: impl fmt::Display) -> String {
        let code = match self {
            _ if !colours => return text.to_string(),
            Self::Plain => return text.to_string(),
            Self::Bold => "1",
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Columns, as wide as their widest cell; the last one ends where it ends.
#[derive(Debug)]
pub(crate) struct Columns {
    rows: Vec<Vec<(String, Style)>>,
}

impl Columns {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| ((*heading).to_owned(), Style::Bold)).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<(String, Style)>) {
        // What others say may contain anything: a cell is one line, and drives no terminal.
        let clean = |text: String| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.rows.push(cells.into_iter().map(|(text, style)| (clean(text), style)).collect());
    }

    /// The lines.
    pub(crate) fn render(&self, colours: bool) -> String {
        let count = self.rows.first().map_or(0, Vec::len);
        let width =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|(text, _)| text.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..count).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            let mut pad = 0;
            for ((text, style), width) in row.iter().zip(&widths) {
                if !text.is_empty() {
                    line.push_str(&" ".repeat(pad));
                    line.push_str(&style.paint(colours, text));
                    pad = 0;
                }
                pad += width + 2 - text.chars().count();
            }
            out.push_str(&line);
            out.push('\n');
        }
        out
    }
}

/// A duration in words of at most two units: `3s`, `2m 5s`, `4h 1m`, `3d 2h`.
pub(crate) fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes, rest) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `1 route`, `2 routes`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_end_clean() {
        let mut columns = Columns::new(&["NAME", "STATE", "NOTE"]);
        columns.row(vec![("a".into(), Style::Plain), ("SYNCED".into(), Style::Good), (String::new(), Style::Plain)]);
        columns.row(vec![("längere".into(), Style::Plain), ("NO".into(), Style::Bad), ("why\n\x1b[2J".into(), Style::Plain)]);
        assert_eq!(columns.render(false), "NAME     STATE   NOTE\na        SYNCED\nlängere  NO      why  [2J\n");
        assert!(columns.render(true).contains("\x1b[32mSYNCED\x1b[0m"));
    }

    #[test]
    fn ages() {
        let said: Vec<String> = [0, 59, 125, 3_700, 90_000].into_iter().map(|s| age(Duration::from_secs(s))).collect();
        assert_eq!(said, ["0s", "59s", "2m 5s", "1h 1m", "1d 1h"]);
    }
}
