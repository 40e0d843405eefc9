//! `mesh-ctl topics`: lists, describes, creates, alters and deletes topics.

use std::collections::{BTreeMap, HashMap};

use mesh_proto::v1;
use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::{
    client,
    flags::{Form, HeaderFlag, Retention, Topics, TopicsAlter, TopicsCreate, TopicsDelete, TopicsDescribe, TopicsList},
    output::{Code, Columns, Failure, Style, age, count},
};

pub(super) async fn run(context: &Context, command: &Topics) -> Result<Code, Failure> {
    match command {
        Topics::List(flags) => list(context, flags).await,
        Topics::Describe(flags) => describe(context, flags).await,
        Topics::Create(flags) => create(context, flags).await,
        Topics::Alter(flags) => alter(context, flags).await,
        Topics::Delete(flags) => delete(context, flags).await,
    }
}

#[derive(Debug, Serialize)]
struct Summary {
    topic: String,
    partitions: i32,
    replication: i32,
    records: Option<u64>,
    bytes: Option<u64>,
    uses: Vec<Use>,
}

#[derive(Debug, Serialize)]
struct Use {
    route: String,
    role: String,
}

#[derive(Debug, Serialize)]
struct Detail {
    #[serde(flatten)]
    summary: Summary,
    config: BTreeMap<String, String>,
    partition_details: Vec<Partition>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Partition {
    partition: i32,
    leader: Option<i32>,
    replicas: Vec<i32>,
    in_sync: Vec<i32>,
    earliest: Option<i64>,
    latest: Option<i64>,
}

impl From<v1::TopicSummary> for Summary {
    fn from(topic: v1::TopicSummary) -> Self {
        let v1::TopicSummary { name, partitions, replication, records, bytes, uses } = topic;
        let uses = uses.into_iter().map(|used| Use { route: used.route, role: used.role }).collect();
        Self { topic: name, partitions, replication, records, bytes, uses }
    }
}

impl Summary {
    /// Who uses it: `price from, intake to`.
    fn used(&self) -> String {
        let uses: Vec<String> = self.uses.iter().map(|used| format!("{} {}", used.route, used.role)).collect();
        uses.join(", ")
    }
}

fn plain(text: impl ToString) -> (String, Style) {
    (text.to_string(), Style::Plain)
}

fn known(number: Option<impl ToString>) -> (String, Style) {
    plain(number.map_or_else(|| "-".to_owned(), |number| number.to_string()))
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.1} {}", UNITS[unit])
}

fn table(context: &Context, topics: &[Summary]) -> String {
    let mut columns = Columns::new(&["TOPIC", "PARTITIONS", "REPLICATION", "RECORDS", "SIZE", "USED BY"]);
    for topic in topics {
        columns.row(vec![
            plain(&topic.topic),
            plain(topic.partitions),
            plain(topic.replication),
            known(topic.records),
            known(topic.bytes.map(size)),
            plain(topic.used()),
        ]);
    }
    columns.render(context.colours)
}

async fn list(context: &Context, flags: &TopicsList) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ListTopicsRequest { internal: flags.all };
    let response = client.list_topics(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::ListTopicsResponse { topics, uncounted } = response.into_inner();
    let topics: Vec<Summary> = topics.into_iter().map(Summary::from).collect();
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &topics)?,
        None | Some(Form::Table) => context.print(&table(context, &topics))?,
    }
    if uncounted > 0 {
        context.note(&format!(
            "the records of {} were not counted: there are too many; `topics describe` counts them",
            count(uncounted, "topic")
        ));
    }
    Ok(Code::Done)
}

async fn describe(context: &Context, flags: &TopicsDescribe) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::DescribeTopicsRequest { topics: flags.topics.clone() };
    let response = client.describe_topics(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let details: Vec<Detail> = response.into_inner().topics.into_iter().map(Detail::from).collect();
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &details)?,
        None | Some(Form::Table) => {
            let texts: Vec<String> = details.iter().map(|detail| detail.text(context.colours)).collect();
            context.print(&texts.join("\n"))?;
        }
    }
    for detail in &details {
        for warning in &detail.warnings {
            context.note(&format!("{} {}: {warning}", Style::Warn.paint(context.error_colours, "warning:"), detail.summary.topic));
        }
    }
    Ok(Code::Done)
}

