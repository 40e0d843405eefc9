//! Who runs a generation of the table: all sidecars, or those that a canary chooses.
//!
//! Invariant: a channel has one text, and the text says all of it: it is signed, and every reader chooses the same instances by it.
//! Invariant: a higher share chooses those of a lower one, and more.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    str::FromStr,
};

use sha2::{Digest as _, Sha256};

use crate::sign::STABLE;

/// What the text of a canary begins with.
const CANARY: &str = "canary";
/// The longest word of a selector, in bytes.
const WORD: usize = 200;
/// The most words of a selector.
const WORDS: usize = 100;

/// Who runs a generation. As text, `stable` or `canary <selector>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// All sidecars.
    Stable,
    /// Those that the selector chooses; the others stay with the newest stable generation.
    Canary(Selector),
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stable => f.write_str(STABLE),
            Self::Canary(selector) => write!(f, "{CANARY} {selector}"),
        }
    }
}

impl FromStr for Channel {
    type Err = SelectorError;

    /// Reads what [`Channel`] is written as, and nothing else: two texts are never one channel.
    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let channel = match text.strip_prefix(CANARY) {
            None if text == STABLE => Self::Stable,
            None => return Err(SelectorError::Word(text.to_owned())),
            Some(selector) => Self::Canary(selector.parse()?),
        };
        if channel.to_string() == text { Ok(channel) } else { Err(SelectorError::Word(text.to_owned())) }
    }
}

/// What a canary chooses: an instance that fits every kind of word that there is. Of services and instances it must be one of those that are named, of
/// labels it must have all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    services: BTreeSet<String>,
    instances: BTreeSet<String>,
    labels: BTreeMap<String, String>,
    percent: Option<u8>,
}

/// What is wrong with the text of a selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// It says nothing.
    #[error("chooses nobody: give service=NAME, instance=NAME, label.NAME=VALUE or percent=1 to 99")]
    Empty,
    /// A word that is none.
    #[error("has {0:?}, which is none of service=NAME, instance=NAME, label.NAME=VALUE and percent=1 to 99")]
    Word(String),
    /// A label or the share is given twice.
    #[error("has {0} twice")]
    Twice(String),
    /// Too much.
    #[error("has more than {WORDS} words")]
    TooLong,
}

/// A sidecar, as a selector looks at it.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The instance.
    pub instance: &'a str,
    /// The services that it serves.
    pub services: &'a [String],
    /// Its labels.
    pub labels: &'a HashMap<String, String>,
}

impl Selector {
    /// Whether it chooses an instance.
    pub fn chooses(&self, member: &Member<'_>) -> bool {
        let Self { services, instances, labels, percent } = self;
        (services.is_empty() || member.services.iter().any(|service| services.contains(service)))
            && (instances.is_empty() || instances.contains(member.instance))
            && labels.iter().all(|(name, value)| member.labels.get(name) == Some(value))
            && percent.is_none_or(|percent| share(member.instance) < u64::from(percent))
    }
}

/// Where among a hundred an instance stands: by its name alone.
fn share(instance: &str) -> u64 {
    let digest = Sha256::digest(instance);
    digest.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte)) % 100
}

