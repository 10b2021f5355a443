//! The gateway as the admin surface sees it.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use cofferdam_admin::{
    CertificateView, ClusterView, Fault, GateView, GatewayView, HealthView, OdooServerView, PlaneUsage, ReloadFailed,
    ServerView, StatusView, TenantView, TotalsView,
};
use cofferdam_fairness::{GateSet, TenantUsage};
use cofferdam_postgres::{CacheUsage, ServerUsage};
use cofferdam_tenant::{Diagnostic, Diagnostics, PlaneQuota, Tenant, TenantId};

use crate::gateway::{Inner, ReloadError};

pub(crate) struct View(pub(crate) Arc<Inner>, pub(crate) Option<Arc<dyn HealthView>>);

#[async_trait]
impl GatewayView for View {
    fn token(&self) -> Option<String> {
        // The listener was opened on the strength of the first token: a reload may change it, never take it away.
        let current = self.0.catalog.load();
        current.admin_token.as_ref().or(self.0.first_admin_token.as_ref()).map(|t| t.expose().to_owned())
    }

    fn health(&self) -> Option<Arc<dyn HealthView>> {
        self.1.clone()
    }

    fn is_ready(&self) -> bool {
        !self.0.draining.is_cancelled()
    }

    fn status(&self) -> StatusView {
        let generation = self.0.generation.load(Ordering::Relaxed);
        StatusView {
            version: env!("CARGO_PKG_VERSION"),
            generation,
            tenants: self.0.catalog.load().tenants().len(),
            reloads: generation - 1,
            failed_reloads: self.0.failed_reloads.load(Ordering::Relaxed),
            last_errors: faults(&self.0.last_errors.lock().unwrap_or_else(PoisonError::into_inner)),
            draining: self.0.draining.is_cancelled(),
        }
    }

    fn tenants(&self) -> Vec<TenantView> {
        let catalog = self.0.catalog.load();
        let open = self.open();
        catalog.tenants().iter().map(|t| self.describe(t, &open)).collect()
    }

    fn tenant(&self, slug: &str) -> Option<TenantView> {
        let catalog = self.0.catalog.load();
        let tenant = catalog.by_slug(slug)?;
        Some(self.describe(tenant, &self.open()))
    }

