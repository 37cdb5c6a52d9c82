//! The rules of an MQTT session: subscriptions, keep-alive, QoS, wills, topics.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use hubsim::{Event, EventKind, Events, Hub, Options, Reason, UnknownFilter, UnknownTopic};
use mqttbytes::v4::{Connect, Login, Packet};
use openssl::ssl::{SslConnector, SslMethod, SslVersion};
use rumqttc::QoS;
use serde_json::json;
use support::{
    DESIRED, DEVICE, Device, LIMIT, METHODS, TWIN_RESPONSES, connect_options, device_token,
    disconnected, hub, hub_with, now, user_name, will,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;

/// A client without a mind of its own: sends the bytes it is given.
struct Bare {
    stream: SslStream<TcpStream>,
    buffer: BytesMut,
}

impl Bare {
    async fn open(hub: &Hub, version: Option<SslVersion>) -> Self {
        let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
        connector.set_ca_file(hub.ca_path()).unwrap();
        connector.set_min_proto_version(version).unwrap();
        connector.set_max_proto_version(version).unwrap();
        let ssl = connector.build().configure().unwrap().into_ssl("localhost").unwrap();
        let tcp = TcpStream::connect(hub.mqtt_addr()).await.unwrap();
        let mut stream = SslStream::new(ssl, tcp).unwrap();
        std::pin::Pin::new(&mut stream).connect().await.unwrap();
        Self { stream, buffer: BytesMut::new() }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    async fn connect(&mut self, hub: &Hub, keep_alive: u16) -> Packet {
        let mut connect = Connect::new(DEVICE);
        connect.keep_alive = keep_alive;
        connect.login =
            Some(Login::new(user_name(hub, DEVICE), device_token(hub, DEVICE, now() + 600)));
        let mut bytes = BytesMut::new();
        connect.write(&mut bytes).unwrap();
        self.send(&bytes).await;
        self.read().await.unwrap()
    }

    /// The next packet; None at the end of the connection.
    async fn read(&mut self) -> Option<Packet> {
        loop {
            if let Ok(packet) = mqttbytes::v4::read(&mut self.buffer, 1 << 20) {
                return Some(packet);
            }
            let read = self.stream.read_buf(&mut self.buffer);
            match tokio::time::timeout(LIMIT, read).await.expect("bytes in time") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }
}

fn is_accepted(packet: &Packet) -> bool {
    matches!(packet, Packet::ConnAck(ack) if ack.code == mqttbytes::v4::ConnectReturnCode::Success)
}

#[tokio::test]
async fn speaks_tls_1_2_and_1_3() {
    let hub = hub().await;
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let mut bare = Bare::open(&hub, Some(version)).await;
        assert!(is_accepted(&bare.connect(&hub, 60).await));
        assert_eq!(bare.stream.ssl().version2(), Some(version));
    }
}

#[tokio::test]
async fn only_mqtt_3_1_1_is_let_in() {
    let hub = hub().await;
    let mqtt_3_1 = b"\x10\x10\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x02id";
    let mqtt_5 = b"\x10\x0f\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x02id";
    for connect in [mqtt_3_1.as_slice(), mqtt_5] {
        let mut bare = Bare::open(&hub, None).await;
        bare.send(connect).await;
        match bare.read().await {
            Some(Packet::ConnAck(ack)) => {
                assert_eq!(ack.code, mqttbytes::v4::ConnectReturnCode::RefusedProtocolVersion);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(bare.read().await, None);
    }
    let mut bare = Bare::open(&hub, None).await;
    bare.send(b"\xc0\x00").await;
    assert_eq!(bare.read().await, None, "a PINGREQ before CONNECT");
}

#[tokio::test]
async fn a_silent_client_is_cut_after_one_and_a_half_keep_alives() {
    let hub = hub().await;
    let mut bare = Bare::open(&hub, None).await;
    assert!(is_accepted(&bare.connect(&hub, 2).await));
    let mut events = hub.events();
    // A ping at 2 s keeps it alive beyond 3 s.
    let start = tokio::time::Instant::now();
    tokio::time::sleep_until(start + Duration::from_secs(2)).await;
    bare.send(b"\xc0\x00").await;
    assert_eq!(bare.read().await, Some(Packet::PingResp));
    assert_eq!(bare.read().await, None);
    assert!(start.elapsed() >= Duration::from_secs(5), "cut after {:?}", start.elapsed());
    assert_eq!(disconnected(&mut events).await, Reason::KeepAlive);
}

#[tokio::test]
async fn a_second_connect_and_rubbish_close_the_connection() {
    let hub = hub().await;
    for rubbish in [b"\x10\x00".as_slice(), b"\x00\x00", b"\x20\x02\x00\x00", b"\x30\x02\x00\x09"] {
        let mut bare = Bare::open(&hub, None).await;
        assert!(is_accepted(&bare.connect(&hub, 60).await));
        let mut events = hub.events();
        bare.send(rubbish).await;
        assert_eq!(bare.read().await, None);
        let reason = disconnected(&mut events).await;
        assert!(matches!(reason, Reason::Protocol(_)), "{rubbish:?}: {reason:?}");
    }
}

#[tokio::test]
async fn subscriptions_of_a_kept_session_outlive_the_connection() {
    let hub = hub().await;
    let first = Device::ready(&hub).await;
    assert!(!first.session_present);
    first.client.disconnect().await.unwrap();
    let mut first = first;
    first.closed().await;
    // Told to nobody: it is not kept for later.
    hub.patch_desired(DEVICE, json!({ "missed": 1 })).unwrap();

    let mut second = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    assert!(second.session_present);
    hub.patch_desired(DEVICE, json!({ "told": 2 })).unwrap();
    let message = second.message().await;
    assert_eq!(message.topic, "$iothub/twin/PATCH/properties/desired/?$version=3");
    assert_eq!(message.payload, r#"{"$version":3,"told":2}"#);

    let mut options = connect_options(&hub, DEVICE);
    options.set_clean_session(true);
    let mut third = Device::connect(options).await.unwrap();
    assert!(!third.session_present);
    assert!(!is_delivered(&hub).await, "the old subscriptions are gone");
    assert_eq!(third.subscribe(DESIRED, QoS::AtMostOnce).await, Some(0));
    assert!(is_delivered(&hub).await);

    // A clean session leaves nothing behind.
    let fourth = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    assert!(!fourth.session_present);
    assert!(!is_delivered(&hub).await, "the subscriptions of the clean session are gone");
}

/// Whether a change of the desired section reaches the device now.
async fn is_delivered(hub: &Hub) -> bool {
    let mut events = hub.events();
    hub.patch_desired(DEVICE, json!({ "n": 1 })).unwrap();
    match events.next().await.kind {
        EventKind::TwinWritten { delivered, .. } => delivered,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn qos_of_subscriptions_and_messages() {
    let hub = hub_with(Options { push_qos: 1, ..Options::default() }).await;
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    for (filter, asked, granted) in [
        (TWIN_RESPONSES, QoS::AtMostOnce, Some(0)),
        (METHODS, QoS::AtLeastOnce, Some(1)),
        (DESIRED, QoS::ExactlyOnce, Some(1)),
        ("devices/pi-1/messages/devicebound/#", QoS::AtLeastOnce, Some(1)),
        ("devices/pi-2/messages/devicebound/#", QoS::AtLeastOnce, None),
        ("$iothub/twin/res/?$rid=5", QoS::AtMostOnce, None),
        ("$iothub/+/res/#", QoS::AtMostOnce, None),
        ("#", QoS::AtMostOnce, None),
    ] {
        assert_eq!(device.subscribe(filter, asked).await, granted, "{filter}");
    }
    // QoS 1 from the device is acknowledged on the hub's own topics too, before or after the answer.
    device.publish_at("$iothub/twin/GET/?$rid=1", " ", QoS::AtLeastOnce).await;
    let (mut acknowledged, mut answered) = (false, false);
    while !(acknowledged && answered) {
        match device.incoming().await.unwrap() {
            rumqttc::Packet::PubAck(_) => acknowledged = true,
            rumqttc::Packet::Publish(message) => {
                assert_eq!(message.qos, QoS::AtMostOnce, "subscribed at 0");
                answered = true;
            }
            other => panic!("{other:?}"),
        }
    }
    hub.patch_desired(DEVICE, json!({ "a": 1 })).unwrap();
    assert_eq!(device.message().await.qos, QoS::AtLeastOnce);

    let mut events = hub.events();
    device.publish_at("devices/pi-1/messages/events/", "x", QoS::ExactlyOnce).await;
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::Protocol("PUBLISH with QoS 2".into()));
}

async fn telemetry(events: &mut Events) -> (BTreeMap<String, Option<String>>, String) {
    let found = events
        .wait_for(|event| matches!(event.kind, EventKind::Telemetry { .. }), LIMIT)
        .await
        .unwrap();
    match found.kind {
        EventKind::Telemetry { properties, text, .. } => (properties, text.unwrap()),
        _ => unreachable!(),
    }
}

fn properties(pairs: &[(&str, Option<&str>)]) -> BTreeMap<String, Option<String>> {
    pairs.iter().map(|(name, value)| ((*name).into(), value.map(Into::into))).collect()
}

#[tokio::test]
async fn telemetry_comes_with_its_properties() {
    let hub = hub().await;
    let device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let mut events = hub.events();
    let (client, polling) = device.in_background();
    for (bag, expected) in [
        ("", properties(&[])),
        ("a=b%20c&d=&e", properties(&[("a", Some("b c")), ("d", Some("")), ("e", None)])),
        (
            "%24.ct=application%2Fjson%3Bcharset%3Dutf-8&$.ce=utf-8/",
            properties(&[
                ("$.ct", Some("application/json;charset=utf-8")),
                ("$.ce", Some("utf-8")),
            ]),
        ),
    ] {
        let topic = format!("devices/pi-1/messages/events/{bag}");
        client.publish(topic, QoS::AtLeastOnce, false, "body").await.unwrap();
        assert_eq!(telemetry(&mut events).await, (expected, "body".to_owned()));
    }
    client.publish("devices/pi-1/messages/events/", QoS::AtMostOnce, true, "kept").await.unwrap();
    let (marks, _) = telemetry(&mut events).await;
    assert_eq!(marks, properties(&[("mqtt-retain", Some("true"))]));
    polling.abort();
}

#[tokio::test]
async fn a_will_is_sent_when_the_connection_breaks_and_only_then() {
    let hub = hub().await;
    let mut options = connect_options(&hub, DEVICE);
    options.set_last_will(will("devices/pi-1/messages/events/why=lost", "gone"));

    let mut events = hub.events();
    let mut device = Device::connect(options.clone()).await.unwrap();
    device.client.disconnect().await.unwrap();
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::ClientDisconnected);

    let device = Device::connect(options.clone()).await.unwrap();
    drop(device);
    assert_eq!(disconnected(&mut events).await, Reason::ConnectionLost);
    let (properties_of_will, body) = telemetry(&mut events).await;
    let expected = properties(&[("iothub-MessageType", Some("Will")), ("why", Some("lost"))]);
    assert_eq!((properties_of_will, body.as_str()), (expected, "gone"));

    let wills = |hub: &Hub| {
        let mut all = hub.events_from_start();
        std::iter::from_fn(move || all.try_next())
            .filter(|event: &Event| matches!(event.kind, EventKind::Telemetry { .. }))
            .count()
    };
    assert_eq!(wills(&hub), 1, "none after DISCONNECT");

    for topic in ["devices/pi-2/messages/events/", "will"] {
        let mut options = connect_options(&hub, DEVICE);
        options.set_last_will(will(topic, "gone"));
        assert!(Device::connect(options).await.is_err(), "{topic}");
    }
}

#[tokio::test]
async fn topics_outside_the_grammar_close_the_connection() {
    let hub = hub().await;
    for topic in [
        "devices/pi-2/messages/events/",
        "devices/pi-1/messages/events",
        "devices/pi-1/messages/devicebound/",
        "devices//pi-1/messages/events/",
        "$iothub/twin/GET?$rid=1",
        "$iothub/twin/GET/",
        "$iothub/twin/GET/?rid=1",
        "$iothub/twin/PATCH/properties/reported?$rid=1",
        "$iothub/twin/PATCH/properties/desired/?$rid=1",
        "$iothub/methods/res/200?$rid=1",
        "$iothub/methods/res/ok/?$rid=1",
        "$iothub/methods/res/200/?x=1",
        "hello",
    ] {
        let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
        let mut events = hub.events();
        device.publish(topic, "{}").await;
        device.closed().await;
        let reason = disconnected(&mut events).await;
        assert!(matches!(reason, Reason::Protocol(_)), "{topic}: {reason:?}");
    }
}

#[tokio::test]
async fn the_other_readings_of_unknown_topics_can_be_chosen() {
    let options = Options {
        unknown_topic: UnknownTopic::Telemetry,
        unknown_filter: UnknownFilter::Ignore,
        ..Options::default()
    };
    let hub = hub_with(options).await;
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    assert_eq!(device.subscribe("my/topic", QoS::AtLeastOnce).await, Some(1));
    let mut events = hub.events();
    device.publish_at("my/topic", "hello", QoS::AtLeastOnce).await;
    assert!(matches!(device.incoming().await, Ok(rumqttc::Packet::PubAck(_))));
    let (properties, body) = telemetry(&mut events).await;
    assert_eq!(properties["$PG.Subject"].as_deref(), Some("my/topic"));
    assert_eq!(body, "hello");
}

#[tokio::test]
async fn a_message_over_the_limit_closes_the_connection() {
    let hub = hub().await;
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let body = "x".repeat(200 * 1024);
    device.publish_at("devices/pi-1/messages/events/", &body, QoS::AtLeastOnce).await;
    assert!(matches!(device.incoming().await, Ok(rumqttc::Packet::PubAck(_))));
    let body = "x".repeat(257 * 1024);
    device.publish_at("devices/pi-1/messages/events/", &body, QoS::AtLeastOnce).await;
    device.closed().await;
}

#[tokio::test]
async fn a_stopped_hub_comes_back_with_everything_it_knew() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    device.report(r#"{"version":"1"}"#).await;
    let (mqtt, https) = (hub.mqtt_addr(), hub.https_addr());
    let options = connect_options(&hub, DEVICE);
    let mut events = hub.events();
    let stopped = hub.stop().await;
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::HubStopped);
    assert!(Device::connect(options.clone()).await.is_err(), "nobody listens");

    let hub = stopped.start().await.unwrap();
    assert_eq!((hub.mqtt_addr(), hub.https_addr()), (mqtt, https));
    let mut device = Device::connect(options).await.unwrap();
    assert!(device.session_present);
    assert_eq!(device.twin().await["reported"], json!({ "version": "1", "$version": 2 }));
}
