//! Prometheus metrics, collected when they are asked for: nothing of this is on a request path.
//!
//! A recorder is made per scrape and never installed globally, so that an embedding program keeps its own.

use metrics::{Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};

use crate::view::{GatewayView, PlaneUsage};

/// Tenants with series of their own; the others are summed up as `other`.
const TENANT_SERIES: usize = 100;

const METADATA: Metadata<'static> = Metadata::new("cofferdam", Level::INFO, None);

/// The metrics of a gateway in the Prometheus text format.
pub(crate) fn render(view: &dyn GatewayView) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    let out = Out(&recorder);
    let status = view.status();
    out.gauge("cofferdam_info", &[("version", status.version)], 1.0);
    out.gauge("cofferdam_ready", &[], f64::from(u8::from(view.is_ready())));
    out.gauge("cofferdam_catalog_generation", &[], status.generation as f64);
    out.gauge("cofferdam_catalog_tenants", &[], status.tenants as f64);
    out.counter("cofferdam_reloads_total", &[("result", "ok")], status.reloads);
    out.counter("cofferdam_reloads_total", &[("result", "failed")], status.failed_reloads);
    out.gauge("cofferdam_config_errors", &[], status.last_errors.len() as f64);
    totals(&out, view);
    for gate in view.gates() {
        let labels = [("plane", gate.plane.as_str()), ("gate", gate.name.as_str())];
        out.gauge("cofferdam_gate_slots", &labels, gate.slots.into());
        out.gauge("cofferdam_gate_open_slots", &labels, gate.open_slots.into());
        out.gauge("cofferdam_gate_open_expensive_slots", &labels, gate.open_expensive.into());
        out.gauge("cofferdam_gate_nested", &labels, gate.nested.into());
        out.gauge("cofferdam_gate_inflation", &labels, gate.inflation);
        out.gauge("cofferdam_gate_running", &labels, gate.running.into());
        out.gauge("cofferdam_gate_expensive", &labels, gate.expensive.into());
        out.gauge("cofferdam_gate_waiting", &labels, gate.waiting.into());
        out.gauge("cofferdam_gate_busy_cores", &labels, gate.busy_cores);
    }
    for cluster in view.clusters() {
        for (state, n) in [("idle", cluster.idle), ("busy", cluster.open - cluster.idle.min(cluster.open))] {
            let labels = [("cluster", cluster.name.as_str()), ("state", state)];
            out.gauge("cofferdam_postgres_server_connections", &labels, n.into());
        }
        let labels = [("cluster", cluster.name.as_str())];
        out.gauge("cofferdam_postgres_server_connections_lowered", &labels, cluster.lowered.into());
        for server in &cluster.servers {
            let labels = [("cluster", cluster.name.as_str()), ("server", &server.address), ("role", &server.role)];
            out.gauge("cofferdam_postgres_server_up", &labels, f64::from(u8::from(server.up)));
            if let Some(lag) = server.lag_seconds {
                out.gauge("cofferdam_postgres_replica_lag_seconds", &labels[..2], lag);
            }
        }
    }
    tenants(&out, view);
    recorder.handle().render()
}