impl From<v1::TopicDetail> for Detail {
    fn from(detail: v1::TopicDetail) -> Self {
        let v1::TopicDetail { summary, partitions, config, warnings } = detail;
        let partition = |partition: v1::PartitionDetail| Partition {
            partition: partition.partition,
            leader: Some(partition.leader).filter(|leader| *leader >= 0),
            replicas: partition.replicas,
            in_sync: partition.in_sync,
            earliest: partition.earliest,
            latest: partition.latest,
        };
        Self {
            summary: summary.unwrap_or_default().into(),
            config: config.into_iter().collect(),
            partition_details: partitions.into_iter().map(partition).collect(),
            warnings,
        }
    }
}

impl Detail {
    fn text(&self, colours: bool) -> String {
        let Summary { topic, partitions, replication, records, bytes, .. } = &self.summary;
        let mut out = format!("{}\n", Style::Bold.paint(colours, topic));
        let records = records.map_or_else(|| "records not known".to_owned(), |records| count(records, "record"));
        let bytes = bytes.map(|bytes| format!(", {}", size(bytes))).unwrap_or_default();
        let partitions = count(u64::try_from(*partitions).unwrap_or(0), "partition");
        out += &format!("  {partitions}, replication {replication}, {records}{bytes}\n");
        if !self.summary.uses.is_empty() {
            out += &format!("  used by {}\n", self.summary.used());
        }
        for (name, value) in &self.config {
            let words = value.parse().ok().filter(|_| name.ends_with(".ms")).filter(|millis| *millis >= 1_000);
            let words = words.map(|millis| format!(" ({})", age(std::time::Duration::from_millis(millis)))).unwrap_or_default();
            out += &format!("  {name} = {value}{words}\n");
        }
        let mut columns = Columns::new(&["  PARTITION", "LEADER", "REPLICAS", "IN SYNC", "EARLIEST", "LATEST"]);
        let list = |brokers: &[i32]| brokers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        for partition in &self.partition_details {
            let behind = partition.in_sync.len() < partition.replicas.len();
            columns.row(vec![
                plain(format!("  {}", partition.partition)),
                match partition.leader {
                    Some(leader) => plain(leader),
                    None => ("none".to_owned(), Style::Bad),
                },
                plain(list(&partition.replicas)),
                (list(&partition.in_sync), if behind { Style::Warn } else { Style::Plain }),
                known(partition.earliest),
                known(partition.latest),
            ]);
        }
        out + &columns.render(colours)
    }
}

/// Settings by name.
fn settings(config: &[HeaderFlag], retention: Option<&Retention>) -> Result<HashMap<String, String>, Failure> {
    let mut settings = HashMap::new();
    let retention = retention.map(|retention| ("retention.ms".to_owned(), retention.millis()));
    for (name, value) in config.iter().map(|flag| (flag.name.clone(), flag.value.clone())).chain(retention) {
        if settings.insert(name.clone(), value).is_some() {
            return Err(Failure::new(format!("{name} is set twice"), "--retention is retention.ms"));
        }
    }
    Ok(settings)
}

async fn create(context: &Context, flags: &TopicsCreate) -> Result<Code, Failure> {
    let config = settings(&flags.settings.config, flags.settings.retention.as_ref())?;
    let mut client = client::connect(&context.admin).await?;
    let message = v1::CreateTopicRequest {
        topic: flags.topic.clone(),
        partitions: flags.partitions.unwrap_or(0),
        replication: flags.replication.unwrap_or(0),
        config,
    };
    let response = client.create_topic(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let partitions = response.into_inner().partitions;
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => {
            context.print_document(form, &json!({ "topic": flags.topic, "partitions": partitions, "created": true }))?;
        }
        None | Some(Form::Table) => {
            context.print(&format!("created {} with {}\n", flags.topic, count(u64::try_from(partitions).unwrap_or(0), "partition")))?;
        }
    }
    Ok(Code::Done)
}

