//! Direct methods.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::Value;

use super::answer::{Failure, Target, authorize};
use crate::access::Right;
use crate::core::Core;
use crate::error::HubError;
use crate::service::MethodCall;

const DEFAULT_RESPONSE_S: u64 = 30;
const MAX_S: u64 = 300;
const MIN_RESPONSE_S: u64 = 5;

/// The request's body. Unknown members are let pass: old tutorials send `timeoutInSeconds`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    method_name: String,
    response_timeout_in_seconds: Option<u64>,
    connect_timeout_in_seconds: Option<u64>,
    #[serde(default)]
    payload: Value,
}

pub(super) async fn call(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(identity): Target,
    body: Bytes,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::ServiceConnect)?;
    let call = parse(&body).map_err(|error| Failure::of_method(&core, error))?;
    let answer = core.call(&identity, call).await;
    let (status, payload) = answer.map_err(|error| Failure::of_method(&core, error))?;
    // The hub pastes the device's bytes as they are: an empty answer makes a body that is not JSON.
    let mut envelope = format!("{{\"status\":{status},\"payload\":").into_bytes();
    envelope.extend_from_slice(&payload);
    envelope.push(b'}');
    Ok(([(CONTENT_TYPE, "application/json; charset=utf-8")], envelope).into_response())
}

fn parse(body: &[u8]) -> Result<MethodCall, HubError> {
    let body: Body = serde_json::from_slice(body).map_err(|error| {
        HubError::ArgumentInvalid(format!("the body is no method call: {error}"))
    })?;
    let response = body.response_timeout_in_seconds.unwrap_or(DEFAULT_RESPONSE_S);
    let connect = body.connect_timeout_in_seconds.unwrap_or(0);
    if !(MIN_RESPONSE_S..=MAX_S).contains(&response) {
        return Err(HubError::ArgumentInvalid(format!(
            "responseTimeoutInSeconds = {response}: must be {MIN_RESPONSE_S} to {MAX_S}"
        )));
    }
    if connect > MAX_S {
        return Err(HubError::ArgumentInvalid(format!(
            "connectTimeoutInSeconds = {connect}: must be 0 to {MAX_S}"
        )));
    }
    Ok(MethodCall {
        name: body.method_name,
        payload: Bytes::from(body.payload.to_string()),
        connect_timeout: Duration::from_secs(connect),
        response_timeout: Duration::from_secs(response),
    })
}
