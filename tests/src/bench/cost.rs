//! What is optional, and what it costs: TLS on the API, and a span of every record. The floor is the same without it.

use anyhow::{Context as _, Result};

use super::{
    ground::{Bench, Filling},
    measure::cpu_of,
    role,
    rows::{Kind, Row},
};
use crate::{certificates::Authority, stage::Stage};

impl Bench {
    /// Publishing with TLS, and in clear.
    pub(super) async fn tls(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let authority = Authority::new(stage.folder())?;
        let plain = if row.kind == Kind::TlsHttp { Kind::PublishHttp } else { Kind::PublishStream };
        for round in 0..self.effort.rounds {
            let name = |what: &str| format!("{what}{round}");
            row.floor("in clear", self.publish_round(plain, &stage, &name("clear"), None).await?);
            row.mesh.push(self.publish_round(plain, &stage, &name("tls"), Some(&authority)).await?);
        }
        added(row)
    }

    /// A push over HTTP with a span of every record, and without.
    pub(super) async fn traced(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        self.fill(&stage, &source, Filling::of(self.effort.records)).await?;
        let (_collector, port) = role::serve(stage.folder(), &["collector"]).await?;
        for round in 0..self.effort.rounds {
            let service = async || role::serve(stage.folder(), &["service-http", "echo"]).await;
            row.floor("no spans", self.push_round(Kind::PushHttp, &stage, 2 * round, service().await?).await?);
            let traced = self.with_env("MESH_TELEMETRY_OTLP", &format!("http://127.0.0.1:{port}"));
            row.mesh.push(traced.push_round(Kind::PushHttp, &stage, 2 * round + 1, service().await?).await?);
        }
        self.delete(&[&source]).await?;
        added(row)
    }
}

/// What the sidecar's processor does more for each record.
fn added(row: &mut Row) -> Result<()> {
    let floor = row.floors.first().and_then(|floor| cpu_of(&floor.runs, "sidecar")).context("the floor's processor time")?;
    let with = cpu_of(&row.mesh, "sidecar").context("the processor time")?;
    row.figure("sidecar's processor time without it", floor, "µs a record");
    row.figure("sidecar's processor time with it", with, "µs a record");
    Ok(())
}
