//! How Linux schedules a process among others: its `nice` value, its *slice* and its policy; and between how many cores.
//!
//! The `nice` value says how much of a busy core a process gets in the long run. Its slice says in what portions, and so who has to
//! wait for whom: since Linux 6.12 (EEVDF) a process that wakes up takes the core at once from one that has a longer slice, and
//! otherwise waits until that one's portion is over, whatever the `nice` values are. Work that is in nobody's hurry gets a long slice:
//! it is preempted by all others, and runs longer when it is left alone. Kernels before 6.12 take the value and do nothing
//! with it; those before 5.3 do not know the call in this form and refuse it.
//!
//! The only place with `unsafe` in Cofferdam, in one private module, because no library has a safe function for `sched_setattr(2)`.

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::io;
use std::time::Duration;

use attr::Attr;

/// The longest slice that the kernel takes.
pub const LONGEST_SLICE: Duration = Duration::from_millis(100);
/// The shortest.
pub const SHORTEST_SLICE: Duration = Duration::from_micros(100);

/// How a process is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduling {
    /// Its `nice` value, from -20 to 19; greater is less.
    pub nice: i32,
    /// In what portions it gets a core; zero where the kernel does not say.
    pub slice: Duration,
    /// With what policy.
    pub policy: Policy,
}

/// By what policy a process is scheduled, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// `SCHED_OTHER`, and so are its children.
    Ordinary,
    /// `SCHED_IDLE`: it runs on what others leave.
    Idle,
    /// Another, or with conditions.
    Other,
}

/// How a process, or rather its first thread, is scheduled.
///
/// Fails when there is none with this number.
pub fn scheduling(pid: i32) -> io::Result<Scheduling> {
    let attr = attr::get(pid)?;
    let policy = match (attr.policy, attr.flags) {
        (attr::ORDINARY, 0) => Policy::Ordinary,
        (attr::IDLE, 0) => Policy::Idle,
        _ => Policy::Other,
    };
    Ok(Scheduling { nice: attr.nice, slice: Duration::from_nanos(attr.runtime), policy })
}

/// Sets the `nice` value and the slice of a process's first thread; the slice is taken to the nearest that the kernel has,
/// and `None` is the kernel's own. Its policy (ordinary, batch, idle) stays.
///
/// Fails when there is no such process, when it is another user's, and when its `nice` value would fall further than the
/// caller may let it.
pub fn set_scheduling(pid: i32, nice: i32, slice: Option<Duration>) -> io::Result<()> {
    let slice = slice.map_or(Duration::ZERO, |slice| slice.clamp(SHORTEST_SLICE, LONGEST_SLICE));
    // At most 100 million.
    let runtime = u64::try_from(slice.as_nanos()).unwrap_or(0);
    attr::set(pid, &Attr { nice: nice.clamp(-20, 19), runtime, flags: attr::KEEP_POLICY, ..Attr::default() })
}

/// Lets a process's first thread run on what others leave. Its `nice` value means nothing as long.
///
/// Whoever wakes up takes the core from what runs so, where both are in the same group of processes.
///
/// Fails as [`set_scheduling`] does.
pub fn set_idle(pid: i32) -> io::Result<()> {
    attr::set(pid, &Attr { policy: attr::IDLE, ..Attr::default() })
}

/// Makes a process's first thread an ordinary one again, with this `nice` value and the kernel's own slice.
///
/// Fails as [`set_scheduling`] does.
pub fn set_ordinary(pid: i32, nice: i32) -> io::Result<()> {
    attr::set(pid, &Attr { policy: attr::ORDINARY, nice: nice.clamp(-20, 19), ..Attr::default() })
}

/// Lets the calling thread go before all ordinary ones, whenever it has something to do: `SCHED_RR` with the lowest priority. The
/// threads and processes that it starts are ordinary ones.
///
/// For threads that never compute for long: as long as one does, nothing else has its core. The kernel leaves
/// ordinary ones a twentieth of the time all the same.
///
/// Fails without `CAP_SYS_NICE` or a limit on real-time priorities (`RLIMIT_RTPRIO`), and where the process's control group has no
/// real-time budget.
pub fn go_before_others() -> io::Result<()> {
    let flags = attr::RESET_ON_FORK;
    attr::set(0, &Attr { policy: attr::ROUND_ROBIN, flags, priority: 1, ..Attr::default() })
}

/// The cores of the machine that are in use, whoever may use them; `None` where the system does not say.
pub fn cores() -> Option<u32> {
    count(std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?.trim())
}

/// The machine's cores but for so many; at least one.
pub fn cores_but(spare: u32) -> u32 {
    // Not those that this process may use, which can be fewer.
    let own = || std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok());
    cores().or_else(own).unwrap_or(1).saturating_sub(spare).max(1)
}

/// How many there are in a list such as `0-3,8`.
fn count(ranges: &str) -> Option<u32> {
    ranges.split(',').try_fold(0u32, |sum, range| {
        let (first, end) = range.split_once('-').unwrap_or((range, range));
        let (first, end) = (first.parse::<u32>().ok()?, end.parse::<u32>().ok()?);
        sum.checked_add(end.checked_sub(first)?.checked_add(1)?)
    })
}

