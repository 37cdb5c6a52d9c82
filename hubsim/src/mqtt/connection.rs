//! One MQTT connection: packets in, packets out, and the reasons why it ends.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use mqttbytes::v4::{
    ConnAck, ConnectReturnCode, LastWill, Packet, PingResp, PubAck, Publish, SubAck, Subscribe,
    SubscribeReasonCode, UnsubAck,
};
use mqttbytes::{Error as CodecError, QoS, v4};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;

use super::connect::{Accepted, Refused, decide};
use super::topic::{Properties, Published};
use crate::access::ClientCertificate;
use crate::core::{Core, Push};
use crate::events::{EventKind, Reason, Transport};
use crate::faults::PacketFate;
use crate::identity::Identity;
use crate::options::UnknownTopic;
use crate::service::MAX_METHOD_PAYLOAD;

/// Largest message, properties included. Source: IoT Hub limits (256 KB).
const MAX_MESSAGE: usize = 256 * 1024;
/// A client that has not sent its CONNECT by then is a stranger.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// A client that does not read for this long is cut.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// Longest silence on any connection, whatever the keep-alive. Source: IoT Hub MQTT support.
const MAX_SILENCE: Duration = Duration::from_secs(1767);

/// Serves one connection to its end.
pub(crate) async fn serve<S>(
    core: Arc<Core>,
    stream: S,
    certificate: Option<ClientCertificate>,
    transport: Transport,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut wire = Wire { stream, buffer: BytesMut::new() };
    let first = tokio::time::timeout(CONNECT_LIMIT, wire.read()).await;
    let accepted = match first {
        Ok(Ok(Packet::Connect(connect))) => decide(&core, connect, certificate.as_ref(), transport),
        Ok(Err(WireError::Codec(
            CodecError::InvalidProtocol | CodecError::InvalidProtocolLevel(_),
        ))) => Err(Refused {
            identity: None,
            code: Some(ConnectReturnCode::RefusedProtocolVersion),
            reason: "not MQTT 3.1.1".to_owned(),
        }),
        Ok(Ok(_)) | Ok(Err(WireError::Codec(_))) => Err(Refused {
            identity: None,
            code: None,
            reason: "the first packet is no CONNECT".to_owned(),
        }),
        Ok(Err(WireError::Lost)) | Err(_) => return,
    };
    match accepted {
        Err(refused) => refuse(&core, &mut wire, refused).await,
        Ok(accepted) => run(core, wire, accepted).await,
    }
}

async fn refuse<S>(core: &Core, wire: &mut Wire<S>, refused: Refused)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let code = refused.code.map_or(0, connack_number);
    core.tell(refused.identity.as_ref(), EventKind::AuthFailed { code, reason: refused.reason });
    if let Some(code) = refused.code {
        // If it does not arrive, the client sees the end of the connection instead.
        let _ = wire.send(|buffer| ConnAck::new(code, false).write(buffer)).await;
    }
    let _ = wire.stream.shutdown().await;
}

fn connack_number(code: ConnectReturnCode) -> u16 {
    match code {
        ConnectReturnCode::Success => 0,
        ConnectReturnCode::RefusedProtocolVersion => 1,
        ConnectReturnCode::BadClientId => 2,
        ConnectReturnCode::ServiceUnavailable => 3,
        ConnectReturnCode::BadUserNamePassword => 4,
        ConnectReturnCode::NotAuthorized => 5,
    }
}

async fn run<S>(core: Arc<Core>, wire: Wire<S>, accepted: Accepted)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Accepted { identity, opened, expires, keep_alive_s, will } = accepted;
    let mut connection = Connection {
        core: Arc::clone(&core),
        identity: identity.clone(),
        wire,
        silence: allowed_silence(keep_alive_s),
        next_id: 1,
    };
    let session_present = opened.session_present;
    let expiry = async {
        match expires {
            Some(second) => core.clock.sleep_until(core.cut_time(second)).await,
            None => std::future::pending().await,
        }
    };
    let reason = tokio::select! {
        biased;
        reason = opened.cut => reason.unwrap_or(Reason::HubStopped),
        () = expiry => Reason::TokenExpired,
        reason = connection.talk(session_present, opened.out) => reason,
    };
    let graceful = reason == Reason::ClientDisconnected;
    core.close(&identity, opened.serial, reason);
    if !graceful && let Some(will) = will {
        send_will(&core, &identity, will);
    }
}

