//! What the console of the PostgreSQL plane can have done to the whole gateway.

use std::pin::Pin;
use std::sync::Weak;

use cofferdam_postgres::ConsoleHost;

use crate::gateway::Inner;

/// The gateway, as long as it is there.
pub(crate) struct Console(pub(crate) Weak<Inner>);

impl ConsoleHost for Console {
    fn reload(&self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(async {
            let Some(inner) = self.0.upgrade() else { return Err("the gateway is gone".to_owned()) };
            inner.reload(None).await.map(drop).map_err(|error| error.to_string())
        })
    }

    fn shutdown(&self) {
        if let Some(inner) = self.0.upgrade() {
            inner.drain();
        }
    }
}
