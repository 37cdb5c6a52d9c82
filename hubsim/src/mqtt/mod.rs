//! The device side: MQTT 3.1.1 over TLS, in the dialect of IoT Hub.

mod connect;
mod connection;
pub(crate) mod topic;
mod username;

use std::sync::Arc;

use openssl::ssl::SslAcceptor;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) use connection::serve;

use crate::core::Core;
use crate::events::Transport;
use crate::tls;

/// Accepts MQTT connections over TLS until `stop`; then cuts them all.
pub(crate) async fn listen(
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: SslAcceptor,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: all three.
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let (core, acceptor) = (Arc::clone(&core), acceptor.clone());
                connections.spawn(async move {
                    match tls::accept(&acceptor, stream).await {
                        Ok(stream) => {
                            let certificate = tls::client_certificate(&stream);
                            serve(core, stream, certificate, Transport::Mqtt).await;
                        }
                        Err(error) => tls::tell_failure(&core, &error),
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
}
