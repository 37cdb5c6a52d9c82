//! Queries over twins, in pages.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use serde_json::Value;

use super::answer::{Failure, authorize, document, json_body};
use crate::access::Right;
use crate::core::Core;
use crate::error::HubError;

const PAGE_SIZE: HeaderName = HeaderName::from_static("x-ms-max-item-count");
const CONTINUATION: HeaderName = HeaderName::from_static("x-ms-continuation");
const ITEM_TYPE: HeaderName = HeaderName::from_static("x-ms-item-type");
const DEFAULT_PAGE: usize = 100;

pub(super) async fn run(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::ServiceConnect)?;
    let failure = |error| Failure::new(&core, error);
    let body = json_body(&core, &body)?;
    let text = body.get("query").and_then(Value::as_str);
    let text = text.ok_or_else(|| failure(HubError::ArgumentInvalid("no `query`".to_owned())))?;
    let size = number(&headers, &PAGE_SIZE).map_err(failure)?.unwrap_or(DEFAULT_PAGE);
    let start = number(&headers, &CONTINUATION).map_err(failure)?.unwrap_or(0);
    let (items, item_type) = core.query(text).map_err(failure)?;
    let next = start.saturating_add(size.max(1));
    let more = items.len() > next;
    let page: Vec<Value> = items.into_iter().skip(start).take(size.max(1)).collect();
    let mut response = document(&Value::Array(page));
    response.headers_mut().insert(ITEM_TYPE, HeaderValue::from_static(item_type));
    if more {
        response.headers_mut().insert(CONTINUATION, HeaderValue::from(next));
    }
    Ok(response)
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Result<Option<usize>, HubError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let value = value.to_str().unwrap_or_default().trim();
    if value.is_empty() {
        return Ok(None);
    }
    let number = value.parse().map_err(|_| {
        HubError::ArgumentInvalid(format!("header {name} = {value:?}: must be a number"))
    })?;
    Ok(Some(number))
}
