//! The life of the session: wait for the clock, log in, hold one conversation after the other,
//! and between them wait as long as the reason for the last end asks for.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::calls::Calls;
use super::conversation::{Conversation, End, Renewal};
use super::credential::{Credential, CredentialError, Login, Source};
use super::mirror::Mirror;
use super::payload::Rules;
use super::topic;
use super::transport::{ConnectError, Transport};
use super::{HubLink, SessionStatus};
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::config;
use crate::logging::chain;
use crate::update::WallTime;

/// A connection that held this long was a good one.
const STABLE: Duration = Duration::from_secs(60);
/// Connections in a row that were cut early, after which somebody else is suspected.
const SUSPICIOUS_LOSSES: u32 = 3;
/// Connections in a row that the hub closed without a CONNACK, after which that is a refusal.
const REFUSING_CLOSES: u32 = 2;
/// Refusals in a row after which the wait is as long as it ever is.
const FULL_REFUSALS: u32 = 4;
/// Part of a token's life after which it is renewed in a quiet moment, in percent.
const RENEW_DUE_PERCENT: u32 = 80;
/// Part of a token's life after which it is renewed in any case, in percent.
const RENEW_LATEST_PERCENT: u32 = 95;
/// After a good connection a device comes back within this time, drawn evenly: a hub that restarts
/// must not have its whole fleet back in one second.
const RETURN_SPREAD: Duration = Duration::from_secs(20);
/// While a trial waits for the hub, no delay is longer than this part of what is left of it...
const TRIAL_PART: u32 = 4;
/// ...as long as that is more than this.
const TRIAL_PACE: Duration = Duration::from_secs(5);
/// How long a stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How often the clock is looked at while it is waited for.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);
/// A clock that moved further than this was set.
const CLOCK_STEP: Duration = Duration::from_secs(30);

/// Times of a session.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Life of a SAS token.
    pub token_lifetime: Duration,
    /// Longest first delay after a lost connection.
    pub retry_min: Duration,
    /// Longest delay.
    pub retry_max: Duration,
    /// Longest delay after a refused credential.
    pub refused_retry: Duration,
    /// How long the hub may take to answer.
    pub reply_limit: Duration,
}

impl From<&config::Hub> for Timing {
    fn from(hub: &config::Hub) -> Self {
        Timing {
            token_lifetime: hub.token_lifetime_s.duration(),
            retry_min: hub.retry_min_s.duration(),
            retry_max: hub.retry_max_s.duration(),
            refused_retry: hub.refused_retry_s.duration(),
            reply_limit: hub.connect_limit_s.duration(),
        }
    }
}

/// The session.
#[allow(missing_debug_implementations, reason = "holds trait objects")]
pub struct Session<T> {
    /// How MQTT travels.
    pub transport: T,
    /// Who the device is; read anew for every connection. A systemd credential is a copy that
    /// systemd made when the service started.
    pub source: Source,
    /// The agent.
    pub link: HubLink,
    /// Wall time for tokens.
    pub clock: Arc<dyn Clock>,
    /// What the cloud may ask for.
    pub rules: Rules,
    /// How long things may take.
    pub timing: Timing,
}

/// How an attempt to hold a conversation ended.
enum Attempt {
    /// Connect again at once.
    Renew,
    /// It was online for this long.
    Lost { online: Duration, why: String },
    /// There was no connection; the next try may do better.
    Failed(String),
    /// The same: the hub could not be reached.
    Unreached(String),
    /// The hub closed the connection without a word.
    Closed(String),
    /// The next try will not do better unless somebody acts.
    Refused(String),
    /// There is nobody left to talk for.
    AgentGone,
}

/// What the attempts so far tell.
struct Record {
    backoff: Backoff,
    early_losses: u32,
    closes: u32,
    refusals: u32,
}

