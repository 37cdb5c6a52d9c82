//! A page for people, and the read-only document it shows. No token, therefore no keys.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{Html, Response};
use serde_json::{Value, json};

use super::answer::document;
use crate::core::Core;

pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("../page.html"))
}

pub(super) async fn devices(State(core): State<Arc<Core>>) -> Response {
    document(&view(&core))
}

/// Every device and module with its twin.
pub(crate) fn view(core: &Core) -> Value {
    let book = core.book();
    book.records
        .iter()
        .map(|(identity, record)| {
            let twin = record.twin_json(identity, book.connected(identity));
            json!({
                "deviceId": identity.device_id(),
                "moduleId": identity.module_id(),
                "connectionState": twin.get("connectionState"),
                "lastActivityTime": record.last_activity,
                "telemetryCount": record.telemetry_count,
                "twin": twin,
            })
        })
        .collect()
}
