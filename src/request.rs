//! What can be asked of the agent, from the cloud and on the device, and how it answers.

use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use crate::update::{Job, Origin};

/// One question to the agent. Dropping `reply` unanswered means that the agent is going down.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Answer>,
}

/// What is asked.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a handful exist at a time")]
pub enum Command {
    /// Install an image; the origin is [`Origin::Method`] or [`Origin::Local`].
    Install(Job, Origin),
    /// Take back an update that was not tried yet.
    Cancel,
    /// Tell where things stand.
    Status,
    /// Mark the running slot good without waiting for the checks.
    Confirm,
    /// Go back to the other slot; the origin is [`Origin::Method`] or [`Origin::Local`].
    RollBack(Origin),
    /// Restart the machine.
    Reboot,
}

/// The agent's answer: a status in the manner of HTTP, as direct methods have it, and a body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    /// 200 done or accepted, 400 wrong, 409 not now, 500 failed.
    pub status: u16,
    /// Always an object; with `error` and `message` unless the status is 200.
    pub body: Value,
}

impl Answer {
    /// 200 with these members.
    #[must_use]
    pub fn ok(body: Map<String, Value>) -> Self {
        Answer { status: 200, body: Value::Object(body) }
    }

    /// A refusal: `error` is one word for programs, `message` a sentence that says what to do.
    #[must_use]
    pub fn refused(status: u16, error: &str, message: impl Into<String>) -> Self {
        Answer { status, body: json!({ "error": error, "message": message.into() }) }
    }
}
