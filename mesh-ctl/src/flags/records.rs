//! The flags of `tail`, `produce`, `topics`, `lag`, `completion` and `man`.

use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, Subcommand};

use crate::moment::Moment;

/// `tail`.
#[derive(Debug, Args)]
#[command(after_help = TAIL_HELP)]
pub(crate) struct Tail {
    /// The topics.
    #[arg(required = true, value_name = "TOPIC")]
    pub(crate) topics: Vec<String>,
    /// Where to begin in each partition: earliest, latest, an offset, -100 for so many offsets before the end, a time as in `reset
    /// --to-datetime`, or -10m: so long ago. Without it: earliest, or latest with --follow.
    #[arg(long, value_name = "WHERE", allow_hyphen_values = true)]
    pub(crate) from: Option<TailFrom>,
    /// Only this partition; may be given several times.
    #[arg(long = "partition", value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) partitions: Vec<i32>,
    /// Only records for which this expression is true: CEL, as a route's `filter`.
    #[arg(long, value_name = "CEL")]
    pub(crate) filter: Option<String>,
    /// End after so many records.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Go on with what is appended, until Ctrl-C.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Print values whole, JSON over several lines.
    #[arg(long)]
    pub(crate) pretty: bool,
}

const TAIL_HELP: &str = "\
Without --follow it ends at what is the end when it begins. Records of a partition come in their order; those of
several partitions come as they are read. Nothing is committed, and no group is joined.

For people it is one line a record: place, time, key, value, cut to the width of the terminal. With -o json it is
one JSON object a line, which `mesh-ctl produce --json` and the API's publish of lines take as it is:
  {\"topic\":\"orders\",\"partition\":0,\"offset\":7,\"timestamp\":1760000000000,\"key\":{\"text\":\"k\"},\"value\":{\"json\":{\"n\":1}},
   \"content_type\":\"application/json\",\"mesh_id\":\"…\",\"headers\":[{\"name\":\"source\",\"value\":{\"text\":\"web\"}}],\"mesh\":{\"mesh-hops\":\"1\"}}
A value is json, text or base64, by its content type and by what it is; a null is null. `mesh` has the headers
that the mesh wrote.

Examples:
  mesh-ctl tail orders --from -10m
  mesh-ctl tail orders payments -f --filter 'record.json.country == \"KR\"'
  mesh-ctl tail orders --partition 3 --from 1042 --limit 1 --pretty
  mesh-ctl tail orders -o json | mesh-ctl produce orders-copy --json";

/// Where to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TailFrom {
    /// At the oldest record.
    Earliest,
    /// At the end.
    Latest,
    /// At an offset; negative: so many before the end.
    Offset(i64),
    /// At a time.
    Time(Moment),
}

impl std::str::FromStr for TailFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "earliest" => return Ok(Self::Earliest),
            "latest" => return Ok(Self::Latest),
            _ => {}
        }
        if let Ok(offset) = text.parse() {
            return Ok(Self::Offset(offset));
        }
        // `-10m` is ten minutes ago, and so is `10m`.
        let ago = text.strip_prefix('-').filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        ago.unwrap_or(text).parse().map(Self::Time).map_err(|why| format!("use earliest, latest, an offset, or a time: {why}"))
    }
}

/// `produce`.
#[derive(Debug, Args)]
#[command(after_help = PRODUCE_HELP, group = ArgGroup::new("what").multiple(false))]
pub(crate) struct Produce {
    /// The topic. With --json it may be left out: each line says its own then.
    #[arg(required_unless_present = "json", value_name = "TOPIC")]
    pub(crate) topic: Option<String>,
    /// The key. With --json, of lines that have none.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// A header; may be given several times. With --json, where a line has none of the name.
    #[arg(long = "header", value_name = "NAME=VALUE")]
    pub(crate) headers: Vec<HeaderFlag>,
    /// The media type of the value. With --json, of lines that name none.
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// The identity of the record (`mesh-id`), to publish it again under the one that it had. Without it, it gets a new one.
    #[arg(long, value_name = "ID", conflicts_with_all = ["lines", "json"])]
    pub(crate) id: Option<String>,
    /// The value. Without this, it is all of stdin.
    #[arg(long, value_name = "VALUE", group = "what")]
    pub(crate) value: Option<String>,
    /// No value: a null, which deletes the key from a compacted topic.
    #[arg(long, group = "what")]
    pub(crate) tombstone: bool,
    /// Each line of stdin is the value of a record.
    #[arg(long, group = "what")]
    pub(crate) lines: bool,
    /// Each line of stdin is a record as JSON, as `tail -o json` prints it.
    #[arg(long, group = "what")]
    pub(crate) json: bool,
}

const PRODUCE_HELP: &str = "\
Records are published as a service's are: checked against the topic's schema, with a `mesh-id`, and acknowledged
by the broker before they count. Headers that begin with `mesh-` are the mesh's own and are refused.

