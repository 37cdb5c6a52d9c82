//! The admin endpoint: the library's test handles over plain HTTP on loopback.
//!
//! | call | effect |
//! |---|---|
//! | `POST /devices/{id}/faults` with a [`Fault`] as JSON | puts the fault in |
//! | `POST /devices/{id}/methods/{name}`, any body | sends these bytes as a method's payload |
//! | `GET /devices/{id}/reported-history` | every accepted reported patch |
//! | `GET /events?from=n` | events from number n on |
//! | `PUT /clock` with `{"offsetSeconds":n}` | moves the hub's clock |
//! | `GET /view` | devices and twins |

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::core::Core;
use crate::error::HubError;
use crate::events::Event;
use crate::faults::Fault;
use crate::identity::Identity;
use crate::rest::view;
use crate::service::MethodCall;

/// How long a method sent by the admin endpoint may take.
const METHOD_LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn router(core: Arc<Core>) -> Router {
    Router::new()
        .route("/devices/{device}/faults", post(fault))
        .route("/devices/{device}/methods/{method}", post(method))
        .route("/devices/{device}/reported-history", get(history))
        .route("/events", get(events))
        .route("/clock", put(clock))
        .route("/view", get(|State(core): State<Arc<Core>>| async move { Json(view::view(&core)) }))
        .with_state(core)
}

fn refused(error: &HubError) -> Response {
    let status = StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::BAD_REQUEST);
    (status, Json(json!({ "errorCode": error.code(), "message": error.to_string() })))
        .into_response()
}

async fn fault(State(core): State<Arc<Core>>, Path(device): Path<String>, body: Bytes) -> Response {
    let fault: Fault = match serde_json::from_slice(&body) {
        Ok(fault) => fault,
        Err(error) => return refused(&HubError::ArgumentInvalid(error.to_string())),
    };
    let done = device.parse::<Identity>().map_err(HubError::from);
    match done.and_then(|identity| core.fault(&identity, &fault)) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refused(&error),
    }
}

async fn method(
    State(core): State<Arc<Core>>,
    Path((device, name)): Path<(String, String)>,
    body: Bytes,
) -> Response {
    let call = MethodCall {
        name,
        payload: body,
        connect_timeout: Duration::ZERO,
        response_timeout: METHOD_LIMIT,
    };
    let answer = match device.parse::<Identity>() {
        Ok(identity) => core.call(&identity, call).await,
        Err(error) => Err(error.into()),
    };
    match answer {
        Ok((status, payload)) => {
            let text = String::from_utf8_lossy(&payload).into_owned();
            Json(json!({ "status": status, "payloadText": text })).into_response()
        }
        Err(error) => refused(&error),
    }
}

async fn history(State(core): State<Arc<Core>>, Path(device): Path<String>) -> Response {
    let Ok(identity) = device.parse::<Identity>() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let book = core.book();
    let history = book.sessions.get(&identity).map(|session| &session.history);
    let changes: Value = history
        .into_iter()
        .flatten()
        .map(|change| {
            json!({
                "patch": change.patch,
                "version": change.version,
                "reported": change.reported,
            })
        })
        .collect();
    Json(changes).into_response()
}

async fn events(
    State(core): State<Arc<Core>>,
    Query(parameters): Query<HashMap<String, String>>,
) -> Json<Vec<Event>> {
    let from = parameters.get("from").and_then(|from| from.parse::<u64>().ok()).unwrap_or(0);
    let mut reader = core.events_from_start();
    let all = std::iter::from_fn(|| reader.try_next());
    Json(all.filter(|event| event.number >= from).collect())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ClockSetting {
    offset_seconds: i64,
}

async fn clock(State(core): State<Arc<Core>>, Json(setting): Json<ClockSetting>) -> StatusCode {
    core.clock.set_offset(setting.offset_seconds);
    StatusCode::NO_CONTENT
}
