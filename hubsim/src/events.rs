//! What happened on the hub, in order, for tests that wait and for people who watch.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::identity::Identity;

/// Events kept for late readers; older ones are forgotten.
const KEPT: usize = 100_000;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// Place in the order of all events of this hub, from 0.
    pub number: u64,
    /// The hub's time, ISO 8601.
    pub time: String,
    /// The device or module it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// What it was.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
#[expect(missing_docs, reason = "the members say what they are")]
pub enum EventKind {
    /// A device's MQTT connection was accepted.
    Connected { clean: bool, session_present: bool, keep_alive_s: u16, transport: Transport },
    /// A device's connection is gone.
    Disconnected { reason: Reason },
    /// A connection or a service call was refused. `code` is the CONNACK or the HTTP status.
    AuthFailed { code: u16, reason: String },
    /// A device subscribed; `granted` is absent if the hub refused.
    Subscribed { filter: String, granted: Option<u8> },
    /// A device took a subscription back.
    Unsubscribed { filter: String },
    /// A device read its twin.
    TwinGet { status: u16 },
    /// A device reported; `version` is that of the reported section after it.
    Reported { patch: Value, version: Option<u64>, status: u16 },
    /// The service wrote tags or desired; `delivered` says whether the device was told.
    TwinWritten { desired_version: u64, patch: Option<Value>, delivered: bool },
    /// A method went to a device.
    MethodCalled { method: String, rid: String, payload: String },
    /// A device answered a method; `late` if nobody waits any more.
    MethodAnswered { rid: String, status: i64, payload: String, late: bool },
    /// A message from a device, or its will.
    Telemetry { properties: BTreeMap<String, Option<String>>, bytes: usize, text: Option<String> },
    /// A fault that a test asked for took effect.
    Fault { what: String },
    /// Something that a real hub might not take, or a client's mistake.
    Warning { message: String },
}

/// How a device is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Transport {
    /// MQTT over TLS.
    Mqtt,
    /// MQTT in WebSocket frames on the HTTPS port.
    WebSocket,
}

/// Why a connection ended. The names follow the hub's own logs where it has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Reason {
    /// The device said DISCONNECT.
    ClientDisconnected,
    /// The connection broke (404104 DeviceConnectionClosedRemotely).
    ConnectionLost,
    /// Nothing came for 1.5 times the keep-alive time (404104).
    KeepAlive,
    /// The token ran out (401003).
    TokenExpired,
    /// Another connection of the same identity came (400027).
    TakenOver,
    /// The device did what MQTT or IoT Hub does not allow.
    Protocol(String),
    /// The identity was disabled or deleted.
    IdentityRemoved,
    /// A test asked for it.
    Fault,
    /// The hub stops.
    HubStopped,
}

/// Nothing that was waited for happened in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such event within {waited:?}; the last events were:\n{last}")]
pub struct NoSuchEvent {
    waited: Duration,
    last: String,
}

/// All events since the hub was made. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    kept: Arc<Mutex<Kept>>,
    count: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Event>,
    next: u64,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self { kept: Arc::default(), count: watch::Sender::new(0) }
    }

    pub(crate) fn push(&self, time: String, identity: Option<Identity>, kind: EventKind) {
        let mut kept = self.kept.lock();
        let number = kept.next;
        kept.next = number.saturating_add(1);
        if kept.events.len() >= KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(Event { number, time, identity, kind });
        self.count.send_replace(kept.next);
    }

    /// A reader that starts with the oldest event kept.
    pub(crate) fn read_from_start(&self) -> Events {
        Events { log: self.clone(), next: 0 }
    }

    /// A reader of what is to come.
    pub(crate) fn read_from_now(&self) -> Events {
        Events { log: self.clone(), next: self.kept.lock().next }
    }
}

/// A reader of events. Each reader sees every event, in order.
#[derive(Debug, Clone)]
pub struct Events {
    log: Log,
    next: u64,
}

impl Events {
    /// The next event if it has happened.
    pub fn try_next(&mut self) -> Option<Event> {
        let kept = self.log.kept.lock();
        let oldest = kept.events.front()?.number;
        let at = usize::try_from(self.next.saturating_sub(oldest)).ok()?;
        let event = kept.events.get(at)?.clone();
        self.next = event.number.saturating_add(1);
        Some(event)
    }

    /// The next event, waited for.
    pub async fn next(&mut self) -> Event {
        let mut count = self.log.count.subscribe();
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            if count.changed().await.is_err() {
                // Not reached while `self` holds the log, which holds the sender.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The next event that meets the condition; those before it are passed over.
    ///
    /// # Errors
    /// None came in time.
    pub async fn wait_for(
        &mut self,
        condition: impl Fn(&Event) -> bool,
        limit: Duration,
    ) -> Result<Event, NoSuchEvent> {
        let found = tokio::time::timeout(limit, async {
            loop {
                let event = self.next().await;
                if condition(&event) {
                    return event;
                }
            }
        });
        found.await.map_err(|_| NoSuchEvent { waited: limit, last: self.log.last(20) })
    }
}

impl Log {
    fn last(&self, count: usize) -> String {
        let kept = self.kept.lock();
        let from = kept.events.len().saturating_sub(count);
        kept.events.iter().skip(from).map(|event| format!("  {event}\n")).collect()
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let identity = self.identity.as_ref().map(ToString::to_string);
        write!(f, "{} {:<12} ", self.time, identity.as_deref().unwrap_or("-"))?;
        write!(f, "{}", self.kind)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connected { clean, session_present, keep_alive_s, transport } => write!(
                f,
                "connected over {transport:?}, keep-alive {keep_alive_s} s, clean={clean}, session \
                 present={session_present}"
            ),
            Self::Disconnected { reason } => write!(f, "disconnected: {reason:?}"),
            Self::AuthFailed { code, reason } => write!(f, "refused with {code}: {reason}"),
            Self::Subscribed { filter, granted: Some(qos) } => {
                write!(f, "subscribed {filter} at QoS {qos}")
            }
            Self::Subscribed { filter, granted: None } => write!(f, "may not subscribe {filter}"),
            Self::Unsubscribed { filter } => write!(f, "unsubscribed {filter}"),
            Self::TwinGet { status } => write!(f, "read its twin: {status}"),
            Self::Reported { patch, version: Some(version), .. } => {
                write!(f, "reported, version {version}: {patch}")
            }
            Self::Reported { patch, status, .. } => write!(f, "reported, {status}: {patch}"),
            Self::TwinWritten { desired_version, patch, delivered } => {
                write!(f, "twin written, desired version {desired_version}, ")?;
                match patch {
                    Some(patch) => write!(f, "delivered={delivered}: {patch}"),
                    None => f.write_str("nothing to deliver"),
                }
            }
            Self::MethodCalled { method, rid, payload } => {
                write!(f, "method {method} called, rid {rid}: {payload}")
            }
            Self::MethodAnswered { rid, status, payload, late } => {
                let late = if *late { " too late" } else { "" };
                write!(f, "method answered{late}, rid {rid}, {status}: {payload}")
            }
            Self::Telemetry { properties, bytes, text } => {
                write!(f, "telemetry, {bytes} bytes")?;
                for (name, value) in properties {
                    write!(f, " {name}={}", value.as_deref().unwrap_or_default())?;
                }
                write!(f, ": {}", text.as_deref().unwrap_or("(binary)"))
            }
            Self::Fault { what } => write!(f, "fault: {what}"),
            Self::Warning { message } => write!(f, "warning: {message}"),
        }
    }
}