    fn gates(&self) -> Vec<GateView> {
        let of = |plane: &'static str, gates: &GateSet| {
            gates
                .all()
                .into_iter()
                .map(|(name, gate)| {
                    let usage = gate.usage();
                    GateView {
                        plane: plane.to_owned(),
                        name,
                        slots: usage.slots,
                        open_slots: usage.open_slots,
                        open_expensive: usage.open_expensive,
                        running: usage.running,
                        expensive: usage.expensive,
                        nested: usage.nested,
                        waiting: usage.waiting,
                        busy_cores: usage.busy_cores,
                        inflation: usage.inflation,
                    }
                })
                .collect::<Vec<_>>()
        };
        let http = self.0.http.iter().flat_map(|p| of("http", p.gates()));
        let postgres = self.0.postgres.iter().flat_map(|p| of("postgres", p.gates()));
        http.chain(postgres).collect()
    }

    fn clusters(&self) -> Vec<ClusterView> {
        let usage = self.0.postgres.as_ref().map(|p| p.usage()).unwrap_or_default();
        let server = |s: &ServerUsage| ServerView {
            address: s.address.to_string(),
            role: s.role.as_str().to_owned(),
            up: s.is_up,
            lag_seconds: s.lag.map(|lag| lag.as_secs_f64()),
        };
        let servers = |name: &str| usage.servers.get(name).map(|all| all.iter().map(server).collect());
        let view = |(name, u): (&String, &CacheUsage)| ClusterView {
            name: name.clone(),
            open: u.open,
            idle: u.idle,
            lowered: u.lowered,
            servers: servers(name).unwrap_or_default(),
        };
        usage.connections.iter().map(view).collect()
    }

    fn servers(&self) -> Vec<OdooServerView> {
        let servers = self.0.http.as_ref().map(|p| p.usage().servers).unwrap_or_default();
        let view = |s: cofferdam_http::ServerUsage| OdooServerView {
            pool: s.pool.as_str().to_owned(),
            address: s.address.to_string(),
            well: s.is_well,
            in_flight: s.in_flight,
            lowered: s.lowered,
        };
        servers.into_iter().map(view).collect()
    }

    fn certificates(&self) -> Vec<CertificateView> {
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let view = |state: cofferdam_http::HostState| CertificateView {
            not_after: state.not_after.map(seconds),
            next: seconds(state.next),
            failures: state.failures,
            error: state.reason,
            host: state.host,
        };
        self.0.http.as_ref().map(|plane| plane.certificates().into_iter().map(view).collect()).unwrap_or_default()
    }

    fn purge_cache(&self, tenant: Option<&str>, path: Option<&str>) -> bool {
        let catalog = self.0.catalog.load();
        let tenant = match tenant {
            Some(slug) => match catalog.by_slug(slug) {
                Some(tenant) => Some(tenant.id),
                None => return false,
            },
            None => None,
        };
        if let Some(plane) = &self.0.http {
            plane.purge_cache(tenant, path);
        }
        true
    }

    fn totals(&self) -> TotalsView {
        let mut totals = TotalsView::default();
        if let Some(usage) = self.0.http.as_ref().map(|p| p.usage()) {
            totals.http_requests = usage.requests;
            totals.http_unknown_host = usage.unknown_host;
            totals.http_refused = usage.refused;
            totals.http_failed = usage.failed;
            totals.http_denied = usage.denied;
            totals.http_crowded = usage.crowded;
            totals.http_log_lines_dropped = usage.log_lines_dropped;
            totals.cache_hits = usage.cache.hits;
            totals.cache_misses = usage.cache.misses;
            totals.cache_confirmed = usage.cache.confirmed;
            totals.cache_memory_bytes = usage.cache.memory_bytes;
            totals.cache_disk_bytes = usage.cache.disk_bytes;
            totals.http_websockets = usage.websockets.values().map(|n| u64::from(*n)).sum();
        }
        if let Some(usage) = self.0.postgres.as_ref().map(|p| p.usage()) {
            totals.postgres_logins = usage.logins;
            totals.postgres_login_failures = usage.login_failures;
            totals.postgres_transactions = usage.transactions;
            totals.postgres_refused = usage.refused;
            totals.postgres_cancels = usage.cancels;
            totals.postgres_clients = usage.clients.values().map(|n| u64::from(*n)).sum();
        }
        totals
    }

    async fn reload(&self) -> Result<StatusView, ReloadFailed> {
        match self.0.reload(None).await {
            Ok(_) => Ok(self.status()),
            Err(ReloadError::Config(Diagnostics(all))) => Err(ReloadFailed { errors: faults(&all) }),
            Err(other) => {
                let path = self.0.main_path();
                let fault = Diagnostic::file_level(path, other.to_string(), "a usable configuration");
                Err(ReloadFailed { errors: faults(&[fault]) })
            }
        }
    }
}

/// Connections open by tenant.
struct OpenConnections {
    clients: HashMap<TenantId, u32>,
    websockets: HashMap<TenantId, u32>,
}

impl View {
    fn open(&self) -> OpenConnections {
        OpenConnections {
            clients: self.0.postgres.as_ref().map(|p| p.usage().clients).unwrap_or_default(),
            websockets: self.0.http.as_ref().map(|p| p.usage().websockets).unwrap_or_default(),
        }
    }

