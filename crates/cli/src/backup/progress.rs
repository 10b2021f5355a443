//! What is shown while work goes on, and how it is stopped.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cofferdam_backup::{Control, Event};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line that moves while something is done. Ends with it.
pub(super) struct Shown {
    bar: ProgressBar,
    pub(super) control: Control,
    ticker: tokio::task::JoinHandle<()>,
}

impl Shown {
    /// Shows a tenant's work on a terminal; elsewhere, and when asked to be quiet, only warnings are printed.
    /// The first Ctrl-C stops the work, the second ends the process.
    pub(super) fn new(tenant: &str, quiet: bool) -> Self {
        let target = if quiet || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_prefix(tenant.to_owned());
        bar.set_style(style("{prefix} {spinner} {msg} {bytes} at {binary_bytes_per_sec}, {elapsed}"));
        let (drawn, name) = (bar.clone(), tenant.to_owned());
        // A phase counts from its beginning.
        let base = Arc::new(Mutex::new(0_u64));
        let begun = Arc::clone(&base);
        let moved: Arc<Mutex<Option<Control>>> = Arc::default();
        let reader = Arc::clone(&moved);
        let control = Control::new(move |event| match event {
            Event::Phase { name, bytes } => {
                let now = lock(&reader).as_ref().map_or(0, Control::moved);
                *lock(&begun) = now;
                drawn.reset();
                match bytes.filter(|bytes| *bytes > 0) {
                    Some(bytes) => {
                        drawn.set_length(bytes);
                        drawn.set_style(style(
                            "{prefix} {spinner} {msg} {bytes} of about {total_bytes} at {binary_bytes_per_sec}, {elapsed}",
                        ));
                    }
                    None => drawn.set_style(style("{prefix} {spinner} {msg}")),
                }
                drawn.set_message(*name);
            }
            Event::FenceLowered { reason } => {
                drawn.suspend(|| eprintln!("{name}: the fence came down early: {reason}"));
            }
            Event::Warning { text } => drawn.suspend(|| eprintln!("{name}: {text}")),
            _ => {}
        });
        *lock(&moved) = Some(control.clone());
        let ticker = tokio::spawn({
            let (bar, control) = (bar.clone(), control.clone());
            async move {
                let mut interrupted = false;
                loop {
                    tokio::select! {
                        signal = stop_signal() => {
                            if signal.is_err() {
                                return;
                            }
                            if interrupted {
                                // The work had its chance. What it leaves behind looks like nothing.
                                std::process::abort();
                            }
                            interrupted = true;
                            bar.suspend(|| eprintln!("stopping; once more to end at once"));
                            control.cancel();
                        }
                        () = tokio::time::sleep(Duration::from_millis(100)) => {
                            let base = *lock(&base);
                            bar.set_position(control.moved().saturating_sub(base));
                            bar.tick();
                        }
                    }
                }
            }
        });
        Self { bar, control, ticker }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.ticker.abort();
        self.bar.finish_and_clear();
    }
}

/// Ctrl-C or SIGTERM.
pub(crate) async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
