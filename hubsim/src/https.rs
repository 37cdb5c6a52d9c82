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
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::accept;
use crate::access::ClientCertificate;
use crate::core::Core;

/// What the handlers may know of a connection: the client's certificate, for MQTT in WebSockets.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) certificate: Option<ClientCertificate>,
    /// An upgraded connection outlives its HTTP connection's task, but not this.
    pub(crate) stop: CancellationToken,
}

/// Serves `router` over TLS until `stop`.
pub(crate) async fn listen(
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: SslAcceptor,
    router: Router,
    stop: CancellationToken,
) {
    let peers_stop = stop.clone();
    accept::each_tls(core, listener, acceptor, stop, move |stream, certificate| {
        serve(stream, router.clone(), Peer { certificate, stop: peers_stop.clone() })
    })
    .await;
}

/// Serves plain HTTP until `stop`, for the admin endpoint.
pub(crate) async fn listen_plain(listener: TcpListener, router: Router, stop: CancellationToken) {
    accept::each(listener, stop.clone(), |stream| {
        serve(stream, router.clone(), Peer { certificate: None, stop: stop.clone() })
    })
    .await;
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
