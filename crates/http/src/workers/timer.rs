//! Pauses shorter than the runtime's timer can make, whose shortest is between one and two milliseconds.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A timer of the kernel's (`timerfd_create(2)`).
#[derive(Debug)]
pub(super) struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// Fails when there is no descriptor left. To be called in a runtime.
    pub(super) fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an owned descriptor is open for as long as the timer lives"
        )]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self(timer))
    }

    /// Waits for so long, at least a microsecond and less than a second. One that is dropped leaves the timer set, and the next sets it anew.
    pub(super) async fn pause(&mut self, length: Duration) -> io::Result<()> {
        let nanoseconds = length.subsec_nanos().max(1_000);
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: 0, tv_nsec: nanoseconds.into() },
        };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        // Readable from now on until it is set again, of which the runtime is not told.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_pause_lasts_as_long_as_was_said_time_and_again() {
        let mut timer = Timer::new().unwrap();
        for length in [300, 100, 2_000, 1, 700].map(Duration::from_micros) {
            let begun = Instant::now();
            timer.pause(length).await.unwrap();
            assert!(begun.elapsed() >= length, "{:?} and not {length:?}", begun.elapsed());
        }
    }
}
