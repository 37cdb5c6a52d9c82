//! Accepts connections, and cuts them all when the hub stops.

use std::sync::Arc;

use openssl::ssl::SslAcceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_openssl::SslStream;
use tokio_util::sync::CancellationToken;

use crate::access::ClientCertificate;
use crate::core::Core;
use crate::tls;

/// Serves every connection until `stop`; then cuts them, also those with work under way.
pub(crate) async fn each<S>(
    listener: TcpListener,
    stop: CancellationToken,
    serve: impl Fn(TcpStream) -> S,
) where
    S: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: all three.
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(serve(stream));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
}

/// As [`each`], over TLS, with the certificate that the client showed. A failed handshake is told.
pub(crate) async fn each_tls<S>(
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: SslAcceptor,
    stop: CancellationToken,
    serve: impl Fn(SslStream<TcpStream>, Option<ClientCertificate>) -> S + Clone + Send + 'static,
) where
    S: Future<Output = ()> + Send + 'static,
{
    each(listener, stop, |stream| {
        let (core, acceptor, serve) = (Arc::clone(&core), acceptor.clone(), serve.clone());
        async move {
            match tls::accept(&acceptor, stream).await {
                Ok(stream) => {
                    let certificate = tls::client_certificate(&stream);
                    serve(stream, certificate).await;
                }
                Err(error) => tls::tell_failure(&core, &error),
            }
        }
    })
    .await;
}