impl<T: Transport> Session<T> {
    /// Keeps the session up until `cancel`, or until the agent's ends of the channels are gone.
    /// Then it says goodbye to the hub, which takes 2 seconds at most.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut calls = Calls::new(self.rules);
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.keep_up(&mut calls) => {}
        }
        for (request_id, answer) in calls.give_up() {
            let topic = topic::method_answer(answer.status, &request_id);
            if self.transport.publish(&topic, answer.body.to_string().into_bytes()).is_err() {
                break;
            }
        }
        if timeout(STOP_LIMIT, self.transport.disconnect()).await.is_err() {
            debug!("the hub connection did not close in time");
        }
        self.tell_offline("the hub session has ended".to_owned());
    }

    async fn keep_up(&mut self, calls: &mut Calls) {
        let backoff = Backoff::new(self.timing.retry_min, self.timing.retry_max);
        let mut record = Record { backoff, early_losses: 0, closes: 0, refusals: 0 };
        loop {
            let attempt = self.attempt(calls).await;
            record.note(&attempt);
            let out_of_reach = matches!(attempt, Attempt::Unreached(_));
            let (why, delay) = match attempt {
                Attempt::Renew => continue,
                Attempt::AgentGone => return,
                Attempt::Refused(why) => (why, self.slow_delay(record.refused())),
                Attempt::Closed(why) if record.closes >= REFUSING_CLOSES => {
                    (why, self.slow_delay(record.refused()))
                }
                Attempt::Closed(why) | Attempt::Failed(why) | Attempt::Unreached(why) => {
                    (why, record.backoff.delay())
                }
                Attempt::Lost { why, online } if online >= STABLE => (why, self.return_delay()),
                Attempt::Lost { why, .. } => (record.suspect(why), record.backoff.delay()),
            };
            let hurry = 0.5 + fastrand::f64() / 2.0;
            let next_try_s = self.in_time(delay, hurry).as_secs().saturating_add(1);
            warn!(why, next_try_s, "no hub session");
            let text = format!("offline: {why}; next try within {next_try_s} s");
            self.tell(text, Some(out_of_reach));
            self.pause(delay, hurry).await;
        }
    }

    /// One connection, from the clock to its end.
    async fn attempt(&mut self, calls: &mut Calls) -> Attempt {
        let now = self.set_clock().await;
        let began = Instant::now();
        let (credential, login) = match self.log_in(now) {
            Ok(ready) => ready,
            Err(error) => {
                let why = format!("{}{}", chain(&error), self.source.advice());
                return match error {
                    CredentialError::Expired { .. } => Attempt::Refused(why),
                    _ => Attempt::Failed(why),
                };
            }
        };
        let identity = &credential.identity;
        let peer = format!("{} as {identity}", identity.hub);
        self.tell_offline(format!("connecting to {peer}"));
        if let Err(error) = self.transport.connect(&login).await {
            let why = self.explain(&error, &credential, now);
            return match error {
                ConnectError::Closed => Attempt::Closed(why),
                error if error.is_refusal() => Attempt::Refused(why),
                error if error.is_out_of_reach() => Attempt::Unreached(why),
                _ => Attempt::Failed(why),
            };
        }
        info!(hub = identity.hub, identity = %identity, "connected to the hub");
        let connected = Instant::now();
        let percent = |life: Duration, percent| began + life.mul_f64(f64::from(percent) / 100.0);
        let renewal = login.renew_within.map(|life| Renewal {
            due: percent(life, RENEW_DUE_PERCENT),
            latest: percent(life, RENEW_LATEST_PERCENT),
        });
        let backoff = Backoff::new(self.timing.retry_min, self.timing.retry_max);
        let conversation = Conversation {
            transport: &mut self.transport,
            link: &mut self.link,
            calls,
            mirror: Mirror::new(self.timing.reply_limit, backoff),
            renewal,
            peer,
        };
        let end = conversation.run(self.timing.reply_limit).await;
        self.after(end, &credential, connected.elapsed()).await
    }

    async fn after(&mut self, end: End, credential: &Credential, online: Duration) -> Attempt {
        let why = match end {
            End::Lost => "the connection to the hub was lost".to_owned(),
            End::AgentGone => return Attempt::AgentGone,
            End::Renew => {
                debug!("renewing the token");
                self.tell_offline("renewing the token".to_owned());
                self.transport.disconnect().await;
                return Attempt::Renew;
            }
            End::Silent => {
                self.transport.disconnect().await;
                "the hub does not answer requests".to_owned()
            }
            End::NotGranted(error) => {
                self.transport.disconnect().await;
                return Attempt::Refused(format!(
                    "{}: check the rights of {}",
                    chain(&error),
                    credential.identity
                ));
            }
        };
        // The identity helps who suspects another program to hold the same one.
        Attempt::Lost { online, why: format!("{why} ({})", credential.identity) }
    }

    /// Waits until the clock can be trusted.
    async fn set_clock(&mut self) -> WallTime {
        loop {
            if let Some(now) = self.clock.wall() {
                return now;
            }
            let text = "waiting for the clock to be set: tokens and certificates need the time; \
                        check that time synchronisation works";
            self.tell(text.to_owned(), Some(true));
            sleep(CLOCK_INTERVAL).await;
        }
    }

    fn log_in(&self, now: WallTime) -> Result<(Credential, Login), CredentialError> {
        let credential = self.source.load()?;
        let login = credential.login(now, self.timing.token_lifetime)?;
        Ok((credential, login))
    }

    /// Why there is no connection, and what to do about it.
    fn explain(&self, error: &ConnectError, credential: &Credential, now: WallTime) -> String {
        let text = chain(error).to_string();
        if error.is_refusal() || matches!(error, ConnectError::Closed) {
            format!(
                "{text}: check that {} exists in {} and is enabled, that {} holds its \
                 credential, and that the clock is right ({now}){}",
                credential.identity,
                credential.identity.hub,
                self.source.place(),
                self.source.advice()
            )
        } else {
            text
        }
    }

    /// Between half and the whole of the time for refusals: slow, and not all devices at once. The
    /// first refusals in a row may be the hub's own trouble, and a trial may wait for the session:
    /// after them an eighth, a quarter, half of it.
    fn slow_delay(&self, refusals: u32) -> Duration {
        let longest = self.timing.refused_retry / (1 << FULL_REFUSALS.saturating_sub(refusals));
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// The delay after a good connection.
    fn return_delay(&self) -> Duration {
        let spread = RETURN_SPREAD.max(self.timing.retry_min).min(self.timing.retry_max);
        spread.mul_f64(fastrand::f64())
    }

    /// `delay`, or less while a trial waits for the hub: it must not be lost between two tries.
    /// `hurry`, from a half to one, keeps devices apart that restarted together.
    fn in_time(&self, delay: Duration, hurry: f64) -> Duration {
        let ends = self.link.report.borrow().trial_ends;
        let left = ends.unwrap_or_default().saturating_sub(self.clock.since_boot());
        if left.is_zero() {
            return delay;
        }
        delay.min((left / TRIAL_PART).max(TRIAL_PACE).mul_f64(hurry))
    }

    /// Waits. A clock that is set meanwhile ends the wait: it may have been the reason.
    async fn pause(&self, delay: Duration, hurry: f64) {
        let began = Instant::now();
        let offset = self.clock_offset_ms();
        loop {
            // Each time anew: a trial may begin, or run out of time.
            let left = self.in_time(delay, hurry).saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            sleep(CLOCK_INTERVAL.min(left)).await;
            let moved = match (offset, self.clock_offset_ms()) {
                (Some(before), Some(after)) => before.abs_diff(after),
                _ => 0,
            };
            if u128::from(moved) > CLOCK_STEP.as_millis() {
                info!("the clock was set, trying the hub again");
                return;
            }
        }
    }

    /// Wall time of the boot; moves only if the clock is set.
    fn clock_offset_ms(&self) -> Option<i64> {
        let since_boot = i64::try_from(self.clock.since_boot().as_millis()).ok()?;
        self.clock.wall().map(|now| now.unix_ms().saturating_sub(since_boot))
    }

    fn tell_offline(&self, text: String) {
        self.tell(text, None);
    }

    /// There is no session; what is known of the hub stays while it is tried again.
    fn tell(&self, text: String, out_of_reach: Option<bool>) {
        self.link.status.send_if_modified(|shown| {
            let out_of_reach = out_of_reach.unwrap_or(shown.out_of_reach);
            let status = SessionStatus { out_of_reach, text, ..SessionStatus::default() };
            let changed = *shown != status;
            *shown = status;
            changed
        });
    }
}

impl Record {
    fn note(&mut self, attempt: &Attempt) {
        self.closes =
            if matches!(attempt, Attempt::Closed(_)) { self.closes.saturating_add(1) } else { 0 };
        match attempt {
            Attempt::Lost { online, .. } if *online < STABLE => {
                self.early_losses = self.early_losses.saturating_add(1);
            }
            Attempt::Lost { .. } | Attempt::Renew => {
                self.early_losses = 0;
                self.backoff.reset();
            }
            _ => {}
        }
        if matches!(attempt, Attempt::Lost { .. } | Attempt::Renew) {
            self.refusals = 0;
        }
    }

    /// Counts one more refusal in a row.
    fn refused(&mut self) -> u32 {
        self.refusals = self.refusals.saturating_add(1);
        self.refusals
    }

    /// Adds what many early losses mean.
    fn suspect(&self, why: String) -> String {
        if self.early_losses < SUSPICIOUS_LOSSES {
            return why;
        }
        format!(
            "{why}; this happened {} times in a row soon after connecting: another device or \
             program is probably connected under the same identity",
            self.early_losses
        )
    }
}
