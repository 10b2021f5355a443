//! What a process wants of the machine's cores, as the kernel counts it.

use std::time::Duration;

use cofferdam_fairness::OnCores;
use rustix::process::Pid;

/// For how long threads have had a core, and have waited for one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub(crate) had: Duration,
    pub(crate) waited: Duration,
}

impl Wanted {
    /// What a thread has wanted so far. Where the kernel does not say that, how long it has computed, in its own time and the
    /// system's for it, in hundredths of a second.
    fn of_thread(pid: Pid, thread: Pid) -> Option<Self> {
        let scheduled = std::fs::read_to_string(path(pid, thread, "schedstat")).unwrap_or_default();
        let mut times = scheduled.split_ascii_whitespace().map_while(|n| n.parse().ok().map(Duration::from_nanos));
        if let (Some(had), Some(waited)) = (times.next(), times.next())
            && !had.is_zero()
        {
            return Some(Self { had, waited });
        }
        let stat = stat(pid, thread)?;
        let mut fields = stat.split(' ').skip(11);
        let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
        Some(Self { had: Duration::from_millis(10 * ticks), waited: Duration::ZERO })
    }

    /// The same of some threads of a process; what those have wanted that have ended is not known any more.
    pub(crate) fn of(pid: Pid, threads: &[Pid]) -> Option<Self> {
        let each = threads.iter().filter_map(|thread| Self::of_thread(pid, *thread));
        each.reduce(|a, b| Self { had: a.had + b.had, waited: a.waited + b.waited })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { had: self.had.saturating_sub(before.had), waited: self.waited.saturating_sub(before.waited) }
    }

    /// Whoever has wanted a core all the time has waited when it had none.
    pub(crate) fn all_of(self, time: Duration) -> Self {
        Self { waited: time.saturating_sub(self.had), ..self }
    }

    /// The parts of a time in which a core was wanted, and in which one was waited for and none was had: some threads of a process may wait
    /// while others compute.
    pub(crate) fn part_of(self, time: Duration) -> (f32, f32) {
        let part = |of: Duration| (of.as_secs_f32() / time.as_secs_f32()).min(1.0);
        (part(self.had + self.waited), part(self.waited.min(time.saturating_sub(self.had))))
    }

    pub(crate) fn on_cores(self, time: Duration, gives_way: bool) -> OnCores {
        let (wanted, waited) = self.part_of(time);
        OnCores { wanted, waited, gives_way }
    }
}

/// Whether one of some threads has a core or waits for one.
pub(crate) fn is_runnable(pid: Pid, threads: &[Pid]) -> bool {
    threads.iter().any(|thread| stat(pid, *thread).is_some_and(|fields| fields.starts_with('R')))
}

/// The process that has started a process.
pub(crate) fn parent(pid: Pid) -> Option<Pid> {
    Pid::from_raw(stat(pid, pid)?.split(' ').nth(1)?.parse().ok()?)
}

/// The threads of a process, all of them.
pub(crate) fn threads(pid: Pid) -> Vec<Pid> {
    let entries = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).into_iter().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// What the system says of a thread, behind its name, which is in parentheses and may have some itself.
fn stat(pid: Pid, thread: Pid) -> Option<String> {
    let stat = std::fs::read_to_string(path(pid, thread, "stat")).ok()?;
    stat.rsplit_once(") ").map(|(_, fields)| fields.to_owned())
}

fn path(pid: Pid, thread: Pid, file: &str) -> String {
    format!("/proc/{}/task/{}/{file}", pid.as_raw_nonzero(), thread.as_raw_nonzero())
}
