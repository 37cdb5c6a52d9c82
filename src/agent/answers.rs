//! Verdicts of the core as answers to people and programs.

use serde_json::{Map, Value, json};

use crate::request::Answer;
use crate::update::{RunId, Verdict};

/// The answer that tells `verdict`.
#[must_use]
pub fn answer(verdict: &Verdict) -> Answer {
    match verdict {
        Verdict::Accepted(id) => told("accepted", "Firmware update started", Some(id)),
        Verdict::AlreadyRunning(id) => {
            told("alreadyRunning", "This firmware update is already under way", Some(id))
        }
        Verdict::Cancelled(id) => told("cancelled", "Firmware update cancelled", Some(id)),
        Verdict::Confirming => told("confirming", "The running slot is being confirmed", None),
        Verdict::RollingBack => told("rollingBack", "Going back to the other slot", None),
        Verdict::Restarting => told("restarting", "Reboot started", None),
        Verdict::Busy(id) => refused(
            "busy",
            "Another firmware update is under way; wait for its end, or cancel it",
            Some(id),
        ),
        Verdict::TooLate(id) => refused(
            "tooLate",
            "The new slot is about to be tried or is being tried; wait for its end, or call \
             roll back during the trial",
            Some(id),
        ),
        Verdict::Unconfirmed => refused(
            "unconfirmed",
            "The running slot is not confirmed, so the other one may be the only good one; \
             confirm it first",
            None,
        ),
        Verdict::NoWayBack => refused(
            "noWayBack",
            "The other slot holds no image known to be whole; install one first",
            None,
        ),
        Verdict::Nothing => refused("nothing", "There is nothing this applies to now", None),
    }
}

fn told(result: &str, message: &str, id: Option<&RunId>) -> Answer {
    let mut body = Map::new();
    body.insert("result".to_owned(), json!(result));
    body.insert("message".to_owned(), json!(message));
    if let Some(id) = id {
        body.insert("id".to_owned(), json!(id));
    }
    Answer::ok(body)
}

fn refused(error: &str, message: &str, id: Option<&RunId>) -> Answer {
    let mut answer = Answer::refused(409, error, message);
    if let (Value::Object(body), Some(id)) = (&mut answer.body, id) {
        body.insert("id".to_owned(), json!(id));
    }
    answer
}
