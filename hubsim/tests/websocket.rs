//! MQTT in WebSocket frames, with tungstenite as the client.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::pin::Pin;

use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use hubsim::{EventKind, Hub, Reason, Transport};
use mqttbytes::v4::{Connect, Login, Packet};
use openssl::ssl::{SslConnector, SslMethod};
use support::{DEVICE, LIMIT, device_token, disconnected, hub, now, user_name};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};

type Socket = WebSocketStream<SslStream<TcpStream>>;

async fn tls(hub: &Hub) -> SslStream<TcpStream> {
    let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
    connector.set_ca_file(hub.ca_path()).unwrap();
    let ssl = connector.build().configure().unwrap().into_ssl("localhost").unwrap();
    let tcp = TcpStream::connect(hub.https_addr()).await.unwrap();
    let mut stream = SslStream::new(ssl, tcp).unwrap();
    Pin::new(&mut stream).connect().await.unwrap();
    stream
}

/// Shakes hands; Err is the HTTP status of the refusal, Ok has the subprotocol chosen.
async fn open(hub: &Hub, path: &str, protocol: Option<&str>) -> Result<(Socket, String), u16> {
    let mut request = format!("wss://localhost{path}").into_client_request().unwrap();
    if let Some(protocol) = protocol {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    match tokio_tungstenite::client_async(request, tls(hub).await).await {
        Ok((socket, response)) => {
            let chosen = response.headers()["sec-websocket-protocol"].to_str().unwrap().to_owned();
            Ok((socket, chosen))
        }
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn the_handshake_wants_the_path_and_the_subprotocol() {
    let hub = hub().await;
    for (path, protocol, outcome) in [
        ("/$iothub/websocket", Some("mqtt"), Ok("mqtt")),
        ("/$iothub/websocket", Some("MQTT"), Ok("MQTT")),
        ("/$iothub/websocket", Some("amqp, mqtt"), Ok("mqtt")),
        ("/$iothub/websocket?iothub-no-client-cert=true", Some("mqtt"), Ok("mqtt")),
        ("/$iothub/websocket", Some("amqp"), Err(400)),
        ("/$iothub/websocket", None, Err(400)),
        ("/mqtt", Some("mqtt"), Err(400)),
        ("/$iothub/websocket/", Some("mqtt"), Err(400)),
        ("/twins/pi-1", Some("mqtt"), Err(401)),
    ] {
        let found = open(&hub, path, protocol).await.map(|(_, chosen)| chosen);
        assert_eq!(found, outcome.map(str::to_owned), "{path} {protocol:?}");
    }
}

async fn read(socket: &mut Socket, buffer: &mut BytesMut) -> Packet {
    loop {
        if let Ok(packet) = mqttbytes::v4::read(buffer, 1 << 20) {
            return packet;
        }
        match tokio::time::timeout(LIMIT, socket.next()).await.unwrap() {
            Some(Ok(Message::Binary(bytes))) => buffer.extend_from_slice(&bytes),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn packets_may_be_cut_into_frames_anywhere() {
    let hub = hub().await;
    let (mut socket, _) = open(&hub, "/$iothub/websocket", Some("mqtt")).await.unwrap();
    let mut connect = Connect::new(DEVICE);
    connect.login =
        Some(Login::new(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 600)));
    let mut bytes = BytesMut::new();
    connect.write(&mut bytes).unwrap();
    // Two subscriptions and a read of the twin, all of it in pieces of seven bytes.
    mqttbytes::v4::Subscribe {
        pkid: 1,
        ..mqttbytes::v4::Subscribe::new("$iothub/twin/res/#", mqttbytes::QoS::AtMostOnce)
    }
    .write(&mut bytes)
    .unwrap();
    mqttbytes::v4::Publish::new("$iothub/twin/GET/?$rid=1", mqttbytes::QoS::AtMostOnce, "")
        .write(&mut bytes)
        .unwrap();
    for piece in bytes.chunks(7) {
        socket.send(Message::Binary(piece.to_vec().into())).await.unwrap();
    }
    let mut buffer = BytesMut::new();
    assert!(matches!(read(&mut socket, &mut buffer).await, Packet::ConnAck(_)));
    assert!(matches!(read(&mut socket, &mut buffer).await, Packet::SubAck(_)));
    match read(&mut socket, &mut buffer).await {
        Packet::Publish(answer) => assert_eq!(answer.topic, "$iothub/twin/res/200/?$rid=1"),
        other => panic!("{other:?}"),
    }
    let over = |event: &hubsim::Event| {
        matches!(event.kind, EventKind::Connected { transport: Transport::WebSocket, .. })
    };
    hub.wait_for(over, LIMIT).await.unwrap();

    let mut events = hub.events();
    hub.faults(DEVICE).drop_now().unwrap();
    assert_eq!(disconnected(&mut events).await, Reason::Fault);
    while let Some(Ok(_)) = tokio::time::timeout(LIMIT, socket.next()).await.unwrap() {}
}

#[tokio::test]
async fn closing_the_socket_is_losing_the_connection() {
    let hub = hub().await;
    let (mut socket, _) = open(&hub, "/$iothub/websocket", Some("mqtt")).await.unwrap();
    let mut connect = Connect::new(DEVICE);
    connect.login =
        Some(Login::new(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 600)));
    let mut bytes = BytesMut::new();
    connect.write(&mut bytes).unwrap();
    socket.send(Message::Binary(bytes.freeze())).await.unwrap();
    assert!(matches!(read(&mut socket, &mut BytesMut::new()).await, Packet::ConnAck(_)));
    let mut events = hub.events();
    socket.close(None).await.unwrap();
    assert_eq!(disconnected(&mut events).await, Reason::ConnectionLost);
}