/// `sched_getattr(2)` and `sched_setattr(2)`.
mod attr {
    #![allow(unsafe_code)]

    use std::io;
    use std::mem::size_of;

    /// `SCHED_OTHER`, `SCHED_RR` and `SCHED_IDLE`.
    pub(super) const ORDINARY: u32 = 0;
    pub(super) const ROUND_ROBIN: u32 = 2;
    pub(super) const IDLE: u32 = 5;
    /// Whatever it starts is ordinary.
    pub(super) const RESET_ON_FORK: u64 = 0x01;
    /// Leave the policy as it is.
    pub(super) const KEEP_POLICY: u64 = 0x08;

    /// `struct sched_attr`, in its first version; its size is set with the call.
    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct Attr {
        pub(super) size: u32,
        pub(super) policy: u32,
        pub(super) flags: u64,
        pub(super) nice: i32,
        /// With a real-time policy only.
        pub(super) priority: u32,
        /// Nanoseconds. With an ordinary policy, the slice.
        pub(super) runtime: u64,
        pub(super) deadline: u64,
        pub(super) period: u64,
    }

    const SIZE: u32 = 48;
    const _: () = assert!(size_of::<Attr>() == SIZE as usize, "as large as the kernel takes it to be");

    pub(super) fn get(pid: i32) -> io::Result<Attr> {
        let mut attr = Attr::default();
        // SAFETY: the kernel writes no more than `SIZE` bytes to where it is told to, all of which are the structure's, of
        // which any value of any bit is one; the pointer is used only during the call.
        let outcome = unsafe { libc::syscall(libc::SYS_sched_getattr, pid, &raw mut attr, SIZE, 0) };
        if outcome == 0 { Ok(attr) } else { Err(io::Error::last_os_error()) }
    }

    pub(super) fn set(pid: i32, attr: &Attr) -> io::Result<()> {
        let mut attr = Attr { size: SIZE, ..*attr };
        // SAFETY: the kernel reads `size` bytes from the pointer, which are all the structure's, and during the call only. When
        // it knows no such version it writes its own size into `size`, so the structure is mutable.
        let outcome = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw mut attr, 0) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A process that is ended with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Self {
            Self(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_gets_the_nice_value_and_the_slice_that_are_set_where_the_kernel_has_slices() {
        let sleeper = Sleeper::new();
        let before = scheduling(sleeper.pid()).unwrap();
        let nice = before.nice + 1;
        set_scheduling(sleeper.pid(), nice, Some(Duration::from_millis(40))).unwrap();
        let set = scheduling(sleeper.pid()).unwrap();
        assert_eq!(set.nice, nice);
        // Before 6.12 nothing is said of slices, or always the same.
        assert!(set.slice == before.slice || set.slice == Duration::from_millis(40), "{set:?}");
        set_scheduling(sleeper.pid(), nice, Some(Duration::from_secs(10))).unwrap();
        let longest = scheduling(sleeper.pid()).unwrap().slice;
        assert!(longest == before.slice || longest == LONGEST_SLICE, "{longest:?}");
        set_scheduling(sleeper.pid(), nice, None).unwrap();
        assert_eq!(scheduling(sleeper.pid()).unwrap(), Scheduling { nice, ..before });
    }

    #[test]
    fn a_process_runs_on_what_others_leave_and_as_before_again() {
        let sleeper = Sleeper::new();
        let before = scheduling(sleeper.pid()).unwrap();
        assert_eq!(before.policy, Policy::Ordinary);
        set_idle(sleeper.pid()).unwrap();
        assert_eq!(scheduling(sleeper.pid()).unwrap().policy, Policy::Idle);
        // Whoever may only lower does not get it back.
        match set_ordinary(sleeper.pid(), before.nice) {
            Ok(()) => assert_eq!(scheduling(sleeper.pid()).unwrap(), before),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
    }

    /// Where it is not permitted the error says so.
    #[test]
    fn a_thread_that_goes_before_others_has_ordinary_children() {
        let seen = std::thread::spawn(|| {
            go_before_others()
                .map(|()| (scheduling(0).unwrap().policy, scheduling(Sleeper::new().pid()).unwrap().policy))
        });
        match seen.join().unwrap() {
            Ok(seen) => assert_eq!(seen, (Policy::Other, Policy::Ordinary)),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
        assert_eq!(scheduling(0).unwrap().policy, Policy::Ordinary, "no other thread");
    }

    #[test]
    fn cores_are_counted_as_the_system_lists_them() {
        assert_eq!((count("0"), count("0-1"), count("0-3,8,10-11")), (Some(1), Some(2), Some(7)));
        for wrong in ["", "x", "3-1", "0-", "0-4294967295", "0,"] {
            assert_eq!(count(wrong), None, "{wrong}");
        }
        assert!(cores().is_none_or(|n| n > 0));
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let sleeper = Sleeper::new();
        let pid = sleeper.pid();
        drop(sleeper);
        assert_eq!(scheduling(pid).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(set_scheduling(pid, 5, None).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
