//! What a back end does and sees, without the way over HTTPS; and what happened on the hub.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::Hub;
use crate::core::ReportedChange;
use crate::error::HubError;
use crate::events::{Event, Events, NoSuchEvent};
use crate::identity::Identity;
use crate::service::MethodCall;
use crate::twin::Write;

impl Hub {
    /// The twin as the service sees it.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn twin(&self, id: &str) -> Result<Value, HubError> {
        self.core.twin(&id.parse()?)
    }

    /// Merges into the desired section and tells the device. `Value::Null` empties the section.
    ///
    /// # Errors
    /// There is none of this id, or the patch breaks a rule of twins; nothing is written then.
    pub fn patch_desired(&self, id: &str, desired: Value) -> Result<Value, HubError> {
        self.patch_twin(id, json!({ "properties": { "desired": desired } }))
    }

    /// Merges tags and desired, as `PATCH /twins/{id}`.
    ///
    /// # Errors
    /// There is none of this id, or the patch breaks a rule of twins; nothing is written then.
    pub fn patch_twin(&self, id: &str, patch: Value) -> Result<Value, HubError> {
        self.core.write_twin(&id.parse()?, &patch, Write::Merge, None)
    }

    /// Replaces tags and desired, as `PUT /twins/{id}`.
    ///
    /// # Errors
    /// There is none of this id, or the content breaks a rule of twins; nothing is written then.
    pub fn replace_twin(&self, id: &str, twin: Value) -> Result<Value, HubError> {
        self.core.write_twin(&id.parse()?, &twin, Write::Replace, None)
    }

    /// Calls a direct method and waits up to `limit` for the answer. The device must be connected
    /// and subscribed.
    ///
    /// # Errors
    /// Unknown device, not online, no answer in time, or an answer that is not JSON.
    pub async fn invoke(
        &self,
        id: &str,
        method: &str,
        payload: Value,
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        self.invoke_raw(id, method, payload.to_string().into_bytes(), limit).await
    }

    /// The same with any bytes as payload, also such as no service would let pass.
    ///
    /// # Errors
    /// As [`Hub::invoke`].
    pub async fn invoke_raw(
        &self,
        id: &str,
        method: &str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        let call = MethodCall {
            name: method.to_owned(),
            payload: Bytes::from(payload),
            connect_timeout: Duration::ZERO,
            response_timeout: limit,
        };
        let (status, body) = self.core.call(&id.parse()?, call).await?;
        let payload = serde_json::from_slice(&body).map_err(|_| HubError::InvalidAnswer {
            status,
            body: String::from_utf8_lossy(&body).chars().take(200).collect(),
        })?;
        Ok((status, payload))
    }

    /// Runs a query over the twins.
    ///
    /// # Errors
    /// The text is not a query.
    pub fn query(&self, text: &str) -> Result<Vec<Value>, HubError> {
        self.core.query(text).map(|(items, _)| items)
    }

    /// Every accepted reported patch of an identity, in order, with what it led to.
    pub fn reported_history(&self, id: &str) -> Vec<ReportedChange> {
        let Ok(identity) = id.parse::<Identity>() else { return Vec::new() };
        let book = self.core.book();
        let session = book.sessions.get(&identity);
        session.map(|session| session.history.iter().cloned().collect()).unwrap_or_default()
    }

    /// Whether an identity is connected now.
    pub fn connected(&self, id: &str) -> bool {
        id.parse().is_ok_and(|identity| self.core.book().connected(&identity))
    }

    /// A reader of the events from now on.
    pub fn events(&self) -> Events {
        self.core.events_from_now()
    }

    /// A reader of all events since the hub was made.
    pub fn events_from_start(&self) -> Events {
        self.core.events_from_start()
    }

    /// The first event since the hub was made that meets the condition, waited for. For what comes
    /// after a certain moment take [`Hub::events`] then, and wait on that.
    ///
    /// # Errors
    /// None came in time.
    pub async fn wait_for(
        &self,
        condition: impl Fn(&Event) -> bool,
        limit: Duration,
    ) -> Result<Event, NoSuchEvent> {
        self.core.wait_for(condition, limit).await
    }
}
