//! The binary as its users meet it: output, exit codes, hints. The sidecar at the other end is a script.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test panics on purpose")]

mod documents;
mod exact;
mod fake;
mod operations;
mod records;
mod tables;
mod watches;

const TABLE: &str = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  routes:
  - { name: price, service: pricing, from: [orders], handler: /price, to: [priced] }
";

const FAULTY: &str = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  routes:
  - { name: price, servise: pricing, from: [orders], handler: /price, to: [priced] }
  - { name: price, service: pricing, from: [__own], handler: /price }
";
