//! The lag of groups whose members are none of the mesh's, and what becomes of it, look by look.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    on_both, on_kafka,
    service::{Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout},
    task::block_in_place,
};

const MINUTE: Duration = Duration::from_secs(60);

/// A member of a consumer group that knows nothing of the mesh.
struct Foreign {
    consumer: BaseConsumer,
    topic: String,
}

impl Foreign {
    /// Joins, and waits until the partitions are its own.
    fn join(stage: &Stage, group: &str, topic: &str) -> Result<Self> {
        let bootstrap = stage.broker().bootstrap().context("Kafka")?;
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", bootstrap).set("group.id", group).set("enable.auto.commit", "false");
        let consumer: BaseConsumer = config.create()?;
        consumer.subscribe(&[topic])?;
        let end = std::time::Instant::now() + MINUTE;
        block_in_place(|| {
            while consumer.assignment()?.count() == 0 {
                ensure!(std::time::Instant::now() < end, "it does not become a member");
                consumer.poll(Duration::from_millis(50)).transpose()?;
            }
            Ok(())
        })?;
        Ok(Self { consumer, topic: topic.to_owned() })
    }

    /// Commits an offset of the first partition, whatever was read.
    fn commit(&self, offset: i64) -> Result<()> {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.topic, 0, Offset::Offset(offset))?;
        Ok(block_in_place(|| self.consumer.commit(&offsets, CommitMode::Sync))?)
    }
}

/// `mesh-ctl lag --watch`, by the last three looks.
struct Watch {
    looks: Lines<BufReader<ChildStdout>>,
    _running: Child,
}

impl Watch {
    fn start(sidecar: &Sidecar, which: &[&str]) -> Result<Self> {
        let arguments = [&["lag", "--watch", "500ms", "--window", "3", "-o", "json"], which].concat();
        let mut running = sidecar.ctl_start(&arguments, Stdio::piped())?;
        Ok(Self { looks: BufReader::new(running.stdout.take().context("its output")?).lines(), _running: running })
    }

    /// The one group of the next look.
    async fn next(&mut self) -> Result<Value> {
        let line = tokio::time::timeout(MINUTE, self.looks.next_line()).await??.context("it ended")?;
        Ok(serde_json::from_str::<Value>(&line)?["groups"][0].take())
    }

    /// Looks until the group is in this state, and says in which it was before.
    async fn until(&mut self, state: &str) -> Result<(Value, Vec<String>)> {
        let mut before = Vec::new();
        loop {
            let look = self.next().await?;
            let word = look["state"].as_str().context("a state")?.to_owned();
            if word == state {
                return Ok((look, before));
            }
            before.push(word);
            ensure!(before.len() < 40, "no {state}, but {before:?}: {look:#}");
        }
    }
}

async fn produce(sidecar: &Sidecar, topic: &str, count: usize) -> Result<()> {
    sidecar.ctl_with(&["produce", topic, "--lines"], "x\n".repeat(count).into_bytes()).await?.success()?;
    Ok(())
}

on_kafka!(a_group_that_is_none_of_the_meshs_is_told_and_judged, foreign);

/// It is told beside the routes', and judged by what it commits and whether somebody is there.
async fn foreign(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    let (topic, group) = (stage.topic("in"), format!("{}-connector", stage.mesh()));
    sidecar.ctl(&["topics", "create", &topic, "--partitions", "1"]).await?.success()?;
    produce(&sidecar, &topic, 10).await?;
    let member = Foreign::join(&stage, &group, &topic)?;
    member.commit(4)?;

    // Once: by its name, and among all. It is told where it committed, though no table says what it reads.
    let partition = |look: &Value| look["partitions"][0].clone();
    let named = sidecar.ctl(&["lag", "--group", &group, "-o", "json"]).await?.ends(0)?.json()?;
    let one = &named["groups"][0];
    ensure!(one["route"].is_null() && one["members"] == 1 && one["state"] == "LAG" && one["lag_records"] == 6, "{named:#}");
    ensure!(one["lag_seconds"].as_f64().is_some_and(|age| age > 0.0) && one["partitions"].as_array().map(Vec::len) == Some(1), "{named:#}");
    let place = partition(one);
    ensure!((&place["topic"], &place["committed"], &place["low"], &place["end"]) == (&json!(topic), &json!(4), &json!(0), &json!(10)));
    let all = sidecar.ctl(&["lag", "--all-groups", "-o", "json"]).await?.ends(0)?.json()?;
    let among = all["groups"].as_array().into_iter().flatten().find(|one| one["group"] == json!(group)).context("among all")?;
    ensure!(among["lag_records"] == 6 && among["members"] == 1 && partition(among)["committed"] == 4, "{among:#}");
    let near = sidecar.ctl(&["lag", "--group", &format!("{group}s")]).await?;
    ensure!(near.status == Some(2) && near.stderr.contains(&format!("did you mean {group}?")), "{near:?}");

    // It is there and commits nothing.
    let mut watch = Watch::start(&sidecar, &["--group", &group])?;
    let (_, before) = watch.until("STALL").await?;
    ensure!(before == ["LAG", "LAG"], "it takes three looks: {before:?}");
    // It commits, and more comes than it reads.
    let mut committed = 4;
    loop {
        produce(&sidecar, &topic, 2).await?;
        committed += 1;
        member.commit(committed)?;
        let look = watch.next().await?;
        if look["state"] == "WARN" {
            ensure!(look["lag_records"].as_u64() >= Some(6), "{look:#}");
            break;
        }
        ensure!(committed < 40, "no WARN: {look:#}");
    }
    // What it committed goes back.
    member.commit(1)?;
    let (look, _) = watch.until("REWIND").await?;
    ensure!(partition(&look)["committed"] == 1, "{look:#}");
    // It goes, and leaves a lag.
    block_in_place(|| drop(member));
    let (look, before) = watch.until("STOP").await?;
    ensure!(look["members"] == 0 && before.iter().all(|state| state != "OK"), "{before:?}: {look:#}");
    // Another comes, and reads everything.
    let member = Foreign::join(&stage, &group, &topic)?;
    member.commit(look["partitions"][0]["end"].as_i64().context("the end")?)?;
    let (look, _) = watch.until("OK").await?;
    ensure!(look["lag_records"] == 0 && look["lag_seconds"] == 0.0, "{look:#}");
    block_in_place(|| drop(member));
    sidecar.finish().await
}

on_both!(a_reset_is_seen_as_a_rewind, rewound);

async fn rewound(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::light()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply("{ topics: { %in: { partitions: 1 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }] }")
        .await?;
    sidecar.wait_running(&["work"]).await?;
    produce(&sidecar, &stage.topic("in"), 10).await?;
    service.wait(10, MINUTE).await?;
    let mut watch = Watch::start(&sidecar, &["work"])?;
    watch.until("OK").await?;
    // Paused, it does not read again at once what it was sent back to.
    sidecar.ctl(&["pause", "work", "--wait"]).await?.success()?;
    sidecar.ctl(&["reset", "work", "--to-offset", "3", "--execute"]).await?.success()?;
    let (look, before) = watch.until("REWIND").await?;
    ensure!(before.iter().all(|state| state == "OK"), "{before:?}");
    ensure!(look["lag_records"] == 7 && look["partitions"][0]["committed"] == 3, "{look:#}");
    sidecar.ctl(&["resume", "work"]).await?.success()?;
    let (look, _) = watch.until("OK").await?;
    ensure!(look["lag_records"] == 0, "{look:#}");
    service.wait(17, MINUTE).await?;
    sidecar.finish().await
}
