//! The locks of the gate: the standard library's, or those of a model checker that tries every hand-over.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Mutex, MutexGuard};

/// A gate is shared by the standard counter also under the model checker: its count is not what is checked.
pub(crate) use std::sync::Arc;
