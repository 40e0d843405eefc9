//! One question for many who ask it at the same time.
//!
//! Invariant: who asks gets an answer to a question that was asked after the call.

use std::time::Instant;

use tokio::sync::Mutex;

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
}