async fn alter(context: &Context, flags: &TopicsAlter) -> Result<Code, Failure> {
    let config = settings(&flags.config, flags.retention.as_ref())?;
    let mut client = client::connect(&context.admin).await?;
    let message =
        v1::AlterTopicRequest { topic: flags.topic.clone(), partitions: flags.partitions.unwrap_or(0), config, unset: flags.unset.clone() };
    let response = client.alter_topic(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::AlterTopicResponse { changes, warnings } = response.into_inner();
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => {
            context.print_document(form, &json!({ "topic": flags.topic, "changes": changes, "warnings": warnings }))?;
        }
        None | Some(Form::Table) if changes.is_empty() => context.print(&format!("unchanged: {} is so already\n", flags.topic))?,
        None | Some(Form::Table) => {
            let lines: Vec<String> = changes.iter().map(|change| format!("~ {}: {change}\n", flags.topic)).collect();
            context.print(&lines.concat())?;
        }
    }
    for warning in warnings {
        context.note(&format!("{} {warning}", Style::Warn.paint(context.error_colours, "warning:")));
    }
    Ok(Code::Done)
}

async fn delete(context: &Context, flags: &TopicsDelete) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::DeleteTopicsRequest { topics: flags.topics.clone(), force: flags.force, execute: flags.execute };
    let response = client.delete_topics(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::DeleteTopicsResponse { topics, executed } = response.into_inner();
    let topics: Vec<Summary> = topics.into_iter().map(Summary::from).collect();
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &json!({ "topics": topics, "executed": executed }))?,
        None | Some(Form::Table) => {
            let end = match executed {
                true => format!("{} deleted\n", count(topics.len() as u64, "topic")),
                false => "preview: nothing is deleted; --execute does it, for good\n".to_owned(),
            };
            context.print(&(table(context, &topics) + &end))?;
        }
    }
    if !executed && topics.iter().any(|topic| !topic.uses.is_empty()) && !flags.force {
        context.note("routes of the table in force use some of them: that is refused without --force");
    }
    Ok(Code::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_described() {
        let uses = vec![v1::TopicUse { route: "price".into(), role: "from".into() }];
        let summary =
            v1::TopicSummary { name: "orders".into(), partitions: 2, replication: 3, records: Some(17), bytes: Some(5_000), uses };
        let partition = |partition, leader, in_sync: &[i32]| v1::PartitionDetail {
            partition,
            leader,
            replicas: vec![1, 2, 3],
            in_sync: in_sync.to_vec(),
            earliest: (leader >= 0).then_some(0),
            latest: (leader >= 0).then_some(17),
        };
        let detail = v1::TopicDetail {
            summary: Some(summary),
            partitions: vec![partition(0, 1, &[1, 2, 3]), partition(1, -1, &[2])],
            config: HashMap::from([("retention.ms".to_owned(), "604800000".to_owned())]),
            warnings: Vec::new(),
        };
        assert_eq!(
            Detail::from(detail).text(false),
            "orders\n  2 partitions, replication 3, 17 records, 4.9 KiB\n  used by price from\n  retention.ms = 604800000 (7d 0h)\n\
             \x20 PARTITION  LEADER  REPLICAS  IN SYNC  EARLIEST  LATEST\n  0          1       1,2,3     1,2,3    0         17\n\
             \x20 1          none    1,2,3     2        -         -\n"
        );
    }

    #[test]
    fn settings_are_named_once() {
        let flag = |text: &str| text.parse::<HeaderFlag>().unwrap();
        let retention: Retention = "1h".parse().unwrap();
        let found = settings(&[flag("cleanup.policy=compact")], Some(&retention)).ok().unwrap();
        assert_eq!((found["retention.ms"].as_str(), found["cleanup.policy"].as_str()), ("3600000", "compact"));
        assert!(settings(&[flag("retention.ms=1")], Some(&retention)).is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!([size(0), size(1023), size(1024), size(5 << 30)], ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]);
    }
}
