use mesh_proto::v1::{outcome::Outcome as Said, subscribe_request::Request as Ask, subscribe_response::Response as Told};
use tokio::sync::mpsc;
use tonic::{Code, Streaming};

use super::*;

struct Stream {
    ask: mpsc::Sender<v1::SubscribeRequest>,
    told: Streaming<v1::SubscribeResponse>,
}

impl Stream {
    async fn open(world: &World, first: Ask) -> Self {
        let (ask, asked) = mpsc::channel(16);
        ask.send(v1::SubscribeRequest { request: Some(first) }).await.unwrap();
        let told = world.client().await.subscribe(tokio_stream::wrappers::ReceiverStream::new(asked)).await.unwrap().into_inner();
        Self { ask, told }
    }

    async fn ask(&self, ask: Ask) {
        self.ask.send(v1::SubscribeRequest { request: Some(ask) }).await.unwrap();
    }

    async fn say(&self, delivery_id: u64, outcome: Said) {
        self.ask(Ask::Outcomes(v1::Outcomes { outcomes: vec![v1::Outcome { delivery_id, outcome: Some(outcome) }] })).await;
    }

    async fn told(&mut self) -> Told {
        self.told.message().await.unwrap().unwrap().response.unwrap()
    }

    async fn delivered(&mut self) -> Vec<v1::DeliveredRecord> {
        match self.told().await {
            Told::Delivery(delivery) => delivery.records,
            other => panic!("{other:?}"),
        }
    }
}

fn topics(group: &str, credits: u32) -> Ask {
    Ask::Topics(v1::TopicSubscription { topics: vec!["orders".to_owned()], group: group.to_owned(), from: String::new(), credits })
}

#[tokio::test]
async fn credits_bound_what_is_sent_and_outcomes_commit() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, topics("g", 2)).await;
    assert_eq!(stream.told().await, Told::Attached(v1::Attached { route: String::new(), group: "g".to_owned() }));
    let mut consumer = world.consumer();
    consumer.events.send(assigned(0)).await.unwrap();
    consumer.events.send(records(0, &[b"a", b"b", b"c"])).await.unwrap();
    let first = stream.delivered().await;
    assert_eq!(first.len(), 2);
    assert_eq!(first[0].position, Some(v1::Position { topic: "orders".to_owned(), partition: 0, offset: 0 }));
    assert_eq!(first[0].record.as_ref().unwrap().mesh_id, "id-0");
    // The second is done: nothing can be committed, since the first is not.
    stream.say(first[1].delivery_id, Said::Reply(v1::Reply::default())).await;
    stream.say(first[0].delivery_id, Said::Retry(v1::Retry::default())).await;
    stream.ask(Ask::Credit(v1::Credit { records: 1 })).await;
    let again = stream.delivered().await;
    assert_eq!((again.len(), again[0].delivery_id, again[0].attempt), (1, first[0].delivery_id, 2));
    assert!(consumer.commits.borrow().is_empty());
    stream.say(again[0].delivery_id, Said::Ignore(v1::Ignore::default())).await;
    consumer.commits.wait_for(|commits| commits.last().is_some_and(|commit| commit.offset == 2)).await.unwrap();
    stream.ask(Ask::Credit(v1::Credit { records: 5 })).await;
    assert_eq!(stream.delivered().await[0].record.as_ref().unwrap().value.as_deref(), Some(&b"c"[..]));
    drop(stream);
    consumer.closed.wait_for(|closed| *closed).await.unwrap();
    assert_eq!(consumer.commits.borrow().last().unwrap().offset, 2);
}

#[tokio::test]
async fn a_subscriber_may_only_listen_without_a_group() {
    let world = World::new().await;
    let Stream { ask, mut told } = Stream::open(&world, topics("", 3)).await;
    drop(ask);
    told.message().await.unwrap().unwrap();
    let consumer = world.consumer();
    assert_eq!(consumer.config.start, StartOffset::Latest);
    consumer.events.send(assigned(0)).await.unwrap();
    consumer.events.send(records(0, &[b"a", b"b", b"c", b"d"])).await.unwrap();
    let mut seen = 0;
    while let Some(message) = told.message().await.unwrap() {
        let Some(Told::Delivery(delivery)) = message.response else { panic!() };
        seen += delivery.records.len();
    }
    assert_eq!(seen, 3);
}

#[tokio::test]
async fn messages_stay_below_what_clients_take() {
    let world = World::new().await;
    static LARGE: [u8; 700_000] = [b'x'; 700_000];
    let mut stream = Stream::open(&world, topics("", 100)).await;
    stream.told().await;
    let consumer = world.consumer();
    consumer.events.send(assigned(0)).await.unwrap();
    consumer.events.send(records(0, &[&LARGE[..]; 10])).await.unwrap();
    let mut seen = 0;
    while seen < 10 {
        seen += stream.delivered().await.len();
    }
}

#[tokio::test]
async fn a_drain_is_told_and_outcomes_are_still_taken() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, topics("g", 10)).await;
    stream.told().await;
    let mut consumer = world.consumer();
    consumer.events.send(assigned(0)).await.unwrap();
    consumer.events.send(records(0, &[b"a"])).await.unwrap();
    let id = stream.delivered().await[0].delivery_id;
    world.draining.cancel();
    assert!(matches!(stream.told().await, Told::Draining(_)));
    stream.say(id, Said::Ignore(v1::Ignore::default())).await;
    assert!(stream.told.message().await.unwrap().is_none());
    consumer.commits.wait_for(|commits| commits.last().is_some_and(|commit| commit.offset == 1)).await.unwrap();
    drop(stream);
    world.shutdown.cancel();
    assert_eq!(world.serving.await.unwrap(), 0);
}

#[tokio::test]
async fn bad_subscriptions_fail_the_call() {
    let world = World::new().await;
    let attach = Ask::Attach(v1::Attach { route: "none".to_owned(), credits: 0 });
    let of = |topics: &[&str], group: &str, from: &str| {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        Ask::Topics(v1::TopicSubscription { topics, group: group.to_owned(), from: from.to_owned(), credits: 0 })
    };
    for (first, code) in [
        (attach, Code::NotFound),
        (Ask::Credit(v1::Credit { records: 1 }), Code::InvalidArgument),
        (of(&[], "", ""), Code::InvalidArgument),
        (of(&["none"], "", ""), Code::NotFound),
        (of(&["__x"], "", ""), Code::PermissionDenied),
        (of(&["orders"], "", "soon"), Code::InvalidArgument),
        (of(&["orders"], "__g", ""), Code::InvalidArgument),
    ] {
        let mut stream = Stream::open(&world, first).await;
        assert_eq!(stream.told.message().await.unwrap_err().code(), code);
    }
}
