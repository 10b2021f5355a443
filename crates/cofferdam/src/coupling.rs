//! Couples the planes: see [`Ledger`]. One task looks at the clusters' gates ten times a second and lowers the limits of
//! tenants whose database work waits at the gates of their pools.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use cofferdam_fairness::{Clock, Gate, Ledger, LedgerConfig, Pressure};
use cofferdam_http::HttpPlane;
use cofferdam_tenant::{Catalog, TenantId};

use crate::gateway::Inner;

const EVERY: Duration = Duration::from_millis(100);

/// Runs until the gateway has stopped.
pub(crate) async fn run(inner: Weak<Inner>, clock: Arc<dyn Clock>) {
    let mut ledger = Ledger::new(LedgerConfig::default());
    let mut coupled = Coupled::default();
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tick.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        if inner.stopped.is_cancelled() {
            return;
        }
        let (Some(http), Some(postgres)) = (&inner.http, &inner.postgres) else { return };
        coupled.follow(&inner.catalog.load_full(), http);
        let waiting: Vec<Pressure> = postgres
            .gates()
            .all()
            .iter()
            .flat_map(|(_, gate)| gate.pressures())
            .filter(|p| coupled.gates.contains_key(&p.tenant))
            .collect();
        let in_workers = |tenant| coupled.gates.get(&tenant).map_or(0, |gate| gate.tenant_usage(tenant).running);
        for verdict in ledger.observe(clock.now(), &waiting, in_workers) {
            if let Some(gate) = coupled.gates.get(&verdict.tenant) {
                gate.squeeze(verdict.tenant, verdict.limit);
            }
        }
    }
}

/// The gate of each tenant's pool, for tenants with both a coupled pool and a cluster.
#[derive(Default)]
struct Coupled {
    catalog: Option<Arc<Catalog>>,
    gates: HashMap<TenantId, Arc<Gate>>,
}

impl Coupled {
    /// Keeps in step with the catalog. A tenant that moved away leaves no lowered limit behind.
    fn follow(&mut self, catalog: &Arc<Catalog>, http: &HttpPlane) {
        if self.catalog.as_ref().is_some_and(|c| Arc::ptr_eq(c, catalog)) {
            return;
        }
        let gate = |tenant: &cofferdam_tenant::Tenant| {
            let pool = tenant.pool.as_ref().filter(|p| p.coupled && tenant.cluster.is_some())?;
            http.gates().get(pool.name.as_str())
        };
        let gates: HashMap<TenantId, Arc<Gate>> =
            catalog.tenants().iter().filter_map(|t| gate(t).map(|g| (t.id, g))).collect();
        for (tenant, old) in &self.gates {
            if !gates.get(tenant).is_some_and(|new| Arc::ptr_eq(new, old)) {
                old.squeeze(*tenant, None);
            }
        }
        self.gates = gates;
        self.catalog = Some(Arc::clone(catalog));
    }
}
