//! MQTT in WebSocket frames, at `/$iothub/websocket` with the subprotocol `mqtt`.

use std::io;
use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::http::header::SEC_WEBSOCKET_PROTOCOL;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};

use crate::core::Core;
use crate::events::Transport;
use crate::https::Peer;
use crate::mqtt;

/// Takes the handshake. Another subprotocol, or none, is answered with 400.
pub(crate) async fn upgrade(
    State(core): State<Arc<Core>>,
    Extension(peer): Extension<Peer>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let Ok(upgrade) = upgrade else {
        return (StatusCode::BAD_REQUEST, "expected a WebSocket handshake").into_response();
    };
    // The C SDK asks for it in capitals; what is asked for is echoed.
    let asked = headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .find(|protocol| protocol.eq_ignore_ascii_case("mqtt"));
    let Some(protocol) = asked else {
        return (StatusCode::BAD_REQUEST, "expected the subprotocol mqtt").into_response();
    };
    let wants_no_certificate =
        uri.query().is_some_and(|query| query.contains("iothub-no-client-cert=true"));
    let certificate = peer.certificate.filter(|_| !wants_no_certificate);
    upgrade.protocols([protocol.to_owned()]).on_upgrade(|socket| async move {
        let (sink, stream) = socket.split();
        let bytes = stream.filter_map(|message| async {
            match message {
                Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
                Ok(Message::Close(_)) => Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof))),
                Ok(_) => None,
                Err(error) => Some(Err(io::Error::other(error))),
            }
        });
        let frames = sink
            .sink_map_err(io::Error::other)
            .with(|bytes: Bytes| std::future::ready(Ok::<_, io::Error>(Message::Binary(bytes))));
        let reader = StreamReader::new(Box::pin(bytes));
        let writer = SinkWriter::new(CopyToBytes::new(frames));
        let stream = tokio::io::join(reader, writer);
        tokio::select! {
            () = mqtt::serve(core, stream, certificate, Transport::WebSocket) => {}
            () = peer.stop.cancelled() => {}
        }
    })
}
