//! What every [`Probe`] must do, as a check that anybody can run against theirs.

use jiff::Timestamp;

use super::{Probe, look};
use crate::model::{Status, Topic};

/// Tries a probe on what it looks at; says what it did wrong. `reachable` says whether that is there.
pub async fn check(probe: &dyn Probe, reachable: bool) -> Result<(), String> {
    let fail = |what: String| Err(format!("{}: {what}", probe.name()));
    let checks = probe.checks();
    if !checks.contains(&probe.reachability()) {
        return fail("the check for reachability is one of its checks".to_owned());
    }
    let now = Timestamp::UNIX_EPOCH;
    let found = look(probe, now).await;
    for observation in &found {
        if !checks.contains(&observation.check) {
            return fail(format!("it has looked at {}, which it does not say it does", observation.check));
        }
        if observation.at != now {
            return fail("observations are dated with the instant that was given".to_owned());
        }
        if observation.text.trim().is_empty() {
            return fail(format!("{}: it says nothing", observation.check));
        }
        if found.iter().filter(|other| other.check == observation.check).count() > 1 {
            return fail(format!("{}: it says two things", observation.check));
        }
    }
    let reachability = found.iter().find(|observation| observation.check == probe.reachability());
    match (reachability.map(|observation| observation.status), reachable) {
        (Some(Status::Pass | Status::Warn), true) | (Some(Status::Fail), false) => {}
        // Of what keeps others out, what could not be seen is no failure.
        (Some(Status::Unknown), false) if probe.topic() == Topic::Security => {}
        (status, _) => return fail(format!("there: {reachable}, and it says {status:?}: {found:?}")),
    }
    if !reachable && found.iter().any(|o| o.check != probe.reachability() && o.status != Status::Unknown) {
        return fail(format!("it knows things of what is not there: {found:?}"));
    }
    Ok(())
}
