//! The gateway as the admin surface sees it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use cofferdam_admin::{
    ClusterView, Fault, GateView, GatewayView, PlaneUsage, ReloadFailed, StatusView, TenantView, TotalsView,
};
use cofferdam_fairness::{GateSet, TenantUsage};
use cofferdam_tenant::{Diagnostic, Diagnostics, PlaneQuota, Tenant};

use crate::gateway::{Inner, ReloadError};

pub(crate) struct View(pub(crate) Arc<Inner>);

#[async_trait]
impl GatewayView for View {
    fn token(&self) -> Option<String> {
        // The listener was opened on the strength of the first token: a reload may change it, never take it away.
        let current = self.0.catalog.load();
        current.admin_token.as_ref().or(self.0.first_admin_token.as_ref()).map(|t| t.expose().to_owned())
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
        let clients = self.0.postgres.as_ref().map(|p| p.usage().clients).unwrap_or_default();
        catalog.tenants().iter().map(|t| self.describe(t, clients.get(&t.id).copied().unwrap_or(0))).collect()
    }

    fn tenant(&self, slug: &str) -> Option<TenantView> {
        let catalog = self.0.catalog.load();
        let tenant = catalog.by_slug(slug)?;
        let clients = self.0.postgres.as_ref().map(|p| p.usage().clients).unwrap_or_default();
        Some(self.describe(tenant, clients.get(&tenant.id).copied().unwrap_or(0)))
    }

    fn gates(&self) -> Vec<GateView> {
        let of = |plane: &'static str, gates: &GateSet| {
            gates
                .all()
                .into_iter()
                .map(|(name, gate)| {
                    let usage = gate.usage();
                    GateView {
                        plane,
                        name,
                        slots: usage.slots,
                        open_slots: usage.open_slots,
                        open_expensive: usage.open_expensive,
                        running: usage.running,
                        expensive: usage.expensive,
                        nested: usage.nested,
                        waiting: usage.waiting,
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
        let usage = self.0.postgres.as_ref().map(|p| p.usage().connections).unwrap_or_default();
        usage.into_iter().map(|(name, u)| ClusterView { name, open: u.open, idle: u.idle }).collect()
    }

    fn totals(&self) -> TotalsView {
        let mut totals = TotalsView::default();
        if let Some(usage) = self.0.http.as_ref().map(|p| p.usage()) {
            totals.http_requests = usage.requests;
            totals.http_unknown_host = usage.unknown_host;
            totals.http_refused = usage.refused;
            totals.http_failed = usage.failed;
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

impl View {
    fn describe(&self, tenant: &Tenant, clients: u32) -> TenantView {
        let pool = tenant.pool.as_ref().map(|p| p.name.as_str());
        let cluster = tenant.cluster.as_ref().map(|c| c.name.as_str());
        let usage = |gates: Option<&GateSet>, name: Option<&str>, quota: &PlaneQuota| {
            let gate = gates?.get(name?)?;
            Some(plane_usage(&gate.tenant_usage(tenant.id), quota))
        };
        let (http, postgres) = (self.0.http.as_ref(), self.0.postgres.as_ref());
        TenantView {
            tenant: tenant.slug.as_str().to_owned(),
            hosts: tenant.hosts.iter().map(|h| h.as_str().to_owned()).collect(),
            database: tenant.database.as_ref().map(|d| d.as_str().to_owned()),
            pool: pool.map(str::to_owned),
            cluster: cluster.map(str::to_owned),
            plan: tenant.plan.name.as_str().to_owned(),
            http: usage(http.map(|p| p.gates()), pool, &tenant.plan.http),
            postgres: usage(postgres.map(|p| p.gates()), cluster, &tenant.plan.postgres),
            postgres_clients: clients,
        }
    }
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
        granted: usage.granted,
        rejected: usage.rejected,
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
