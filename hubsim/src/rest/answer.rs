//! What every handler shares: who is called, who calls, what an error looks like.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, ETAG, IF_MATCH};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::access::Right;
use crate::core::Core;
use crate::error::HubError;
use crate::events::EventKind;
use crate::identity::Identity;
use crate::service::IfMatch;

const JSON: &str = "application/json; charset=utf-8";

/// The device or module in the path.
pub(super) struct Target(pub(super) Identity);

impl FromRequestParts<Arc<Core>> for Target {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Failure> {
        let names = Path::<HashMap<String, String>>::from_request_parts(parts, core).await;
        let names = names.map(|Path(names)| names).unwrap_or_default();
        let device = names.get("device").map_or("", String::as_str);
        let identity = match names.get("module") {
            None => Identity::device(device),
            Some(module) => Identity::module(device, module),
        };
        identity.map(Target).map_err(|error| Failure::new(core, error.into()))
    }
}

/// An error on its way to the caller.
#[derive(Debug)]
pub(super) struct Failure {
    error: HubError,
    form: Form,
    tracking_id: String,
    timestamp: String,
}

/// The two bodies that errors come in.
#[derive(Debug, Clone, Copy)]
enum Form {
    Flat,
    Nested,
}

impl Failure {
    /// An error of a registry, twin or query call, or a refused token. Node's SDK recognises an
    /// unknown device by the flat body only.
    pub(super) fn new(core: &Core, error: HubError) -> Self {
        let (tracking_id, timestamp) = (core.tracking_id(), core.clock.stamp());
        Self { error, form: Form::Flat, tracking_id, timestamp }
    }

    /// An error of a method call.
    pub(super) fn of_method(core: &Core, error: HubError) -> Self {
        Self { form: Form::Nested, ..Self::new(core, error) }
    }

    /// The two-layered body: the outer `Message` is a string that holds JSON. C#'s SDK wants the
    /// number in it to agree with the name in the header.
    fn nested(&self) -> Value {
        let mut message = json!({
            "errorCode": self.error.code(),
            "trackingId": self.tracking_id,
            "message": self.error.to_string(),
            "timestampUtc": self.timestamp,
        });
        let info = match &self.error {
            HubError::NotOnline { waited } | HubError::NoAnswer { waited } => {
                let seconds = waited.as_secs();
                let (hours, minutes) = (seconds / 3600, seconds % 3600 / 60);
                json!({ "timeout": format!("{hours:02}:{minutes:02}:{:02}", seconds % 60) })
            }
            _ => json!({}),
        };
        if let Value::Object(members) = &mut message {
            members.insert("info".to_owned(), info);
        }
        json!({ "Message": message.to_string(), "ExceptionMessage": "" })
    }

    /// The older body.
    fn flat(&self) -> Value {
        json!({
            "Message": format!("ErrorCode:{};{}", self.error.name(), self.error),
            "ExceptionMessage": format!("Tracking ID:{}", self.tracking_id),
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = match self.form {
            Form::Flat => self.flat(),
            Form::Nested => self.nested(),
        };
        let status = StatusCode::from_u16(self.error.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = [("content-type", JSON), ("iothub-errorcode", self.error.name())];
        (status, headers, body.to_string()).into_response()
    }
}

/// Checks the caller's token, or tells why not.
pub(super) fn authorize(core: &Core, headers: &HeaderMap, right: Right) -> Result<(), Failure> {
    let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    core.authorize(token, right).map_err(|error| {
        core.tell(None, EventKind::AuthFailed { code: 401, reason: error.to_string() });
        Failure::new(core, error)
    })
}

/// `If-Match` in any of the forms that SDKs send: `*`, `"*"`, `"{etag}"`, `{etag}`.
pub(super) fn if_match(headers: &HeaderMap) -> Option<IfMatch> {
    let value = headers.get(IF_MATCH)?.to_str().ok()?.trim();
    let value = value.strip_prefix("W/").unwrap_or(value).trim_matches('"');
    Some(if value == "*" { IfMatch::Any } else { IfMatch::Tag(value.to_owned()) })
}

/// A JSON body. An empty one counts as `null`.
pub(super) fn json_body(core: &Core, body: &[u8]) -> Result<Value, Failure> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(body).map_err(|error| {
        let error = HubError::ArgumentInvalid(format!("the body is not JSON: {error}"));
        Failure::new(core, error)
    })
}

/// A document with its ETag also in the header.
pub(super) fn document(value: &Value) -> Response {
    let etag = value.get("etag").and_then(Value::as_str).map(|etag| format!("\"{etag}\""));
    let body = value.to_string();
    match etag {
        Some(etag) => ([(CONTENT_TYPE, JSON.to_owned()), (ETAG, etag)], body).into_response(),
        None => ([(CONTENT_TYPE, JSON)], body).into_response(),
    }
}
