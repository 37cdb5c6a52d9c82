//! The twin as one connection knows it: what the hub holds, what is in flight, what comes next.
//!
//! Decides without doing: times come in, topics and bodies go out. The rules are the flow that
//! Microsoft recommends after every connect: read the twin, take desired patches by their
//! version, read again when one is missing, report what differs. A report that the hub refuses for
//! what it holds is made smaller, step by step.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Desired, Report, reduction, topic, twin};
use crate::backoff::Backoff;

/// Requests in a row without an answer after which the connection counts as dead.
const MAX_UNANSWERED: u8 = 2;
/// Desired patches that wait for one before them; with more the twin is read instead.
const MAX_WAITING: usize = 64;
/// How much of the hub's explanation of a refusal is shown.
const MAX_EXPLANATION_CHARS: usize = 300;
/// How long a smaller report does before the whole one is tried again in the same connection.
const WHOLE_AGAIN: Duration = Duration::from_secs(3600);

/// A message to send.
#[derive(Clone, Debug, PartialEq)]
pub struct Outgoing {
    /// Its topic.
    pub topic: String,
    /// Its body.
    pub payload: Vec<u8>,
}

/// The twin as one connection knows it. At most one request is in flight.
#[derive(Debug)]
pub struct Mirror {
    reply_limit: Duration,
    backoff: Backoff,
    /// The desired section and its version, once read.
    desired: Option<(Map<String, Value>, u64)>,
    /// Desired patches by version that could not be merged yet.
    waiting: BTreeMap<u64, Map<String, Value>>,
    /// What the agent has yet to be given.
    undelivered: Option<Desired>,
    /// The reported section, as far as this connection knows it.
    reported: Map<String, Value>,
    /// Whether the twin must be read before anything else.
    stale: bool,
    in_flight: Option<InFlight>,
    last_id: u64,
    unanswered: u8,
    hold_until: Option<Instant>,
    /// The patch that the hub refused, which would be refused again.
    refused: Option<Map<String, Value>>,
    /// How much of the report is left out, because the hub refused more.
    reduced: Option<Reduced>,
    acknowledged: u64,
    answered: u64,
    trouble: Option<String>,
}

/// See [`reduction`].
#[derive(Debug)]
struct Reduced {
    steps: usize,
    /// Until the whole report is tried again.
    until: Instant,
    /// For people.
    told: String,
}

#[derive(Debug)]
struct InFlight {
    request_id: String,
    request: TwinRequest,
    deadline: Instant,
}

#[derive(Debug)]
enum TwinRequest {
    Read,
    Patch {
        patch: Map<String, Value>,
        generation: u64,
        /// Steps of reduction that would send something else, if there are any.
        smaller: Option<usize>,
    },
}

impl Mirror {
    /// Knows nothing yet. An answer is waited for `reply_limit`; `backoff` spaces what must be
    /// tried again.
    #[must_use]
    pub fn new(reply_limit: Duration, backoff: Backoff) -> Self {
        Mirror {
            reply_limit,
            backoff,
            desired: None,
            waiting: BTreeMap::new(),
            undelivered: None,
            reported: Map::new(),
            stale: true,
            in_flight: None,
            // Not 0, so that an answer to an earlier connection is not taken for one of ours.
            last_id: u64::from(fastrand::u32(..)),
            unanswered: 0,
            hold_until: None,
            refused: None,
            reduced: None,
            acknowledged: 0,
            answered: 0,
            trouble: None,
        }
    }

