//! Routes that a service fetches itself: by polling, and attached.

use std::time::Duration;

use mesh_proto::v1::{outcome::Outcome as Said, subscribe_request::Request as Ask, subscribe_response::Response as Told};
use tokio::sync::mpsc;

use super::*;
use crate::{
    deliver::desk::{Counters, Desk},
    outcome::{Answer as Answered, Delivery, Outcome, Reply},
    record::Position,
};

/// An open desk with the route's side of it.
struct Open {
    world: World,
    desk: Arc<Desk>,
    route: Arc<mesh_routing::Route>,
    answers: mpsc::Receiver<Answered>,
    desks: Desks,
    counters: Counters,
}

impl Open {
    async fn new(mode: &str) -> Self {
        Self::timed(mode, "5s").await
    }

    async fn timed(mode: &str, timeout: &str) -> Self {
        let table = format!(
            "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: m }}\nspec:\n  routes:\n  - {{ name: r, service: a, from: [orders], deliver: {mode}, to: void, concurrency: 2, timeout: {timeout} }}\n"
        );
        let table = mesh_routing::compile(&mesh_routing::parse("t.yaml", &table).unwrap()).unwrap();
        let route = table.routes.first().unwrap().clone();
        let (sender, answers) = mpsc::channel(64);
        let desks = Desks::default();
        let counters = Counters::default();
        let desk = desks.open(route.clone(), sender, counters.clone());
        let active =
            crate::table::ActiveTable { generation: 1, applied_ms: 0, origin: crate::table::TableOrigin::Mesh, compiled: Arc::new(table) };
        let world = World::in_force(config(&["a", "b"]), Fake::new(&["orders"]), desks.clone(), Some(Arc::new(active))).await;
        Self { world, desk, route, answers, desks, counters }
    }

    fn put(&self, ids: std::ops::Range<u64>) {
        self.desk.put(ids.map(|id| Delivery {
            id,
            route: self.route.clone(),
            record: Arc::new(Record { value: Some(Bytes::from_static(b"{}")), ..Record::default() }),
            position: Position { partition: TopicPartition::new("orders", 0), offset: id as i64 },
            attempt: 1,
            hops: 2,
            mesh_id: Bytes::from_static(b"me"),
            traceparent: Bytes::new(),
        }));
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::get(path).header("host", "s");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.world.send(request.body(Full::default()).unwrap()).await
    }

    async fn stream(&self, credits: u32) -> (mpsc::Sender<v1::SubscribeRequest>, tonic::Streaming<v1::SubscribeResponse>) {
        let (ask, asked) = mpsc::channel(16);
        ask.send(v1::SubscribeRequest { request: Some(Ask::Attach(v1::Attach { route: "r".to_owned(), credits })) }).await.unwrap();
        let told = self.world.client().await.subscribe(tokio_stream::wrappers::ReceiverStream::new(asked)).await.unwrap();
        (ask, told.into_inner())
    }
}

/// The ids of the deliveries of an answer.
fn ids(answer: &Answer) -> Vec<String> {
    answer.json["records"].as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_reader_in_the_group_of_a_route_would_take_its_records_and_is_refused() {
    let open = Open::new("pull").await;
    let request = Request::get("/v1/topics/orders/records?group=m.r").header("host", "s").header("mesh-service", "a");
    let response = open.world.open(request.body(Full::default()).unwrap()).await;
    assert_eq!(response.status(), 403);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (problem["code"].as_str(), problem["detail"].as_str().is_some_and(|detail| detail.contains("`r`"))),
        (Some("group-of-route"), true)
    );
    let topics = v1::TopicSubscription { topics: vec!["orders".to_owned()], group: "m.r".to_owned(), ..v1::TopicSubscription::default() };
    let first = v1::SubscribeRequest { request: Some(Ask::Topics(topics)) };
    let mut request = tonic::Request::new(tokio_stream::iter([first]));
    request.metadata_mut().insert("mesh-service", "a".parse().unwrap());
    let mut answers = open.world.client().await.subscribe(request).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap_err().code(), tonic::Code::PermissionDenied);
}

