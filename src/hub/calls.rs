//! Direct methods on their way: each is answered on its own, so that a slow one holds up nothing.

use std::collections::HashSet;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info};

use super::payload::{self, Rules};
use crate::request::{Answer, Request};

/// Calls that may wait for the agent at a time. The hub allows fewer.
const MAX_WAITING: usize = 64;

/// Calls that the agent has and did not answer yet.
#[derive(Debug)]
pub struct Calls {
    rules: Rules,
    request_ids: HashSet<String>,
    waiting: FuturesUnordered<BoxFuture<'static, (String, Option<Answer>)>>,
}

impl Calls {
    /// None yet.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Calls { rules, request_ids: HashSet::new(), waiting: FuturesUnordered::new() }
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.request_ids.is_empty()
    }

    /// Hands a call to the agent. Gives back the answer where there is one without it: the call
    /// cannot be carried out, or the agent takes no more. A call that is delivered twice while
    /// the first waits is one call.
    pub fn call(
        &mut self,
        agent: &mpsc::Sender<Request>,
        method: &str,
        request_id: &str,
        payload: &[u8],
    ) -> Option<Answer> {
        if self.request_ids.contains(request_id) {
            return None;
        }
        let command = match payload::command(method, payload, self.rules) {
            Ok(command) => command,
            Err(answer) => return Some(told(method, answer)),
        };
        if self.request_ids.len() >= MAX_WAITING {
            return Some(told(method, busy()));
        }
        let (reply, answer) = oneshot::channel();
        match agent.try_send(Request { command, reply }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Some(told(method, busy())),
            Err(mpsc::error::TrySendError::Closed(_)) => return Some(told(method, stopping())),
        }
        let (method, request_id) = (method.to_owned(), request_id.to_owned());
        self.request_ids.insert(request_id.clone());
        self.waiting.push(Box::pin(async move {
            (request_id, answer.await.ok().map(|answer| told(&method, answer)))
        }));
        None
    }

    /// The next call that the agent answered, by its request id; never, if none waits. Losing the
    /// future loses no answer.
    pub async fn answered(&mut self) -> (String, Answer) {
        match self.waiting.next().await {
            Some((request_id, answer)) => {
                self.request_ids.remove(&request_id);
                (request_id, answer.unwrap_or_else(stopping))
            }
            None => std::future::pending().await,
        }
    }

    /// Answers for all calls that still wait, because the session ends: the agent's where it has
    /// given one just now.
    pub fn give_up(&mut self) -> Vec<(String, Answer)> {
        let mut answers = Vec::new();
        while let Some(answered) = self.answered().now_or_never() {
            answers.push(answered);
        }
        self.waiting.clear();
        answers.extend(self.request_ids.drain().map(|request_id| (request_id, stopping())));
        answers
    }
}

/// Notes how a call ended. Never what was in it. Who only looks may look twice a second, all day.
fn told(method: &str, answer: Answer) -> Answer {
    let status = answer.status;
    if method == payload::STATUS && status == 200 {
        debug!(?method, status, "method answered");
    } else {
        let method = method.get(..64).unwrap_or(method);
        info!(?method, status, "method answered");
    }
    answer
}

fn busy() -> Answer {
    Answer::refused(503, "busy", "too many calls at once: call again in some seconds")
}

fn stopping() -> Answer {
    Answer::refused(500, "stopping", "twinboot is stopping: call again in a minute")
}