    /// Whether the twin has been read.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.desired.is_some()
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.in_flight.is_none()
    }

    /// Whether the hub leaves requests unanswered on a connection that looks alive.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.unanswered >= MAX_UNANSWERED
    }

    /// Generation of the newest report that the hub holds, as far as it takes it; 0 if none.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Generation of the newest report that the hub has answered in any way; 0 if none.
    #[must_use]
    pub fn answered_generation(&self) -> u64 {
        self.answered
    }

    /// What does not go well, for people.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref().or(self.reduced.as_ref().map(|reduced| reduced.told.as_str()))
    }

    /// When [`Mirror::next`] must be asked again even if nothing happens.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        match &self.in_flight {
            Some(in_flight) => Some(in_flight.deadline),
            None => self.hold_until.or(self.reduced.as_ref().map(|reduced| reduced.until)),
        }
    }

    /// The request to send now, if any; it then counts as sent.
    pub fn next(&mut self, report: &Report, now: Instant) -> Option<Outgoing> {
        if self.in_flight.as_ref().is_some_and(|in_flight| in_flight.deadline <= now) {
            self.give_up_waiting();
        }
        if self.is_dead()
            || self.in_flight.is_some()
            || self.hold_until.is_some_and(|until| now < until)
        {
            return None;
        }
        self.hold_until = None;
        self.reduced.take_if(|reduced| reduced.until <= now);
        let request_id = self.last_id.saturating_add(1).to_string();
        let (request, topic, payload) = if self.stale {
            (TwinRequest::Read, topic::read_twin(&request_id), Vec::new())
        } else {
            let (patch, smaller) = self.patch(report)?;
            let payload = Value::Object(patch.clone()).to_string().into_bytes();
            let request = TwinRequest::Patch { patch, generation: report.generation, smaller };
            (request, topic::patch_reported(&request_id), payload)
        };
        self.last_id = self.last_id.saturating_add(1);
        self.in_flight = Some(InFlight { request_id, request, deadline: now + self.reply_limit });
        Some(Outgoing { topic, payload })
    }

    /// The hub answered a twin request. Answers to nothing are ignored: they are late, and what
    /// they tell has been asked again.
    pub fn answered(&mut self, status: u16, request_id: &str, body: &[u8], now: Instant) {
        let Some(in_flight) = self.in_flight.take_if(|waiting| waiting.request_id == request_id)
        else {
            debug!(request_id, status, "late answer to a twin request");
            return;
        };
        self.unanswered = 0;
        match in_flight.request {
            TwinRequest::Read => self.read_answered(status, body, now),
            TwinRequest::Patch { patch, generation, smaller } => {
                self.answered = generation;
                match (status, smaller) {
                    (400 | 413, Some(steps)) => self.reduce(steps, status, body, now),
                    _ => self.patch_answered(status, body, patch, generation, now),
                }
            }
        }
    }

    /// A desired patch came. `version` is that of the topic; the body may tell it too.
    pub fn notified(&mut self, version: Option<u64>, body: &[u8]) {
        let Ok(Value::Object(mut patch)) = serde_json::from_slice(body) else {
            warn!(bytes = body.len(), "a desired patch is no JSON object; the twin is read");
            self.stale = true;
            return;
        };
        let in_body = patch.remove("$version").and_then(|version| version.as_u64());
        let Some(version) = version.or(in_body) else {
            self.stale = true;
            return;
        };
        self.waiting.insert(version, patch);
        if self.waiting.len() > MAX_WAITING {
            self.waiting.clear();
            self.stale = true;
        }
        self.merge_waiting();
    }

    /// The desired document that the agent has not been given yet.
    pub fn take_desired(&mut self) -> Option<Desired> {
        self.undelivered.take()
    }

    /// Whether there is one.
    #[must_use]
    pub fn has_desired(&self) -> bool {
        self.undelivered.is_some()
    }

    /// What differs between `report` and the hub's section and was not refused already, and the
    /// next step of reduction that sends something else. Notes that the report is acknowledged if
    /// nothing differs.
    fn patch(&mut self, report: &Report) -> Option<(Map<String, Value>, Option<usize>)> {
        let steps = self.reduced.as_ref().map_or(0, |reduced| reduced.steps);
        let patch = self.difference(report, steps);
        if patch.is_empty() {
            (self.acknowledged, self.answered) = (report.generation, report.generation);
            (self.refused, self.trouble) = (None, None);
            return None;
        }
        if self.refused.as_ref() == Some(&patch) {
            self.answered = report.generation;
            return None;
        }
        let mut more = (steps..=reduction::ALL).skip(1);
        let smaller = more.find(|steps| self.difference(report, *steps) != patch);
        Some((patch, smaller))
    }

    /// What differs between `report`, reduced by so many steps, and the hub's section.
    fn difference(&self, report: &Report, steps: usize) -> Map<String, Value> {
        let document = twin::fit(&reduction::reduced(&report.document, steps));
        twin::difference(&document, &self.reported)
    }

    /// The hub refused a report for what it holds, and there is a smaller one.
    fn reduce(&mut self, steps: usize, status: u16, body: &[u8], now: Instant) {
        let told = format!(
            "the hub refuses the whole report ({status}{}); it goes without: {}",
            explanation(body),
            reduction::left_out(steps)
        );
        if self.reduced.is_none() {
            warn!("{told}");
        }
        self.reduced = Some(Reduced { steps, until: now + WHOLE_AGAIN, told });
    }

    /// No answer came. A patch may or may not have been applied, so the twin is read.
    fn give_up_waiting(&mut self) {
        self.in_flight = None;
        self.stale = true;
        self.unanswered = self.unanswered.saturating_add(1);
        debug!(in_a_row = self.unanswered, "no answer to a twin request");
    }

    fn read_answered(&mut self, status: u16, body: &[u8], now: Instant) {
        let twin = if status == 200 { serde_json::from_slice(body).ok() } else { None };
        let Some((desired, reported)) = twin.and_then(sections) else {
            let problem = explanation(body);
            self.hold(now, format!("the hub does not hand out the twin ({status}{problem})"));
            return;
        };
        self.stale = false;
        self.recovered();
        let version = desired.get("$version").and_then(Value::as_u64).unwrap_or(0);
        let mut document = Map::new();
        twin::merge(&mut document, &desired);
        let known = self.desired.as_ref().map(|(document, version)| (document, *version));
        if known != Some((&document, version)) {
            self.deliver(Desired { document: document.clone(), version, patch: None });
        }
        self.desired = Some((document, version));
        self.reported = reported;
        self.merge_waiting();
    }

    fn patch_answered(
        &mut self,
        status: u16,
        body: &[u8],
        patch: Map<String, Value>,
        generation: u64,
        now: Instant,
    ) {
        match status {
            200..=299 => {
                twin::merge(&mut self.reported, &patch);
                self.acknowledged = generation;
                self.refused = None;
                self.recovered();
            }
            429 => self.hold(now, "the hub throttles reports (429)".to_owned()),
            // Whether it was applied is not known.
            500..=599 => {
                self.stale = true;
                self.hold(now, format!("the hub has trouble with reports ({status})"));
            }
            _ => {
                let text = format!("the hub refuses the report ({status}{})", explanation(body));
                if self.refused.is_none() {
                    warn!(members = ?patch.keys().collect::<Vec<_>>(), "{text}");
                }
                self.refused = Some(patch);
                self.hold(now, text);
            }
        }
    }

    fn hold(&mut self, now: Instant, trouble: String) {
        let delay = self.backoff.delay();
        debug!(retry_in_s = delay.as_secs_f32(), trouble, "twin request put off");
        self.hold_until = Some(now + delay);
        self.trouble = Some(trouble);
    }

    fn recovered(&mut self) {
        if self.refused.is_none() {
            self.backoff.reset();
            self.trouble = None;
        }
    }

    /// Merges what waits, as far as no version is missing; if one is, the twin is read.
    fn merge_waiting(&mut self) {
        let Some((mut document, mut version)) = self.desired.take() else { return };
        while let Some((next, patch)) = self.waiting.pop_first() {
            if next <= version {
                debug!(version = next, "desired patch is known already");
            } else if next == version.saturating_add(1) {
                twin::merge(&mut document, &patch);
                version = next;
                self.deliver(Desired { document: document.clone(), version, patch: Some(patch) });
            } else {
                self.waiting.insert(next, patch);
                self.stale = true;
                break;
            }
        }
        self.desired = Some((document, version));
    }

    /// The agent gets the newest document; the patches it did not see yet come as one, because
    /// what was written counts even if nothing of it is new.
    fn deliver(&mut self, newer: Desired) {
        let patch = match (self.undelivered.take().and_then(|older| older.patch), newer.patch) {
            (Some(mut older), Some(newer)) => {
                overlay(&mut older, newer);
                Some(older)
            }
            (older, newer) => older.or(newer),
        };
        self.undelivered = Some(Desired { patch, ..newer });
    }
}

/// Two patches as one: as a merge, but nulls stay.
fn overlay(older: &mut Map<String, Value>, newer: Map<String, Value>) {
    for (key, value) in newer {
        match (older.get_mut(&key), value) {
            (Some(Value::Object(older)), Value::Object(newer)) => overlay(older, newer),
            (_, value) => {
                older.insert(key, value);
            }
        }
    }
}

/// Desired and reported section of a whole twin.
fn sections(twin: Value) -> Option<(Map<String, Value>, Map<String, Value>)> {
    let Value::Object(mut twin) = twin else { return None };
    match (twin.remove("desired"), twin.remove("reported")) {
        (Some(Value::Object(desired)), Some(Value::Object(reported))) => Some((desired, reported)),
        _ => None,
    }
}

/// What the hub says about a refusal, as the end of a text in brackets.
fn explanation(body: &[u8]) -> String {
    let body: Option<Value> = serde_json::from_slice(body).ok();
    let message = body.as_ref().and_then(|body| body.get("message")?.as_str());
    message
        .map(|text| {
            let shown = text.chars().filter(|c| !c.is_control()).take(MAX_EXPLANATION_CHARS);
            format!(": {}", shown.collect::<String>())
        })
        .unwrap_or_default()
}