#[tokio::test]
async fn a_pull_takes_and_answers() {
    let mut open = Open::new("pull").await;
    let none = open.get("/v1/routes/r/records?wait=1ms", &[]).await;
    assert_eq!((none.status.as_u16(), &none.body[..]), (200, &b"{\"records\":[]}"[..]));
    open.put(1..6);
    let taken = open.get("/v1/routes/r/records?max=3", &[("mesh-service", "a")]).await;
    let ids = ids(&taken);
    let record = &taken.json["records"][0];
    assert_eq!((ids.len(), &record["attempt"], &record["hops"], &record["lease_ms"]), (3, &1.into(), &2.into(), &5000.into()));
    let body = format!(
        r#"{{"outcomes":[{{"id":"{}","reply":{{"records":[{{"value":"x"}}]}}}},{{"id":{},"retry":{{"reason":"busy"}}}},{{"id":"99","ignore":{{}}}},{{"id":"{}"}}]}}"#,
        ids[0], ids[1], ids[2]
    );
    let answer = open.world.post("/v1/routes/r/outcomes", &[], body).await;
    assert_eq!(answer.status, 207);
    let results = answer.json["results"].as_array().unwrap();
    let statuses: Vec<_> = results.iter().map(|result| result["status"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [200, 200, 404, 400]);
    assert_eq!(results[2]["problem"]["code"], "unknown-delivery");
    let Answered { id: 1, outcome: Outcome::Reply(Reply { status: 200, .. }) } = open.answers.recv().await.unwrap() else { panic!() };
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 2, outcome: Outcome::Retry { .. } }));
    // The third by a line, beside a line that is none.
    let lines = format!("{{\"id\":\"{}\",\"reply\":{{\"records\":[{{\"value\":1}},{{\"value\":2}}]}}}}\n\nno outcome\n", ids[2]);
    let answer = open.world.post("/v1/routes/r/outcomes", &[("content-type", "application/x-ndjson")], lines).await;
    assert_eq!(answer.status, 207);
    assert_eq!((&answer.json["results"][0]["status"], &answer.json["results"][1]["status"]), (&200.into(), &400.into()));
    assert!(answer.json["results"][1]["problem"]["detail"].as_str().unwrap().starts_with("line 3: "));
    let Answered { id: 3, outcome: Outcome::Reply(reply) } = open.answers.recv().await.unwrap() else { panic!() };
    assert_eq!(reply.records.iter().map(|record| record.value.as_deref().unwrap()).collect::<Vec<_>>(), [b"1", b"2"]);
}

