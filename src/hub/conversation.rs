//! One connection from the subscriptions to its end: twin, reports, methods, and the quiet moment
//! in which it is given up for one with a new token.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, warn};

use super::calls::Calls;
use super::mirror::Mirror;
use super::topic::{self, Incoming};
use super::transport::{ConnectionError, Message, Transport};
use super::{HubLink, SessionStatus};
use crate::request::Answer;

/// How long the hub may take to take back the subscription to methods.
const UNSUBSCRIBE_LIMIT: Duration = Duration::from_secs(5);

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// The token is to be renewed, and nothing is under way.
    Renew,
    /// The hub or the network ended it.
    Lost,
    /// It looks alive, but the hub does not answer.
    Silent,
    /// The hub does not grant what twinboot needs.
    NotGranted(ConnectionError),
    /// The agent's ends of the channels are gone.
    AgentGone,
}

/// When a token must be renewed.
#[derive(Clone, Copy, Debug)]
pub struct Renewal {
    /// From here on in a quiet moment.
    pub due: Instant,
    /// Here in any case.
    pub latest: Instant,
}

/// One connection.
#[derive(Debug)]
pub struct Conversation<'a, T> {
    /// The connection.
    pub transport: &'a mut T,
    /// The agent.
    pub link: &'a mut HubLink,
    /// Calls that wait for the agent; they outlive the connection.
    pub calls: &'a mut Calls,
    /// The twin.
    pub mirror: Mirror,
    /// When to end, if the token runs out.
    pub renewal: Option<Renewal>,
    /// The hub and the identity, for people.
    pub peer: String,
}

enum Happened {
    Message(Option<Message>),
    Answered(String, Answer),
    ReportChanged,
    Delivered,
    AgentGone,
    Time,
    Drained,
}

impl<T: Transport> Conversation<'_, T> {
    /// Keeps twin and methods going until the connection ends.
    pub async fn run(mut self, limit: Duration) -> End {
        match timeout(limit, self.transport.subscribe(&topic::FILTERS)).await {
            Ok(Ok(())) => {}
            Ok(Err(ConnectionError::Lost)) => return End::Lost,
            Ok(Err(refused)) => return End::NotGranted(refused),
            Err(_) => return End::Silent,
        }
        match self.talk().await {
            Ok(end) => end,
            Err(error) => {
                debug!(%error, "connection ended");
                End::Lost
            }
        }
    }

    async fn talk(&mut self) -> Result<End, ConnectionError> {
        let mut closing = false;
        loop {
            if !closing {
                self.send_twin_request()?;
                if self.mirror.is_dead() {
                    return Ok(End::Silent);
                }
                if self.is_time_to_renew() {
                    self.take_no_more_calls().await?;
                    closing = true;
                }
            }
            self.tell();
            let quiet = self.is_quiet();
            let wake_at = self.wake_at(closing);
            // Cancel-safe: all of them. `receive` comes first, so that a connection is given up
            // only after everything that came over it was dealt with.
            let happened = tokio::select! {
                biased;
                message = self.transport.receive() => Happened::Message(message),
                (id, answer) = self.calls.answered() => Happened::Answered(id, answer),
                permit = self.link.desired.reserve(), if self.mirror.has_desired() => {
                    match (permit, self.mirror.take_desired()) {
                        (Ok(permit), Some(desired)) => {
                            permit.send(desired);
                            Happened::Delivered
                        }
                        _ => Happened::AgentGone,
                    }
                }
                changed = self.link.report.changed() => match changed {
                    Ok(()) => Happened::ReportChanged,
                    Err(_) => Happened::AgentGone,
                },
                () = std::future::ready(()), if closing && quiet => Happened::Drained,
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {
                    Happened::Time
                }
            };
            match happened {
                Happened::Message(Some(message)) => self.take(&message)?,
                Happened::Message(None) => return Ok(End::Lost),
                Happened::Answered(request_id, answer) => self.answer(&request_id, &answer)?,
                Happened::AgentGone => return Ok(End::AgentGone),
                Happened::Drained => return Ok(End::Renew),
                Happened::Time if closing => return Ok(End::Renew),
                Happened::Time | Happened::ReportChanged | Happened::Delivered => {}
            }
        }
    }

    fn send_twin_request(&mut self) -> Result<(), ConnectionError> {
        let report = self.link.report.borrow_and_update().clone();
        match self.mirror.next(&report, Instant::now()) {
            Some(request) => self.transport.publish(&request.topic, request.payload),
            None => Ok(()),
        }
    }

    fn take(&mut self, message: &Message) -> Result<(), ConnectionError> {
        match Incoming::parse(&message.topic) {
            Ok(Incoming::TwinAnswer { status, request_id }) => {
                self.mirror.answered(status, &request_id, &message.payload, Instant::now());
            }
            Ok(Incoming::Desired { version }) => self.mirror.notified(version, &message.payload),
            Ok(Incoming::Method { name, request_id }) => {
                let requests = &self.link.requests;
                let answer = self.calls.call(requests, &name, &request_id, &message.payload);
                if let Some(answer) = answer {
                    self.answer(&request_id, &answer)?;
                }
            }
            Err(error) => warn!(%error, "message ignored"),
        }
        Ok(())
    }

    fn answer(&mut self, request_id: &str, answer: &Answer) -> Result<(), ConnectionError> {
        let topic = topic::method_answer(answer.status, request_id);
        self.transport.publish(&topic, answer.body.to_string().into_bytes())
    }

    /// No call, no twin request, nothing the agent must still be given.
    fn is_quiet(&self) -> bool {
        self.calls.is_empty() && self.mirror.is_quiet() && !self.mirror.has_desired()
    }

    fn is_time_to_renew(&self) -> bool {
        let now = Instant::now();
        self.renewal
            .is_some_and(|renewal| renewal.latest <= now || (renewal.due <= now && self.is_quiet()))
    }

    /// Takes back the subscription to methods. A call between that and the next connection is
    /// refused by the hub, which its caller learns at once; without this it could be delivered
    /// into the closing connection, and its caller would wait for an answer in vain.
    async fn take_no_more_calls(&mut self) -> Result<(), ConnectionError> {
        let taken_back = self.transport.unsubscribe(topic::METHODS);
        match timeout(UNSUBSCRIBE_LIMIT, taken_back).await {
            Ok(result) => result,
            Err(_) => {
                debug!("the hub does not confirm the end of the subscription to methods");
                Ok(())
            }
        }
    }

    /// When something must be done even if nothing happens.
    fn wake_at(&self, closing: bool) -> Option<Instant> {
        let renewal = self.renewal.map(
            |Renewal { due, latest }| {
                if closing || due <= Instant::now() { latest } else { due }
            },
        );
        let mirror = if closing { None } else { self.mirror.wake_at() };
        renewal.into_iter().chain(mirror).min()
    }

    fn tell(&self) {
        let online = self.mirror.is_read();
        let mut text = format!("connected to {}", self.peer);
        if let Some(trouble) = self.mirror.trouble() {
            text.push_str("; ");
            text.push_str(trouble);
        } else if !online {
            text.push_str("; reading the twin");
        }
        let status = SessionStatus {
            online,
            acknowledged: self.mirror.acknowledged(),
            answered: self.mirror.answered_generation(),
            out_of_reach: false,
            text,
        };
        self.link.status.send_if_modified(|shown| {
            let changed = *shown != status;
            *shown = status;
            changed
        });
    }
}
