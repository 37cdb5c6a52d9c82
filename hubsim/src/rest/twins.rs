//! Twins: read, merged, replaced.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;

use super::answer::{Failure, Target, authorize, document, if_match, json_body};
use crate::access::Right;
use crate::core::Core;
use crate::twin::Write;

pub(super) async fn read(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    Target(identity): Target,
) -> Result<Response, Failure> {
    authorize(&core, &headers, Right::ServiceConnect)?;
    let twin = core.twin(&identity).map_err(|error| Failure::new(&core, error))?;
    Ok(document(&twin))
}

pub(super) async fn merge(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    target: Target,
    body: Bytes,
) -> Result<Response, Failure> {
    write(&core, &headers, target, &body, Write::Merge)
}

pub(super) async fn replace(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    target: Target,
    body: Bytes,
) -> Result<Response, Failure> {
    write(&core, &headers, target, &body, Write::Replace)
}

fn write(
    core: &Core,
    headers: &HeaderMap,
    Target(identity): Target,
    body: &[u8],
    mode: Write,
) -> Result<Response, Failure> {
    authorize(core, headers, Right::ServiceConnect)?;
    let body = json_body(core, body)?;
    let twin = core.write_twin(&identity, &body, mode, if_match(headers).as_ref());
    twin.map(|twin| document(&twin)).map_err(|error| Failure::new(core, error))
}
