//! What the listeners, the service interface and the library share: identities, sessions, calls.
//!
//! One lock guards it all, so that a device hears of versions in the order in which they were made.
//! It is never held across an await.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use openssl::x509::X509;
use parking_lot::{Mutex, MutexGuard};
use serde_json::Value;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::access::Policies;
use crate::clock::Clock;
use crate::error::HubError;
use crate::events::{EventKind, Events, Log, NoSuchEvent, Reason};
use crate::faults::{Active, Fault};
use crate::identity::Identity;
use crate::mqtt::topic::{Filter, Style};
use crate::options::Options;
use crate::registry::Record;

/// The shared heart of a hub.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) options: Options,
    pub(crate) clock: Clock,
    pub(crate) policies: Policies,
    log: Log,
    book: Mutex<Book>,
    /// Counts connects, disconnects and subscriptions, for those who wait for a device.
    sessions_changed: watch::Sender<u64>,
    /// Told when something changed that is kept on disk.
    pub(crate) dirty: Notify,
}

/// What the lock guards.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) records: BTreeMap<Identity, Record>,
    pub(crate) sessions: HashMap<Identity, Session>,
    pub(crate) calls: HashMap<String, Call>,
    /// Certificate authorities that sign devices' certificates.
    pub(crate) authorities: Vec<X509>,
    serial: u64,
}

/// What the hub knows about an identity's MQTT session, connected or not.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pub(crate) live: Option<Live>,
    /// Granted QoS by filter.
    pub(crate) filters: BTreeMap<Filter, u8>,
    /// The last CONNECT had clean session 0: the filters outlive the connection.
    kept: bool,
    pub(crate) faults: Active,
    pub(crate) history: VecDeque<ReportedChange>,
}

/// The connection that an identity has now.
#[derive(Debug)]
pub(crate) struct Live {
    serial: u64,
    out: mpsc::UnboundedSender<Push>,
    cut: oneshot::Sender<Reason>,
}

/// A message on its way to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Push {
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
    pub(crate) qos: u8,
    /// Sent again at once, with the mark for it at QoS 1.
    pub(crate) doubled: bool,
}

/// A method call that waits for its answer.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) identity: Identity,
    pub(crate) answer: oneshot::Sender<(i64, Bytes)>,
}

/// A reported patch that was accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportedChange {
    /// The patch as the device sent it.
    pub patch: Value,
    /// Version of the reported section after it.
    pub version: u64,
    /// The reported section after it, with `$version`.
    pub reported: Value,
}

/// What a connection gets when its CONNECT is accepted.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) serial: u64,
    pub(crate) session_present: bool,
    pub(crate) out: mpsc::UnboundedReceiver<Push>,
    pub(crate) cut: oneshot::Receiver<Reason>,
}

impl Core {
    pub(crate) fn new(options: Options, policies: Policies, book: Book) -> Self {
        Self {
            options,
            clock: Clock::new(),
            policies,
            log: Log::new(),
            book: Mutex::new(book),
            sessions_changed: watch::Sender::new(0),
            dirty: Notify::new(),
        }
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock()
    }

    pub(crate) fn tell(&self, identity: Option<&Identity>, kind: EventKind) {
        self.log.push(self.clock.stamp(), identity.cloned(), kind);
    }

    pub(crate) fn events_from_now(&self) -> Events {
        self.log.read_from_now()
    }

    pub(crate) fn events_from_start(&self) -> Events {
        self.log.read_from_start()
    }

