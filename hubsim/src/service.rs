//! What a back end may ask of the hub.

use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::core::{Book, Call, Core};
use crate::error::HubError;
use crate::events::{EventKind, Reason};
use crate::identity::Identity;
use crate::mqtt::topic::Filter;
use crate::query::Query;
use crate::registry::{Entry, Record, Status};
use crate::twin::Write;

/// Largest payload of a method, each way.
pub(crate) const MAX_METHOD_PAYLOAD: usize = 128 * 1024;
/// Longest name of a method.
const MAX_METHOD_NAME: usize = 100;

/// A direct method to be called.
#[derive(Debug, Clone)]
pub(crate) struct MethodCall {
    pub(crate) name: String,
    pub(crate) payload: Bytes,
    pub(crate) connect_timeout: Duration,
    pub(crate) response_timeout: Duration,
}

/// What a write asks to be the present ETag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum IfMatch {
    Any,
    Tag(String),
}

impl IfMatch {
    fn check(this: Option<&Self>, present: &str) -> Result<(), HubError> {
        match this {
            Some(Self::Tag(tag)) if tag != present => Err(HubError::PreconditionFailed),
            _ => Ok(()),
        }
    }
}

impl Core {
    /// The twin as the service sees it.
    pub(crate) fn twin(&self, identity: &Identity) -> Result<Value, HubError> {
        self.book().twin_json(identity)
    }

    /// Writes tags and desired, tells the device, and returns the whole twin.
    pub(crate) fn write_twin(
        &self,
        identity: &Identity,
        body: &Value,
        mode: Write,
        if_match: Option<&IfMatch>,
    ) -> Result<Value, HubError> {
        let mut book = self.book();
        let now = self.clock.stamp();
        let record = book.record_mut(identity)?;
        IfMatch::check(if_match, &record.twin_etag())?;
        let change = record.twin.write(body, mode, &now)?;
        let desired_version =
            change.as_ref().map_or_else(|| record.twin.desired.version(), |change| change.version);
        let patch = change.map(|change| Value::Object(change.patch));
        let session = book.sessions.get(identity);
        let delivered = session.zip(patch.as_ref()).is_some_and(|(session, patch)| {
            let topic = session.style().desired_patch(desired_version);
            let body = Bytes::from(patch.to_string());
            session.push(Filter::DesiredPatches, topic, body, self.options.push_qos)
        });
        self.tell(Some(identity), EventKind::TwinWritten { desired_version, patch, delivered });
        self.dirty.notify_one();
        book.twin_json(identity)
    }

