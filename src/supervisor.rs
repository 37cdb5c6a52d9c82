//! Tells systemd how the service is: ready, alive, and what it does in one sentence.

use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

use crate::agent::Supervisor;

/// Messages that may wait for a systemd that does not listen; more are dropped.
const MESSAGES: usize = 16;

/// How long the last message may take.
const LAST_LIMIT: Duration = Duration::from_secs(1);

/// systemd, or nobody when the daemon was started by hand.
///
/// A message blocks while systemd's queue is full, so that a thread of its own sends them: an
/// update goes on, and can be asked for, on a device whose systemd hangs.
#[derive(Debug)]
pub struct Systemd {
    messages: SyncSender<Message>,
    told: Mutex<String>,
}

#[derive(Debug)]
enum Message {
    Ready,
    Alive,
    Status(String),
    /// The last one; says when it was sent.
    Stopping(SyncSender<()>),
}

impl Default for Systemd {
    fn default() -> Self {
        let (messages, queue) = mpsc::sync_channel(MESSAGES);
        thread::spawn(move || queue.iter().for_each(|message| send(&message)));
        Systemd { messages, told: Mutex::default() }
    }
}

impl Systemd {
    /// The configuration and the state are good, and the loop is about to run.
    pub fn ready(&self) {
        self.tell(Message::Ready);
    }

    /// The service is about to end. Returns when systemd knows, or does not listen.
    pub fn stopping(&self) {
        let (sent, wait) = mpsc::sync_channel(1);
        if self.tell(Message::Stopping(sent)) {
            // The message is for people; the stop goes on without it.
            let _ = wait.recv_timeout(LAST_LIMIT);
        }
    }

    fn tell(&self, message: Message) -> bool {
        match self.messages.try_send(message) {
            Ok(()) => true,
            Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) => {
                debug!(?message, "systemd does not listen");
                false
            }
        }
    }
}

impl Supervisor for Systemd {
    fn alive(&self) {
        self.tell(Message::Alive);
    }

    fn status(&self, sentence: &str) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != sentence && self.tell(Message::Status(sentence.to_owned())) {
            sentence.clone_into(&mut told);
        }
    }
}

fn send(message: &Message) {
    let state = match message {
        Message::Ready => NotifyState::Ready,
        Message::Alive => NotifyState::Watchdog,
        Message::Status(sentence) => NotifyState::Status(sentence),
        Message::Stopping(_) => NotifyState::Stopping,
    };
    if let Err(error) = sd_notify::notify(&[state]) {
        debug!(%error, "systemd could not be told");
    }
    if let Message::Stopping(sent) = message {
        // Who waited may have gone.
        let _ = sent.send(());
    }
}
