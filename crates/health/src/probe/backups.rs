//! Backups and drills, from what `cofferdam backup run --textfile` writes.
//!
//! The file says of each tenant how much would be lost now, and how the last drill went. A file that is not written any
//! more says that nobody makes backups.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Alone, Probe, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Looks at the file.
#[derive(Debug, Clone)]
pub struct BackupsProbe {
    /// The file.
    pub file: PathBuf,
    /// Tenants that must be in it.
    pub tenants: Vec<String>,
    /// A file that is older says that nobody makes backups.
    pub stale_after: Duration,
    /// A drill that is older, in seconds: a warning, a failure.
    pub drill_age: (f64, f64),
    /// How often to look.
    pub interval: Duration,
    alone: Alone,
}

impl BackupsProbe {
    /// A probe of what the file says of some tenants.
    pub fn new(
        file: PathBuf,
        tenants: Vec<String>,
        stale_after: Duration,
        drill_age: (f64, f64),
        interval: Duration,
    ) -> Self {
        Self { file, tenants, stale_after, drill_age, interval, alone: Alone::default() }
    }

    fn of_tenant(&self, tenant: &str, values: &BTreeMap<(String, String), f64>, now: Timestamp) -> Vec<Observation> {
        let value = |name: &str| values.get(&(name.to_owned(), tenant.to_owned())).copied();
        let backup = CheckId::tenant(tenant, "backup");
        let mut found = Vec::new();
        found.push(match value("cofferdam_backup_rpo_seconds") {
            None => Observation::pass(backup, Topic::RecoveryPoint, now, "the backup runner does not know this tenant")
                .with(Status::Fail),
            Some(loss) => {
                let objective = value("cofferdam_backup_rpo_objective_seconds").unwrap_or(86_400.0);
                let failures = value("cofferdam_backup_failures").unwrap_or(0.0);
                let lost =
                    if loss.is_finite() { format!("{} of work", seconds(loss)) } else { "everything".to_owned() };
                let mut text =
                    format!("if it were lost now, {lost} would be; at most {} are allowed", seconds(objective));
                if loss == 0.0 {
                    "everything is saved".clone_into(&mut text);
                }
                let mut status = if loss > objective { Status::Fail } else { Status::Pass };
                if failures > 0.0 {
                    text = format!("{text}; the last {failures:.0} backups have failed");
                    status = status.max(Status::Warn);
                }
                if value("cofferdam_backup_complete") == Some(0.0) {
                    text = format!("{text}; the last one lacks files");
                    status = status.max(Status::Warn);
                }
                let shown = if loss.is_finite() { loss } else { f64::MAX };
                Observation::pass(backup, Topic::RecoveryPoint, now, text)
                    .with(status)
                    .figure(Evidence::new("would_be_lost", shown, "s").limited(objective))
            }
        });
        let drill = CheckId::tenant(tenant, "drill");
        found.push(match (value("cofferdam_drill_passed"), value("cofferdam_drill_age_seconds")) {
            (Some(passed), age) => {
                let age = age.unwrap_or(0.0);
                let (warn, fail) = self.drill_age;
                let text = if passed > 0.5 {
                    format!("a restore was tried {} ago and was good", seconds(age))
                } else {
                    format!("a restore was tried {} ago and FAILED: see its report", seconds(age))
                };
                let status = if passed > 0.5 { super::graded(age, warn, fail) } else { Status::Fail };
                Observation::pass(drill, Topic::RecoveryPoint, now, text)
                    .with(status)
                    .figure(Evidence::new("last_drill_age", age, "s").limited(fail))
            }
            (None, _) => {
                Observation::pass(drill, Topic::RecoveryPoint, now, "nobody has ever tried to restore a backup")
                    .with(Status::Warn)
            }
        });
        found
    }
}

#[async_trait]
impl Probe for BackupsProbe {
    fn name(&self) -> String {
        format!("backups, {}", self.file.display())
    }

    fn checks(&self) -> Vec<CheckId> {
        let mut checks = vec![self.reachability()];
        for tenant in &self.tenants {
            checks.extend([CheckId::tenant(tenant, "backup"), CheckId::tenant(tenant, "drill")]);
        }
        checks
    }

    fn reachability(&self) -> CheckId {
        CheckId::shared("backups", "runner")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn topic(&self) -> Topic {
        Topic::RecoveryPoint
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let runner =
            |status, text: String| Observation::pass(self.reachability(), Topic::RecoveryPoint, now, text).with(status);
        let file = self.file.clone();
        let read = move || {
            let age = std::fs::metadata(&file)?.modified()?.elapsed().unwrap_or_default();
            Ok::<_, std::io::Error>((age, std::fs::read_to_string(&file)?))
        };
        let read = self.alone.run(read).await.and_then(|read| read.map_err(|error| error.to_string()));
        let (age, text) = match read {
            Ok(found) => found,
            Err(error) => {
                let what = "what `cofferdam backup run --textfile` writes cannot be read";
                return vec![runner(Status::Fail, format!("{what}: {}: {error}", self.file.display()))];
            }
        };
        if age > self.stale_after {
            let text = format!(
                "nobody has written {} for {}: no backups are made",
                self.file.display(),
                seconds(age.as_secs_f64())
            );
            return vec![runner(Status::Fail, text)];
        }
        // The file may be written by somebody else than whoever makes backups.
        let looked =
            text.lines().find_map(|line| line.strip_prefix("cofferdam_backup_time_seconds ")?.trim().parse().ok());
        let idle = looked.map_or(0.0, |at: f64| Timestamp::now().as_second() as f64 - at);
        if idle > IDLE {
            let text = format!("the backup runner has not looked at its tenants for {}: it hangs", seconds(idle));
            return vec![runner(Status::Fail, text)];
        }
        let values = read_metrics(&text);
        let mut found = vec![runner(Status::Pass, format!("it has written {} ago", seconds(age.as_secs_f64())))];
        for tenant in &self.tenants {
            found.extend(self.of_tenant(tenant, &values, now));
        }
        found
    }
}

/// A runner that has not looked at its tenants for so many seconds hangs.
const IDLE: f64 = 600.0;

/// Samples with the one label `tenant`, by name and tenant.
fn read_metrics(text: &str) -> BTreeMap<(String, String), f64> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once("{tenant=\"")?;
            let (tenant, value) = rest.split_once("\"} ")?;
            Some(((name.to_owned(), tenant.to_owned()), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_runner_writes_is_read() {
        let text = "# TYPE x gauge\nx{tenant=\"acme\"} 12.5\nx{tenant=\"beta\"} inf\ny 3\n";
        let values = read_metrics(text);
        assert_eq!(values.get(&("x".into(), "acme".into())), Some(&12.5));
        assert_eq!(values.get(&("x".into(), "beta".into())), Some(&f64::INFINITY));
        assert_eq!(values.len(), 2);
    }
}
