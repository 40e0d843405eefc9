//! The flags, checked: what comes out of here is used as it is.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_proto::{admin::AdminAddress, v1::PartitionOffset};

use crate::moment::Moment;

mod operate;
mod records;
mod tables;

pub(crate) use self::{operate::*, records::*};
pub(crate) use tables::{
    Apply, Diff, History, How, Keys, KeysGenerate, KeysShow, Rollback, Rollout, RolloutAbort, RolloutPromote, RolloutStatus, Side,
};

const EXIT_CODES: &str = "\
Exit codes:
  0  done; `diff`, `plan`: no difference
  1  the answer is no: faults in a table, a table refused, a reset refused, `doctor`: errors, `diff`, `plan`: there are differences
  2  an error: wrong usage, an unreadable file, no sidecar at the admin address
  3  a conflict: somebody else applied, or another generation is in force than expected
  4  not known whether it was done, or not in force everywhere in time (`apply --wait`)

Environment:
  MESH_ADMIN                         the admin address of a sidecar, as --admin
  MESH_TOKEN_FILE                    the token's file, as --token-file
  MESH_CA                            the authorities of its certificate, as --ca
  MESH_CLIENT_CERT, MESH_CLIENT_KEY  what is shown to it, as --client-cert and --client-key
  MESH_SIGN_KEY                      the file of the key that signs tables, as --sign-key
  NO_COLOR                           if set and not empty: no colours";

/// Controls an event mesh: checks, applies and shows routing tables, and tells the state of every instance and route.
///
/// Any sidecar of the mesh can be asked, at its admin address.
#[derive(Debug, Parser)]
#[command(name = "mesh-ctl", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Flags {
    /// The admin address of any sidecar of the mesh.
    #[arg(long, global = true, env = "MESH_ADMIN", value_name = "URL", default_value = "http://127.0.0.1:4501", value_parser = admin_url)]
    pub(crate) admin: String,
    /// The file with the token that the admin listener asks for (`control.tokens` in the sidecar's config).
    #[arg(long, global = true, env = "MESH_TOKEN_FILE", value_name = "FILE", help_heading = "Connection")]
    pub(crate) token_file: Option<PathBuf>,
    /// PEM file with the authorities of the listener's certificate; the system's without it.
    #[arg(long, global = true, env = "MESH_CA", value_name = "FILE", help_heading = "Connection")]
    pub(crate) ca: Option<PathBuf>,
    /// PEM file with the certificate to show to the listener.
    #[arg(long, global = true, env = "MESH_CLIENT_CERT", value_name = "FILE", requires = "client_key", help_heading = "Connection")]
    pub(crate) client_cert: Option<PathBuf>,
    /// PEM file with the key of --client-cert.
    #[arg(long, global = true, env = "MESH_CLIENT_KEY", value_name = "FILE", requires = "client_cert", help_heading = "Connection")]
    pub(crate) client_key: Option<PathBuf>,
    /// The form of the output; the default is for people.
    #[arg(short, long, global = true, value_name = "FORM")]
    pub(crate) output: Option<Form>,
    /// Say nothing but results and errors.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// `mesh-ctl pause`.
#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// The route.
    pub(crate) route: String,
    /// Why, for those who look at `mesh-ctl status`.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Wait until every instance that runs the route has paused it, and nothing of it is at the service.
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long that may take.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = patience)]
    pub(crate) timeout: Duration,
}