/// The route's loop retries a delivery under the same id. An outcome of the first lease must not end the second, which somebody else holds.
#[tokio::test]
async fn an_outcome_of_an_ended_lease_changes_nothing_though_the_record_is_leased_again() {
    let mut open = Open::timed("pull", "20ms").await;
    open.put(1..2);
    let first = open.get("/v1/routes/r/records", &[]).await;
    // The loop waits for answers, which ends leases.
    tokio::select! {
        () = open.desk.end_leases() => {}
        answer = open.answers.recv() => assert!(matches!(answer, Some(Answered { id: 1, outcome: Outcome::Retry { .. } }))),
    }
    open.put(1..2);
    let second = open.get("/v1/routes/r/records", &[]).await;
    assert_ne!(ids(&first), ids(&second));
    let outcome = |taken: &Answer| format!(r#"{{"outcomes":[{{"id":"{}","ignore":{{}}}}]}}"#, ids(taken)[0]);
    let late = open.world.post("/v1/routes/r/outcomes", &[], outcome(&first)).await;
    let result = &late.json["results"][0];
    assert_eq!((late.status.as_u16(), &result["status"], &result["problem"]["code"]), (207, &410.into(), &"lease-ended".into()));
    assert!(open.answers.try_recv().is_err());
    assert_eq!(open.world.post("/v1/routes/r/outcomes", &[], outcome(&second)).await.status, 200);
    assert!(matches!(open.answers.recv().await, Some(Answered { id: 1, outcome: Outcome::Ignore })));
    // Answered twice is neither late nor known.
    let twice = open.world.post("/v1/routes/r/outcomes", &[], outcome(&second)).await;
    assert_eq!(twice.json["results"][0]["problem"]["code"], "unknown-delivery");
    assert_eq!((open.counters.expired.get(), open.counters.late.get()), (1, 1));
}

/// Reads events until there are so many, and gives their ids and those of their deliveries.
async fn events(response: &mut Response<Incoming>, count: usize) -> Vec<(String, String)> {
    let mut text = String::new();
    loop {
        let events: Vec<(String, String)> = text
            .split_inclusive("\n\n")
            .filter(|event| event.ends_with("\n\n"))
            .filter_map(|event| {
                let id = event.lines().find_map(|line| line.strip_prefix("id: "))?;
                let data: serde_json::Value = serde_json::from_str(event.lines().find_map(|line| line.strip_prefix("data: "))?).unwrap();
                Some((id.to_owned(), data["id"].as_str().unwrap().to_owned()))
            })
            .collect();
        if events.len() >= count {
            return events;
        }
        text.push_str(std::str::from_utf8(response.body_mut().frame().await.unwrap().unwrap().data_ref().unwrap()).unwrap());
    }
}

#[tokio::test]
async fn a_pull_streams_and_a_foreign_service_is_refused() {
    let open = Open::new("pull").await;
    open.put(1..3);
    let request = Request::get("/v1/routes/r/records").header("host", "s").header("accept", "text/event-stream");
    let mut stream = open.world.open(request.body(Full::default()).unwrap()).await;
    assert_eq!(events(&mut stream, 2).await.len(), 2);
    open.get("/v1/routes/r/records", &[("mesh-service", "b")]).await.problem(403, "foreign-route");
    open.get("/v1/routes/r/records?max=0", &[]).await.problem(400, "bad-parameter");
    open.get("/v1/routes/r/records", &[("accept", "text/event-stream"), ("last-event-id", "x")]).await.problem(400, "invalid-header");
    let (_ask, mut told) = open.stream(1).await;
    assert_eq!(told.message().await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    open.desks.close(&open.desk);
    while stream.body_mut().frame().await.is_some() {}
}

/// A client that lost its connection tells what it saw last: what came after that is delivered at once, as the same attempt.
#[tokio::test]
async fn a_stream_that_goes_on_gives_back_what_its_reader_never_saw() {
    let mut open = Open::new("pull").await;
    open.put(1..6);
    let connect = |last: Option<String>| {
        let mut request = Request::get("/v1/routes/r/records").header("host", "s").header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        open.world.open(request.body(Full::default()).unwrap())
    };
    let mut stream = connect(None).await;
    let first = events(&mut stream, 5).await;
    drop(stream);
    // It saw three, and may still answer those.
    let mut stream = connect(Some(first[2].0.clone())).await;
    let again = events(&mut stream, 2).await;
    let offsets = |events: &[(String, String)]| events.len();
    assert_eq!(offsets(&again), 2);
    assert!(again.iter().all(|(_, id)| first.iter().all(|(_, other)| other != id)), "new leases have new ids");
    let outcomes: Vec<String> = first[..3].iter().chain(&again).map(|(_, id)| format!(r#"{{"id":"{id}","ignore":{{}}}}"#)).collect();
    let body = format!(r#"{{"outcomes":[{}]}}"#, outcomes.join(","));
    assert_eq!(open.world.post("/v1/routes/r/outcomes", &[], body).await.status, 200);
    for id in 1..6 {
        assert_eq!(open.answers.recv().await.unwrap().id, id, "the order is kept");
    }
    // An id of another run of the process means nothing, and gives nothing back.
    open.put(6..7);
    assert_eq!(events(&mut stream, 1).await.len(), 1);
    drop(connect(Some("77-1".to_owned())).await);
    drop(connect(Some("1-9007199254740991".to_owned())).await);
    assert!(open.answers.try_recv().is_err());
    assert!(open.desk.take(1, Duration::ZERO).await.unwrap().is_empty());
}

/// The answer of a long poll that never reached the connection costs no attempt, and the next poll has it.
#[tokio::test]
async fn what_a_vanished_puller_never_got_lies_on_the_desk_again() {
    let mut open = Open::new("pull").await;
    let waiting = open.desk.take(10, Duration::from_secs(5));
    open.put(1..4);
    let taken = waiting.await.unwrap();
    open.desk.give_back(&taken.iter().rev().map(|delivery| delivery.id).collect::<Vec<_>>());
    let again = open.desk.take(10, Duration::from_secs(5)).await.unwrap();
    let offsets: Vec<i64> = again.iter().map(|delivery| delivery.position.offset).collect();
    assert_eq!((offsets, again[0].attempt), (vec![1, 2, 3], 1));
    // After the loop took back what lay there, for a rebalance, it decides itself.
    open.desk.withdraw();
    open.desk.give_back(&[again[0].id]);
    assert!(matches!(open.answers.recv().await, Some(Answered { id: 1, outcome: Outcome::NoService { .. } })));
    assert!(open.desk.take(1, Duration::ZERO).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_attached_stream_has_credits_and_gives_back_what_it_did_not_answer() {
    let mut open = Open::new("stream").await;
    open.put(1..6);
    let (ask, mut told) = open.stream(0).await;
    let attached = told.message().await.unwrap().unwrap().response.unwrap();
    assert_eq!(attached, Told::Attached(v1::Attached { route: "r".to_owned(), group: "m.r".to_owned() }));
    // No credits named: the route's concurrency, 2.
    let Some(Told::Delivery(delivery)) = told.message().await.unwrap().unwrap().response else { panic!() };
    let ids: Vec<u64> = delivery.records.iter().map(|record| record.delivery_id).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!((&*delivery.route, delivery.records[0].hops, &*delivery.records[0].record.as_ref().unwrap().mesh_id), ("r", 2, "me"));
    let outcomes = vec![v1::Outcome { delivery_id: ids[0], outcome: Some(Said::Reply(v1::Reply::default())) }];
    ask.send(v1::SubscribeRequest { request: Some(Ask::Outcomes(v1::Outcomes { outcomes })) }).await.unwrap();
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 1, outcome: Outcome::Reply(_) }));
    ask.send(v1::SubscribeRequest { request: Some(Ask::Credit(v1::Credit { records: 1 })) }).await.unwrap();
    let Some(Told::Delivery(delivery)) = told.message().await.unwrap().unwrap().response else { panic!() };
    assert_eq!(delivery.records[0].position.as_ref().unwrap().offset, 3);
    drop((ask, told));
    let mut back = [open.answers.recv().await.unwrap().id, open.answers.recv().await.unwrap().id];
    back.sort_unstable();
    assert_eq!(back, [2, 3]);
}

#[tokio::test]
async fn a_route_that_drains_says_so() {
    let mut open = Open::new("stream").await;
    open.put(1..2);
    let (ask, mut told) = open.stream(5).await;
    told.message().await.unwrap();
    let Some(Told::Delivery(delivery)) = told.message().await.unwrap().unwrap().response else { panic!() };
    open.desks.close(&open.desk);
    assert!(matches!(told.message().await.unwrap().unwrap().response, Some(Told::Draining(_))));
    let outcomes = vec![v1::Outcome { delivery_id: delivery.records[0].delivery_id, outcome: Some(Said::Ignore(v1::Ignore::default())) }];
    ask.send(v1::SubscribeRequest { request: Some(Ask::Outcomes(v1::Outcomes { outcomes })) }).await.unwrap();
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 1, outcome: Outcome::Ignore }));
    assert!(told.message().await.unwrap().is_none());
}
