//! What the tests share: a hub with one device, a service client, and an MQTT client that we did
//! not write (rumqttc).
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    missing_debug_implementations,
    reason = "tests"
)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hubsim::{Event, EventKind, Events, Hub, Options, Reason};
use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, EventLoop, Incoming, LastWill, MqttOptions,
    Packet, Publish, QoS, TlsConfiguration,
};
use serde_json::Value;

/// Longer than anything takes; what ends by it has failed.
pub const LIMIT: Duration = Duration::from_secs(20);

pub const DEVICE: &str = "pi-1";

pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// A hub with the device `pi-1`.
pub async fn hub() -> Hub {
    hub_with(Options::default()).await
}

pub async fn hub_with(options: Options) -> Hub {
    let hub = Hub::start(options).await.unwrap();
    hub.add_device(DEVICE).unwrap();
    hub
}

/// A part of a connection string.
pub fn part(connection_string: &str, name: &str) -> String {
    let found = connection_string.split(';').find_map(|pair| {
        pair.split_once('=').and_then(|(key, value)| (key == name).then_some(value))
    });
    found.unwrap_or_else(|| panic!("{name} in {connection_string}")).to_owned()
}

pub fn device_key(hub: &Hub, id: &str) -> String {
    part(&hub.device_connection_string(id).unwrap(), "SharedAccessKey")
}

pub fn device_token(hub: &Hub, id: &str, expiry: i64) -> String {
    let resource = match id.split_once('/') {
        None => format!("{}/devices/{id}", hub.hub_name()),
        Some((device, module)) => format!("{}/devices/{device}/modules/{module}", hub.hub_name()),
    };
    hubsim::sas::token(&resource, &device_key(hub, id), expiry, None).unwrap()
}

/// Options of a good CONNECT; tests change what they are about.
pub fn connect_options(hub: &Hub, id: &str) -> MqttOptions {
    let mut options = anonymous_options(hub, id);
    options.set_credentials(user_name(hub, id), device_token(hub, id, now() + 3600));
    options
}

pub fn user_name(hub: &Hub, id: &str) -> String {
    format!("{}/{id}/?api-version=2021-04-12", hub.hub_name())
}

pub fn anonymous_options(hub: &Hub, id: &str) -> MqttOptions {
    let mut options = MqttOptions::new(id, "localhost", hub.mqtt_addr().port());
    options.set_transport(rumqttc::Transport::Tls(TlsConfiguration::SimpleNative {
        ca: hub.ca_pem().into_bytes(),
        client_auth: None,
    }));
    options.set_keep_alive(Duration::from_secs(60));
    options.set_clean_session(false);
    // IoT Hub's limit is 256 KB; rumqttc's own default is 10 KB.
    options.set_max_packet_size(1 << 20, 1 << 20);
    options
}

/// A connected device.
pub struct Device {
    pub client: AsyncClient,
    pub eventloop: EventLoop,
    pub session_present: bool,
    rid: u32,
}

pub const TWIN_RESPONSES: &str = "$iothub/twin/res/#";
pub const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";
pub const METHODS: &str = "$iothub/methods/POST/#";

impl Device {
    /// Connects and subscribes to everything an agent needs.
    pub async fn ready(hub: &Hub) -> Self {
        let mut device = Self::connect(connect_options(hub, DEVICE)).await.unwrap();
        for filter in [TWIN_RESPONSES, DESIRED, METHODS] {
            assert_eq!(device.subscribe(filter, QoS::AtMostOnce).await, Some(0));
        }
        device
    }

    /// Connects and hears only answers to its own requests.
    pub async fn reporter(hub: &Hub) -> Self {
        let mut device = Self::connect(connect_options(hub, DEVICE)).await.unwrap();
        assert_eq!(device.subscribe(TWIN_RESPONSES, QoS::AtMostOnce).await, Some(0));
        device
    }

    pub async fn connect(options: MqttOptions) -> Result<Self, ConnectionError> {
        let (client, mut eventloop) = AsyncClient::new(options, 50);
        eventloop.network_options.set_connection_timeout(LIMIT.as_secs());
        match tokio::time::timeout(LIMIT, eventloop.poll()).await.expect("a CONNACK in time")? {
            rumqttc::Event::Incoming(Incoming::ConnAck(ack)) => {
                Ok(Self { client, eventloop, session_present: ack.session_present, rid: 0 })
            }
            other => panic!("{other:?} in place of a CONNACK"),
        }
    }

    /// The next packet from the hub, or the error that ends the connection.
    pub async fn incoming(&mut self) -> Result<Packet, ConnectionError> {
        let next = async {
            loop {
                if let rumqttc::Event::Incoming(packet) = self.eventloop.poll().await? {
                    return Ok(packet);
                }
            }
        };
        tokio::time::timeout(LIMIT, next).await.expect("a packet in time")
    }

    /// The next message, acknowledgements passed over.
    pub async fn message(&mut self) -> Publish {
        loop {
            if let Packet::Publish(publish) = self.incoming().await.expect("a connection") {
                return publish;
            }
        }
    }

