//! What the threads of the brokers share is built of these. A test builds the same sources of parts whose interleavings it chooses
//! (`interleavings`).

pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, atomic::AtomicBool};