Stdin is read as a stream: lines go out as they come. Empty lines are passed over. What is refused is told with the
number of its line, the others are stored, and at the end it is said how many were.

With --json a line keeps its key, value, headers, time and `mesh-id`; its `topic` counts where no TOPIC is given;
`partition`, `offset` and `mesh` tell where it was, and are not taken. Only `value` has to be there; a plain
string is its text, other plain JSON is itself, null is a null.

Exit codes: 0 all are stored, 1 some are refused, 4 it is not known of some whether they are stored.

Examples:
  mesh-ctl produce orders --key order-1 --value '{\"item\":\"tea\"}' --content-type application/json
  mesh-ctl produce orders --key order-1 --header source=web < order.json
  mesh-ctl produce orders --lines < orders.ndjson
  mesh-ctl produce orders --key order-1 --tombstone
  mesh-ctl tail orders -o json | mesh-ctl produce orders-copy --json";

/// A header on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderFlag {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl std::str::FromStr for HeaderFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("use NAME=VALUE, such as source=web")?;
        Ok(Self { name: name.to_owned(), value: value.to_owned() })
    }
}

/// `topics`.
#[derive(Debug, Subcommand)]
pub(crate) enum Topics {
    /// List the topics: partitions, records, and which routes use them.
    List(TopicsList),
    /// Describe topics: each partition with its leader and offsets, and the settings that are not the broker's defaults.
    Describe(TopicsDescribe),
    /// Create a topic.
    Create(TopicsCreate),
    /// Give a topic more partitions, or other settings.
    #[command(after_help = ALTER_HELP)]
    Alter(TopicsAlter),
    /// Delete topics, for good. A preview, unless --execute is given.
    #[command(after_help = DELETE_HELP)]
    Delete(TopicsDelete),
}

const ALTER_HELP: &str = "\
More partitions move keys: a key goes to one of the partitions by its hash and their number. Later records of a key
may then be processed before earlier ones that still lie in its old partition; to keep the order, let the routes
read everything first (`mesh-ctl lag`). Partitions are never taken away. The retry and park topics of routes that
read the topic grow with it. On Kafka routes read new partitions within half a minute, and what is published goes
there within five; on the embedded broker both at once.

Settings that are not named stay as they are.

Examples:
  mesh-ctl topics alter orders --partitions 24
  mesh-ctl topics alter orders --retention 30d --config cleanup.policy=delete
  mesh-ctl topics alter orders --unset retention.ms";

const DELETE_HELP: &str = "\
A topic that a route of the table in force uses is refused; --force deletes it all the same. What begins with `__`
is never deleted. The embedded broker makes a topic anew when somebody publishes to it.

  mesh-ctl topics delete orders-test orders-copy --execute";

/// `topics list`.
#[derive(Debug, Args)]
pub(crate) struct TopicsList {
    /// The mesh's own and the broker's, too: those that begin with `__`.
    #[arg(long)]
    pub(crate) all: bool,
}

/// `topics describe`.
#[derive(Debug, Args)]
pub(crate) struct TopicsDescribe {
    /// The topics.
    #[arg(required = true, value_name = "TOPIC")]
    pub(crate) topics: Vec<String>,
}

/// `topics create`.
#[derive(Debug, Args)]
pub(crate) struct TopicsCreate {
    /// Its name.
    pub(crate) topic: String,
    /// How many partitions; the broker's default otherwise.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) partitions: Option<i32>,
    /// How many replicas; the broker's default otherwise.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=32_767))]
    pub(crate) replication: Option<i32>,
    #[command(flatten)]
    pub(crate) settings: TopicSettings,
}

/// `topics alter`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true))]
pub(crate) struct TopicsAlter {
    /// The topic.
    pub(crate) topic: String,
    /// How many partitions it is to have.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..), group = "change")]
    pub(crate) partitions: Option<i32>,
    /// How long it keeps records: 7d, 12h; `forever` keeps all.
    #[arg(long, value_name = "TIME", group = "change")]
    pub(crate) retention: Option<Retention>,
    /// A setting, by Kafka's name; may be given several times.
    #[arg(long = "config", value_name = "NAME=VALUE", group = "change")]
    pub(crate) config: Vec<HeaderFlag>,
    /// A setting that goes back to the broker's default; may be given several times.
    #[arg(long, value_name = "NAME", group = "change")]
    pub(crate) unset: Vec<String>,
}

/// Settings of a topic.
#[derive(Debug, Args)]
pub(crate) struct TopicSettings {
    /// How long it keeps records: 7d, 12h; `forever` keeps all.
    #[arg(long, value_name = "TIME")]
    pub(crate) retention: Option<Retention>,
    /// A setting, by Kafka's name, such as cleanup.policy=compact; may be given several times.
    #[arg(long = "config", value_name = "NAME=VALUE")]
    pub(crate) config: Vec<HeaderFlag>,
}

