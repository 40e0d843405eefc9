//! One question for many who ask it at the same time, and one about all that many ask about at about the same time.
//!
//! Invariant: who asks gets an answer to a question that was asked after the call.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

use super::{sync, wakeup::lock};

/// The last answer, and when it was asked for.
#[derive(Debug)]
pub(super) struct Together<T>(Mutex<Option<(Instant, T)>>);

impl<T> Default for Together<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Together<T> {
    /// Asks, or waits for the answer that somebody else asked for after this call. Cancel-safe: the next one who waits asks then.
    pub(super) async fn ask(&self, question: impl AsyncFnOnce() -> T) -> T {
        let called = Instant::now();
        // The lock is held while asking, on purpose: the others wait for this answer.
        let mut last = self.0.lock().await;
        if let Some((asked, answer)) = &*last
            && *asked > called
        {
            return answer.clone();
        }
        let asked = Instant::now();
        let answer = question().await;
        *last = Some((asked, answer.clone()));
        answer
    }
}

/// What is to be asked about, and the last answers, with the time at which they were asked for.
#[derive(Debug)]
pub(super) struct Gather<K, V> {
    wanted: sync::Mutex<BTreeSet<K>>,
    last: Mutex<Option<(Instant, BTreeMap<K, V>)>>,
}

impl<K, V> Default for Gather<K, V> {
    fn default() -> Self {
        Self { wanted: sync::Mutex::new(BTreeSet::new()), last: Mutex::new(None) }
    }
}

impl<K: Clone + Ord, V: Clone> Gather<K, V> {
    /// Asks about these, and about what others ask about meanwhile, a pause after the call. The question answers all that it is asked about.
    /// Cancel-safe, as [`Together::ask`].
    pub(super) async fn ask(&self, keys: &[K], pause: Duration, question: impl AsyncFnOnce(Vec<K>) -> BTreeMap<K, V>) -> Vec<V> {
        let of = |answers: &BTreeMap<K, V>| keys.iter().filter_map(|key| answers.get(key).cloned()).collect();
        let called = Instant::now();
        lock(&self.wanted).extend(keys.iter().cloned());
        // Held over the pause and the question, on purpose, as above.
        let mut last = self.last.lock().await;
        if let Some((asked, answers)) = &*last
            && *asked > called
            // Not if somebody took them along who gave up then.
            && keys.iter().all(|key| answers.contains_key(key))
        {
            return of(answers);
        }
        tokio::time::sleep(pause).await;
        let mut all = std::mem::take(&mut *lock(&self.wanted));
        all.extend(keys.iter().cloned());
        let asked = Instant::now();
        let answers = question(all.into_iter().collect()).await;
        let own = of(&answers);
        *last = Some((asked, answers));
        own
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::{FutureExt as _, future::join_all};

    use super::*;

    #[tokio::test]
    async fn who_comes_while_it_is_asked_shares_the_next_answer() {
        let (together, asked) = (Together::default(), AtomicUsize::new(0));
        let ask = || {
            together.ask(async || {
                tokio::task::yield_now().await;
                asked.fetch_add(1, Ordering::Relaxed)
            })
        };
        assert_eq!(
            join_all((0..10).map(|_| ask())).await,
            [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            "the first one's question was before the others' calls"
        );
        assert_eq!(ask().await, 2, "an old answer is nobody's");
        // One who gives up leaves the question to the next.
        let mut given_up = Box::pin(ask());
        assert!(given_up.as_mut().now_or_never().is_none());
        drop(given_up);
        assert_eq!(ask().await, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_about_within_a_pause_is_one_question() {
        let (gather, questions) = (Gather::default(), sync::Mutex::new(Vec::new()));
        let ask = |keys: [u32; 2]| {
            let (gather, questions) = (&gather, &questions);
            async move {
                let question = async |all: Vec<u32>| {
                    lock(questions).push(all.clone());
                    all.into_iter().map(|key| (key, key * 10)).collect()
                };
                gather.ask(&keys, Duration::from_millis(100), question).await
            }
        };
        assert_eq!(join_all([ask([2, 1]), ask([3, 2])]).await, [[20, 10], [30, 20]]);
        assert_eq!(ask([1, 2]).await, [10, 20], "an old answer is nobody's");
        // One who gives up leaves the question to the next.
        let (mut given_up, mut next) = (Box::pin(ask([4, 5])), Box::pin(ask([6, 7])));
        assert!(given_up.as_mut().now_or_never().is_none() && next.as_mut().now_or_never().is_none());
        drop(given_up);
        assert_eq!(next.await, [60, 70]);
        assert_eq!(*lock(&questions), [vec![1, 2, 3], vec![1, 2], vec![4, 5, 6, 7]]);
    }
}
