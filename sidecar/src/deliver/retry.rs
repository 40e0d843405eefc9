//! When the next attempt is made. Pure.

use std::time::Duration;

use mesh_routing::Retry;

/// A wish of the service (`Retry-After`) beyond this is cut: a mistaken date must not park a record for years.
pub const LONGEST_WISH: Duration = Duration::from_secs(3600);

/// The pause before the attempt after `attempt` (from 1): exponential, spread by ±10 % so that records that failed together do not come back
/// together, and never shorter than what the service asked for. `spread` is any number that differs between records.
pub fn pause(retry: &Retry, attempt: u32, wish: Option<Duration>, spread: u64) -> Duration {
    let jitter = 0.9 + 0.2 * ((spread.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f64 / (1u64 << 24) as f64);
    retry.pause(attempt).mul_f64(jitter).max(wish.unwrap_or_default().min(LONGEST_WISH))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Retry = Retry { attempts: 10, initial: Duration::from_millis(100), max: Duration::from_secs(30), multiplier: 2.0 };

    #[test]
    fn it_grows_up_to_the_maximum() {
        for (attempt, ms) in [(1, 100.0), (2, 200.0), (5, 1_600.0), (20, 30_000.0), (u32::MAX, 30_000.0)] {
            for spread in 0..100 {
                let pause = pause(&RETRY, attempt, None, spread).as_secs_f64() * 1e3;
                assert!((0.9 * ms..=1.1 * ms).contains(&pause), "{attempt}: {pause}");
            }
        }
    }

    #[test]
    fn the_services_wish_is_honoured() {
        assert_eq!(pause(&RETRY, 1, Some(Duration::from_secs(7)), 3), Duration::from_secs(7));
        assert_eq!(pause(&RETRY, 1, Some(Duration::from_secs(1 << 40)), 3), LONGEST_WISH);
    }
}
