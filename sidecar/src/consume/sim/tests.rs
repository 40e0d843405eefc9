use super::*;
use crate::mutation::built_in;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number is meant")))
}

/// Fails with everything that is known of a seed.
fn explain(seed: u64) -> ! {
    let run = simulate(seed, true);
    let broken = run.broken.unwrap_or_else(|| "it holds now".to_owned());
    println!("{}", run.log.join("\n"));
    panic!("seed {seed}: {broken}\nagain, alone: MESH_SIM_SEED={seed} cargo test -p mesh-sidecar --lib simulation_holds");
}

/// Whatever goes wrong, the promises hold.
#[test]
fn simulation_holds() {
    if let Some(seed) = number("MESH_SIM_SEED") {
        let run = simulate(seed, true);
        println!("{}", run.log.join("\n"));
        assert_eq!(run.broken, None, "seed {seed}");
        return;
    }
    let set = |name| std::env::var_os(name).is_some();
    let usual = if set("MESH_FULL") {
        100_000
    } else if set("CI") {
        3_000
    } else {
        300
    };
    let count = number("MESH_SIM_SEEDS").unwrap_or(usual);
    let began = std::time::Instant::now();
    let (found, totals) = search(number("MESH_SIM_FROM").unwrap_or(1), count, 10, |seed| simulate(seed, false));
    println!("{totals:?} in {:?}", began.elapsed());
    for (seed, run) in &found {
        println!("seed {seed}: {}", run.broken.as_deref().unwrap_or_default());
    }
    if let Some(seed) = found.keys().next() {
        explain(*seed);
    }
}

/// Each fault that is built in is found, and soon.
#[test]
fn simulation_finds_every_mutation() {
    for fault in built_in::ALL {
        let (found, totals) = search(1, 500, 1, |seed| {
            built_in::set(Some(fault));
            let run = simulate(seed, false);
            built_in::set(None);
            run
        });
        let Some((seed, run)) = found.first_key_value() else { panic!("{fault:?} is not found: {totals:?}") };
        println!("{fault:?}: {} seeds; {seed}: {}", totals.seeds, run.broken.as_deref().unwrap_or_default());
    }
}

/// Same seed, same events.
#[test]
fn simulation_is_deterministic() {
    for seed in 1..=20 {
        let (one, other) = (simulate(seed, true).log, simulate(seed, true).log);
        if let Some(at) = (0..one.len().max(other.len())).find(|at| one.get(*at) != other.get(*at)) {
            let around = |log: &[String]| log[at.saturating_sub(30)..log.len().min(at + 3)].join("\n");
            panic!("seed {seed} goes two ways:\n{}\n\n{}", around(&one), around(&other));
        }
    }
}
