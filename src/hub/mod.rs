//! The Azure IoT Hub session: one connection, the device twin, direct methods.
//!
//! The agent sees only [`HubLink`]'s other ends: requests and desired documents come in, one
//! report goes out. Nothing is queued: the report is the newest picture of the saved state, and
//! the session keeps the hub's copy equal to it.

pub mod calls;
pub mod conversation;
pub mod credential;
pub mod diagnose;
pub mod mirror;
pub mod paho;
pub mod payload;
pub mod reduction;
pub mod session;
pub mod topic;
pub mod transport;
pub mod twin;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{mpsc, watch};

use crate::request::Request;

/// The session's ends of the channels to the agent.
#[derive(Debug)]
pub struct HubLink {
    /// Direct methods, parsed; the session answers unknown and malformed ones itself.
    pub requests: mpsc::Sender<Request>,
    /// Desired documents, newest last.
    pub desired: mpsc::Sender<Desired>,
    /// What the twin's reported section is to show.
    pub report: watch::Receiver<Arc<Report>>,
    /// How the session is, for status, health checks and answers that wait for a report.
    pub status: watch::Sender<SessionStatus>,
}

/// The desired section of the twin.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// The whole section after the merge, without `$version` and `$metadata`.
    pub document: Map<String, Value>,
    /// Its `$version`.
    pub version: u64,
    /// The patch that led to it, if it came as a live notification; `None` after a read of the
    /// whole twin. A key in it was written by somebody just now, even if its value is the same.
    pub patch: Option<Map<String, Value>>,
}

/// What the twin is to show. Only the top-level members named here are ours; members of the
/// hub's reported section under other names are left alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Goes up by one with every new report of this process.
    pub generation: u64,
    /// Whole content of our top-level members. A member that is null is deleted from the twin.
    pub document: Map<String, Value>,
    /// Time since boot at which a trial is lost that waits for this session; the session tries
    /// more often until then.
    pub trial_ends: Option<Duration>,
}

/// How the session is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SessionStatus {
    /// Whether twin and methods work now.
    pub online: bool,
    /// Generation of the newest report that the hub has acknowledged in this session, whole or as
    /// much of it as the twin has room for; 0 while there is none. A new connection starts again
    /// with 0.
    pub acknowledged: u64,
    /// Generation of the newest report that the hub has answered in this session, be it with a
    /// refusal: twin and reports went there and back. Otherwise as `acknowledged`.
    pub answered: u64,
    /// Whether the hub could not be reached when it was last tried, or could not be tried without
    /// the time, which comes over the network too. False where it was reached and refused, and where
    /// something on this device is wrong.
    pub out_of_reach: bool,
    /// One sentence for people: what the session does, or why it is not online and what to do.
    pub text: String,
}