/// `mesh-ctl resume`.
#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// The route.
    pub(crate) route: String,
}

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// Columns, for people.
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check routing tables, without a sidecar. Prints all faults, each with its place and a hint.
    Validate(Validate),
    /// Apply a routing table to the whole mesh.
    Apply(Apply),
    /// Print the routing table in force, ready to be edited and applied again (YAML, or `-o json`).
    Get(Get),
    /// Show what differs between two routing tables: files, generations, the one in force. Exits with 0 if nothing, 1 if something, 2 or
    /// more on errors.
    Diff(Diff),
    /// List the generations that the mesh keeps: who applied each, when, from where, why, and what it changed.
    History(History),
    /// Bring the content of an earlier generation back, as a new generation.
    Rollback(Rollback),
    /// Follow, promote and abort a table that some instances run before all do (`apply --canary`).
    #[command(subcommand)]
    Rollout(Rollout),
    /// Make and show the keys that sign routing tables.
    #[command(subcommand)]
    Keys(Keys),
    /// Show every instance and every route: state, reason, lag, age.
    Status(Status),
    /// Draw the routes: of a file, or those in force.
    Graph(Graph),
    /// Let a route read its sources from elsewhere: deliver records again, or skip them. A dry run, unless --execute is given.
    Reset(Reset),
    /// Let records go on whose attempts are used up (`on_exhausted: park` and `stop`), with what waits behind them.
    Release(Release),
    /// Pause a route in the whole mesh: nothing is delivered until it is resumed, over restarts and new tables, too.
    Pause(Pause),
    /// Let a paused route go on.
    Resume(Resume),
    /// List, show, send back and delete dead letters.
    #[command(subcommand)]
    Dlq(Dlq),
    /// Copy a range of a topic into another, or to one route. A preview, unless --execute is given.
    Replay(Replay),
    /// Run the last records of the sources through a routing table that is not applied: what would be delivered, filtered or sent elsewhere.
    /// Nothing is delivered. Exits with 0 if nothing would change, 1 if something would, 2 or more on errors.
    Plan(Plan),
    /// Tell what each route did, or would do, with a record, and what became of it.
    Explain(Explain),
    /// Follow a flow over its hops, from the records alone: by a trace id or a mesh-id.
    Trace(Trace),
    /// Read topics: from an offset or a time, filtered, followed. `-o json` gives one JSON object a line.
    Tail(Tail),
    /// Publish records: one, the lines of stdin, or what `tail -o json` wrote.
    Produce(Produce),
    /// List, describe, create, alter and delete topics.
    #[command(subcommand)]
    Topics(Topics),
    /// Show how far routes, or any consumer groups, are behind: records and time, by partition.
    Lag(Lag),
    /// Show routes and instances with their rates, live: the full screen on a terminal, else tables one after the other.
    Top(Top),
    /// Find what is wrong with the mesh, and how to mend it: brokers, rights, clocks, topics, instances, routes. Changes nothing. Exits with 1 if
    /// something does not work.
    Doctor,
    /// Let a sidecar finish what it does, and end it: this one, or any other instance. A preview, unless --execute is given.
    Drain(Drain),
    /// Print a script that completes commands and flags in a shell.
    Completion(Completion),
    /// Write the manual pages into a folder.
    Man(Man),
}

/// `validate`.
#[derive(Debug, Args)]
pub(crate) struct Validate {
    /// The files; `-` is stdin.
    #[arg(short, long = "file", value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) files: Vec<Source>,
}

/// `get`.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// An earlier generation; the mesh keeps 50.
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
}

/// `status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Show it again and again, every so often.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s", value_parser = interval)]
    pub(crate) watch: Option<Duration>,
    /// End after so many looks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "watch")]
    pub(crate) count: Option<u64>,
}

/// `graph`.
#[derive(Debug, Args)]
pub(crate) struct Graph {
    /// The file, `-` is stdin; without it, the table in force.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<Source>,
    /// The language of the picture.
    #[arg(long, value_name = "LANGUAGE", default_value = "text")]
    pub(crate) format: GraphFormat,
    /// With what flows: records a second at each edge, by how they end, and the lag. Of the mesh; with `-o json` as numbers.
    #[arg(long, conflicts_with = "file")]
    pub(crate) live: bool,
    /// How long it is watched for that.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = interval)]
    pub(crate) interval: Duration,
}

/// The longest that anything is waited for. No clock ends before that, nor does any deadline of a question.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// How long something may take.
fn patience(text: &str) -> Result<Duration, String> {
    let patience = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if patience > LONGEST { Err(format!("{text} is too long: use 24h or less")) } else { Ok(patience) }
}

/// A time between two looks at the mesh: shorter ones tell no rates.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = patience(text)?;
    if interval < Duration::from_millis(500) { Err(format!("{text} is too short: use 500ms or more")) } else { Ok(interval) }
}

