//! Signed tables, their history, and what is refused of the log and of the disk.

use mesh_routing::sign::{PublicKey, STABLE, Signed, SigningKey};

use super::*;
use crate::control::{TrustError, snapshot::About, trust::Seal};

async fn start_trusting(broker: &Memory, name: &str, state: tempfile::TempDir, keys: &[PublicKey]) -> Instance {
    start_with(broker, name, state, |config| config.control.trusted_keys = keys.to_vec()).await
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_random(&[seed; 32])
}

fn signature(key: &SigningKey, text: &str, generation: u64) -> v1::TableSignature {
    let digest = mesh_routing::parse("t", text).unwrap().digest();
    let place = Signed { mesh: "shop", channel: STABLE, generation, digest: &digest };
    v1::TableSignature { key_id: key.public().id().to_owned(), ed25519: key.sign(&place).into() }
}

fn signed(key: &SigningKey, text: &str, generation: u64) -> ApplyOptions {
    ApplyOptions { signature: Some(signature(key, text, generation)), ..ApplyOptions::default() }
}

/// A generation as a writer would put it into the log.
fn stored(generation: u64, text: &str, seal: Option<Seal>) -> bytes::Bytes {
    let parts = mesh_routing::parse("t", text).unwrap().parts();
    Snapshot { signature: seal, ..Snapshot::new("shop", generation, 0, "x", parts).unwrap() }.pack().unwrap()
}

#[tokio::test]
async fn with_trusted_keys_only_signed_tables_are_applied() {
    let (old, new) = (key(1), key(2));
    let broker = Memory::new(true);
    let a = start_trusting(&broker, "a", tempfile::tempdir().unwrap(), &[old.public(), new.public()]).await;
    a.ready().await;
    let text = one("priced");
    let apply = async |text: &str, options: ApplyOptions| a.control().apply("routes.yaml", text, options).await;

    let unsigned = apply(&text, ApplyOptions::default()).await.unwrap_err();
    assert!(matches!(unsigned, ApplyError::Untrusted(TrustError::Unsigned { .. })), "{unsigned}");
    let dry = apply(&text, ApplyOptions { dry_run: true, ..ApplyOptions::default() }).await.unwrap();
    assert!(dry.warnings.iter().any(|warning| warning.code == "unsigned"), "{dry:?}");
    for (wrong, options) in [
        ("an unknown key", signed(&key(3), &text, 1)),
        ("another generation", signed(&old, &text, 2)),
        ("another table", signed(&old, &one("other"), 1)),
    ] {
        let error = apply(&text, options.clone()).await.unwrap_err();
        assert!(matches!(error, ApplyError::Untrusted(_)), "{wrong}: {error}");
        let error = apply(&text, ApplyOptions { dry_run: true, ..options }).await.unwrap_err();
        assert!(matches!(error, ApplyError::Untrusted(_)), "{wrong}, dry run: {error}");
    }
    assert!(broker.records(CONTROL_TOPIC).is_empty(), "nothing of this was proposed");

    assert_eq!(apply(&text, signed(&old, &text, 1)).await.unwrap().generation, 1);
    // The same table: without a signature, and with one of the same key, nothing changes; with one of another key it is signed anew.
    assert!(!apply(&text, ApplyOptions::default()).await.unwrap().changed);
    assert!(!apply(&text, signed(&old, &text, 2)).await.unwrap().changed);
    let anew = apply(&text, signed(&new, &text, 2)).await.unwrap();
    assert_eq!((anew.generation, anew.changed, anew.changes.len()), (2, true, 1));
    assert!(anew.changes[0].starts_with("~ signed by key ") && anew.changes[0].contains(new.public().id()), "{anew:?}");

    // Rotation is over: what the old key signed is history that can be read, and is not taken.
    let Instance { handle, state, .. } = a;
    handle.close().await;
    let a = start_trusting(&broker, "a", state, &[new.public()]).await;
    a.generation(2).await;
    let history = a.control().history(0).await.unwrap();
    let refused: Vec<_> = history.generations.iter().map(|entry| (entry.generation, entry.refused.is_empty())).collect();
    assert_eq!(refused, [(2, true), (1, false)]);
    let first = a.control().get_table(Some(1)).await.unwrap().unwrap().entry.unwrap();
    assert!(first.refused.contains("it is signed by key ") && first.signature.is_some(), "{first:?}");
}

