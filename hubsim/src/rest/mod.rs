//! The service interface: HTTPS with JSON, as Microsoft's service SDKs call it.

mod answer;
mod devices;
mod methods;
mod query;
mod twins;
pub(crate) mod view;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::UPGRADE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};

use crate::core::Core;
use crate::websocket;

/// Largest request body: a method's payload with room around it.
const MAX_BODY: usize = 1024 * 1024;

/// Everything on the HTTPS port.
pub(crate) fn router(core: Arc<Core>) -> Router {
    Router::new()
        .route("/", get(view::page))
        .route("/api/view", get(view::devices))
        .route("/$iothub/websocket", get(websocket::upgrade))
        .route("/twins/{device}", get(twins::read).patch(twins::merge).put(twins::replace))
        .route(
            "/twins/{device}/modules/{module}",
            get(twins::read).patch(twins::merge).put(twins::replace),
        )
        .route("/twins/{device}/methods", post(methods::call))
        .route("/twins/{device}/modules/{module}/methods", post(methods::call))
        .route("/devices", get(devices::list).post(devices::import))
        // Microsoft's Node SDK writes these two with a slash at the end.
        .route("/devices/", get(devices::list).post(devices::import))
        .route("/devices/query", post(query::run))
        .route("/devices/{device}", get(devices::read).put(devices::put).delete(devices::delete))
        .route("/devices/{device}/modules", get(devices::modules))
        .route(
            "/devices/{device}/modules/{module}",
            get(devices::read).put(devices::put).delete(devices::delete),
        )
        .route("/statistics/devices", get(devices::statistics))
        .route("/statistics/service", get(devices::service_statistics))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(core)
}

/// A WebSocket on another path is answered with 400 as the hub does, anything else with 404.
async fn unknown(headers: HeaderMap) -> Response {
    let status =
        if headers.contains_key(UPGRADE) { StatusCode::BAD_REQUEST } else { StatusCode::NOT_FOUND };
    (status, "no such resource").into_response()
}
