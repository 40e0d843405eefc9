use futures_util::StreamExt;
use prost::Message;
use tonic::Code;

use super::*;

fn record(value: &'static str) -> v1::Record {
    v1::Record { value: Some(Bytes::from(value)), ..v1::Record::default() }
}

fn request(topic: &str, records: Vec<v1::Record>) -> v1::PublishRequest {
    v1::PublishRequest { topic: topic.to_owned(), records }
}

fn problem(status: &tonic::Status) -> v1::Problem {
    let rich = problem::RichStatus::decode(status.details()).unwrap();
    assert_eq!(rich.code, status.code() as i32);
    assert_eq!(rich.details[0].type_url, "type.googleapis.com/mesh.v1.Problem");
    v1::Problem::decode(&*rich.details[0].value).unwrap()
}

#[tokio::test]
async fn records_are_published_and_answered_each() {
    let world = World::new().await;
    let mut client = world.client().await;
    let full = v1::Record {
        key: Some(Bytes::from("k")),
        value: None,
        headers: vec![v1::Header { name: "H".to_owned(), value: None }],
        content_type: "text/plain".to_owned(),
        mesh_id: "me".to_owned(),
        timestamp_ms: Some(7),
    };
    let bad = v1::Record { headers: vec![v1::Header { name: "mesh-hops".to_owned(), value: None }], ..record("x") };
    let results = client.publish(request("orders", vec![full, bad, record("z")])).await.unwrap().into_inner().results;
    let position = |offset| Some(v1::publish_result::Result::Position(v1::Position { topic: "orders".to_owned(), partition: 0, offset }));
    assert_eq!((&results[0].result, &*results[0].mesh_id), (&position(0), "me"));
    assert!(matches!(&results[1].result, Some(v1::publish_result::Result::Problem(problem)) if problem.code == "invalid-header"));
    assert_eq!(results[2].result, position(1));
    let stored = &world.fake.records("orders")[0];
    assert_eq!((stored.key.as_deref(), &stored.value, stored.timestamp_ms), (Some(&b"k"[..]), &None, Some(7)));
    assert_eq!((stored.header_str("content-type"), stored.header_str("mesh-id")), (Some("text/plain"), Some("me")));
    assert!(stored.headers.iter().any(|field| field.name == "H" && field.value.is_none()));
}

#[tokio::test]
async fn failures_have_their_codes() {
    let world = World::new().await;
    let mut client = world.client().await;
    for (topic, code, word) in [
        ("a/b", Code::InvalidArgument, "invalid-topic"),
        ("void", Code::InvalidArgument, "invalid-topic"),
        ("__x", Code::PermissionDenied, "forbidden-topic"),
        ("none", Code::NotFound, "unknown-topic"),
    ] {
        let status = client.publish(request(topic, vec![record("x")])).await.unwrap_err();
        assert_eq!((status.code(), &*problem(&status).code), (code, word));
    }
    for (kind, code, word, persisted) in [
        (ProduceErrorKind::QueueFull, Code::ResourceExhausted, "queue-full", v1::Persisted::No),
        (ProduceErrorKind::Unavailable, Code::Unavailable, "broker-unavailable", v1::Persisted::No),
        (ProduceErrorKind::Unauthorized, Code::PermissionDenied, "broker-forbids", v1::Persisted::No),
        (ProduceErrorKind::TooLarge, Code::InvalidArgument, "record-too-large", v1::Persisted::No),
        (ProduceErrorKind::TimedOut, Code::DeadlineExceeded, "publish-timeout", v1::Persisted::Possibly),
    ] {
        world.fake.set(Mode::Fail(kind));
        let status = client.publish(request("orders", vec![record("x")])).await.unwrap_err();
        let problem = problem(&status);
        assert_eq!((status.code(), &*problem.code, problem.persisted()), (code, word, persisted));
    }
    let mut wrong = tonic::Request::new(request("orders", vec![record("x")]));
    wrong.metadata_mut().insert("mesh-service", "other".parse().unwrap());
    assert_eq!(problem(&client.publish(wrong).await.unwrap_err()).code, "unknown-service");
}

#[tokio::test]
async fn a_stream_is_answered_in_order() {
    let world = World::new().await;
    let mut client = world.client().await;
    let requests = (0..500u64).map(|sequence| v1::PublishStreamRequest {
        sequence,
        topic: match sequence {
            0 => "orders".to_owned(),
            250 => "none".to_owned(),
            251 => "orders".to_owned(),
            _ => String::new(),
        },
        records: vec![record("x"), record("y")],
    });
    let mut answers = client.publish_stream(futures_util::stream::iter(requests)).await.unwrap().into_inner();
    let mut results = Vec::new();
    while let Some(answer) = answers.next().await {
        results.extend(answer.unwrap().results);
    }
    assert!(results.iter().map(|result| result.sequence).eq(0..500));
    assert!(results.iter().all(|result| result.results.len() == 2));
    let refused = |result: &v1::PublishResult| matches!(&result.result, Some(v1::publish_result::Result::Problem(_)));
    assert!(results.iter().all(|result| result.results.iter().all(|one| refused(one) == (result.sequence == 250))));
    assert_eq!(world.fake.records("orders").len(), 998);
}

#[tokio::test]
async fn a_stream_without_a_topic_and_one_at_shutdown() {
    let world = World::new().await;
    let mut client = world.client().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let mut answers = client.publish_stream(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap().into_inner();
    sender.send(v1::PublishStreamRequest { sequence: 1, topic: String::new(), records: vec![record("x")] }).await.unwrap();
    let answer = answers.next().await.unwrap().unwrap();
    assert!(
        matches!(&answer.results[0].results[0].result, Some(v1::publish_result::Result::Problem(problem)) if problem.code == "protocol")
    );
    world.shutdown.cancel();
    assert_eq!(answers.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    drop((sender, answers, client));
    assert_eq!(world.serving.await.unwrap(), 0);
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let world = World::new().await;
    let channel = Channel::from_shared(format!("http://{}", world.address)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let asked = |service: &str| tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
    assert_eq!(health.check(asked("")).await.unwrap().into_inner().status, 1);
    let mut watch = health.watch(asked("")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
        server_reflection_response::MessageResponse,
    };
    let list = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers = reflection.server_reflection_info(futures_util::stream::iter([list])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response else { panic!() };
    let names: Vec<_> = list.service.iter().map(|service| &*service.name).collect();
    assert!(names.contains(&"mesh.v1.Mesh") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    world.shutdown.cancel();
    // A watcher does not hold the drain.
    while let Ok(Some(_)) = watch.message().await {}
    drop((health, watch, reflection, answers));
    assert_eq!(world.serving.await.unwrap(), 0);
}