    fn describe(&self, tenant: &Tenant, open: &OpenConnections) -> TenantView {
        let pool = tenant.pool.as_ref().map(|p| p.name.as_str());
        let cluster = tenant.cluster.as_ref().map(|c| c.name.as_str());
        let usage = |gates: Option<&GateSet>, name: Option<&str>, quota: &PlaneQuota| {
            let gate = gates?.get(name?)?;
            Some(plane_usage(&gate.tenant_usage(tenant.id), quota))
        };
        let (http, postgres) = (self.0.http.as_ref(), self.0.postgres.as_ref());
        let of = |counts: &HashMap<TenantId, u32>| counts.get(&tenant.id).copied().unwrap_or(0);
        let mut view = TenantView {
            tenant: tenant.slug.as_str().to_owned(),
            hosts: tenant.hosts.iter().map(|h| h.as_str().to_owned()).collect(),
            database: tenant.database.as_ref().map(|d| d.as_str().to_owned()),
            pool: pool.map(str::to_owned),
            cluster: cluster.map(str::to_owned),
            plan: tenant.plan.name.as_str().to_owned(),
            http: usage(http.map(|p| p.gates()), pool, &tenant.plan.http),
            postgres: usage(postgres.map(|p| p.gates()), cluster, &tenant.plan.postgres),
            postgres_clients: of(&open.clients),
            max_clients: tenant.plan.max_clients,
            websockets: of(&open.websockets),
            max_websockets: tenant.plan.max_websockets,
            warnings: Vec::new(),
        };
        view.warnings = warnings(&view);
        view
    }
}

/// From this part of a quota on an operator is told.
const NEARLY: f64 = 0.8;

/// What is nearly used up, or holds the tenant back already.
pub(crate) fn warnings(tenant: &TenantView) -> Vec<String> {
    let mut out = Vec::new();
    let mut nearly = |what: &str, used: u32, limit: u32| {
        if limit > 0 && f64::from(used) >= NEARLY * f64::from(limit) {
            out.push(format!("{what}: {used} of {limit}"));
        }
    };
    for (plane, usage) in [("http", &tenant.http), ("postgres", &tenant.postgres)] {
        let Some(usage) = usage else { continue };
        // One of one is what a limit of one is for.
        if let Some(limit) = usage.limit.filter(|l| *l > 1 || usage.waiting > 0) {
            nearly(&format!("{plane} slots"), usage.running, limit);
        }
        nearly(&format!("{plane} queue"), usage.waiting, usage.queue);
    }
    nearly("PostgreSQL clients", tenant.postgres_clients, tenant.max_clients);
    nearly("WebSockets", tenant.websockets, tenant.max_websockets);
    for (plane, usage) in [("http", &tenant.http), ("postgres", &tenant.postgres)] {
        let Some(usage) = usage else { continue };
        if usage.throttled {
            out.push(format!("{plane}: held back by its rate or budget"));
        }
        if let Some(limit) = usage.squeezed_to {
            out.push(format!("{plane}: limited to {limit} while its database work is queued"));
        }
    }
    out
}

fn plane_usage(usage: &TenantUsage, quota: &PlaneQuota) -> PlaneUsage {
    PlaneUsage {
        running: usage.running,
        limit: (quota.limit != u32::MAX).then_some(quota.limit),
        reserved: quota.reserved,
        waiting: usage.waiting,
        queue: quota.queue,
        slot_seconds: usage.used.0,
        wait_seconds: usage.waited.as_secs_f64(),
        wait_p99_seconds: usage.waits.quantile(0.99).map_or(0.0, |wait| wait.as_secs_f64()),
        granted: usage.granted,
        rejected: usage.rejected,
        nested: usage.nested,
        squeezed_to: usage.squeezed_to,
        throttled: usage.throttled,
        rate: quota.rate.map(|r| r.amount),
        work_per_second: quota.work.map(|w| w.amount as f64 / 1e3),
        work_balance: usage.work_balance.map(|ms| ms / 1e3),
        bytes_per_second: quota.bandwidth.map(|b| b.amount),
    }
}

fn faults(diagnostics: &[Diagnostic]) -> Vec<Fault> {
    diagnostics
        .iter()
        .map(|d| Fault {
            file: d.file.display().to_string(),
            line: d.line,
            column: d.column,
            field: d.field.clone(),
            found: d.found.clone(),
            expected: d.expected.clone(),
        })
        .collect()
}
