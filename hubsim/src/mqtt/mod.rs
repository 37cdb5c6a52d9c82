//! The device side: MQTT 3.1.1 over TLS, in the dialect of IoT Hub.

mod connect;
mod connection;
pub(crate) mod topic;
mod username;

use std::sync::Arc;

use openssl::ssl::SslAcceptor;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(crate) use connection::serve;

use crate::accept;
use crate::core::Core;
use crate::events::Transport;

/// Accepts MQTT connections over TLS until `stop`; then cuts them all.
pub(crate) async fn listen(
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: SslAcceptor,
    stop: CancellationToken,
) {
    let book = Arc::clone(&core);
    accept::each_tls(core, listener, acceptor, stop, move |stream, certificate| {
        serve(Arc::clone(&book), stream, certificate, Transport::Mqtt)
    })
    .await;
}
