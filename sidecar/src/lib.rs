//! The event mesh sidecar. See `ARCHITECTURE.md` for the house and the life of a record.
//!
//! Floors, from the top: `app` · `api` · `consume`, `publish`, `control` · `deliver` · `broker` · `config`, `telemetry` ·
//! `record`, `json`, `outcome`, `judge`, `tiers`, `completed`, `watermark`, `lanes`, `mutation`, `parking`, `status`, `table`, `command`. A module
//! imports only from floors below its own (a test reads the imports).

pub mod api;
pub mod app;
pub mod broker;
pub mod command;
pub mod completed;
pub mod config;
pub mod consume;
pub mod control;
pub mod deliver;
mod json;
mod judge;
pub mod lanes;
mod mutation;
pub mod outcome;
pub mod parking;
pub mod pause;
pub mod publish;
pub mod record;
pub mod status;
pub mod table;
pub mod telemetry;
mod tiers;
pub mod watermark;
