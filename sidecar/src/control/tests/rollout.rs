//! Canaries: who runs them, promotion, and how they end.

use mesh_routing::sign::{PublicKey, SigningKey};

use super::*;
use crate::{
    control::{CanaryOptions, reset::OperationError},
    outcome::Disposition,
};

fn canary(selector: &str) -> ApplyOptions {
    let canary = CanaryOptions { selector: selector.parse().unwrap(), max_dead_letters: 2, max_refusals: 0 };
    ApplyOptions { canary: Some(canary), ..ApplyOptions::default() }
}

fn promoting(generation: u64) -> ApplyOptions {
    ApplyOptions { promotes: Some(generation), ..ApplyOptions::default() }
}

/// An instance with a label, in a folder; it may trust a key.
async fn labelled(broker: &Memory, name: &str, zone: &str, state: tempfile::TempDir, key: Option<PublicKey>) -> Instance {
    let instance = start_with(broker, name, state, |config| {
        config.labels = [("zone".to_owned(), zone.to_owned())].into();
        config.control.trusted_keys = key.into_iter().collect();
    });
    let instance = instance.await;
    instance.ready().await;
    instance
}

async fn three(broker: &Memory) -> [Instance; 3] {
    let start = async |name, zone| labelled(broker, name, zone, tempfile::tempdir().unwrap(), None).await;
    [start("a", "east").await, start("b", "west").await, start("c", "west").await]
}

impl Instance {
    /// Waits until all report that they are as they ought to be, and says what each runs.
    async fn settled(&self, instances: usize) -> Vec<u64> {
        let settled = |status: &v1::GetStatusResponse| {
            status.instances.len() == instances && status.instances.iter().all(|one| one.state() == InstanceState::Synced)
        };
        let status = self.status("all SYNCED", settled).await;
        status.instances.iter().map(|one| one.generation).collect()
    }

    fn running(&self) -> (u64, String) {
        let active = self.handle.table().borrow().clone().unwrap();
        (active.generation, active.compiled.digest.to_string())
    }
}

#[tokio::test]
async fn a_canary_is_run_by_some_and_promoted_to_all() {
    let broker = Memory::new(true);
    let [a, b, c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 1, 1]);

    let applied = c.control().apply("routes.yaml", &one("priced-2"), canary("label.zone=west")).await.unwrap();
    assert_eq!((applied.generation, applied.changed, applied.warnings.len()), (2, true, 0));
    assert_eq!(a.settled(3).await, [1, 2, 2]);
    assert!(b.running() == c.running() && a.running().0 == 1);
    let read = |status: &v1::GetStatusResponse| {
        status.rollout.as_ref().and_then(|rollout| rollout.entry.as_ref()).is_some_and(|entry| entry.applied_ms > 0)
    };
    let rollout = a.status("the canary's snapshot is read", read).await.rollout.unwrap();
    let told = rollout.canary.unwrap();
    assert_eq!((rollout.generation, rollout.stable_generation, rollout.refusals), (2, 1, 0));
    assert_eq!((&*told.selector, told.max_dead_letters, told.max_refusals), ("label.zone=west", 2, 0));
    // Who comes later is chosen as those that were there.
    let late = labelled(&broker, "late", "west", tempfile::tempdir().unwrap(), None).await;
    late.generation(2).await;

    // Nothing else is applied meanwhile, and nothing else is promoted.
    let error = a.apply(&one("other")).await.unwrap_err();
    assert!(matches!(error, ApplyError::Open { generation: 2, .. }) && error.to_string().contains("label.zone=west"), "{error}");
    for (text, generation, reason) in
        [("other", 2, "another one"), ("priced-2", 1, "generation 2 is the canary"), ("priced-2", 3, "is the canary")]
    {
        let error = a.control().apply("t", &one(text), promoting(generation)).await.unwrap_err();
        assert!(matches!(error, ApplyError::NotOpen { .. }) && error.to_string().contains(reason), "{error}");
    }

    let promoted = a.control().apply("generation 2", &one("priced-2"), promoting(2)).await.unwrap();
    assert_eq!((promoted.generation, promoted.changed), (3, true));
    assert_eq!(a.settled(4).await, [3, 3, 3, 3]);
    assert!(a.control().status().rollout.is_none());
    let history = a.control().history(0).await.unwrap();
    let told: Vec<_> = history.generations.iter().map(|one| (one.generation, &*one.canary, one.promotes, &*one.aborted)).collect();
    assert_eq!(told, [(3, "", 2, ""), (2, "label.zone=west", 0, ""), (1, "", 0, "")]);
    let error = a.control().abort_rollout(0, "ann".into(), String::new()).await.unwrap_err();
    assert!(error.to_string().contains("no rollout is open"), "{error}");
}

