//! A TCP proxy whose network can be cut, go silent, or become slow.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// What the network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// It works.
    Well,
    /// Nothing comes through, and nobody is told: what is sent arrives when it works again.
    Silent,
    /// Everything takes this much longer, each way.
    Slow(Duration),
}

/// A proxy in front of one address. Ends, with its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    network: Arc<watch::Sender<Network>>,
    cuts: Arc<watch::Sender<u64>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens at `at` for `target`, which need not be there yet.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(at: SocketAddr, target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(at).await.with_context(|| format!("the proxy's port {at}"))?;
        let (network, cuts) = (Arc::new(watch::Sender::new(Network::Well)), Arc::new(watch::Sender::new(0)));
        let (of_task, cuts_of_task) = (network.clone(), cuts.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        let (network, mut cut) = (of_task.subscribe(), cuts_of_task.subscribe());
                        connections.spawn(async move {
                            tokio::select! {
                                () = pass(stream, target, network) => {}
                                _ = cut.changed() => {}
                            }
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { network, cuts, task })
    }

    /// What the network does from now on.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Breaks all connections.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(stream: TcpStream, target: SocketAddr, mut network: watch::Receiver<Network>) {
    // A connection that begins while nothing comes through begins when it works again.
    if network.wait_for(|network| *network != Network::Silent).await.is_err() {
        return;
    }
    let Ok(other) = TcpStream::connect(target).await else { return };
    // Small answers must not wait for more.
    let _ = (stream.set_nodelay(true), other.set_nodelay(true));
    let ((from, to), (back, forth)) = (stream.into_split(), other.into_split());
    tokio::select! {
        () = one_way(from, forth, network.clone()) => {}
        () = one_way(back, to, network) => {}
    }
}

async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut network: watch::Receiver<Network>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        let now = match network.wait_for(|network| *network != Network::Silent).await {
            Ok(network) => *network,
            Err(_) => return,
        };
        if let Network::Slow(delay) = now {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::Port;

    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn what_is_sent_into_silence_arrives_afterwards_and_a_cut_breaks() {
        let port = Port::take().unwrap();
        let proxy = Proxy::start(port.address(), echo().await).await.unwrap();
        let mut stream = TcpStream::connect(port.address()).await.unwrap();
        let mut buffer = [0; 4];
        stream.write_all(b"well").await.unwrap();
        stream.read_exact(&mut buffer).await.unwrap();
        proxy.set(Network::Silent);
        stream.write_all(b"hush").await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(100), stream.read_exact(&mut buffer)).await.is_err());
        proxy.set(Network::Well);
        stream.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"hush");
        proxy.cut();
        assert!(matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)));
    }
}