#[tokio::test]
async fn what_the_log_holds_is_refused_with_its_reason_and_the_last_good_table_stays() {
    let trusted = key(1);
    let broker = Memory::new(true);
    let a = start_trusting(&broker, "a", tempfile::tempdir().unwrap(), &[trusted.public()]).await;
    a.ready().await;
    a.control().apply("routes.yaml", &one("priced"), signed(&trusted, &one("priced"), 1)).await.unwrap();
    let other = one("other");
    let good = |generation| Some(Seal::from(&signature(&trusted, &other, generation)));
    let truncated = stored(3, &other, good(3));
    let newer = Snapshot { schema: 3, ..Snapshot::unpack(&stored(6, &other, good(6))).unwrap() };
    let cases: [(&str, bytes::Bytes); 6] = [
        ("it is not signed", stored(2, &other, None)),
        ("the snapshot", truncated.slice(..truncated.len() / 2)),
        ("does not fit", stored(4, &other, good(3))),
        ("it is signed by key", stored(5, &other, Some(Seal::from(&signature(&key(9), &other, 5))))),
        ("has schema 3", newer.pack().unwrap()),
        ("says generation", stored(99, &other, good(99))),
    ];
    for (generation, (reason, value)) in (2..).zip(cases) {
        broker.append(CONTROL_TOPIC, 0, &proposal_key("shop", generation, "x", &Channel::Stable), Some(&value));
        let nacked = |status: &v1::GetStatusResponse| status.instances[0].refused_generation == generation;
        let status = a.status(reason, nacked).await;
        let mine = &status.instances[0];
        assert_eq!((mine.state(), mine.generation), (InstanceState::Nacked, 1), "{reason}");
        assert!(mine.error.contains(reason), "{reason}: {}", mine.error);
        let history = a.control().history(1).await.unwrap();
        assert_eq!((history.generation, history.in_force), (generation, 1));
        assert!(history.generations[0].refused.contains(reason), "{reason}: {history:?}");
    }
    assert!(a.control().get_table(None).await.unwrap().unwrap().json.contains("\"priced\""));

    // One that starts comes to the same, and the next good one heals both, with the content that was refused for its signature.
    let b = start_trusting(&broker, "b", tempfile::tempdir().unwrap(), &[trusted.public()]).await;
    b.generation(1).await;
    let healed = b.control().apply("routes.yaml", &other, signed(&trusted, &other, 8)).await.unwrap();
    assert_eq!((healed.generation, healed.changed), (8, true));
    assert!(healed.changes[0].starts_with("~ routes.price.to: "), "it is compared with the last good one: {healed:?}");
    a.generation(8).await;
}

#[tokio::test]
async fn history_tells_who_applied_what_and_conflicts_do_too() {
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    assert!(a.control().history(0).await.unwrap().generations.is_empty());
    let by = |who: &str, message: &str, expected| ApplyOptions {
        applied_by: who.to_owned(),
        message: message.to_owned(),
        expected_generation: expected,
        ..ApplyOptions::default()
    };
    a.control().apply("one.yaml", &one("priced"), by("ann@desk", "begin", None)).await.unwrap();
    let more = table(&[("price", "orders", "priced-2"), ("bill", "orders", "billed")]);
    a.control().apply("two.yaml", &more, by("bob@desk", "\u{1b}[2Jmore", Some(1))).await.unwrap();
    let back = ApplyOptions { rollback_to: Some(1), ..by("ann@desk", "", None) };
    a.control().apply("generation 1", &one("priced"), back).await.unwrap();

    // Another sidecar tells the same, from the log alone. An older version left less there.
    let parts = mesh_routing::parse("t", &one("priced")).unwrap().parts();
    let old = Snapshot { about: About::default(), ..Snapshot::new("shop", 4, 7, "older", parts).unwrap() };
    broker.append(CONTROL_TOPIC, 0, "shop/4/x", Some(&old.pack().unwrap()));
    let b = start(&broker, "b").await;
    b.generation(4).await;
    let history = b.control().history(0).await.unwrap();
    assert_eq!((history.generation, history.in_force, &*history.mesh), (4, 4, "shop"));
    let told: Vec<_> = history
        .generations
        .iter()
        .map(|entry| {
            let routes = entry.routes.as_ref().map(|counts| (counts.added, counts.changed, counts.removed));
            (&*entry.applied_by, &*entry.source, &*entry.instance, &*entry.message, entry.rollback_to, routes)
        })
        .collect();
    let expected = [
        ("", "", "older", "", 0, None),
        ("ann@desk", "generation 1", "a", "", 1, Some((0, 1, 1))),
        ("bob@desk", "two.yaml", "a", " [2Jmore", 0, Some((1, 1, 0))),
        ("ann@desk", "one.yaml", "a", "begin", 0, Some((1, 0, 0))),
    ];
    assert_eq!(told, expected);
    assert_eq!(b.control().history(2).await.unwrap().generations.len(), 2);

    let error = b.control().apply("x", &one("x"), by("eve", "", Some(1))).await.unwrap_err();
    assert!(matches!(&error, ApplyError::Expected { changes, .. } if changes.is_empty()), "4 is what 1 was: {error}");
    let error = b.control().apply("x", &one("x"), by("eve", "", Some(2))).await.unwrap_err().to_string();
    assert!(error.contains("generation 4 is, applied by instance older") && error.contains("\n  - routes.bill: "), "{error}");
}