/// `reset`.
#[derive(Debug, Args)]
#[command(after_help = RESET_HELP)]
pub(crate) struct Reset {
    /// The route.
    pub(crate) route: String,
    #[command(flatten)]
    pub(crate) to: ResetTo,
    /// Only this source topic; may be given several times.
    #[arg(long = "topic", value_name = "TOPIC")]
    pub(crate) topics: Vec<String>,
    /// Only this partition; may be given several times.
    #[arg(long = "partition", value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) partitions: Vec<i32>,
    /// Do it. Without this, it is only shown what would be done.
    #[arg(long)]
    pub(crate) execute: bool,
    /// Write the offsets that are committed now to this file first; --from-file takes them back.
    #[arg(long, value_name = "FILE")]
    pub(crate) backup: Option<PathBuf>,
    /// How long the sidecars that own the partitions may take: they wait for records that are at the service.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = patience)]
    pub(crate) timeout: Duration,
}

/// `release`.
#[derive(Debug, Args)]
#[command(after_help = RELEASE_HELP)]
pub(crate) struct Release {
    /// The route.
    pub(crate) route: String,
    /// Only the record of this key, and what waits behind it. With `order: partition` or `none` it is ignored.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Only the record without a key, and what waits behind it.
    #[arg(long, conflicts_with = "key")]
    pub(crate) no_key: bool,
    /// Send the records to the dead letters, in place of another attempt; what waits behind them goes on.
    #[arg(long)]
    pub(crate) discard: bool,
    /// How long the sidecars that own the partitions may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = patience)]
    pub(crate) timeout: Duration,
}

const RELEASE_HELP: &str = "\
`mesh-ctl status` shows how many records wait for this. A released record is tried again from its first
attempt on, and the later records of its key follow it, in order.

  mesh-ctl release price
  mesh-ctl release price --key order-17 --discard";

const RESET_HELP: &str = "\
The route goes on while it is reset: the sidecar that owns a partition waits for what is at the service,
commits the new offset, and reads on from there. Other partitions and routes are not touched. A route that
no sidecar runs is reset too, while its consumer group has no members.

An offset outside of what exists is refused, with the range; then nothing at all is reset.

Examples:
  mesh-ctl reset price --to-datetime 2026-11-21T10:00:00+09:00
  mesh-ctl reset price --to-offset 0=17,1=23 --execute
  mesh-ctl reset price --shift-by -100 --partition 2 --backup before.csv --execute
  mesh-ctl reset price --from-file before.csv --execute";

/// `dlq`.
#[derive(Debug, Subcommand)]
pub(crate) enum Dlq {
    /// Count the dead letters of all routes, or of one, by reason.
    List(DlqList),
    /// Show dead letters: reason, detail, attempts, origin. `-o json` gives one JSON object a line, with key, value and headers.
    Show(DlqShow),
    /// Send dead letters back to their route. A preview, unless --execute is given. Nothing is sent twice.
    #[command(after_help = REDRIVE_HELP)]
    Redrive(DlqRedrive),
    /// Delete dead letters, for good. A preview, unless --execute is given.
    Purge(DlqPurge),
}

const REDRIVE_HELP: &str = "\
The copies go to the topic and partition that the record came from, and only the route that wrote the letter
takes them; other routes of that topic pass them over (they count them as filtered). They are records of that
topic: consumers outside of the mesh, and subscriptions without a route, see them too. --every-route lets all
routes of the topic take them.

A copy has the letter's key, value, headers and mesh-id, none of the headers that told why it died, and
`mesh-redriven` with the letter's place. What was sent is remembered together with the sending: a redrive that
was cut goes on where it was when it is given again, and a letter is never sent twice.

Of a letter that was too large for its topic, and lies there without its value (`dlq show` says so), the record
itself is sent, read from where it came from; where it is gone the letter is refused.

Examples:
  mesh-ctl dlq redrive price --reason attempts
  mesh-ctl dlq redrive price --reason attempts --since 1h --rate 100 --execute
  mesh-ctl dlq redrive price --place 3/1042 --execute";

/// Which dead letters.
#[derive(Debug, Args)]
pub(crate) struct Letters {
    /// Only letters of this reason (attempts, status, expression, hops, reply, …); may be given several times.
    #[arg(long = "reason", value_name = "REASON")]
    pub(crate) reasons: Vec<String>,
    /// Only letters with this key.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Only letters written at this time or later: a time as in `reset --to-datetime`, or 15m: so long ago.
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<Moment>,
    /// Only letters written before this time.
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<Moment>,
    /// Only the letter at this place of the dead-letter topic, as `show` prints it; may be given several times.
    #[arg(long = "place", visible_alias = "offset", value_name = "PARTITION/OFFSET")]
    pub(crate) places: Vec<Place>,
}