#[tokio::test]
async fn an_aborted_canary_is_over_for_all_also_for_those_that_were_away() {
    let broker = Memory::new(true);
    let [a, b, c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    a.control().apply("routes.yaml", &one("priced-2"), canary("label.zone=west,instance=b,instance=c")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 2, 2]);
    let Instance { handle, state, .. } = c;
    handle.close().await;

    let other = a.control().abort_rollout(7, "ann".into(), String::new()).await.unwrap_err();
    assert!(matches!(other, OperationError::Conflict(_)) && other.to_string().contains("generation 2 is"), "{other}");
    let aborted = a.control().abort_rollout(2, "ann".into(), "too slow".into()).await.unwrap();
    assert_eq!((aborted.generation, aborted.stable_generation), (2, 1));
    assert_eq!(a.settled(2).await, [1, 1]);
    assert_eq!(a.running(), b.running());
    // It had the canary on its disk.
    let c = labelled(&broker, "c", "west", state, None).await;
    c.generation(1).await;
    assert_eq!(a.settled(3).await, [1, 1, 1]);
    let rollout = a.control().status().rollout.unwrap();
    let ended = rollout.entry.unwrap().aborted;
    assert!(ended.starts_with("aborted by ann at ") && ended.ends_with(": too slow"), "{ended}");
    let error = a.control().apply("t", &one("priced-2"), promoting(2)).await.unwrap_err();
    assert!(matches!(error, ApplyError::NotOpen { .. }) && error.to_string().contains("too slow"), "{error}");

    // What is in force is that table again, and the next generation follows the canary's.
    let same = a.apply(&one("priced")).await.unwrap();
    assert_eq!((same.generation, same.changed), (1, false));
    let expecting = |generation| ApplyOptions { expected_generation: Some(generation), ..ApplyOptions::default() };
    let next = a.control().apply("t", &one("priced-3"), expecting(1)).await.unwrap();
    assert_eq!((next.generation, next.changed), (3, true));
    assert_eq!(a.settled(3).await, [3, 3, 3]);
    assert!(matches!(a.control().apply("t", &one("x"), expecting(2)).await.unwrap_err(), ApplyError::Expected { actual: 3, .. }));
}

/// What the history says of each generation: what it promotes, and whether it was aborted.
async fn told(instance: &Instance) -> Vec<(u64, u64, bool)> {
    let history = instance.control().history(0).await.unwrap();
    history.generations.iter().map(|one| (one.generation, one.promotes, !one.aborted.is_empty())).collect()
}