/// How long records are kept; nothing: for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Retention(Option<Duration>);

impl Retention {
    /// As `retention.ms`.
    pub(crate) fn millis(&self) -> String {
        self.0.map_or_else(|| "-1".to_owned(), |kept| kept.as_millis().to_string())
    }
}

impl std::str::FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "forever" => Ok(Self(None)),
            text => {
                humantime::parse_duration(text).map(|kept| Self(Some(kept))).map_err(|error| format!("{error}: use 7d, 12h, or forever"))
            }
        }
    }
}

/// `topics delete`.
#[derive(Debug, Args)]
pub(crate) struct TopicsDelete {
    /// The topics.
    #[arg(required = true, value_name = "TOPIC")]
    pub(crate) topics: Vec<String>,
    /// Even if routes of the table in force use them.
    #[arg(long)]
    pub(crate) force: bool,
    /// Do it. Without this, it is only shown what would be deleted.
    #[arg(long)]
    pub(crate) execute: bool,
}

/// `lag`.
#[derive(Debug, Args)]
#[command(after_help = LAG_HELP)]
pub(crate) struct Lag {
    /// The routes; without any, and without --group, all of the table in force.
    #[arg(value_name = "ROUTE")]
    pub(crate) routes: Vec<String>,
    /// This consumer group, whoever's it is; may be given several times.
    #[arg(long = "group", value_name = "GROUP")]
    pub(crate) groups: Vec<String>,
    /// All groups that the broker knows, and that committed something.
    #[arg(long, conflicts_with_all = ["groups", "routes"])]
    pub(crate) all_groups: bool,
    /// Look again and again, every so often, and judge what changes.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "5s", value_parser = super::interval)]
    pub(crate) watch: Option<Duration>,
    /// Judge by the last so many looks.
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u16).range(3..=1_000), requires = "watch")]
    pub(crate) window: u16,
    /// End after so many looks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "watch")]
    pub(crate) count: Option<u64>,
}

const LAG_HELP: &str = "\
LAG counts the offsets between what the group committed and the end; BEHIND is the age of the first record that it
has to read.

One look tells OK (nothing to read) or LAG. With --watch the last looks are judged, by Burrow's rules:
  OK      it read everything at some time, or its lag falls
  WARN    it commits, but its lag never fell from one look to the next
  STALL   it has members and a lag, and committed nothing
  STOP    it has a lag, no members, and committed nothing
  REWIND  what it committed went back: a reset, or a second reader under its name
With -o json and --watch each look is one JSON document on one line.

Examples:
  mesh-ctl lag price
  mesh-ctl lag --group some-connector --watch 10s
  mesh-ctl lag --all-groups";

/// `completion`.
#[derive(Debug, Args)]
#[command(
    after_help = "  mesh-ctl completion bash > /etc/bash_completion.d/mesh-ctl\n  mesh-ctl completion zsh > \"${fpath[1]}/_mesh-ctl\""
)]
pub(crate) struct Completion {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

/// `man`.
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The folder; it is made if it is not there.
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_begin() {
        let read = |text: &str| text.parse::<TailFrom>();
        assert_eq!((read("earliest"), read("latest")), (Ok(TailFrom::Earliest), Ok(TailFrom::Latest)));
        assert_eq!((read("17"), read("-100")), (Ok(TailFrom::Offset(17)), Ok(TailFrom::Offset(-100))));
        assert!(matches!((read("-10m"), read("10m")), (Ok(TailFrom::Time(_)), Ok(TailFrom::Time(_)))));
        let Ok(TailFrom::Time(moment)) = read("2026-11-21T10:00:00Z") else { panic!("a time") };
        assert_eq!(moment.millis(), 1_795_255_200_000);
        for wrong in ["", "-", "start", "--1", "-yesterday", "1.5"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn headers_and_retentions() {
        let header = |name: &str, value: &str| Ok(HeaderFlag { name: name.into(), value: value.into() });
        assert_eq!("a=b".parse::<HeaderFlag>(), header("a", "b"));
        assert_eq!("a=".parse::<HeaderFlag>(), header("a", ""));
        assert_eq!("a=b=c".parse::<HeaderFlag>(), header("a", "b=c"));
        assert!("a".parse::<HeaderFlag>().is_err() && "=b".parse::<HeaderFlag>().is_err());
        assert_eq!("7d".parse::<Retention>().map(|kept| kept.millis()).as_deref(), Ok("604800000"));
        assert_eq!("forever".parse::<Retention>().map(|kept| kept.millis()).as_deref(), Ok("-1"));
        assert!("soon".parse::<Retention>().is_err());
    }
}
