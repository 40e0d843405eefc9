//! What no framework would say.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

/// A listener that speaks raw bytes, for what no framework would say.
#[derive(Debug)]
pub struct RawService {
    address: SocketAddr,
    calls: tokio::sync::watch::Receiver<u64>,
    task: JoinHandle<()>,
}

/// What a [`RawService`] does with a connection.
#[derive(Clone, Debug)]
pub enum Raw {
    /// Resets it before anything is read.
    Reset,
    /// Reads a request and resets it.
    ReadAndReset,
    /// Answers every request with these bytes, as they are.
    Say(Vec<u8>),
}

impl RawService {
    /// Listens. The connection of number n is treated by `plan[n]`, later ones by the last entry; an empty plan resets all.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(plan: Vec<Raw>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (count, calls) = tokio::sync::watch::channel(0);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = usize::try_from(*count.borrow()).unwrap_or(usize::MAX);
                let act = plan.get(number).or(plan.last()).cloned().unwrap_or(Raw::Reset);
                count.send_modify(|count| *count += 1);
                connections.spawn(async move {
                    // A broken connection is what this service is for.
                    let _ = talk(stream, act).await;
                });
            }
        });
        Ok(Self { address, calls, task })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits until it got this many connections.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, connections: u64, deadline: Duration) -> Result<()> {
        let mut calls = self.calls.clone();
        let reached = calls.wait_for(|count| *count >= connections);
        tokio::time::timeout(deadline, reached).await.context("connections")??;
        Ok(())
    }
}

impl Drop for RawService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn talk(mut stream: tokio::net::TcpStream, act: Raw) -> Result<()> {
    match act {
        // Zero linger: the close sends RST.
        Raw::Reset => stream.set_zero_linger()?,
        Raw::ReadAndReset => {
            read_request(&mut stream).await?;
            stream.set_zero_linger()?;
        }
        Raw::Say(bytes) => loop {
            read_request(&mut stream).await?;
            stream.write_all(&bytes).await?;
        },
    }
    Ok(())
}

/// Reads one HTTP/1.1 request with a `content-length`, or none and no body.
async fn read_request(stream: &mut tokio::net::TcpStream) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")).map_or(0, |text| text.trim().parse().unwrap_or(0));
            if bytes.len() >= end + 4 + length {
                return Ok(());
            }
        }
        ensure!(stream.read_buf(&mut bytes).await? > 0, "the connection ended");
    }
}
