//! Services that are called by a sidecar: of foreign frameworks in Python, and light ones in this process. A [`Scenario`] says what they
//! answer, and each keeps a ledger of what it was given.
//!
//! Invariant: every HTTP service answers the same administration (`/ledger`, `/ledger/wait`, `/scenario`), whatever it is made of.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::Method;
use rustix::process::Signal;
use serde::Deserialize;
use tokio::{net::TcpListener, task::JoinHandle};

use self::native::Native;
pub use self::{
    batches::{BatchAnswer, BatchCall, BatchService, value},
    raw::{Raw, RawService},
    scenario::{Condition, Entry, Rule, Scenario},
};
use crate::{http::Http, ports::Port, process::Process, python::Python};

mod batches;
mod native;
mod raw;
mod scenario;

/// A running HTTP service.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    http: Http,
    runs: Runs,
    _port: Option<Port>,
}

#[derive(Debug)]
enum Runs {
    Python(Box<Foreign>),
    Native(JoinHandle<()>),
}

#[derive(Debug)]
struct Foreign {
    python: Python,
    script: &'static str,
    process: Option<Process>,
    scenario: Scenario,
    log: PathBuf,
}

impl Drop for Runs {
    fn drop(&mut self) {
        if let Self::Native(task) = self {
            task.abort();
        }
    }
}

impl Service {
    /// A service of a foreign framework: `service.py` (FastAPI on uvicorn) or `flask_service.py` (Flask on waitress), with its log in `folder`.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn python(python: &Python, script: &'static str, folder: &Path, scenario: Scenario) -> Result<Self> {
        let port = Port::take()?;
        let address = port.address();
        let log = folder.join(format!("{script}-{}.log", port.number()));
        let runs = Runs::Python(Box::new(Foreign { python: python.clone(), script, process: None, scenario, log }));
        let mut service = Self { address, http: Http::new(address), runs, _port: Some(port) };
        service.start().await?;
        Ok(service)
    }

    /// A light service in this process; HTTP/1.1, and HTTP/2 with prior knowledge.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn native(scenario: Scenario) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = Native::router(scenario);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the service ended: {error}");
            }
        });
        Ok(Self { address, http: Http::new(address), runs: Runs::Native(task), _port: None })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same for HTTP/2 with prior knowledge.
    pub fn h2c_url(&self) -> String {
        format!("h2c://{}", self.address)
    }

    /// Starts it again after [`Service::kill`], at the same address, with an empty ledger.
    ///
    /// # Errors
    /// If it does not start, or runs in this process.
    pub async fn start(&mut self) -> Result<()> {
        let Runs::Python(foreign) = &mut self.runs else { anyhow::bail!("a native service cannot be started again") };
        let Foreign { python, script, process, scenario, log } = &mut **foreign;
        let mut command = python.command(script);
        command.args(["--port", &self.address.port().to_string(), "--scenario", &serde_json::to_string(scenario)?]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = Process::start(*script, command, log)?;
        started.ready_port(Duration::from_secs(60)).await?;
        *process = Some(started);
        Ok(())
    }

    /// `kill -9`: connections to it are refused from now on.
    ///
    /// # Errors
    /// If it does not run, or runs in this process.
    pub async fn kill(&mut self) -> Result<()> {
        self.process()?.kill9().await
    }

    /// Stops (`SIGSTOP`) or continues it: while it is stopped, connections are accepted and nothing is answered.
    ///
    /// # Errors
    /// If it does not run, or runs in this process.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        self.process()?.signal(if frozen { Signal::STOP } else { Signal::CONT })
    }

    fn process(&mut self) -> Result<&mut Process> {
        match &mut self.runs {
            Runs::Python(foreign) => foreign.process.as_mut().context("the service is not started"),
            Runs::Native(_) => anyhow::bail!("the service is no process"),
        }
    }

    /// Changes what it answers from now on.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn set(&mut self, scenario: Scenario) -> Result<()> {
        let body = serde_json::to_vec(&scenario)?;
        self.http.send(Method::PUT, "/scenario", &[("content-type", "application/json")], body.into()).await?.expect(200)?;
        if let Runs::Python(foreign) = &mut self.runs {
            foreign.scenario = scenario;
        }
        Ok(())
    }

    /// Empties the ledger.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn reset(&self) -> Result<()> {
        self.http.send(Method::DELETE, "/ledger", &[], Bytes::new()).await?.expect(200)?;
        Ok(())
    }

    /// The whole ledger.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn ledger(&self) -> Result<Vec<Entry>> {
        #[derive(Deserialize)]
        struct Page {
            total: usize,
            entries: Vec<Entry>,
        }
        let mut all = Vec::new();
        loop {
            let answer = self.http.get(&format!("/ledger?start={}&size=5000", all.len())).await?.expect(200)?;
            let page: Page = serde_json::from_slice(&answer.body)?;
            let empty = page.entries.is_empty();
            all.extend(page.entries);
            if empty || all.len() >= page.total {
                return Ok(all);
            }
        }
    }

    /// The deliveries to one path.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn ledger_of(&self, path: &str) -> Result<Vec<Entry>> {
        Ok(self.ledger().await?.into_iter().filter(|entry| entry.path == path).collect())
    }

    /// How many deliveries it got.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn total(&self) -> Result<u64> {
        self.wait_at_most(0, Duration::ZERO).await
    }

    /// Waits until it got this many deliveries.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, total: u64, deadline: Duration) -> Result<u64> {
        let got = self.wait_at_most(total, deadline).await?;
        ensure!(got >= total, "the service got {got} of {total} deliveries in {deadline:?}");
        Ok(got)
    }

    /// Waits until it got this many deliveries or the time is over, and says how many it got.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn wait_at_most(&self, total: u64, time: Duration) -> Result<u64> {
        let end = Instant::now() + time;
        loop {
            // In steps, so that no proxy or client deadline cuts a long wait.
            let left = end.saturating_duration_since(Instant::now()).min(Duration::from_secs(20)).as_secs_f64();
            let answer = self.http.get(&format!("/ledger/wait?total={total}&timeout={left:.3}")).await?.expect(200)?;
            let got = answer.json()?["total"].as_u64().context("a total")?;
            if got >= total || Instant::now() >= end {
                return Ok(got);
            }
        }
    }
}
