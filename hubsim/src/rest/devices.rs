//! The identity registry.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::answer::{Failure, Target, authorize, document, if_match, json_body};
use crate::access::Right;
use crate::core::Core;
use crate::error::HubError;
use crate::identity::Identity;
use crate::registry::{Entry, Status};
use crate::service::IfMatch;

/// Most devices in one list, and its default.
const MAX_LIST: usize = 1000;

pub(super) async fn read(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(identity): Target,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryRead)?;
    core.device(&identity).map(|device| document(&device)).map_err(|e| Failure::new(&core, e))
}

pub(super) async fn put(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(identity): Target,
    body: Bytes,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryWrite)?;
    let entry = entry(json_body(&core, &body)?).map_err(|error| Failure::new(&core, error))?;
    if entry.device_id.as_ref().is_some_and(|id| id != identity.device_id()) {
        let error = "deviceId in the body is not the one in the path".to_owned();
        return Err(Failure::new(&core, HubError::ArgumentInvalid(error)));
    }
    let device = core.put_device(&identity, entry, if_match(&headers).as_ref());
    device.map(|device| document(&device)).map_err(|error| Failure::new(&core, error))
}

pub(super) async fn delete(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(identity): Target,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryWrite)?;
    let deleted = core.delete_device(&identity, if_match(&headers).as_ref());
    deleted
        .map(|()| StatusCode::NO_CONTENT.into_response())
        .map_err(|error| Failure::new(&core, error))
}

pub(super) async fn list(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Query(parameters): Query<HashMap<String, String>>,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryRead)?;
    let top = parameters.get("top").and_then(|top| top.parse().ok()).unwrap_or(MAX_LIST);
    Ok(document(&listed(&core, top.min(MAX_LIST), |identity| identity.module_id().is_none())))
}

pub(super) async fn modules(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(device): Target,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryRead)?;
    core.device(&device).map_err(|error| Failure::new(&core, error))?;
    Ok(document(&listed(&core, MAX_LIST, |identity| {
        identity.module_id().is_some() && identity.device_id() == device.device_id()
    })))
}

fn listed(core: &Core, top: usize, wanted: impl Fn(&Identity) -> bool) -> Value {
    let book = core.book();
    book.records
        .iter()
        .filter(|(identity, _)| wanted(identity))
        .take(top)
        .map(|(identity, record)| record.device_json(identity, book.connected(identity)))
        .collect()
}

pub(super) async fn statistics(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryRead)?;
    let book = core.book();
    let devices = book.records.iter().filter(|(identity, _)| identity.module_id().is_none());
    let total = devices.clone().count();
    let enabled = devices.filter(|(_, record)| record.status == Status::Enabled).count();
    Ok(document(&json!({
        "totalDeviceCount": total,
        "enabledDeviceCount": enabled,
        "disabledDeviceCount": total.saturating_sub(enabled),
    })))
}

pub(super) async fn service_statistics(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryRead)?;
    let book = core.book();
    let connected = book
        .records
        .keys()
        .filter(|identity| identity.module_id().is_none() && book.connected(identity));
    Ok(document(&json!({ "connectedDeviceCount": connected.count() })))
}

/// Bulk import: one change after the other; what fails is listed, the rest is done.
pub(super) async fn import(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::RegistryWrite)?;
    let Value::Array(items) = json_body(&core, &body)? else {
        let error = HubError::ArgumentInvalid("the body is no array of devices".to_owned());
        return Err(Failure::new(&core, error));
    };
    let mut errors = Vec::new();
    for item in items {
        let id = item.get("id").or_else(|| item.get("deviceId")).cloned();
        if let Err(error) = import_one(&core, id.as_ref().and_then(Value::as_str), item) {
            errors.push(json!({
                "deviceId": id,
                "errorCode": error.code(),
                "errorStatus": error.to_string(),
            }));
        }
    }
    let status = if errors.is_empty() { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    let result = json!({ "isSuccessful": errors.is_empty(), "errors": errors, "warnings": [] });
    Ok((status, document(&result)).into_response())
}

fn import_one(core: &Core, id: Option<&str>, item: Value) -> Result<(), HubError> {
    let identity = Identity::device(id.unwrap_or_default())?;
    let entry = entry(item)?;
    // azure-iothub writes some modes with a capital.
    let mode = entry.import_mode.as_deref().unwrap_or("create").to_ascii_lowercase();
    let tag = entry.etag.clone().map_or(IfMatch::Any, IfMatch::Tag);
    match mode.as_str() {
        "create" => core.put_device(&identity, entry, None).map(drop),
        "update" => core.put_device(&identity, entry, Some(&IfMatch::Any)).map(drop),
        "updateifmatchetag" => core.put_device(&identity, entry, Some(&tag)).map(drop),
        "createorupdate" => {
            let known = core.device(&identity).is_ok();
            core.put_device(&identity, entry, known.then_some(&IfMatch::Any)).map(drop)
        }
        "delete" => core.delete_device(&identity, None),
        "deleteifmatchetag" => core.delete_device(&identity, Some(&tag)),
        other => Err(HubError::ArgumentInvalid(format!(
            "importMode = {other:?}: must be create, update, updateIfMatchETag, createOrUpdate, \
             delete or deleteIfMatchETag"
        ))),
    }
}

fn entry(body: Value) -> Result<Entry, HubError> {
    match body {
        Value::Null => Ok(Entry::default()),
        body => serde_json::from_value(body).map_err(|error| {
            HubError::ArgumentInvalid(format!("the body is no registry entry: {error}"))
        }),
    }
}