    /// Waits until `condition` holds for the book; looked at after every change of a session.
    pub(crate) async fn wait_until<T>(
        &self,
        condition: impl Fn(&Book) -> Option<T>,
        limit: Duration,
    ) -> Option<T> {
        let mut changes = self.sessions_changed.subscribe();
        let wait = async {
            loop {
                if let Some(found) = condition(&self.book()) {
                    return found;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(limit, wait).await.ok()
    }

    pub(crate) fn session_changed(&self) {
        self.sessions_changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Begins a connection of this identity; one that it had is cut (400027).
    pub(crate) fn open(
        &self,
        identity: &Identity,
        clean: bool,
        connected: impl FnOnce(bool) -> EventKind,
    ) -> Opened {
        let mut book = self.book();
        self.cut_in(&mut book, identity, Reason::TakenOver);
        book.serial = book.serial.wrapping_add(1);
        let serial = book.serial;
        let (out, out_receiver) = mpsc::unbounded_channel();
        let (cut, cut_receiver) = oneshot::channel();
        let session = book.sessions.entry(identity.clone()).or_default();
        let session_present = session.kept && !clean;
        if clean {
            session.filters.clear();
        }
        session.kept = !clean;
        session.live = Some(Live { serial, out, cut });
        self.touch(&mut book, identity, true);
        self.tell(Some(identity), connected(session_present));
        self.session_changed();
        Opened { serial, session_present, out: out_receiver, cut: cut_receiver }
    }

    /// Ends a connection that found its own end. One that was cut has been ended already.
    pub(crate) fn close(&self, identity: &Identity, serial: u64, reason: Reason) {
        let mut book = self.book();
        let live = book.sessions.get(identity).and_then(|session| session.live.as_ref());
        if live.is_some_and(|live| live.serial == serial) {
            self.cut_in(&mut book, identity, reason);
        }
    }

    /// Cuts every connection.
    pub(crate) fn cut_all(&self, reason: &Reason) {
        let mut book = self.book();
        let identities: Vec<_> = book.sessions.keys().cloned().collect();
        for identity in identities {
            self.cut_in(&mut book, &identity, reason.clone());
        }
    }

    /// Cuts the connection of an identity, if it has one.
    pub(crate) fn cut_in(&self, book: &mut Book, identity: &Identity, reason: Reason) -> bool {
        let Some(session) = book.sessions.get_mut(identity) else { return false };
        let Some(live) = session.live.take() else { return false };
        if !session.kept {
            session.filters.clear();
        }
        if self.options.calls_end_with_connection {
            // The caller hears nothing and runs into its time limit.
            book.calls.retain(|_, call| call.identity != *identity);
        }
        self.touch(book, identity, true);
        self.tell(Some(identity), EventKind::Disconnected { reason: reason.clone() });
        // The task may be gone already; then nobody needs to be told.
        let _ = live.cut.send(reason);
        self.session_changed();
        true
    }

    /// Notes activity of an identity, and whether its connection state changed.
    pub(crate) fn touch(&self, book: &mut Book, identity: &Identity, connection: bool) {
        if let Some(record) = book.records.get_mut(identity) {
            let now = self.clock.stamp();
            if connection {
                record.connection_updated.clone_from(&now);
            }
            record.last_activity = now;
        }
    }

    /// Arms a fault, or does it at once.
    pub(crate) fn fault(&self, identity: &Identity, fault: &Fault) -> Result<(), HubError> {
        let mut book = self.book();
        if !book.records.contains_key(identity) {
            return Err(HubError::NotFound(identity.clone()));
        }
        match fault {
            Fault::DropNow => {
                self.cut_in(&mut book, identity, Reason::Fault);
            }
            Fault::ExpireTokenNow => {
                self.cut_in(&mut book, identity, Reason::TokenExpired);
            }
            _ => book.sessions.entry(identity.clone()).or_default().faults.arm(fault),
        }
        drop(book);
        self.session_changed();
        Ok(())
    }

    /// Waits for an event among all since the hub was made.
    pub(crate) async fn wait_for(
        &self,
        condition: impl Fn(&crate::events::Event) -> bool,
        limit: Duration,
    ) -> Result<crate::events::Event, NoSuchEvent> {
        self.events_from_start().wait_for(condition, limit).await
    }
}

impl Book {
    /// A hub's book with these identities, none of them connected.
    pub(crate) fn new(records: BTreeMap<Identity, Record>, authorities: Vec<X509>) -> Self {
        Self { records, authorities, ..Self::default() }
    }

    /// Devices' certificates that this one signed are good; told twice, it is kept once.
    pub(crate) fn trust(&mut self, authority: X509) {
        let known = |known: &X509| known.to_der().ok() == authority.to_der().ok();
        if !self.authorities.iter().any(known) {
            self.authorities.push(authority);
        }
    }

    pub(crate) fn record(&self, identity: &Identity) -> Result<&Record, HubError> {
        self.records.get(identity).ok_or_else(|| HubError::NotFound(identity.clone()))
    }

    pub(crate) fn record_mut(&mut self, identity: &Identity) -> Result<&mut Record, HubError> {
        self.records.get_mut(identity).ok_or_else(|| HubError::NotFound(identity.clone()))
    }

    pub(crate) fn connected(&self, identity: &Identity) -> bool {
        self.sessions.get(identity).is_some_and(|session| session.live.is_some())
    }

    /// The twin as the service sees it.
    pub(crate) fn twin_json(&self, identity: &Identity) -> Result<Value, HubError> {
        Ok(self.record(identity)?.twin_json(identity, self.connected(identity)))
    }
}

impl Session {
    /// Whether a message under this filter would reach the device.
    pub(crate) fn listens(&self, filter: Filter) -> bool {
        self.live.is_some() && self.filters.contains_key(&filter)
    }

    pub(crate) fn style(&self) -> Style {
        Style { swapped: self.faults.swap_parameters, encoded_dollar: self.faults.encode_dollar }
    }

    /// Sends to the device if it is connected and subscribed; nothing is ever kept for later.
    /// `limit` is the highest QoS that the hub uses.
    pub(crate) fn push(&self, filter: Filter, topic: String, payload: Bytes, limit: u8) -> bool {
        self.push_copies(filter, topic, payload, limit, false)
    }

    /// The same, delivered twice if `doubled`.
    pub(crate) fn push_copies(
        &self,
        filter: Filter,
        topic: String,
        payload: Bytes,
        limit: u8,
        doubled: bool,
    ) -> bool {
        let (Some(live), Some(granted)) = (&self.live, self.filters.get(&filter)) else {
            return false;
        };
        live.out.send(Push { topic, payload, qos: limit.min(*granted), doubled }).is_ok()
    }
}
