//! Every hop is one trace.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    on_both,
    otlp::{OtlpReceiver, ReceivedSpan},
    python::python,
    service::Scenario,
    stage::Stage,
};

const MINUTE: Duration = Duration::from_secs(60);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";
/// OTLP's numbers of span kinds.
const PRODUCER: i32 = 4;
const CONSUMER: i32 = 5;

on_both!(a_chain_of_three_services_is_one_trace, chain);

/// The publisher's span is the root; each hop is a `process` span whose parent is the `send` span of the hop before, and links to it.
async fn chain(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let (collector, receiver) = OtlpReceiver::start().await?;
    let service = stage.fastapi(&python, Scenario::new()).await?;
    let sidecar = stage
        .sidecar("sidecar")
        .service("one", &service)
        .service("two", &service)
        .service("three", &service)
        .otlp(collector)
        .start()
        .await?;
    sidecar
        .apply(
            "
            routes:
            - { name: one, service: one, from: [%a], handler: /one, to: [%b] }
            - { name: two, service: two, from: [%b], handler: /two, to: [%c] }
            - { name: three, service: three, from: [%c], handler: /three, to: [%d] }
            ",
        )
        .await?;
    sidecar.wait_running(&["one", "two", "three"]).await?;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let path = format!("/v1/topics/{}/records", stage.topic("a"));
    let headers = [("traceparent", traceparent.as_str()), ("tracestate", "vendor=1"), ("mesh-key", "k")];
    sidecar.http().post(&path, &headers, "{}").await?.expect(200)?;
    service.wait(3, MINUTE).await?;

    let of_trace = |spans: &[ReceivedSpan], kind: i32| {
        spans.iter().filter(|span| span.trace_id() == TRACE && span.span.kind == kind).cloned().collect::<Vec<_>>()
    };
    let spans = receiver
        .wait_for(MINUTE, |spans| of_trace(spans, CONSUMER).len() >= 3 && of_trace(spans, PRODUCER).len() >= 4)
        .await
        .map_err(|spans| anyhow::anyhow!("the spans did not come: {spans:#?}"))?;
    let (processes, sends) = (of_trace(&spans, CONSUMER), of_trace(&spans, PRODUCER));
    ensure!(processes.len() == 3 && sends.len() == 4, "{} process and {} send spans", processes.len(), sends.len());

    // Walk the chain from the publisher's span down.
    let (mut parent, mut walked) = (PARENT.to_owned(), BTreeSet::new());
    let topics = ["a", "b", "c", "d"].map(|name| stage.topic(name));
    for (hop, topic) in topics.iter().enumerate() {
        let send =
            sends.iter().find(|span| span.parent_id() == parent).with_context(|| format!("no send span under {parent}: {sends:#?}"))?;
        ensure!(send.attribute("messaging.destination.name").as_deref() == Some(topic), "{send:#?}");
        ensure!(send.attribute("messaging.operation.type").as_deref() == Some("send"), "{send:#?}");
        ensure!(send.span.name.contains("send"), "{send:#?}");
        ensure!(walked.insert(send.span_id()));
        let Some(route) = ["one", "two", "three"].get(hop) else { break };
        let process = processes
            .iter()
            .find(|span| span.parent_id() == send.span_id())
            .with_context(|| format!("no process span under {send:#?}: {processes:#?}"))?;
        ensure!(process.attribute("messaging.destination.name").as_deref() == Some(topic), "{process:#?}");
        ensure!(process.attribute("messaging.operation.type").as_deref() == Some("process"), "{process:#?}");
        let system = if stage.is_kafka() { "kafka" } else { "embedded" };
        ensure!(process.attribute("messaging.system").as_deref() == Some(system), "{process:#?}");
        ensure!(
            process.attribute("messaging.consumer.group.name").as_deref() == Some(&format!("{}.{route}", stage.mesh())),
            "{process:#?}"
        );
        let link = process.span.links.first().with_context(|| format!("no link: {process:#?}"))?;
        ensure!(link.span_id == send.span.span_id, "the link names its send span: {process:#?}");
        ensure!(process.resource.contains_key("service.name"), "{process:#?}");
        ensure!(process.span.end_time_unix_nano > process.span.start_time_unix_nano, "{process:#?}");
        ensure!(walked.insert(process.span_id()));
        // The service was told of the same trace, under this span or a child of it.
        let ledger = service.ledger_of(&format!("/{route}")).await?;
        let given = ledger.first().and_then(|entry| entry.header("traceparent")).context("traceparent")?;
        ensure!(given.starts_with(&format!("00-{TRACE}-")), "{given}");
        ensure!(ledger.first().and_then(|entry| entry.header("tracestate")) == Some("vendor=1"), "{ledger:?}");
        parent = process.span_id();
    }
    ensure!(walked.len() == 7, "{walked:?}");
    let end = stage.read(&sidecar, Some(&python), &stage.topic("d"), 1).await?;
    ensure!(end.first().and_then(|found| found.header("traceparent")).is_some_and(|own| own.contains(TRACE)), "{end:?}");
    sidecar.finish().await
}

on_both!(a_trace_that_is_not_sampled_makes_no_span_and_goes_on, unsampled);

async fn unsampled(stage: Stage) -> Result<()> {
    let (collector, receiver) = OtlpReceiver::start().await?;
    let service = mesh_tests::service::Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).otlp(collector).start().await?;
    sidecar.apply("routes: [{ name: work, service: work, from: [%a], handler: /work, to: void }]").await?;
    sidecar.wait_running(&["work"]).await?;
    let path = format!("/v1/topics/{}/records", stage.topic("a"));
    sidecar.http().post(&path, &[("traceparent", &format!("00-{TRACE}-{PARENT}-00"))], "{}").await?.expect(200)?;
    service.wait(1, MINUTE).await?;
    let ledger = service.ledger().await?;
    let given = ledger.first().and_then(|entry| entry.header("traceparent")).context("traceparent")?;
    ensure!(given.contains(TRACE) && given.ends_with("-00"), "{given}");
    // The end of the process flushes what there is.
    sidecar.finish().await?;
    ensure!(receiver.spans().iter().all(|span| span.trace_id() != TRACE), "an unsampled trace was exported");
    Ok(())
}
