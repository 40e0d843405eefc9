//! Makes `mesh-id`s: UUIDs of version 7, without a system call each.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use uuid::Uuid;

/// Makes identities of records.
///
/// The 74 bits beside the time are a count, which makes ids of one process distinct, and a keyed hash of it, which makes those of
/// several processes distinct (64 bits, seeded by the system's randomness).
#[derive(Debug)]
pub(super) struct Ids {
    keyed: RandomState,
    seed: u128,
    next: AtomicU64,
}

impl Ids {
    pub(super) fn new() -> Self {
        Self { keyed: RandomState::new(), seed: Uuid::new_v4().as_u128(), next: AtomicU64::new(0) }
    }

    /// A new id, in its usual form of 36 characters.
    pub(super) fn next(&self, now_ms: u64) -> Bytes {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut random = [0; 10];
        // The version takes the upper half of the first byte: the count's 12 bits go beneath it.
        random[..2].copy_from_slice(&(count as u16 & 0x0fff).to_be_bytes());
        random[2..].copy_from_slice(&self.keyed.hash_one((self.seed, count)).to_be_bytes());
        let id = uuid::Builder::from_unix_timestamp_millis(now_ms, &random).into_uuid();
        let mut text = [0; 36];
        Bytes::copy_from_slice(id.hyphenated().encode_lower(&mut text).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_version_7_and_distinct() {
        let ids = Ids::new();
        let made: HashSet<Bytes> = (0..20_000).map(|_| ids.next(1_760_000_000_000)).collect();
        assert_eq!(made.len(), 20_000);
        for id in &made {
            let id = Uuid::parse_str(std::str::from_utf8(id).unwrap()).unwrap();
            assert_eq!(id.get_version_num(), 7);
            assert_eq!(id.get_timestamp().unwrap().to_unix(), (1_760_000_000, 0));
        }
    }
}
