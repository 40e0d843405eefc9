//! Routes that a service fetches itself: by polling, and attached.

use mesh_proto::v1::{outcome::Outcome as Said, subscribe_request::Request as Ask, subscribe_response::Response as Told};
use tokio::sync::mpsc;

use super::*;
use crate::{
    deliver::desk::Desk,
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
}

impl Open {
    async fn new(mode: &str) -> Self {
        let table = format!(
            "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: m }}\nspec:\n  routes:\n  - {{ name: r, service: a, from: [orders], deliver: {mode}, to: void, concurrency: 2, timeout: 5s }}\n"
        );
        let table = mesh_routing::compile(&mesh_routing::parse("t.yaml", &table).unwrap()).unwrap();
        let route = table.routes.first().unwrap().clone();
        let (sender, answers) = mpsc::channel(64);
        let desks = Desks::default();
        let desk = desks.open(route.clone(), sender);
        let world = World::serving(config(&["a", "b"]), Fake::new(&["orders"]), desks.clone()).await;
        Self { world, desk, route, answers, desks }
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

#[tokio::test]
async fn a_pull_takes_and_answers() {
    let mut open = Open::new("pull").await;
    let none = open.get("/v1/routes/r/records?wait=1ms", &[]).await;
    assert_eq!((none.status.as_u16(), &none.body[..]), (200, &b"{\"records\":[]}"[..]));
    open.put(1..6);
    let taken = open.get("/v1/routes/r/records?max=3", &[("mesh-service", "a")]).await;
    let records = taken.json["records"].as_array().unwrap();
    assert_eq!((records.len(), &records[0]["id"], &records[0]["attempt"], &records[0]["hops"]), (3, &"1".into(), &1.into(), &2.into()));
    let body = r#"{"outcomes":[{"id":"1","reply":{"records":[{"value":"x"}]}},{"id":2,"retry":{"reason":"busy"}},{"id":"99","ignore":{}},{"id":"3"}]}"#;
    let answer = open.world.post("/v1/routes/r/outcomes", &[], body).await;
    assert_eq!(answer.status, 207);
    let results = answer.json["results"].as_array().unwrap();
    let statuses: Vec<_> = results.iter().map(|result| result["status"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [200, 200, 404, 400]);
    assert_eq!(results[2]["problem"]["code"], "unknown-delivery");
    let Answered { id: 1, outcome: Outcome::Reply(Reply { status: 200, .. }) } = open.answers.recv().await.unwrap() else { panic!() };
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 2, outcome: Outcome::Retry { .. } }));
    let answer = open.world.post("/v1/routes/r/outcomes", &[], r#"{"outcomes":[{"id":"3","ignore":{}}]}"#).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_pull_streams_and_a_foreign_service_is_refused() {
    let open = Open::new("pull").await;
    open.put(1..3);
    let request = Request::get("/v1/routes/r/records").header("host", "s").header("accept", "text/event-stream");
    let mut events = open.world.open(request.body(Full::default()).unwrap()).await;
    let mut text = String::new();
    while text.matches("\ndata: {\"id\":").count() < 2 {
        text.push_str(std::str::from_utf8(events.body_mut().frame().await.unwrap().unwrap().data_ref().unwrap()).unwrap());
    }
    assert!(text.contains("id: orders/0/1\ndata: {\"id\":\"1\",\"attempt\":1,\"hops\":2,\"topic\":\"orders\""), "{text}");
    open.get("/v1/routes/r/records", &[("mesh-service", "b")]).await.problem(403, "foreign-route");
    open.get("/v1/routes/r/records?max=0", &[]).await.problem(400, "bad-parameter");
    let (_ask, mut told) = open.stream(1).await;
    assert_eq!(told.message().await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    open.desks.close(&open.desk);
    while events.body_mut().frame().await.is_some() {}
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
    assert_eq!(delivery.records.iter().map(|record| record.delivery_id).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((&*delivery.route, delivery.records[0].hops, &*delivery.records[0].record.as_ref().unwrap().mesh_id), ("r", 2, "me"));
    let outcomes = vec![v1::Outcome { delivery_id: 1, outcome: Some(Said::Reply(v1::Reply::default())) }];
    ask.send(v1::SubscribeRequest { request: Some(Ask::Outcomes(v1::Outcomes { outcomes })) }).await.unwrap();
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 1, outcome: Outcome::Reply(_) }));
    ask.send(v1::SubscribeRequest { request: Some(Ask::Credit(v1::Credit { records: 1 })) }).await.unwrap();
    let Some(Told::Delivery(delivery)) = told.message().await.unwrap().unwrap().response else { panic!() };
    assert_eq!(delivery.records[0].delivery_id, 3);
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
    told.message().await.unwrap();
    open.desks.close(&open.desk);
    assert!(matches!(told.message().await.unwrap().unwrap().response, Some(Told::Draining(_))));
    let outcomes = vec![v1::Outcome { delivery_id: 1, outcome: Some(Said::Ignore(v1::Ignore::default())) }];
    ask.send(v1::SubscribeRequest { request: Some(Ask::Outcomes(v1::Outcomes { outcomes })) }).await.unwrap();
    assert!(matches!(open.answers.recv().await.unwrap(), Answered { id: 1, outcome: Outcome::Ignore }));
    assert!(told.message().await.unwrap().is_none());
}
