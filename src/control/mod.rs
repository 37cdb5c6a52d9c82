//! The local socket between the daemon and the device command: one JSON line each way.
//!
//! The daemon is the only writer of slots, boot variables and state; the command only asks. Who
//! may ask is decided by the permissions of the socket.

mod client;
mod server;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use client::{Client, ClientError};
pub use server::{Server, ServerError};

/// Longest line in either direction, so that a stranger cannot fill the memory.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// What the device command asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Ask {
    /// Where things stand.
    Status,
    /// Install an image.
    Install {
        /// `https` URL, or `file` URL of the device itself.
        url: String,
        /// SHA-256 of the file at the URL.
        sha256: Option<String>,
        /// The version in it.
        version: Option<String>,
    },
    /// Take an update back.
    Cancel,
    /// Mark the running slot good.
    Confirm,
    /// Go back to the other slot.
    Rollback,
}

/// What the daemon says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    /// As in HTTP: 200 done or accepted, 400 wrong, 409 not now, 500 failed.
    pub status: u16,
    /// An object; with `error` and `message` unless the status is 200.
    pub body: Value,
}
