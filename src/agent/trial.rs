//! Watches over a slot that is not known good: round after round of checks, until all pass at once
//! or its time is over.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::jobs::Running;
use super::ports::HealthChecks;
use crate::clock::Clock;
use crate::hub::SessionStatus;
use crate::update::{Event, Outage, TrialTime};

/// A round that begins when the time is over, after a late start of the agent, gets this long.
const LEAST_ROUND: Duration = Duration::from_secs(1);

/// Least time between two notes of one outage: each is a write to the medium.
const NOTE_PAUSE_S: u64 = 30;

/// What a watch over the running slot goes by.
#[derive(Clone, Debug)]
pub struct Watch {
    /// When the trial is lost; never if there is none.
    pub time: Option<TrialTime>,
    /// Time between two rounds.
    pub interval: Duration,
    /// The hub must have answered this report in a live session, be it with a refusal, which is no
    /// fault of the image; `None` if the hub is not asked for.
    pub generation: Option<u64>,
    /// The session.
    pub session: watch::Receiver<SessionStatus>,
}

/// How a round ended.
enum Round {
    /// All is well.
    Well,
    /// Something is wrong, perhaps with the image.
    Sick(String),
    /// The hub is missing, and nothing else is wrong; `cause` lies outside the image.
    Outage { problem: String, cause: String },
}

/// Checks the running slot until it is healthy, or its time is over.
pub fn watch(health: &Arc<dyn HealthChecks>, clock: &Arc<dyn Clock>, orders: Watch) -> Running {
    let (health, clock) = (Arc::clone(health), Arc::clone(clock));
    Running::start(|tell, cancel| {
        let watched = Watched { health, clock, notes: Notes::of(&orders), orders, tell };
        Box::pin(watched.run(cancel))
    })
}

struct Watched {
    health: Arc<dyn HealthChecks>,
    clock: Arc<dyn Clock>,
    orders: Watch,
    notes: Notes,
    tell: mpsc::Sender<Event>,
}

impl Watched {
    async fn run(mut self, cancel: CancellationToken) {
        // Cancel-safe: what is dropped in the middle of a round is nobody's loss.
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.until_decided() => {}
        }
    }

    async fn until_decided(&mut self) {
        loop {
            let limit = self.left().max(LEAST_ROUND);
            let problem = match tokio::time::timeout(limit, self.round()).await {
                Ok(Round::Well) => {
                    let _ = self.tell.send(Event::Healthy).await;
                    return;
                }
                Ok(Round::Sick(problem)) => {
                    self.note(None).await;
                    problem
                }
                Ok(Round::Outage { problem, cause }) => {
                    let told = format!("{problem} ({cause})");
                    self.note(Some(cause)).await;
                    told
                }
                Err(_) => {
                    "the health checks were not done when the trial's time was over".to_owned()
                }
            };
            let pause = self.left().min(self.orders.interval);
            if pause.is_zero() {
                let _ = self.tell.send(Event::TrialExpired(problem)).await;
                return;
            }
            self.pause(pause).await;
        }
    }

    /// What is local is always asked: a network that is missing excuses nothing else.
    async fn round(&self) -> Round {
        let hub_before = self.hub();
        if let Err(problem) = self.health.check().await {
            return Round::Sick(problem);
        }
        // The checks take time, and the session may have gone meanwhile.
        let Err(problem) = hub_before.and_then(|()| self.hub()) else { return Round::Well };
        let Some(time) = self.orders.time.filter(TrialTime::may_wait) else {
            return Round::Sick(problem);
        };
        let cause = match self.health.cut_off().await {
            // A hub that was reached and does not want this image is no outage.
            None if time.hub_was_missing && self.orders.session.borrow().out_of_reach => {
                Some("the old slot could not reach the hub either".to_owned())
            }
            cause => cause,
        };
        match cause {
            Some(cause) => Round::Outage { problem, cause },
            None => Round::Sick(problem),
        }
    }

    fn hub(&self) -> Result<(), String> {
        let session = self.orders.session.borrow();
        if is_answered(&session, self.orders.generation) {
            Ok(())
        } else {
            Err(format!("no hub session with an answered report: {}", session.text))
        }
    }

    fn left(&self) -> Duration {
        match self.orders.time {
            None => Duration::MAX,
            Some(time) => {
                Duration::from_secs(time.ends_s()).saturating_sub(self.clock.since_boot())
            }
        }
    }

    /// Takes down that there is an outage, or that there is none (any more).
    async fn note(&mut self, cause: Option<String>) {
        let Some(time) = &mut self.orders.time else { return };
        let now_s = self.clock.since_boot().as_secs();
        if cause.is_some() {
            time.spared_s = Some(now_s);
        }
        if let Some(outage) = self.notes.next(cause, now_s) {
            if outage.lasts {
                info!(cause = outage.what, "the trial waits for the network");
            } else {
                info!(cause = outage.what, "the trial no longer waits for the network");
            }
            let _ = self.tell.send(Event::Outage(outage)).await;
        }
    }

    /// Until the next round; a session that comes up is looked at at once.
    async fn pause(&self, time: Duration) {
        let mut session = self.orders.session.clone();
        let generation = self.orders.generation;
        let comes_up = async {
            // If it is up already, something else is wrong.
            if self.hub().is_ok()
                || session.wait_for(|session| is_answered(session, generation)).await.is_err()
            {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = comes_up => {}
        }
    }
}