/// A partition and an offset.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place(pub(crate) PartitionOffset);

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (partition, offset) = text.split_once(['/', '=']).ok_or("use PARTITION/OFFSET, such as 3/1042")?;
        let number = |_| format!("{text}: use PARTITION/OFFSET, such as 3/1042");
        let (partition, offset) = (partition.parse().map_err(number)?, offset.parse().map_err(number)?);
        Ok(Self(PartitionOffset { topic: String::new(), partition, offset }))
    }
}

/// `dlq list`.
#[derive(Debug, Args)]
pub(crate) struct DlqList {
    /// The route; without it, all routes of the table.
    pub(crate) route: Option<String>,
}

/// `dlq show`.
#[derive(Debug, Args)]
pub(crate) struct DlqShow {
    /// The route.
    pub(crate) route: String,
    #[command(flatten)]
    pub(crate) letters: Letters,
    /// At most so many; 0: all.
    #[arg(long, value_name = "N", default_value = "20")]
    pub(crate) limit: u64,
}

/// `dlq redrive`.
#[derive(Debug, Args)]
pub(crate) struct DlqRedrive {
    /// The route.
    pub(crate) route: String,
    #[command(flatten)]
    pub(crate) letters: Letters,
    /// Let every route that reads the topic take the copies, and not the letters' route alone.
    #[arg(long)]
    pub(crate) every_route: bool,
    /// Send at most so many a second.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// Send at most so many; 0: all. Those that were sent before do not count.
    #[arg(long, value_name = "N", default_value = "0")]
    pub(crate) limit: u64,
    /// Do it. Without this, it is only shown what would be done.
    #[arg(long)]
    pub(crate) execute: bool,
}

/// `dlq purge`.
#[derive(Debug, Args)]
pub(crate) struct DlqPurge {
    /// The route.
    pub(crate) route: String,
    /// Delete those written before this time.
    #[arg(long, value_name = "TIME", required_unless_present_any = ["before", "all"])]
    pub(crate) until: Option<Moment>,
    /// Delete those below this offset of a partition; the others are left alone. May be given several times.
    #[arg(long, value_name = "PARTITION/OFFSET")]
    pub(crate) before: Vec<Place>,
    /// Delete all that there are now.
    #[arg(long, conflicts_with_all = ["until", "before"])]
    pub(crate) all: bool,
    /// Other routes' dead letters lie in the same topic: they may go as well.
    #[arg(long)]
    pub(crate) shared: bool,
    /// Do it. Without this, it is only shown what would be done.
    #[arg(long)]
    pub(crate) execute: bool,
}

/// `replay`.
#[derive(Debug, Args)]
#[command(after_help = REPLAY_HELP)]
pub(crate) struct Replay {
    /// The topic to copy from.
    #[arg(long, value_name = "TOPIC")]
    pub(crate) from: String,
    /// Only this partition; may be given several times.
    #[arg(long = "partition", value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) partitions: Vec<i32>,
    /// From this offset on.
    #[arg(long, value_name = "N")]
    pub(crate) from_offset: Option<i64>,
    /// To this offset, it among them.
    #[arg(long, value_name = "N")]
    pub(crate) to_offset: Option<i64>,
    /// From this time on: a time as in `reset --to-datetime`, or 15m: so long ago.
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<Moment>,
    /// Before this time.
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<Moment>,
    /// Into this topic.
    #[arg(long, value_name = "TOPIC", required_unless_present = "route", conflicts_with = "route")]
    pub(crate) to: Option<String>,
    /// To this route alone.
    #[arg(long, value_name = "ROUTE")]
    pub(crate) route: Option<String>,
    /// Only records for which this expression is true: CEL, as a route's `filter`.
    #[arg(long, value_name = "CEL")]
    pub(crate) filter: Option<String>,
    /// Copy at most so many a second.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// Do it. Without this, it is only counted what would be copied.
    #[arg(long)]
    pub(crate) execute: bool,
}

const REPLAY_HELP: &str = "\
Copies have the key, value, headers, time and mesh-id of their records, and `mesh-replayed` with the place they
came from: a service that has seen a mesh-id can pass the copy over. What is appended after the beginning is not
copied. Copies with old times go as soon as the retention of their topic says.

With --route the copies go into the route's source topic, marked so that the other routes pass them over. To
deliver again what lies in a route's sources without copies, use `reset`.

