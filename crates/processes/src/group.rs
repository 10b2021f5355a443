//! Whether the priority of a process may be changed and given back, and the group of its session.

use std::io;

use rustix::process::{Pid, setpriority_process};

use crate::{NICEST, Untouched};

/// The group of a process's session, where the kernel divides cores between sessions: a server process of PostgreSQL has one of
/// its own, and `nice` counts only inside. The group's priority counts between them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Autogroup {
    usual: i32,
}

impl Autogroup {
    /// The group of a process, if there are such groups.
    pub(crate) fn of(pid: Pid) -> Result<Option<Self>, Untouched> {
        let enabled = std::fs::read("/proc/sys/kernel/sched_autogroup_enabled").unwrap_or_default();
        let group = std::fs::read_to_string(Self::path(pid)).unwrap_or_default();
        let usual = group.trim().rsplit(' ').next().and_then(|nice| nice.parse().ok());
        let Some(usual) = usual.filter(|_| enabled.starts_with(b"1")) else { return Ok(None) };
        if Self::write(pid, usual).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return Err(Untouched::Grouped);
        }
        Ok(Some(Self { usual }))
    }

    /// Sets it to so much more than usual. False when it could not be: whoever is not an administrator may set few in a while.
    pub(crate) fn set(self, pid: Pid, more: i32) -> bool {
        let set = Self::write(pid, (self.usual + more).min(NICEST));
        if let Err(error) = &set {
            tracing::debug!(%error, pid = pid.as_raw_nonzero(), "priority of a session not changed");
        }
        set.is_ok()
    }

    /// Sets it to this.
    pub(crate) fn set_to(self, pid: Pid, nice: i32) -> bool {
        self.set(pid, nice - self.usual)
    }

    fn write(pid: Pid, nice: i32) -> io::Result<()> {
        std::fs::write(Self::path(pid), nice.to_string())
    }

    fn path(pid: Pid) -> String {
        format!("/proc/{}/autogroup", pid.as_raw_nonzero())
    }
}

/// Whether a process with this `nice` value may be given it back. Asked and not tried: whoever may only lower would never be
/// able to give back.
pub(crate) fn may_set(pid: Pid, nice: i32) -> bool {
    has_cap_sys_nice() || may_give_back(pid, nice)
}

fn has_cap_sys_nice() -> bool {
    const CAP_SYS_NICE: u32 = 23;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> CAP_SYS_NICE & 1 == 1)
}

/// Whether a process of the same user may be given back this `nice` value, by its limit (20 for 0).
fn may_give_back(pid: Pid, nice: i32) -> bool {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).unwrap_or_default();
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max nice priority")?.split_whitespace().next());
    soft.and_then(|soft| soft.parse::<i32>().ok()).is_some_and(|soft| 20 - soft <= nice)
        && setpriority_process(Some(pid), nice).is_ok()
}
