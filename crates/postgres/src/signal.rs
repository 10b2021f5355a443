//! Something that is said once to everybody: cheap to ask for every message of every client.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// A signal that is given once and stays.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    given: AtomicBool,
    told: Arc<Notify>,
}

impl Signal {
    pub(crate) fn give(&self) {
        self.given.store(true, Ordering::Release);
        self.told.notify_waiters();
    }

    pub(crate) fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    pub(crate) fn listen(self: &Arc<Self>) -> Listener {
        Listener { signal: Arc::clone(self), registered: None }
    }

    pub(crate) async fn given(self: &Arc<Self>) {
        let mut listener = self.listen();
        std::future::poll_fn(|cx| listener.poll(cx)).await;
    }
}

/// Waits for a signal. Asking again costs one load: the waker is registered once.
#[derive(Debug)]
pub(crate) struct Listener {
    signal: Arc<Signal>,
    registered: Option<(Pin<Box<OwnedNotified>>, Waker)>,
}

impl Listener {
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.signal.is_given() {
            return Poll::Ready(());
        }
        if self.registered.as_ref().is_some_and(|(_, waker)| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        let mut told = Box::pin(Arc::clone(&self.signal.told).notified_owned());
        if told.as_mut().poll(cx).is_ready() || self.signal.is_given() {
            return Poll::Ready(());
        }
        self.registered = Some((told, cx.waker().clone()));
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_reaches_who_waits_and_who_comes_later() {
        let signal = Arc::new(Signal::default());
        let waiting = tokio::spawn({
            let signal = Arc::clone(&signal);
            async move { signal.given().await }
        });
        tokio::task::yield_now().await;
        signal.give();
        waiting.await.expect("the task ends");
        signal.given().await;
    }
}