    /// Calls a method and waits for the answer: its status and body as the device sent them.
    pub(crate) async fn call(
        &self,
        identity: &Identity,
        call: MethodCall,
    ) -> Result<(i64, Bytes), HubError> {
        check_method(&call)?;
        self.book().record(identity)?;
        let listens = |book: &Book| {
            let session = book.sessions.get(identity)?;
            session.listens(Filter::Methods).then_some(())
        };
        if self.wait_until(listens, call.connect_timeout).await.is_none() {
            return Err(HubError::NotOnline { waited: call.connect_timeout });
        }
        let deadline = tokio::time::Instant::now() + call.response_timeout;
        let (_pending, answer) = self.send_call(identity, &call)?;
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => return Ok(answer),
            // Lost with its connection; the caller learns of it by the time limit.
            Ok(Err(_)) => tokio::time::sleep_until(deadline).await,
            Err(_) => {}
        }
        Err(HubError::NoAnswer { waited: call.response_timeout })
    }

    fn send_call<'a>(
        &'a self,
        identity: &Identity,
        call: &MethodCall,
    ) -> Result<(Pending<'a>, oneshot::Receiver<(i64, Bytes)>), HubError> {
        let rid = format!("{:x}", fastrand::u64(..));
        let (sender, receiver) = oneshot::channel();
        let mut book = self.book();
        book.calls.insert(rid.clone(), Call { identity: identity.clone(), answer: sender });
        let pending = Pending { core: self, rid: rid.clone() };
        let session = book.sessions.get_mut(identity);
        let Some(session) = session else {
            drop(book);
            return Err(HubError::NotOnline { waited: call.connect_timeout });
        };
        let topic = session.style().method_call(&call.name, &rid);
        let doubled = session.faults.doubles_method();
        // Told before it goes out: the answer may come at once.
        self.tell(
            Some(identity),
            EventKind::MethodCalled {
                method: call.name.clone(),
                rid,
                payload: String::from_utf8_lossy(&call.payload).into_owned(),
            },
        );
        let (payload, qos) = (call.payload.clone(), self.options.push_qos);
        session.push_copies(Filter::Methods, topic, payload, qos, doubled);
        drop(book);
        Ok((pending, receiver))
    }

    /// Runs a query over the twins; returns every result, and what the results are.
    pub(crate) fn query(&self, text: &str) -> Result<(Vec<Value>, &'static str), HubError> {
        let query = Query::parse(text)?;
        let modules = match query.source() {
            crate::query::Source::Devices => false,
            crate::query::Source::Modules => true,
            // No job has run yet.
            crate::query::Source::Jobs => return Ok((Vec::new(), query.item_type())),
        };
        let book = self.book();
        let twins: Vec<Value> = book
            .records
            .iter()
            .filter(|(identity, _)| identity.module_id().is_some() == modules)
            .map(|(identity, record)| record.twin_json(identity, book.connected(identity)))
            .collect();
        Ok((query.run(&twins), query.item_type()))
    }

    /// The registry's entry of an identity.
    pub(crate) fn device(&self, identity: &Identity) -> Result<Value, HubError> {
        let book = self.book();
        Ok(book.record(identity)?.device_json(identity, book.connected(identity)))
    }

    /// Creates an identity, or with `if_match` updates it.
    pub(crate) fn put_device(
        &self,
        identity: &Identity,
        entry: Entry,
        if_match: Option<&IfMatch>,
    ) -> Result<Value, HubError> {
        let mut book = self.book();
        let now = self.clock.stamp();
        match (book.records.get_mut(identity), if_match) {
            (Some(_), None) => return Err(HubError::AlreadyExists(identity.clone())),
            (None, Some(_)) => return Err(HubError::NotFound(identity.clone())),
            (Some(record), Some(_)) => {
                IfMatch::check(if_match, &record.etag())?;
                let mut changed = record.clone();
                changed.update(entry, &now)?;
                let disabled = changed.status == Status::Disabled;
                *record = changed;
                if disabled {
                    self.cut_in(&mut book, identity, Reason::IdentityRemoved);
                }
            }
            (None, None) => {
                self.check_parent(&book, identity)?;
                let record = Record::create(entry, &now)?;
                book.records.insert(identity.clone(), record);
            }
        }
        self.dirty.notify_one();
        Ok(book.record(identity)?.device_json(identity, book.connected(identity)))
    }

    fn check_parent(&self, book: &Book, identity: &Identity) -> Result<(), HubError> {
        if identity.module_id().is_some() {
            book.record(&Identity::device(identity.device_id())?)?;
        }
        Ok(())
    }

    /// Deletes an identity with its twin, a device with its modules, and cuts their connections.
    pub(crate) fn delete_device(
        &self,
        identity: &Identity,
        if_match: Option<&IfMatch>,
    ) -> Result<(), HubError> {
        let mut book = self.book();
        IfMatch::check(if_match, &book.record(identity)?.etag())?;
        let whole_device = identity.module_id().is_none();
        let gone: Vec<Identity> = book
            .records
            .keys()
            .filter(|other| {
                *other == identity || (whole_device && other.device_id() == identity.device_id())
            })
            .cloned()
            .collect();
        for identity in gone {
            self.cut_in(&mut book, &identity, Reason::IdentityRemoved);
            book.records.remove(&identity);
            book.sessions.remove(&identity);
        }
        self.dirty.notify_one();
        Ok(())
    }
}

/// A call that nobody waits for any more is forgotten.
#[derive(Debug)]
struct Pending<'a> {
    core: &'a Core,
    rid: String,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.core.book().calls.remove(&self.rid);
    }
}

fn check_method(call: &MethodCall) -> Result<(), HubError> {
    let allowed = |c: char| c.is_ascii_graphic() && !"$()<>@,;:\\\"/[]?={}".contains(c);
    if !(1..=MAX_METHOD_NAME).contains(&call.name.len()) || !call.name.chars().all(allowed) {
        return Err(HubError::ArgumentInvalid(format!(
            "methodName = {:?}: 1 to {MAX_METHOD_NAME} printable ASCII characters without \
             $()<>@,;:\\\"/[]?={{}} and spaces",
            call.name
        )));
    }
    let size = call.payload.len();
    if size > MAX_METHOD_PAYLOAD {
        return Err(HubError::TooLarge { size, limit: MAX_METHOD_PAYLOAD });
    }
    Ok(())
}