fn totals(out: &Out<'_>, view: &dyn GatewayView) {
    let t = view.totals();
    out.counter("cofferdam_http_requests_total", &[], t.http_requests);
    out.counter("cofferdam_http_unknown_host_total", &[], t.http_unknown_host);
    out.counter("cofferdam_http_refused_total", &[], t.http_refused);
    out.counter("cofferdam_http_failed_total", &[], t.http_failed);
    out.counter("cofferdam_http_denied_total", &[], t.http_denied);
    out.counter("cofferdam_http_crowded_total", &[], t.http_crowded);
    out.gauge("cofferdam_http_log_lines_dropped", &[], t.http_log_lines_dropped as f64);
    out.counter("cofferdam_http_cache_requests_total", &[("result", "hit")], t.cache_hits);
    out.counter("cofferdam_http_cache_requests_total", &[("result", "miss")], t.cache_misses);
    out.counter("cofferdam_http_cache_requests_total", &[("result", "confirmed")], t.cache_confirmed);
    out.gauge("cofferdam_http_cache_bytes", &[("place", "memory")], t.cache_memory_bytes as f64);
    out.gauge("cofferdam_http_cache_bytes", &[("place", "disk")], t.cache_disk_bytes as f64);
    for server in view.servers() {
        let labels = [("pool", server.pool.as_str()), ("server", server.address.as_str())];
        out.gauge("cofferdam_http_server_up", &labels, f64::from(u8::from(server.well)));
        out.gauge("cofferdam_http_server_in_flight", &labels, f64::from(server.in_flight));
        out.gauge("cofferdam_http_server_workers_lowered", &labels, f64::from(server.lowered));
    }
    let certificates = view.certificates();
    if !certificates.is_empty() {
        let held = certificates.iter().filter(|c| c.not_after.is_some()).count();
        out.gauge("cofferdam_http_certificates", &[("state", "held")], held as f64);
        out.gauge("cofferdam_http_certificates", &[("state", "missing")], (certificates.len() - held) as f64);
        let failing = certificates.iter().filter(|c| c.error.is_some()).count();
        out.gauge("cofferdam_http_certificates_failing", &[], failing as f64);
        if let Some(first) = certificates.iter().filter_map(|c| c.not_after).min() {
            out.gauge("cofferdam_http_certificates_first_expiry_timestamp_seconds", &[], first as f64);
        }
    }
    out.gauge("cofferdam_http_websockets", &[], t.http_websockets as f64);
    out.counter("cofferdam_postgres_logins_total", &[("result", "ok")], t.postgres_logins);
    out.counter("cofferdam_postgres_logins_total", &[("result", "failed")], t.postgres_login_failures);
    out.counter("cofferdam_postgres_transactions_total", &[], t.postgres_transactions);
    out.counter("cofferdam_postgres_refused_total", &[], t.postgres_refused);
    out.counter("cofferdam_postgres_cancels_total", &[], t.postgres_cancels);
    out.gauge("cofferdam_postgres_clients", &[], t.postgres_clients as f64);
}

/// The label under which all tenants are summed; no tenant can have it, since names have no underscore.
const ALL: &str = "_all";

fn tenants(out: &Out<'_>, view: &dyn GatewayView) {
    let mut tenants = view.tenants();
    tenants.sort_by(|a, b| b.work().total_cmp(&a.work()));
    let mut all: [Option<PlaneUsage>; 2] = [None, None];
    for (i, tenant) in tenants.iter().enumerate() {
        for (n, (plane, usage)) in [("http", &tenant.http), ("postgres", &tenant.postgres)].into_iter().enumerate() {
            let Some(usage) = usage else { continue };
            if i < TENANT_SERIES {
                tenant_plane(out, &tenant.tenant, plane, usage);
            }
            // Over all, also the first: who is among them changes, and counters must not fall.
            {
                let sum = all[n].get_or_insert_default();
                sum.running += usage.running;
                sum.waiting += usage.waiting;
                sum.slot_seconds += usage.slot_seconds;
                sum.wait_seconds += usage.wait_seconds;
                sum.granted += usage.granted;
                sum.rejected += usage.rejected;
            }
        }
    }
    for (plane, usage) in ["http", "postgres"].into_iter().zip(&all) {
        if let Some(usage) = usage {
            tenant_plane(out, ALL, plane, usage);
        }
    }
}

fn tenant_plane(out: &Out<'_>, tenant: &str, plane: &str, usage: &PlaneUsage) {
    let labels = [("tenant", tenant), ("plane", plane)];
    out.gauge("cofferdam_tenant_running", &labels, usage.running.into());
    out.gauge("cofferdam_tenant_waiting", &labels, usage.waiting.into());
    // Seconds are no whole numbers, which the recorder's counters want: they are gauges that only rise.
    out.gauge("cofferdam_tenant_slot_seconds_total", &labels, usage.slot_seconds);
    out.gauge("cofferdam_tenant_wait_seconds_total", &labels, usage.wait_seconds);
    out.counter("cofferdam_tenant_granted_total", &labels, usage.granted);
    out.counter("cofferdam_tenant_rejected_total", &labels, usage.rejected);
    if tenant != ALL {
        if let Some(limit) = usage.limit {
            out.gauge("cofferdam_tenant_limit", &labels, limit.into());
        }
        out.gauge(
            "cofferdam_tenant_held_back",
            &labels,
            f64::from(u8::from(usage.throttled || usage.squeezed_to.is_some())),
        );
        if let Some(balance) = usage.work_balance {
            out.gauge("cofferdam_tenant_work_balance_seconds", &labels, balance);
        }
    }
}

struct Out<'a>(&'a PrometheusRecorder);

impl Out<'_> {
    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.0.register_gauge(&key(name, labels), &METADATA).set(value);
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)], value: u64) {
        self.0.register_counter(&key(name, labels), &METADATA).absolute(value);
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    Key::from_parts(name, labels.iter().map(|(k, v)| Label::new(*k, (*v).to_owned())).collect::<Vec<_>>())
}
