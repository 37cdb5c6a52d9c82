//! The HTTPS port: service interface, WebSockets and the page, on one listener.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use openssl::ssl::SslAcceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::access::ClientCertificate;
use crate::core::Core;
use crate::tls;

/// What the handlers may know of a connection: the client's certificate, for MQTT in WebSockets.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) certificate: Option<ClientCertificate>,
    /// An upgraded connection outlives its HTTP connection's task, but not this.
    pub(crate) stop: CancellationToken,
}

/// Serves `router` over TLS until `stop`; then cuts every connection, also those with a request
/// under way.
pub(crate) async fn listen(
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: SslAcceptor,
    router: Router,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: all three.
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let (core, acceptor, router) = (Arc::clone(&core), acceptor.clone(), router.clone());
                let stop = stop.clone();
                connections.spawn(async move {
                    match tls::accept(&acceptor, stream).await {
                        Ok(stream) => {
                            let certificate = tls::client_certificate(&stream);
                            serve(stream, router, Peer { certificate, stop }).await;
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

/// Serves plain HTTP until `stop`, for the admin endpoint.
pub(crate) async fn listen_plain(listener: TcpListener, router: Router, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: all three.
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let peer = Peer { certificate: None, stop: stop.clone() };
                connections.spawn(serve(stream, router.clone(), peer));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
}

async fn serve<S>(stream: S, router: Router, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(request.map(Body::new))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    // A client that goes away in mid-request is its own business.
    let _ = connection.await;
}