/// 1.5 times the keep-alive, under the hub's ceiling; no keep-alive means the ceiling.
fn allowed_silence(keep_alive_s: u16) -> Duration {
    match keep_alive_s {
        0 => MAX_SILENCE,
        seconds => Duration::from_millis(u64::from(seconds) * 1500).min(MAX_SILENCE),
    }
}

/// A will is telemetry that says of itself that it is one.
fn send_will(core: &Core, identity: &Identity, will: LastWill) {
    let Ok(Published::Telemetry(mut properties)) = Published::parse(&will.topic, identity) else {
        return;
    };
    properties.insert("iothub-MessageType".to_owned(), Some("Will".to_owned()));
    if will.retain {
        properties.insert("mqtt-retain".to_owned(), Some("true".to_owned()));
    }
    core.device_sends(identity, properties, &will.message);
}

/// A byte stream with MQTT packets on it.
struct Wire<S> {
    stream: S,
    buffer: BytesMut,
}

#[derive(Debug)]
enum WireError {
    /// The stream ended or broke.
    Lost,
    Codec(CodecError),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// The next packet. Cancel-safe: what was read stays in the buffer.
    async fn read(&mut self) -> Result<Packet, WireError> {
        loop {
            match v4::read(&mut self.buffer, MAX_MESSAGE) {
                Ok(packet) => return Ok(packet),
                Err(CodecError::InsufficientBytes(_)) => {}
                Err(error) => return Err(WireError::Codec(error)),
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return Err(WireError::Lost),
                Ok(_) => {}
            }
        }
    }

    async fn send(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> Result<usize, CodecError>,
    ) -> Result<(), Reason> {
        let mut packet = BytesMut::new();
        write(&mut packet).map_err(|error| Reason::Protocol(format!("cannot send: {error}")))?;
        let sending = async {
            self.stream.write_all(&packet).await?;
            self.stream.flush().await
        };
        match tokio::time::timeout(WRITE_LIMIT, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Reason::ConnectionLost),
        }
    }
}