/// Whether the hub is there as far as it is asked for.
fn is_answered(session: &SessionStatus, generation: Option<u64>) -> bool {
    generation.is_none_or(|generation| session.online && session.answered >= generation)
}

/// What is told of an outage: its begin, that it lasts, its end. Not more often than a medium can
/// bear that writes each of them.
#[derive(Default)]
struct Notes {
    told: Option<(Outage, u64)>,
    newest: Option<(String, u64)>,
    refresh_s: u64,
}

impl Notes {
    fn of(orders: &Watch) -> Self {
        // The trial guard goes by them, which has half of the usual time to find the next one.
        let refresh_s = orders.time.map_or(0, |time| time.limit_s / 2).max(1);
        Notes { refresh_s, ..Notes::default() }
    }

    fn next(&mut self, cause: Option<String>, now_s: u64) -> Option<Outage> {
        let lasts = cause.is_some();
        if let Some(what) = cause {
            self.newest = Some((what, now_s));
        }
        let (what, seen_s) = self.newest.clone()?;
        if let Some((told, at_s)) = &self.told {
            let age_s = now_s.saturating_sub(*at_s);
            let news = told.lasts != lasts || told.what != what;
            if !(news && age_s >= NOTE_PAUSE_S.min(self.refresh_s)
                || lasts && age_s >= self.refresh_s)
            {
                return None;
            }
        }
        let outage = Outage { what, seen_s, lasts };
        self.told = Some((outage.clone(), now_s));
        Some(outage)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::update::WallTime;

    /// A device without complaints, in the first moment of its boot.
    struct Well;

    impl HealthChecks for Well {
        fn check(&self) -> BoxFuture<'static, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }
        fn cut_off(&self) -> BoxFuture<'static, Option<String>> {
            Box::pin(std::future::ready(None))
        }
    }

    impl Clock for Well {
        fn wall(&self) -> Option<WallTime> {
            None
        }
        fn since_boot(&self) -> Duration {
            Duration::ZERO
        }
    }

    #[tokio::test]
    async fn only_a_hub_that_is_out_of_reach_as_it_was_for_the_old_slot_is_an_outage() {
        for (hub_was_missing, out_of_reach, is_outage) in
            [(true, true, true), (true, false, false), (false, true, false)]
        {
            let status = SessionStatus { out_of_reach, ..SessionStatus::default() };
            let (_status, session) = watch::channel(status);
            let (tell, _told) = mpsc::channel(1);
            let (began_s, spared_s, limit_s, outage_limit_s) = (0, None, 600, 86_400);
            let time = TrialTime { began_s, spared_s, hub_was_missing, limit_s, outage_limit_s };
            let interval = Duration::from_secs(5);
            let orders = Watch { time: Some(time), interval, generation: Some(1), session };
            let (health, clock) = (Arc::new(Well), Arc::new(Well));
            let watched = Watched { health, clock, orders, notes: Notes::default(), tell };
            let round = watched.round().await;
            assert_eq!(matches!(round, Round::Outage { .. }), is_outage, "{out_of_reach}");
            assert!(is_outage || matches!(round, Round::Sick(_)));
        }
    }

    #[test]
    fn an_outage_is_noted_when_it_begins_and_ends_and_now_and_then_between() {
        let mut notes = Notes { refresh_s: 300, ..Notes::default() };
        let mut told = Vec::new();
        for now_s in (0..2000).step_by(5) {
            let cause = (100..1000).contains(&now_s).then(|| "eth0".to_owned());
            told.extend(
                notes.next(cause, now_s).map(|outage| (now_s, outage.seen_s, outage.lasts)),
            );
        }
        let expected = [(100, 100, true), (400, 400, true), (700, 700, true), (1000, 995, false)];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_cable_with_a_loose_contact_does_not_wear_the_medium_out() {
        let mut notes = Notes { refresh_s: 300, ..Notes::default() };
        let flaps = |now_s: u64| now_s.is_multiple_of(10).then(|| "eth0".to_owned());
        let told = (0..3600).step_by(5).filter(|now_s| notes.next(flaps(*now_s), *now_s).is_some());
        assert!(told.count() <= 120);
    }
}