    /// Polls until the hub closes the connection.
    pub async fn closed(&mut self) {
        while self.incoming().await.is_ok() {}
    }

    pub async fn subscribe(&mut self, filter: &str, qos: QoS) -> Option<u8> {
        self.client.subscribe(filter, qos).await.unwrap();
        loop {
            if let Packet::SubAck(ack) = self.incoming().await.expect("a connection") {
                return match ack.return_codes[0] {
                    rumqttc::SubscribeReasonCode::Success(QoS::AtMostOnce) => Some(0),
                    rumqttc::SubscribeReasonCode::Success(QoS::AtLeastOnce) => Some(1),
                    rumqttc::SubscribeReasonCode::Success(QoS::ExactlyOnce) => Some(2),
                    rumqttc::SubscribeReasonCode::Failure => None,
                };
            }
        }
    }

    pub async fn publish(&mut self, topic: &str, body: &str) {
        self.publish_at(topic, body, QoS::AtMostOnce).await;
    }

    pub async fn publish_at(&mut self, topic: &str, body: &str, qos: QoS) {
        self.client.publish(topic, qos, false, body).await.unwrap();
    }

    /// Publishes a request and returns the response's topic and body.
    pub async fn request(&mut self, topic: &str, body: &str) -> (String, String) {
        self.rid += 1;
        let topic = format!("{topic}?$rid={}", self.rid);
        self.publish(&topic, body).await;
        let answer = self.message().await;
        (answer.topic, String::from_utf8(answer.payload.to_vec()).unwrap())
    }

    /// Reads the twin as a device does.
    pub async fn twin(&mut self) -> Value {
        let (topic, body) = self.request("$iothub/twin/GET/", "").await;
        assert_eq!(topic, format!("$iothub/twin/res/200/?$rid={}", self.rid));
        serde_json::from_str(&body).unwrap()
    }

    /// Sends a reported patch; returns the status in the response's topic.
    pub async fn report(&mut self, patch: &str) -> (u16, String, String) {
        let (topic, body) = self.request("$iothub/twin/PATCH/properties/reported/", patch).await;
        let status = topic.split('/').nth(3).unwrap().parse().unwrap();
        (status, topic, body)
    }

    /// Polls in the background from now on, so that pings and writes go on; returns the rest as a
    /// handle for publishing.
    pub fn in_background(self) -> (AsyncClient, tokio::task::JoinHandle<()>) {
        let mut eventloop = self.eventloop;
        let polling = tokio::spawn(async move { while eventloop.poll().await.is_ok() {} });
        (self.client, polling)
    }
}

/// The CONNACK code with which the hub refuses.
pub async fn refusal(options: MqttOptions) -> ConnectReturnCode {
    match Device::connect(options).await {
        Err(ConnectionError::ConnectionRefused(code)) => code,
        Err(other) => panic!("{other} in place of a refusal"),
        Ok(_) => panic!("accepted in place of a refusal"),
    }
}

pub fn will(topic: &str, body: &str) -> LastWill {
    LastWill::new(topic, body, QoS::AtLeastOnce, false)
}

/// Waits for the end of a connection and says why it ended.
pub async fn disconnected(events: &mut Events) -> Reason {
    let is_end = |event: &Event| matches!(event.kind, EventKind::Disconnected { .. });
    match events.wait_for(is_end, LIMIT).await.unwrap().kind {
        EventKind::Disconnected { reason } => reason,
        _ => unreachable!(),
    }
}

/// A back end: HTTPS with a token.
pub struct Service {
    client: reqwest::Client,
    base: String,
    pub token: String,
}

pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The number inside the two-layered error body.
    pub fn error_code(&self) -> u64 {
        let outer = self.json();
        let inner: Value = serde_json::from_str(outer["Message"].as_str().unwrap()).unwrap();
        inner["errorCode"].as_u64().unwrap()
    }
}

impl Service {
    pub fn of(hub: &Hub) -> Self {
        let authority = reqwest::Certificate::from_pem(hub.ca_pem().as_bytes()).unwrap();
        Self {
            client: reqwest::Client::builder()
                .tls_certs_only([authority])
                .timeout(LIMIT)
                .build()
                .unwrap(),
            base: format!("https://localhost:{}", hub.https_addr().port()),
            token: hub.service_token(),
        }
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self
            .client
            .request(method, format!("{}{path}?api-version=2021-04-12", self.base))
            .header("content-type", "application/json; charset=utf-8")
            .header("authorization", &self.token);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.body(body.to_owned()).send().await.unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.text().await.unwrap(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    pub async fn patch(&self, path: &str, body: &str) -> Answer {
        self.send("PATCH", path, &[], body).await
    }

    pub async fn put(&self, path: &str, body: &str) -> Answer {
        self.send("PUT", path, &[], body).await
    }

    pub async fn post(&self, path: &str, body: &str) -> Answer {
        self.send("POST", path, &[], body).await
    }
}
