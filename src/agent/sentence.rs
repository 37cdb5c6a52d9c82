//! Where things stand, in one sentence: for systemd, the journal and the device command.

use crate::update::{OutcomeKind, Phase, Progress, Run, Saved, State, Version};

/// What goes on, without the hub.
#[must_use]
pub fn sentence(saved: &Saved, progress: &Progress) -> String {
    let what = |run: &Run| match run.version() {
        Some(version) => format!("version {version}"),
        None => "an update".to_owned(),
    };
    let percent = Phase::of(&saved.state)
        .percent(&saved.state, progress)
        .map(|percent| format!(", {percent} %"))
        .unwrap_or_default();
    match &saved.state {
        State::Idle => idle(saved),
        State::Fetching { run, began: false, .. } => format!("waiting for {}", what(run)),
        State::Fetching { run, .. } => {
            format!("fetching {} into slot {}{percent}", what(run), run.target())
        }
        State::Verifying { run, .. } if progress.installed_percent.is_some() => {
            format!("installing {} into slot {}{percent}", what(run), run.target())
        }
        State::Verifying { run, .. } => {
            format!("reading {} back from slot {}{percent}", what(run), run.target())
        }
        State::Switching { run, attempt, .. } => {
            let why = run.why_armed_again(*attempt).map(|why| format!(" ({why})"));
            let why = why.unwrap_or_default();
            format!("restarting into slot {} with {}{why}", run.target(), what(run))
        }
        State::Trial { run, healthy: false, stopped, .. } => {
            let waits = match (stopped, saved.state.waits_for()) {
                (true, _) => ", and is restarted to go on with it".to_owned(),
                (false, Some(network)) => format!(" and waits for the network: {network}"),
                (false, None) => String::new(),
            };
            format!("slot {} runs {} on trial{waits}", run.target(), what(run))
        }
        State::Trial { run, .. } => format!("confirming {} in slot {}", what(run), run.target()),
        State::RollingBack { run, reason, .. } => {
            format!("going back to slot {}: {reason}", run.from)
        }
    }
}

fn idle(saved: &Saved) -> String {
    let Some(last) = &saved.last else { return "idle".to_owned() };
    let version = last
        .run
        .as_ref()
        .and_then(Run::version)
        .map(|version: &Version| format!(" to {version}"))
        .unwrap_or_default();
    match &last.kind {
        OutcomeKind::Succeeded => format!("idle; the last update{version} is confirmed"),
        OutcomeKind::UpToDate => "idle; the desired version runs already".to_owned(),
        OutcomeKind::Failed(cause) => format!("idle; the last update{version} failed: {cause}"),
        OutcomeKind::RolledBack(cause) => {
            format!("idle; the last update{version} was rolled back: {cause}")
        }
    }
}
