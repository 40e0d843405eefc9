//! What a sidecar has of a table: the routes of its services, and the whole when somebody asks.

use super::*;
use crate::control::reset::OperationError;

const TABLE: &str = "
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  routes:
  - { name: price, service: pricing, from: [orders], handler: /price, to: [priced] }
  - { name: bill, service: billing, from: [priced], handler: /bill, to: [billed] }
";

async fn start_of(broker: &Memory, name: &str, service: &str) -> Instance {
    start_with(broker, name, tempfile::tempdir().unwrap(), |config| config.services[0].name = service.into()).await
}

fn own(instance: &Instance) -> Vec<String> {
    let table = instance.handle.table().borrow().clone().unwrap();
    table.compiled.routes.iter().map(|route| route.name.to_string()).collect()
}

#[tokio::test]
async fn a_sidecar_compiles_its_own_routes_and_answers_for_all() {
    let broker = Memory::new(true);
    let (a, b) = (start_of(&broker, "a", "pricing").await, start_of(&broker, "b", "billing").await);
    let idle = start_of(&broker, "c", "nobody").await;
    for instance in [&a, &b, &idle] {
        instance.ready().await;
    }
    a.apply(TABLE).await.unwrap();
    for instance in [&b, &idle] {
        instance.generation(1).await;
    }
    assert_eq!((own(&a), own(&b), own(&idle)), (vec!["price".to_owned()], vec!["bill".to_owned()], Vec::new()));
    for topic in ["orders", "priced", "billed", "price.dlq", "bill.dlq"] {
        assert!(broker.created().iter().any(|created| created.name == topic), "{topic}: whoever applies a table creates all its topics");
    }
    for instance in [&a, &b, &idle] {
        let control = instance.control();
        let routes: Vec<String> = control.routes().await.unwrap().iter().map(|route| route.name.to_string()).collect();
        assert_eq!(routes, ["price", "bill"]);
        assert_eq!(&*control.route("bill").await.unwrap().group, "shop.bill");
        let unknown = control.route("bil").await.unwrap_err().to_string();
        assert!(unknown.contains("price, bill"), "{unknown}");
        assert!(control.topic_uses().await.unwrap().contains_key("billed"));
        // Compiled once, for all who look at it.
        let (one, two) = (control.whole().await.unwrap(), control.whole().await.unwrap());
        assert!(one.is_whole() && Arc::ptr_eq(&one, &two));
    }
}

/// A route that a sidecar would not run is no reason for it to refuse a table.
#[tokio::test]
async fn what_cannot_be_read_is_refused_by_those_who_would_run_it() {
    let broker = Memory::new(true);
    let (a, b) = (start_of(&broker, "a", "pricing").await, start_of(&broker, "b", "billing").await);
    a.ready().await;
    b.ready().await;
    a.apply(TABLE).await.unwrap();
    b.generation(1).await;
    let json = a.control().get_table(None).await.unwrap().unwrap().json;
    let newer = json.replace("\"handler\":\"/bill\"", "\"handler\":\"/bill\",\"mood\":\"of a newer version\"");
    assert_ne!(newer, json);
    let value = Snapshot::new("shop", 2, 0, "x", mesh_routing::Parts::split(&newer).unwrap()).unwrap().pack().unwrap();
    broker.append(CONTROL_TOPIC, 0, &proposal_key("shop", 2, "x", &Channel::Stable), Some(&value));
    a.generation(2).await;
    let status = a.status("b NACKED", |status| state_of(status, "b") == InstanceState::Nacked).await;
    assert_eq!(state_of(&status, "a"), InstanceState::Synced);
    let refusing = status.instances.iter().find(|instance| instance.instance == "b").unwrap();
    assert_eq!((refusing.generation, refusing.refused_generation), (1, 2));
    assert!(refusing.error.contains("spec.routes[1].mood: unknown field `mood`"), "{}", refusing.error);
    // Who is asked about the routes of others says that, and which.
    match a.control().route("bill").await {
        Err(OperationError::Refused(why)) => assert!(why.contains("cannot read") && why.contains("spec.routes[1].mood"), "{why}"),
        other => panic!("{other:?}"),
    }
    let findings = a.control().diagnose(v1::DiagnoseRequest::default()).await.findings;
    assert!(findings.iter().any(|finding| finding.what.contains("spec.routes[1].mood")), "{findings:#?}");
}
