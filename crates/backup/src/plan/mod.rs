//! Decisions without side effects: which sets stay, which run is due, what can be recovered.
//!
//! Time and sets come in as arguments, so that every decision can be tried, shown and tested.

mod due;
mod retention;
mod window;

pub use due::{Due, due, prune_is_due};
pub use retention::{Kept, RetentionPlan, retention};
pub use window::{Gap, Range, RecoverabilityWindow, logical_window};