/// Whether a name or a value can stand in a selector.
pub fn is_word(text: &str) -> bool {
    (1..=WORD).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = self.services.iter().map(|name| format!("service={name}"));
        let instances = self.instances.iter().map(|name| format!("instance={name}"));
        let labels = self.labels.iter().map(|(name, value)| format!("label.{name}={value}"));
        let percent = self.percent.iter().map(|percent| format!("percent={percent}"));
        f.write_str(&services.chain(instances).chain(labels).chain(percent).collect::<Vec<_>>().join(" "))
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    /// Reads words with commas or spaces between, as in `service=pricing,label.zone=a,percent=10`.
    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let mut selector = Self::default();
        let words: Vec<&str> = text.split([',', ' ']).filter(|word| !word.is_empty()).collect();
        if words.len() > WORDS {
            return Err(SelectorError::TooLong);
        }
        for word in &words {
            let unknown = || SelectorError::Word((*word).to_owned());
            let (kind, value) = word.split_once('=').ok_or_else(unknown)?;
            if !is_word(value) {
                return Err(unknown());
            }
            match kind {
                "service" => drop(selector.services.insert(value.to_owned())),
                "instance" => drop(selector.instances.insert(value.to_owned())),
                "percent" => {
                    let percent = value.parse().ok().filter(|percent| (1..=99).contains(percent)).ok_or_else(unknown)?;
                    if selector.percent.replace(percent).is_some() {
                        return Err(SelectorError::Twice(kind.to_owned()));
                    }
                }
                _ => {
                    let label = kind.strip_prefix("label.").filter(|label| is_word(label)).ok_or_else(unknown)?;
                    if selector.labels.insert(label.to_owned(), value.to_owned()).is_some() {
                        return Err(SelectorError::Twice(kind.to_owned()));
                    }
                }
            }
        }
        if words.is_empty() { Err(SelectorError::Empty) } else { Ok(selector) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(text: &str) -> Selector {
        text.parse().unwrap()
    }

    #[test]
    fn a_channel_has_one_text() {
        let canary = Channel::Canary(selector("percent=10, service=ship,label.zone=a,service=pricing,instance=p-0"));
        let text = "canary service=pricing service=ship instance=p-0 label.zone=a percent=10";
        assert_eq!(canary.to_string(), text);
        assert_eq!(text.parse(), Ok(canary));
        assert_eq!("stable".parse(), Ok(Channel::Stable));
        for other in ["", "Stable", "canary", "canary ", "canaryservice=a", "canary  service=a", "canary service=b service=a", "canary x=1"]
        {
            assert!(other.parse::<Channel>().is_err(), "{other:?}");
        }
    }

    #[test]
    fn what_is_no_selector_is_named() {
        let wrong = |text: &str| text.parse::<Selector>().unwrap_err().to_string();
        assert!(wrong(" , ").contains("chooses nobody"));
        for word in ["pricing", "service=", "service=a/b", "zone=a", "label.=a", "percent=0", "percent=100", "percent=x", "label.a/b=c"] {
            assert!(wrong(word).contains(&format!("{word:?}")), "{word}");
        }
        assert!(wrong("percent=1,percent=2").contains("percent twice"));
        assert!(wrong("label.a=1,label.a=2").contains("label.a twice"));
        assert!(wrong(&vec!["service=a"; WORDS + 1].join(",")).contains("more than"));
    }

    #[test]
    fn instances_are_chosen() {
        let labels = HashMap::from([("zone".to_owned(), "a".to_owned()), ("size".to_owned(), "s".to_owned())]);
        let services = ["pricing".to_owned(), "ship".to_owned()];
        let member = Member { instance: "p-0", services: &services, labels: &labels };
        for chosen in
            ["service=pricing", "service=x,service=ship", "instance=p-0", "label.zone=a,label.size=s", "service=ship,label.zone=a"]
        {
            assert!(selector(chosen).chooses(&member), "{chosen}");
        }
        for other in ["service=x", "instance=p-1", "label.zone=b", "label.none=a", "service=pricing,label.zone=b", "service=x,instance=p-0"]
        {
            assert!(!selector(other).chooses(&member), "{other}");
        }
    }

    #[test]
    fn a_share_grows_and_takes_none_away() {
        let none = HashMap::new();
        let chosen = |percent: u8| -> BTreeSet<usize> {
            let of = selector(&format!("percent={percent}"));
            let chosen = |number: &usize| of.chooses(&Member { instance: &format!("pricing-{number}"), services: &[], labels: &none });
            (0..1_000).filter(chosen).collect()
        };
        let (few, many) = (chosen(10), chosen(50));
        assert!(few.is_subset(&many));
        assert!((60..140).contains(&few.len()) && (430..570).contains(&many.len()), "{} {}", few.len(), many.len());
    }
}