struct Connection<S> {
    core: Arc<Core>,
    identity: Identity,
    wire: Wire<S>,
    silence: Duration,
    next_id: u16,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Speaks MQTT until something ends it.
    async fn talk(
        &mut self,
        session_present: bool,
        mut out: tokio::sync::mpsc::UnboundedReceiver<Push>,
    ) -> Reason {
        let connack = ConnAck::new(ConnectReturnCode::Success, session_present);
        if let Err(reason) = self.wire.send(|buffer| connack.write(buffer)).await {
            return reason;
        }
        let mut deadline = Instant::now() + self.silence;
        loop {
            self.until_not_stalled().await;
            // Cancel-safe: `read` keeps what it has, `recv` and the timer by their own promise.
            let step = tokio::select! {
                biased;
                push = out.recv() => match push {
                    Some(push) => self.push(push).await,
                    None => Err(Reason::HubStopped),
                },
                packet = self.wire.read() => {
                    deadline = Instant::now() + self.silence;
                    self.packet(packet).await
                }
                () = tokio::time::sleep_until(deadline) => Err(Reason::KeepAlive),
            };
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    async fn until_not_stalled(&self) {
        let stalled = |book: &crate::core::Book| {
            book.sessions.get(&self.identity).is_some_and(|session| session.faults.stall)
        };
        if stalled(&self.core.book()) {
            self.core.wait_until(|book| (!stalled(book)).then_some(()), Duration::MAX).await;
        }
    }

    async fn push(&mut self, push: Push) -> Result<(), Reason> {
        let qos = if push.qos == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
        let mut publish = Publish::from_bytes(push.topic, qos, push.payload);
        if qos == QoS::AtLeastOnce {
            publish.pkid = self.next_id;
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        }
        self.wire.send(|buffer| publish.write(buffer)).await?;
        if push.doubled {
            publish.dup = qos == QoS::AtLeastOnce;
            self.wire.send(|buffer| publish.write(buffer)).await?;
        }
        Ok(())
    }

    async fn packet(&mut self, packet: Result<Packet, WireError>) -> Result<(), Reason> {
        let packet = packet.map_err(|error| match error {
            WireError::Lost => Reason::ConnectionLost,
            WireError::Codec(error) => Reason::Protocol(error.to_string()),
        })?;
        let fate = match self.core.book().sessions.get_mut(&self.identity) {
            Some(session) => session.faults.packet(),
            None => PacketFate::Handle,
        };
        match fate {
            PacketFate::Handle => self.handle(packet, true).await,
            PacketFate::HandleThenDrop => {
                self.handle(packet, false).await?;
                Err(Reason::Fault)
            }
            PacketFate::Drop => Err(Reason::Fault),
        }
    }

    /// Does what a packet asks; `answer` false keeps the acknowledgement back.
    async fn handle(&mut self, packet: Packet, answer: bool) -> Result<(), Reason> {
        match packet {
            Packet::Publish(publish) => {
                let (qos, id) = (publish.qos, publish.pkid);
                self.publish(publish)?;
                if qos == QoS::AtLeastOnce && answer && !self.puback_is_lost() {
                    return self.wire.send(|buffer| PubAck::new(id).write(buffer)).await;
                }
                Ok(())
            }
            Packet::Subscribe(subscribe) => self.subscribe(subscribe, answer).await,
            Packet::Unsubscribe(unsubscribe) => {
                for path in &unsubscribe.topics {
                    self.core.device_unsubscribes(&self.identity, path);
                }
                let id = unsubscribe.pkid;
                if answer {
                    self.wire.send(|buffer| UnsubAck::new(id).write(buffer)).await
                } else {
                    Ok(())
                }
            }
            Packet::PingReq if answer => self.wire.send(|buffer| PingResp.write(buffer)).await,
            Packet::PingReq | Packet::PubAck(_) => Ok(()),
            Packet::Disconnect => Err(Reason::ClientDisconnected),
            // Not told in detail: a second CONNECT has a token in it.
            _ => Err(Reason::Protocol("a packet that a client does not send here".to_owned())),
        }
    }

    fn puback_is_lost(&self) -> bool {
        let mut book = self.core.book();
        let session = book.sessions.get_mut(&self.identity);
        session.is_some_and(|session| session.faults.takes_puback())
    }

    fn publish(&self, publish: Publish) -> Result<(), Reason> {
        if publish.qos == QoS::ExactlyOnce {
            return Err(Reason::Protocol("PUBLISH with QoS 2".to_owned()));
        }
        let published = match Published::parse(&publish.topic, &self.identity) {
            Ok(published) => published,
            Err(error) => match self.core.options.unknown_topic {
                UnknownTopic::Close => return Err(Reason::Protocol(error.to_string())),
                UnknownTopic::Telemetry => Published::Telemetry(Properties::from([
                    ("$PG.Unmatched".to_owned(), Some("true".to_owned())),
                    ("$PG.Subject".to_owned(), Some(publish.topic.clone())),
                ])),
            },
        };
        let (core, identity) = (&self.core, &self.identity);
        match published {
            Published::TwinGet { rid } => core.device_reads_twin(identity, &rid),
            Published::ReportedPatch { rid } => {
                core.device_reports(identity, rid.as_deref(), &publish.payload);
            }
            Published::MethodAnswer { .. } if publish.payload.len() > MAX_METHOD_PAYLOAD => {
                return Err(Reason::Protocol("method answer over 128 KB".to_owned()));
            }
            Published::MethodAnswer { status, rid } => {
                core.device_answers(identity, rid, status, publish.payload);
            }
            Published::Telemetry(mut properties) => {
                let marks = [("mqtt-retain", publish.retain), ("mqtt-dup", publish.dup)];
                for (name, _) in marks.into_iter().filter(|(_, set)| *set) {
                    properties.insert(name.to_owned(), Some("true".to_owned()));
                }
                core.device_sends(identity, properties, &publish.payload);
            }
        }
        Ok(())
    }

    async fn subscribe(&mut self, subscribe: Subscribe, answer: bool) -> Result<(), Reason> {
        if subscribe.filters.is_empty() {
            return Err(Reason::Protocol("SUBSCRIBE without a filter".to_owned()));
        }
        let codes = subscribe
            .filters
            .iter()
            .map(|filter| {
                let qos = match filter.qos {
                    QoS::AtMostOnce => 0,
                    QoS::AtLeastOnce => 1,
                    QoS::ExactlyOnce => 2,
                };
                match self.core.device_subscribes(&self.identity, &filter.path, qos) {
                    None => SubscribeReasonCode::Failure,
                    Some(0) => SubscribeReasonCode::Success(QoS::AtMostOnce),
                    Some(_) => SubscribeReasonCode::Success(QoS::AtLeastOnce),
                }
            })
            .collect();
        if !answer {
            return Ok(());
        }
        let suback = SubAck::new(subscribe.pkid, codes);
        self.wire.send(|buffer| suback.write(buffer)).await
    }
}
