# Short commands. `just --list` shows them; each line also works by itself.

# The example mesh.
demo:
    cargo run --release -- demo

# Everything that must hold before a change is merged.
ci:
    .ci/run

# Form and lints.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# All tests.
test:
    cargo test --workspace

# The rules of the house: floors, purity, nothing unfinished. Seconds.
tidy:
    cargo test -p mesh-tests --test tidy

# End to end, by a part of a test's name: `just e2e crash`.
e2e filter="":
    cargo test -p mesh-tests --test e2e -- {{filter}}

# End to end in full length: 100,000 records, outages of minutes.
full:
    MESH_FULL=1 cargo test -p mesh-tests --test e2e -- --nocapture

# The generated code of proto/, written anew.
proto:
    UPDATE=1 cargo test -p mesh-proto

# The benchmarks: `just bench --quick --broker embedded`.
bench *args:
    cargo run --release -p mesh-tests --bin bench -- {{args}}

# A Kafka that stays until Ctrl-C; prints KAFKA_BOOTSTRAP for other runs.
kafka:
    cargo run --release -p mesh-tests --bin bench -- kafka
