//! The whole of it, end to end: real sidecar processes, real Kafka and the embedded broker, services and clients of foreign frameworks.
//!
//! One binary, so that all of it shares one Kafka. `MESH_FULL=1` runs the full lengths: 100,000 records where 10,000 are run otherwise, two
//! minutes of outage where 20 s are. `MESH_KEEP=1` keeps the folders of the tests. `MESH_BIN_DIR` names ready-made binaries.

mod access;
mod api;
mod batch;
mod broker_away;
mod canary;
mod clients;
mod control;
mod crash;
mod day;
mod dlq;
mod exactly_once;
mod faults;
mod flow_control;
mod flows;
mod insight;
mod lag;
mod newer;
mod operate;
mod pitfalls;
mod release;
mod reset;
mod retries;
mod rollout;
mod routes;
mod schema;
mod subscribe;
mod tables;
mod topics;
mod trace;
mod volume;
