//! What is wrong with a configuration: all of it, each with its place, its value and what to do.

use std::fmt;

/// Everything that is wrong with a configuration; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The faults, in the order of their places.
    pub faults: Vec<Fault>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.faults.len();
        write!(f, "the configuration has {count} fault{}:", if count == 1 { "" } else { "s" })?;
        self.faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it is written.
    pub place: Place,
    /// The field, as in `services[0].app`; empty for the whole.
    pub field: String,
    /// The value; `None` if there is none, or if it may be a secret.
    pub value: Option<String>,
    /// What is wrong with it.
    pub problem: String,
    /// What to do.
    pub hint: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, field, value, problem, hint } = self;
        write!(f, "{place}: ")?;
        if !field.is_empty() {
            write!(f, "{field}: ")?;
        }
        if let Some(value) = value {
            write!(f, "{value:?} ")?;
        }
        write!(f, "{problem}")?;
        if !hint.is_empty() {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

/// Where something is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In a file. Line and column count from 1; 0 where they are not known.
    File {
        /// The file, as it was given.
        file: String,
        /// The line.
        line: u64,
        /// The column, in characters.
        column: u64,
    },
    /// In a variable of the environment.
    Env(String),
    /// Nowhere: it is missing, and there is no file.
    Nowhere,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line: 0, .. } => write!(f, "{file}"),
            Self::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::Nowhere => write!(f, "configuration"),
        }
    }
}

/// A hint that names what was probably meant, or all that could have been.
pub(super) fn did_you_mean<'a>(word: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let lower = word.to_lowercase();
    let close = known.clone().map(|name| (distance(&lower, &name.to_lowercase()), name)).min();
    match close {
        Some((distance, name)) if distance <= 2.max(word.chars().count() / 4) => format!("did you mean {name}?"),
        _ => format!("known are {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// How many characters must be inserted, removed or replaced.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_what_is_close() {
        let known = ["services", "state", "broker"];
        assert_eq!(did_you_mean("servises", known.into_iter()), "did you mean services?");
        assert_eq!(did_you_mean("Broker", known.into_iter()), "did you mean broker?");
        assert_eq!(did_you_mean("colour", known.into_iter()), "known are services, state, broker");
        assert_eq!(did_you_mean("", known.into_iter()), "known are services, state, broker");
    }
}