#[tokio::test]
async fn a_promotion_that_an_abort_overtakes_is_a_conflict() {
    let broker = Memory::new(true);
    let [a, b, _c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    a.control().apply("routes.yaml", &one("priced-2"), canary("label.zone=west")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 2, 2]);
    // The promotion found it open, and creates a topic that somebody deleted: meanwhile it is aborted.
    broker.delete("priced-2");
    broker.hold_creation(true);
    let text = one("priced-2");
    let promotion = a.control().apply("generation 2", &text, promoting(2));
    let abort = async {
        broker.creation_waits().await;
        let aborted = b.control().abort_rollout(2, "ann".into(), "too slow".into()).await;
        broker.hold_creation(false);
        aborted
    };
    let (promoted, aborted) = tokio::join!(promotion, abort);
    assert_eq!(aborted.unwrap().stable_generation, 1);
    let error = promoted.unwrap_err();
    assert!(matches!(error, ApplyError::Ended { generation: 2, .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("the rollout was aborted meanwhile: generation 2 was aborted by ann at ") && said.ends_with(": too slow"),
        "{said}"
    );
    // The proposal is in the log, and nobody runs it: also not who reads the log later.
    let stored = last(&broker);
    assert!(stored.key.is_some_and(|key| key.starts_with(b"shop/3/promotes-")));
    let late = labelled(&broker, "late", "west", tempfile::tempdir().unwrap(), None).await;
    late.generation(1).await;
    assert_eq!(a.settled(4).await, [1, 1, 1, 1]);
    assert_eq!(told(&late).await, [(2, 0, true), (1, 0, false)]);
    let next = late.apply(&one("priced-3")).await.unwrap();
    assert_eq!((next.generation, next.changed), (3, true));
    assert_eq!(a.settled(4).await, [3, 3, 3, 3]);
    assert_eq!(told(&a).await, [(3, 0, false), (2, 0, true), (1, 0, false)]);
}

#[tokio::test]
async fn an_abort_that_a_promotion_overtakes_is_a_conflict() {
    let broker = Memory::new(true);
    let [a, b, _c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    a.control().apply("routes.yaml", &one("priced-2"), canary("label.zone=west")).await.unwrap();
    a.control().apply("generation 2", &one("priced-2"), promoting(2)).await.unwrap();
    b.generation(3).await;
    // It had found the canary open before.
    let error = crate::control::rollout::abort(&b.control().0, 2, "ann".into(), "too slow".into()).await.unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, OperationError::Conflict(_)) && said.contains("generation 3 was applied meanwhile"), "{said}");
    let late = labelled(&broker, "late", "west", tempfile::tempdir().unwrap(), None).await;
    late.generation(3).await;
    assert_eq!(a.settled(4).await, [3, 3, 3, 3]);
    for instance in [&a, &late] {
        assert_eq!(told(instance).await, [(3, 2, false), (2, 0, false), (1, 0, false)]);
    }
}

#[tokio::test]
async fn of_a_promotion_and_an_abort_at_the_same_moment_exactly_one_succeeds() {
    let broker = Memory::new(true);
    let [a, b, c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    for round in 0..20 {
        let text = one(&format!("priced-{round}"));
        let before = a.control().get_table(None).await.unwrap().unwrap().generation;
        let open = a.control().apply("routes.yaml", &text, canary("label.zone=west")).await.unwrap().generation;
        let abort = async {
            // Now here, now there, on the way of the promotion.
            for _ in 0..2 * round {
                tokio::task::yield_now().await;
            }
            b.control().abort_rollout(open, "ann".into(), String::new()).await
        };
        let (promoted, aborted) = tokio::join!(a.control().apply("t", &text, promoting(open)), abort);
        let in_force = match (&promoted, &aborted) {
            (Ok(applied), Err(OperationError::Conflict(_) | OperationError::Refused(_))) => applied.generation,
            (Err(ApplyError::Ended { .. } | ApplyError::NotOpen { .. }), Ok(aborted)) => aborted.stable_generation,
            both => panic!("{both:?}"),
        };
        assert_eq!(in_force, if promoted.is_ok() { open + 1 } else { before });
        for instance in [&a, &b, &c] {
            instance.generation(in_force).await;
        }
        let ended = told(&c).await.into_iter().find(|(generation, ..)| *generation == open);
        assert_eq!(ended, Some((open, 0, aborted.is_ok())));
    }
}

#[tokio::test]
async fn a_canary_ends_by_itself_when_it_is_refused() {
    let broker = Memory::new(true);
    let a = labelled(&broker, "a", "east", tempfile::tempdir().unwrap(), None).await;
    let key = SigningKey::from_random(&[1; 32]).public();
    let b = labelled(&broker, "b", "west", tempfile::tempdir().unwrap(), Some(key)).await;
    a.control().apply("routes.yaml", &one("priced"), canary("label.zone=west")).await.unwrap();
    let over = |status: &v1::GetStatusResponse| {
        status.rollout.as_ref().and_then(|rollout| rollout.entry.as_ref()).is_some_and(|entry| !entry.aborted.is_empty())
    };
    let ended = a.status("the end", over).await.rollout.unwrap().entry.unwrap().aborted;
    assert!(ended.contains("instance b") && ended.contains("refused by 1 (0 allowed): b: it is not signed"), "{ended}");
    assert_eq!(a.settled(2).await, [0, 0]);
    drop(b);
}

#[tokio::test]
async fn a_canary_ends_by_itself_when_records_become_dead_letters() {
    let broker = Memory::new(true);
    let [a, b, c] = three(&broker).await;
    let dead = |instance: &Instance, count: u64| {
        let dispositions = [(Disposition::DeadLettered, count)].into();
        instance.board.post(RouteStatus { route: "price".into(), dispositions, ..RouteStatus::default() });
    };
    a.apply(&one("priced")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 1, 1]);
    // What was before does not count, and what happens elsewhere neither.
    dead(&b, 100);
    a.control().apply("routes.yaml", &one("priced-2"), canary("label.zone=west")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 2, 2]);
    dead(&a, 50);
    dead(&b, 101);
    dead(&c, 1);
    let counted = |status: &v1::GetStatusResponse| status.rollout.as_ref().is_some_and(|rollout| rollout.dead_letters == 2);
    a.status("two dead letters", counted).await;
    assert_eq!(a.control().status().rollout.unwrap().entry.unwrap().aborted, "", "two are allowed");
    dead(&c, 2);
    b.generation(1).await;
    c.generation(1).await;
    let rollout =
        a.status("the end", |status| status.rollout.as_ref().is_some_and(|rollout| rollout.dead_letters == 3)).await.rollout.unwrap();
    assert!(rollout.entry.unwrap().aborted.contains("dead letters since its instances took it: 3 (2 allowed)"));
}

#[tokio::test]
async fn a_canary_for_nobody_is_told() {
    let broker = Memory::new(true);
    let [a, _b, _c] = three(&broker).await;
    a.apply(&one("priced")).await.unwrap();
    assert_eq!(a.settled(3).await, [1, 1, 1]);
    let dry = ApplyOptions { dry_run: true, ..canary("service=nobody") };
    let applied = a.control().apply("routes.yaml", &one("priced-2"), dry).await.unwrap();
    assert!(applied.warnings.iter().any(|warning| warning.code == "canary_chooses_nobody"), "{applied:?}");
    assert!(a.control().status().rollout.is_none());
}
