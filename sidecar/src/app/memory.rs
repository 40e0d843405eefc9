//! How the allocator is set. The only place with `unsafe` in the workspace: glibc has no other way in than a C function.
//!
//! glibc gives threads that meet at its lock arenas of their own, up to eight for a core. Records are taken from the broker by one thread, decoded by
//! another and freed by a third, so each arena keeps pages of which little is in use, and more the longer it goes on. With two arenas a sidecar stays
//! flat: BENCHMARKS.md has the figures.

/// The arenas that all threads share.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS: i32 = 2;

/// Bounds the memory that the allocator keeps, unless the environment (`MALLOC_ARENA_MAX`, `GLIBC_TUNABLES`) says how. To be called before there are
/// threads: an arena that is there stays. Without effect on systems with another allocator.
pub fn bound_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() && std::env::var_os("GLIBC_TUNABLES").is_none() {
        #[expect(unsafe_code, reason = "see the module")]
        // SAFETY: mallopt takes two integers, and changes nothing but a limit of the allocator. It is called before there are other threads.
        let taken = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
        debug_assert_eq!(taken, 1, "glibc refuses so many arenas");
    }
}
