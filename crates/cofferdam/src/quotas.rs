//! Tells the operator in the log when a tenant's quota is nearly used up.

use std::collections::HashMap;
use std::sync::Weak;
use std::time::Duration;

use cofferdam_admin::GatewayView;
use tokio::time::Instant;

use crate::gateway::Inner;
use crate::view::View;

const EVERY: Duration = Duration::from_secs(5);
/// The same tenant is not spoken of again for this long.
const SILENCE: Duration = Duration::from_secs(300);

/// Runs until the gateway has stopped.
pub(crate) async fn run(inner: Weak<Inner>) {
    let mut told: HashMap<String, Instant> = HashMap::new();
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tick.tick().await;
        let Some(inner) = inner.upgrade().filter(|i| !i.stopped.is_cancelled()) else { return };
        told.retain(|_, at| at.elapsed() < SILENCE);
        for tenant in View(inner, None).tenants() {
            if !tenant.warnings.is_empty() && !told.contains_key(&tenant.tenant) {
                tracing::warn!(tenant = %tenant.tenant, quotas = %tenant.warnings.join("; "), "quotas nearly used up");
                told.insert(tenant.tenant, Instant::now());
            }
        }
    }
}
