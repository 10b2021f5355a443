//! Something that is said once, to everybody or to one task: cheap to ask for every message of every client.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use futures_util::task::AtomicWaker;
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

/// A signal to the one task that listens to it. It holds no memory of its own: every client has some.
#[derive(Debug, Default)]
pub(crate) struct Word {
    given: AtomicBool,
    listener: AtomicWaker,
}

impl Word {
    pub(crate) fn give(&self) {
        self.given.store(true, Ordering::Release);
        self.listener.wake();
    }
}

/// Listens to a word, the same each time. Asking again costs one load.
#[derive(Debug, Default)]
pub(crate) struct Ear {
    registered: Option<Waker>,
}

impl Ear {
    pub(crate) fn poll(&mut self, word: &Word, cx: &Context<'_>) -> Poll<()> {
        let is_given = || word.given.load(Ordering::Acquire);
        if is_given() {
            return Poll::Ready(());
        }
        if self.registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        word.listener.register(cx.waker());
        self.registered = Some(cx.waker().clone());
        // It may have been given in between.
        if is_given() { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_word_reaches_the_task_that_listens_and_who_comes_later() {
        let word = Arc::new(Word::default());
        let listen = |word: Arc<Word>| async move {
            let mut ear = Ear::default();
            std::future::poll_fn(|cx| ear.poll(&word, cx)).await;
        };
        let waiting = tokio::spawn(listen(Arc::clone(&word)));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        word.give();
        waiting.await.expect("the task ends");
        listen(word).await;
    }

    #[tokio::test]
    async fn an_ear_that_goes_to_another_task_listens_there() {
        let (word, mut ear) = (Word::default(), Ear::default());
        let elsewhere = Context::from_waker(Waker::noop());
        assert!(ear.poll(&word, &elsewhere).is_pending());
        let told = std::future::poll_fn(|cx| {
            let polled = ear.poll(&word, cx);
            word.give();
            polled
        });
        tokio::time::timeout(std::time::Duration::from_secs(5), told).await.expect("woken");
    }

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