Examples:
  mesh-ctl replay --from orders --since 2026-11-21T10:00:00Z --until 2026-11-21T11:00:00Z --to orders-test
  mesh-ctl replay --from orders --partition 3 --from-offset 100 --to-offset 199 --route price --execute
  mesh-ctl replay --from orders --filter 'record.json.country == \"KR\"' --to orders-kr --rate 500 --execute";

/// Where a route is to be read from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ResetTo {
    /// From the oldest record.
    #[arg(long)]
    pub(crate) to_earliest: bool,
    /// From the end: skips what exists.
    #[arg(long)]
    pub(crate) to_latest: bool,
    /// From this offset in every partition, or from one for each: 0=17,1=23, or orders/0=17 where the route reads several topics.
    #[arg(long, value_name = "N|P=N,…")]
    pub(crate) to_offset: Option<Offsets>,
    /// From the first record that is not older: 2026-11-21T10:00:00Z, with any zone's offset (+09:00); without one it is UTC.
    /// Or a duration, such as 15m: so long ago. The time that was taken is printed.
    #[arg(long, value_name = "TIME")]
    pub(crate) to_datetime: Option<Moment>,
    /// So many offsets after what is committed, or before it: -100. Ends at what exists.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) shift_by: Option<i64>,
    /// From the offsets in this file (`-` is stdin): one partition a line, TOPIC,PARTITION,OFFSET, as --backup writes it.
    #[arg(long, value_name = "FILE")]
    pub(crate) from_file: Option<Source>,
}

/// Offsets on the command line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Offsets {
    /// One for all partitions.
    All(i64),
    /// One for each.
    Each(Vec<PartitionOffset>),
}

impl std::str::FromStr for Offsets {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(offset) = text.parse() {
            return Ok(Self::All(offset));
        }
        let each = text.split(',').map(|one| {
            let (place, offset) = one.split_once('=')?;
            let (topic, partition) = place.rsplit_once('/').unwrap_or(("", place));
            Some(PartitionOffset { topic: topic.to_owned(), partition: partition.parse().ok()?, offset: offset.parse().ok()? })
        });
        let each: Option<Vec<_>> = each.collect();
        each.map(Self::Each).ok_or_else(|| "use one offset, such as 17, or one for each partition: 0=17,1=23 or orders/0=17".to_owned())
    }
}

/// `plan`.
#[derive(Debug, Args)]
#[command(after_help = PLAN_HELP)]
pub(crate) struct Plan {
    /// The file; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Source,
    /// The records of the last so long. Without this, --records and --from: 10m.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with_all = ["records", "from"])]
    pub(crate) last: Option<Duration>,
    /// The last N records of each partition.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "from")]
    pub(crate) records: Option<u64>,
    /// The records from this time on: a time as in `reset --to-datetime`.
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Option<Moment>,
    /// Only this route.
    #[arg(long, value_name = "ROUTE")]
    pub(crate) route: Option<String>,
    /// Show at most so many records of each route that would end otherwise.
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) samples: u32,
}

const PLAN_HELP: &str = "\
Up to the call of the service, what a route does with a record follows from the record alone: filter, max_hops,
mesh-only-route. That is told exactly. Where the answer goes may depend on the answer; then the replies that are
stored are judged by both tables. What they cannot tell (the status and headers of an answer are not stored) is
counted as undecided, with the reason. At most 200,000 records are read, the newest; what was left out is said.

  mesh-ctl plan -f routes.yaml
  mesh-ctl plan -f routes.yaml --last 1h --route price --samples 20
  mesh-ctl plan -f routes.yaml --records 1000 -o json";

/// `explain`.
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// The record.
    #[arg(value_name = "TOPIC/PARTITION/OFFSET")]
    pub(crate) record: RecordPlace,
}

/// A place with its topic.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RecordPlace(pub(crate) mesh_proto::v1::Position);

impl std::str::FromStr for RecordPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.rsplit_once('/').and_then(|(rest, offset)| {
            let (topic, partition) = rest.rsplit_once('/').filter(|(topic, _)| !topic.is_empty())?;
            Some((topic.to_owned(), partition.parse().ok().filter(|n: &i32| *n >= 0)?, offset.parse().ok().filter(|n: &i64| *n >= 0)?))
        });
        let (topic, partition, offset) = parsed.ok_or("use TOPIC/PARTITION/OFFSET, such as orders/3/1042")?;
        Ok(Self(mesh_proto::v1::Position { topic, partition, offset }))
    }
}

