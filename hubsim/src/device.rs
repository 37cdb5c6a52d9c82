//! What a connected device may ask of the hub.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::core::{Book, Core, ReportedChange};
use crate::error::HubError;
use crate::events::EventKind;
use crate::faults::ResponseFate;
use crate::identity::Identity;
use crate::mqtt::topic::{Filter, Properties};

impl Core {
    /// Answers a read of the twin.
    pub(crate) fn device_reads_twin(self: &Arc<Self>, identity: &Identity, rid: &str) {
        let mut book = self.book();
        self.touch(&mut book, identity, false);
        let (status, body) = match injected(&mut book, identity) {
            Some(error) => (error.http_status(), self.error_body(&error)),
            None => match book.record(identity) {
                Ok(record) => (200, record.twin.device_view()),
                Err(error) => (error.http_status(), self.error_body(&error)),
            },
        };
        self.tell(Some(identity), EventKind::TwinGet { status });
        self.respond(&mut book, identity, status, rid, None, Bytes::from(body.to_string()));
    }

    /// Applies a patch of the reported section, and answers it if it has a request id.
    pub(crate) fn device_reports(
        self: &Arc<Self>,
        identity: &Identity,
        rid: Option<&str>,
        patch: &[u8],
    ) {
        let mut book = self.book();
        self.touch(&mut book, identity, false);
        let result = match injected(&mut book, identity) {
            Some(error) => Err(error),
            None => self.apply_report(&mut book, identity, patch),
        };
        let parsed = serde_json::from_slice(patch)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(patch).into_owned()));
        let (status, version, body) = match &result {
            Ok(version) => (204, Some(*version), Bytes::new()),
            Err(error) => {
                (error.http_status(), None, Bytes::from(self.error_body(error).to_string()))
            }
        };
        self.tell(Some(identity), EventKind::Reported { patch: parsed, version, status });
        if let Some(rid) = rid {
            self.respond(&mut book, identity, status, rid, version, body);
        }
    }

    fn apply_report(
        &self,
        book: &mut Book,
        identity: &Identity,
        patch: &[u8],
    ) -> Result<u64, HubError> {
        let now = self.clock.stamp();
        let record = book.record_mut(identity)?;
        let version = record.twin.report(patch, &now)?;
        let change = ReportedChange {
            patch: serde_json::from_slice(patch).unwrap_or_default(),
            version,
            reported: record.twin.reported.flat(),
        };
        let history = &mut book.sessions.entry(identity.clone()).or_default().history;
        if history.len() >= self.options.history {
            history.pop_front();
        }
        history.push_back(change);
        self.dirty.notify_one();
        Ok(version)
    }

    /// Sends a twin response; the faults in force decide how.
    fn respond(
        self: &Arc<Self>,
        book: &mut Book,
        identity: &Identity,
        status: u16,
        rid: &str,
        version: Option<u64>,
        body: Bytes,
    ) {
        let Some(session) = book.sessions.get_mut(identity) else { return };
        let topic = session.style().twin_response(status, rid, version);
        let qos = self.options.push_qos;
        match session.faults.response() {
            ResponseFate::Send => {
                if !session.push(Filter::TwinResponses, topic, body, qos) {
                    let message = "twin response lost: not subscribed to $iothub/twin/res/#".into();
                    self.tell(Some(identity), EventKind::Warning { message });
                }
            }
            ResponseFate::Lose => {
                let what = format!("lost the response to rid {rid}");
                self.tell(Some(identity), EventKind::Fault { what });
            }
            ResponseFate::Delay(delay) => {
                let what = format!("response to rid {rid} delayed by {delay:?}");
                self.tell(Some(identity), EventKind::Fault { what });
                let (core, identity) = (Arc::clone(self), identity.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    if let Some(session) = core.book().sessions.get(&identity) {
                        session.push(Filter::TwinResponses, topic, body, qos);
                    }
                });
            }
        }
    }

    /// Passes an answer to the caller of the method, if he still waits.
    pub(crate) fn device_answers(
        &self,
        identity: &Identity,
        rid: String,
        status: i64,
        payload: Bytes,
    ) {
        let mut book = self.book();
        self.touch(&mut book, identity, false);
        let text = String::from_utf8_lossy(&payload).into_owned();
        let waits = book.calls.get(&rid).is_some_and(|call| call.identity == *identity);
        let call = if waits { book.calls.remove(&rid) } else { None };
        let late = call.is_none_or(|call| call.answer.send((status, payload)).is_err());
        self.tell(Some(identity), EventKind::MethodAnswered { rid, status, payload: text, late });
    }

    /// Takes a message from a device.
    pub(crate) fn device_sends(&self, identity: &Identity, properties: Properties, body: &[u8]) {
        let mut book = self.book();
        self.touch(&mut book, identity, false);
        if let Some(record) = book.records.get_mut(identity) {
            record.telemetry_count = record.telemetry_count.saturating_add(1);
        }
        let text = std::str::from_utf8(body).ok().map(str::to_owned);
        self.tell(Some(identity), EventKind::Telemetry { properties, bytes: body.len(), text });
    }

    /// Notes a subscription; QoS 2 is granted as 1.
    pub(crate) fn device_subscribes(&self, identity: &Identity, path: &str, qos: u8) -> Option<u8> {
        let granted = match Filter::parse(path, identity) {
            Some(filter) => {
                let granted = qos.min(1);
                let mut book = self.book();
                let session = book.sessions.entry(identity.clone()).or_default();
                session.filters.insert(filter, granted);
                Some(granted)
            }
            None if self.options.unknown_filter == crate::UnknownFilter::Ignore => Some(qos.min(1)),
            None => None,
        };
        self.tell(Some(identity), EventKind::Subscribed { filter: path.to_owned(), granted });
        self.session_changed();
        granted
    }

    /// Forgets a subscription.
    pub(crate) fn device_unsubscribes(&self, identity: &Identity, path: &str) {
        if let Some(filter) = Filter::parse(path, identity)
            && let Some(session) = self.book().sessions.get_mut(identity)
        {
            session.filters.remove(&filter);
        }
        self.tell(Some(identity), EventKind::Unsubscribed { filter: path.to_owned() });
        self.session_changed();
    }

    /// The error object of twin responses, which Node's SDK recognises by `errorCode`.
    pub(crate) fn error_body(&self, error: &HubError) -> Value {
        json!({
            "errorCode": error.code(),
            "trackingId": self.tracking_id(),
            "message": error.to_string(),
            "timestampUtc": self.clock.stamp(),
        })
    }

    pub(crate) fn tracking_id(&self) -> String {
        let id: u128 = fastrand::u128(..);
        format!("{id:032x}-G:{}-TimeStamp:{}", fastrand::u8(..16), self.clock.tracking_stamp())
    }
}

fn injected(book: &mut Book, identity: &Identity) -> Option<HubError> {
    let session = book.sessions.get_mut(identity)?;
    session.faults.twin_failure().map(HubError::Injected)
}