/// `trace`.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// A trace id (32 hexadecimal digits, as in `traceparent`), or the mesh-id of any record of the flow.
    pub(crate) id: String,
    /// Among the records of the last so long. Without this and --from: 1h.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "from")]
    pub(crate) last: Option<Duration>,
    /// Among the records from this time on: a time as in `reset --to-datetime`.
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Option<Moment>,
}

/// The language of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GraphFormat {
    /// For the terminal.
    Text,
    /// A Mermaid flowchart, for Markdown.
    Mermaid,
    /// Graphviz.
    Dot,
}

/// Where a table's text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl From<std::ffi::OsString> for Source {
    fn from(value: std::ffi::OsString) -> Self {
        if value == "-" { Self::Stdin } else { Self::File(value.into()) }
    }
}

impl Flags {
    /// How the admin listener is reached.
    pub(crate) fn admin_address(&self) -> AdminAddress {
        AdminAddress {
            url: self.admin.clone(),
            token_file: self.token_file.clone(),
            ca: self.ca.clone(),
            identity: self.client_cert.clone().zip(self.client_key.clone()),
        }
    }
}

/// An address as tonic wants it: `http://host:port` or `https://host:port`; without a scheme it is the first.
fn admin_url(value: &str) -> Result<String, String> {
    let url = match value.split_once("://") {
        None => format!("http://{value}"),
        Some(("http" | "https", _)) => value.to_owned(),
        Some((scheme, _)) => return Err(format!("the scheme {scheme:?} is not supported: use http://HOST:PORT or https://HOST:PORT")),
    };
    let uri: tonic::transport::Uri = url.parse().map_err(|error| format!("{error}: use http://HOST:PORT"))?;
    if uri.host().is_none_or(str::is_empty) || uri.path() != "/" || uri.query().is_some() {
        return Err("use http://HOST:PORT, without a path".into());
    }
    if uri.port_u16().is_none() {
        return Err(format!("the port is missing: use {}:4501, for instance", url.trim_end_matches('/')));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Flags::command().debug_assert();
    }

    #[test]
    fn times_have_bounds() {
        assert_eq!((patience("0s"), patience("24h")), (Ok(Duration::ZERO), Ok(LONGEST)));
        for long in ["24h 1ms", "2d", "20000y", "500000000000y"] {
            assert!(patience(long).is_err() && interval(long).is_err(), "{long}");
        }
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        for short in ["0s", "499ms", "-1s", "soon"] {
            assert!(interval(short).is_err(), "{short}");
        }
    }

    #[test]
    fn offsets() {
        let at = |topic: &str, partition, offset| PartitionOffset { topic: topic.to_owned(), partition, offset };
        assert_eq!("17".parse(), Ok(Offsets::All(17)));
        assert_eq!("0=17,1=23".parse(), Ok(Offsets::Each(vec![at("", 0, 17), at("", 1, 23)])));
        assert_eq!("orders/3=5".parse(), Ok(Offsets::Each(vec![at("orders", 3, 5)])));
        for wrong in ["", "a", "0=", "=1", "0=1,", "0:1", "orders=1"] {
            assert!(wrong.parse::<Offsets>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn places_of_records() {
        let place = |topic: &str, partition, offset| RecordPlace(mesh_proto::v1::Position { topic: topic.to_owned(), partition, offset });
        assert_eq!("orders/3/1042".parse(), Ok(place("orders", 3, 1042)));
        assert_eq!("shop.orders-v1/0/0".parse(), Ok(place("shop.orders-v1", 0, 0)));
        for wrong in ["", "orders", "orders/3", "orders/x/1", "orders/-1/1", "orders/1/-1", "/1/2", "orders/1/"] {
            assert!(wrong.parse::<RecordPlace>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(admin_url("10.0.0.1:4501").as_deref(), Ok("http://10.0.0.1:4501"));
        assert_eq!(admin_url("http://[::1]:4501").as_deref(), Ok("http://[::1]:4501"));
        assert_eq!(admin_url("https://a:1").as_deref(), Ok("https://a:1"));
        for wrong in ["ftp://a:1", "http://a", "http://a:1/x", "http://:1", "", "a b:1", "unix:///x"] {
            assert!(admin_url(wrong).is_err(), "{wrong}");
        }
    }
}
