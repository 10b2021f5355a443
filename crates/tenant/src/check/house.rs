//! The main file: plans, clusters, pools, listeners.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Check, Place, number};
use crate::catalog::{
    ClassQuota, Cluster, ConsoleUser, Login, PerSecond, Plan, PlaneQuota, Pool, PostgresFront, Server, TlsFiles,
};
use crate::config::{
    AuthMethod, Class, ClusterConfig, ConsoleConfig, GatewayConfig, PlanConfig, PoolConfig, Priorities, QuotaConfig,
    ReadOnlyRouting, TlsMode,
};
use crate::diagnostic::one_of;
use crate::ids::{ClusterName, PlanName, PoolName, TenantId};
use crate::units::{HumanDuration, Secret};

const DEFAULT_QUEUE: u32 = 200;
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Bytes of a request's head that any tenant may send.
const MOST_HEADER: u64 = 64 << 10;
const DEFAULT_URL: u64 = 16 << 10;
const DEFAULT_BODY: u64 = 128 << 20; // what Odoo itself accepts
const DEFAULT_CLIENTS: u32 = 200;
const DEFAULT_WEBSOCKETS: u32 = 200;
const DEFAULT_IDLE_IN_TRANSACTION: Duration = Duration::from_secs(600);
/// Qualified throughout, and an expired password is none (rule 19).
const AUTH_QUERY: &str = "SELECT rolname, CASE WHEN rolvaliduntil OPERATOR(pg_catalog.<) pg_catalog.now() THEN NULL \
    ELSE rolpassword END FROM pg_catalog.pg_authid WHERE rolname OPERATOR(pg_catalog.=) $1 AND rolcanlogin";

impl Check<'_> {
    pub(super) fn plans(&mut self, main: &Place<'_>, config: &GatewayConfig) -> BTreeMap<PlanName, Arc<Plan>> {
        let mut plans = BTreeMap::new();
        for (name, plan) in &config.plans {
            self.quotas(main, &["plans", name.as_str()], plan);
            plans.insert(name.clone(), Arc::new(resolve_plan(name, plan)));
        }
        plans
    }

    /// Checks the quotas of a plan, or what a tenant has different from it.
    pub(super) fn quotas(&mut self, place: &Place<'_>, path: &[&str], plan: &PlanConfig) {
        let below = |more: &[&'static str]| [path, more].concat();
        let weight = plan.weight.unwrap_or(1);
        if !(1..=10_000).contains(&weight) {
            self.fault(place, &below(&["weight"]), format!("`{weight}`"), "a weight from 1 to 10000");
        }
        for (plane, quota) in [("http", &plan.http), ("postgres", &plan.postgres)] {
            let limit = quota.limit.unwrap_or(u32::MAX);
            let reserved = quota.reserved.unwrap_or(0);
            if limit == 0 {
                self.fault(place, &below(&[plane, "limit"]), "`0`", "a limit of at least 1 slot");
            } else if reserved > limit {
                let expected = format!("at most the plan's own limit of {limit}");
                self.fault(place, &below(&[plane, "reserved"]), format!("`{reserved}`"), expected);
            }
            if quota.max_wait.is_some_and(|w| w.0.is_zero()) {
                let expected = "a wait above zero; `queue: 0` refuses instead of waiting";
                self.fault(place, &below(&[plane, "max_wait"]), "`0s`", expected);
            }
            for (field, zero, expected) in [
                ("rate", quota.rate == Some(0), "at least 1 per second"),
                ("rate_burst", quota.rate_burst == Some(0), "at least 1"),
                (
                    "work",
                    quota.work.is_some_and(|w| w.0.is_zero()),
                    "a time in slots per second, such as `500ms` or `2s`",
                ),
                ("work_burst", quota.work_burst.is_some_and(|w| w.0.is_zero()), "a time above zero"),
                ("bandwidth", quota.bandwidth.is_some_and(|b| b.0 == 0), "a size per second, such as `10MiB`"),
                ("bandwidth_burst", quota.bandwidth_burst.is_some_and(|b| b.0 == 0), "a size above zero"),
            ] {
                if zero {
                    self.fault(place, &below(&[plane, field]), "zero", expected);
                }
            }
            if quota.rate.is_some_and(|r| r > 1_000_000) {
                self.fault(place, &below(&[plane, "rate"]), "more than 1000000", "at most 1000000 per second");
            }
            for (field, burst, rate, named) in [
                ("rate_burst", quota.rate_burst.is_some(), quota.rate.is_some(), "rate"),
                ("work_burst", quota.work_burst.is_some(), quota.work.is_some(), "work"),
                ("bandwidth_burst", quota.bandwidth_burst.is_some(), quota.bandwidth.is_some(), "bandwidth"),
            ] {
                // A tenant's own burst may go with its plan's rate.
                if burst && !rate && path.len() > 1 {
                    self.fault(
                        place,
                        &below(&[plane, field]),
                        format!("no `{named}` beside it"),
                        format!("`{named}` too"),
                    );
                }
            }
            for (class, bounds) in &quota.classes {
                let path = [path, &[plane, "classes", class.as_str()]].concat();
                if bounds.limit == Some(0) {
                    self.fault(place, &[&path[..], &["limit"]].concat(), "`0`", "a limit of at least 1 slot");
                }
                if bounds.max_wait.is_some_and(|w| w.0.is_zero()) {
                    self.fault(place, &[&path[..], &["max_wait"]].concat(), "`0s`", "a wait above zero");
                }
            }
        }
        for (field, value) in [
            ("max_clients", plan.max_clients),
            ("max_websockets", plan.max_websockets),
            ("login_rate", plan.login_rate),
        ] {
            if value == Some(0) {
                self.fault(place, &below(&[field]), "`0`", "at least 1");
            }
        }
        if plan.login_rate.is_some_and(|r| r > 1_000_000) {
            self.fault(place, &below(&["login_rate"]), "more than 1000000", "at most 1000000 per second");
        }
        for (field, time) in [
            ("statement_timeout", plan.statement_timeout),
            ("transaction_timeout", plan.transaction_timeout),
            ("idle_timeout", plan.idle_timeout),
        ] {
            if time.is_some_and(|t| t.0.is_zero()) {
                self.fault(place, &below(&[field]), "`0s`", "a time above zero; without the field there is no limit");
            }
        }
    }

    fn priorities(&mut self, main: &Place<'_>, path: &[&str; 2], priorities: Option<Priorities>) {
        let values = priorities.iter().flat_map(|p| [("storm", p.storm), ("expensive", p.expensive)]);
        for (field, nice) in values.filter(|(_, nice)| *nice > 19) {
            let place = [path[0], path[1], "priorities", field];
            self.fault(main, &place, format!("`{nice}`"), "between 0 and 19, as for `nice`");
        }
    }

    pub(super) fn clusters(&mut self, main: &Place<'_>, config: &GatewayConfig) -> BTreeMap<ClusterName, Arc<Cluster>> {
        let mut clusters = BTreeMap::new();
        for (name, cluster) in &config.clusters {
            let path = ["clusters", name.as_str()];
            self.slots(main, &path, cluster.slots, cluster.min_slots, cluster.expensive_slots);
            self.priorities(main, &path, cluster.priorities);
            let connections = cluster.connections.unwrap_or_else(|| cluster.slots.saturating_mul(4).saturating_add(20));
            if connections < cluster.slots {
                self.fault(
                    main,
                    &[path[0], path[1], "connections"],
                    format!("`{connections}`"),
                    format!("at least as many connections as the {} slots", cluster.slots),
                );
            }
            let tls_ca = cluster.tls_ca.as_ref().and_then(|file| self.pem(main, &[path[0], path[1], "tls_ca"], file));
            if cluster.tls.is_verified() && cluster.tls_ca.is_none() {
                self.fault(
                    main,
                    &[path[0], path[1], "tls"],
                    format!("`{}` without `tls_ca`", cluster.tls.as_str()),
                    "`tls_ca: <PEM file>` beside it, to verify against",
                );
            }
            let mut part = |field: &'static str, file: Option<&std::path::PathBuf>| {
                file.and_then(|file| self.pem(main, &[path[0], path[1], field], file))
            };
            let identity =
                (part("tls_certificate", cluster.tls_certificate.as_ref()), part("tls_key", cluster.tls_key.as_ref()));
            if cluster.tls_certificate.is_some() != cluster.tls_key.is_some() {
                let (has, lacks) = if cluster.tls_key.is_some() {
                    ("tls_key", "tls_certificate")
                } else {
                    ("tls_certificate", "tls_key")
                };
                let found = format!("`{has}` without `{lacks}`");
                self.fault(main, &[path[0], path[1], has], found, format!("`{lacks}: <PEM file>` beside it"));
            }
            let mut all: Vec<_> = std::iter::once(&cluster.address).chain(&cluster.replicas).collect();
            let count = all.len();
            all.sort();
            all.dedup();
            if all.len() < count {
                self.fault(main, &[path[0], path[1], "replicas"], "a server twice", "each server once");
            }
            if cluster.service.is_none() {
                for (field, found) in [
                    ("read_only", (cluster.read_only == ReadOnlyRouting::Replica).then_some("`replica`")),
                    ("auth_query", cluster.auth_query.as_ref().map(|_| "`auth_query`")),
                ] {
                    if let Some(found) = found {
                        let expected =
                            "`service: { role, password }` beside it: the login that the gateway itself uses";
                        self.fault(main, &[path[0], path[1], field], format!("{found} without `service`"), expected);
                    }
                }
            }
            if cluster.read_only == ReadOnlyRouting::Replica && cluster.replicas.is_empty() {
                let expected = "`replicas: [<host:port>]` beside it";
                self.fault(main, &[path[0], path[1], "read_only"], "`replica` without `replicas`", expected);
            }
            for (field, time) in [
                ("health_interval", cluster.health_interval),
                ("connect_timeout", cluster.connect_timeout),
                ("idle_timeout", cluster.idle_timeout),
            ] {
                if time.0.is_zero() {
                    self.fault(main, &[path[0], path[1], field], "`0s`", "a time above zero");
                }
            }
            let service = cluster.service.as_ref().and_then(|service| {
                let login = self.own_login(main, &[path[0], path[1], "service"], &service.login())?;
                Some((login, service.database.clone()))
            });
            let tls_identity =
                identity.0.zip(identity.1).map(|(certificate, key)| TlsFiles { certificate, key: Secret::new(key) });
            let resolved = resolve_cluster(name, cluster, connections, tls_ca, tls_identity, service);
            clusters.insert(name.clone(), Arc::new(resolved));
        }
        clusters
    }

    pub(super) fn pools(
        &mut self,
        main: &Place<'_>,
        config: &GatewayConfig,
        clusters: &BTreeMap<ClusterName, Arc<Cluster>>,
        numbers: &mut HashMap<String, TenantId>,
    ) -> BTreeMap<PoolName, Arc<Pool>> {
        let mut pools = BTreeMap::new();
        let mut roles: HashMap<&str, &PoolName> = HashMap::new();
        for (name, pool) in &config.pools {
            let path = ["pools", name.as_str()];
            self.slots(main, &path, pool.slots, pool.min_slots, pool.expensive_slots);
            self.priorities(main, &path, pool.priorities);
            for (field, time) in [
                ("connect_timeout", pool.connect_timeout),
                ("response_timeout", pool.response_timeout),
                ("read_timeout", pool.read_timeout),
                ("websocket_timeout", pool.websocket_timeout),
            ] {
                if time.0.is_zero() {
                    self.fault(main, &[path[0], path[1], field], "`0s`", "a time above zero");
                }
            }
            if pool.servers.is_empty() {
                self.fault(main, &[path[0], path[1], "servers"], "an empty list", "at least one server");
            }
            // The pool's tenants may live on several clusters; the one that the login itself may open answers for it.
            let asks = pool
                .maintenance
                .as_ref()
                .and_then(|c| clusters.get(c.as_str()))
                .is_some_and(|c| c.auth_query.is_some());
            let login = pool.login.as_ref().and_then(|l| self.login(main, &["pools", name.as_str(), "login"], l, asks));
            let maintenance = pool.maintenance.as_ref().and_then(|cluster| {
                let found = clusters.get(cluster.as_str());
                if found.is_none() {
                    let expected = one_of("a cluster", cluster.as_str(), clusters.keys().map(ClusterName::as_str));
                    self.fault(main, &[path[0], path[1], "maintenance"], format!("`{cluster}`"), expected);
                }
                found.cloned()
            });
            if pool.maintenance.is_some() {
                match &pool.login {
                    None => self.fault(
                        main,
                        &[path[0], path[1], "maintenance"],
                        "`maintenance` without `login`",
                        "`login: { role, password }` beside it: it is the login that may open the database",
                    ),
                    Some(login) => {
                        if let Some(other) = roles.insert(&login.role, name) {
                            self.fault(
                                main,
                                &[path[0], path[1], "login", "role"],
                                format!("`{}`, which pool `{other}` uses too", login.role),
                                "one role per pool when `maintenance` is set: the role tells which pool a client belongs to",
                            );
                        }
                    }
                }
            }
            let account = number(numbers, format!("pool:{name}"));
            let page = ["pools", name.as_str(), "maintenance_mode"];
            let maintenance_mode = self.maintenance_mode(main, &page, pool.maintenance_mode.as_ref());
            if let Some(health) = &pool.health
                && (health.interval.0.is_zero() || health.timeout.0.is_zero() || !health.path.starts_with('/'))
            {
                let found = format!("`{}` every {} within {}", health.path, health.interval, health.timeout);
                self.fault(main, &[path[0], path[1], "health"], found, "a path, and times above zero");
            }
            if pool.wake.as_ref().is_some_and(|wake| !wake.path.starts_with('/') || wake.timeout.0.is_zero()) {
                self.fault(main, &[path[0], path[1], "wake"], "no path from the root, or no time", "both");
            }
            let filestore = pool.filestore.as_ref().map(|directory| self.secrets.locate(directory));
            let place = ["pools", name.as_str(), "filestore_bucket"];
            if filestore.is_some() && pool.filestore_bucket.is_some() {
                self.fault(main, &place, "a bucket beside the directory `filestore`", "one of them");
            }
            let bucket = pool.filestore_bucket.as_ref().and_then(|bucket| self.filestore_bucket(main, &place, bucket));
            let pool = resolve_pool(name, pool, login, maintenance, account);
            pools
                .insert(name.clone(), Arc::new(Pool { filestore, filestore_bucket: bucket, maintenance_mode, ..pool }));
        }
        pools
    }

    fn slots(&mut self, main: &Place<'_>, path: &[&str; 2], slots: u32, min: Option<u32>, expensive: Option<u32>) {
        if !(1..=100_000).contains(&slots) {
            self.fault(main, &[path[0], path[1], "slots"], format!("`{slots}`"), "between 1 and 100000 slots");
        }
        for (field, value) in [("min_slots", min), ("expensive_slots", expensive)] {
            if let Some(value) = value.filter(|v| *v == 0 || *v > slots) {
                let expected = format!("between 1 and the {slots} slots");
                self.fault(main, &[path[0], path[1], field], format!("`{value}`"), expected);
            }
        }
    }

    pub(super) fn postgres(&mut self, main: &Place<'_>, config: &GatewayConfig) -> Option<PostgresFront> {
        let postgres = config.postgres.as_ref()?;
        if postgres.listen.is_empty() {
            self.fault(main, &["postgres", "listen"], "an empty list", "at least one address");
        }
        let tls = postgres.tls.as_ref().filter(|tls| tls.mode != TlsMode::Disable);
        let tls_mode = tls.map_or(TlsMode::Disable, |tls| tls.mode);
        if tls_mode.is_verified() && tls.is_some_and(|tls| tls.client_ca.is_none()) {
            self.fault(
                main,
                &["postgres", "tls", "mode"],
                format!("`{}` without `client_ca`", tls_mode.as_str()),
                "`client_ca: <PEM file>` beside it, to check the clients' certificates against",
            );
        }
        if postgres.auth == AuthMethod::Cert && tls_mode != TlsMode::VerifyFull {
            let found = format!("`cert` with TLS mode `{}`", tls_mode.as_str());
            let expected = "`tls: { mode: verify-full, certificate, key, client_ca }` beside it";
            self.fault(main, &["postgres", "auth"], found, expected);
        }
        let client_ca = tls
            .and_then(|tls| tls.client_ca.as_ref())
            .and_then(|file| self.pem(main, &["postgres", "tls", "client_ca"], file));
        let tls = tls.and_then(|tls| {
            let certificate = self.pem(main, &["postgres", "tls", "certificate"], &tls.certificate);
            let key = self.pem(main, &["postgres", "tls", "key"], &tls.key);
            Some(TlsFiles { certificate: certificate?, key: Secret::new(key?) })
        });
        let console = self.console(main, &postgres.console);
        Some(PostgresFront { auth: postgres.auth, tls, tls_mode, client_ca, config: postgres.clone(), console })
    }

    fn console(&mut self, main: &Place<'_>, config: &ConsoleConfig) -> Vec<ConsoleUser> {
        let mut users: Vec<ConsoleUser> = Vec::new();
        for (field, logins, is_admin) in [("admins", &config.admins, true), ("viewers", &config.viewers, false)] {
            for (i, login) in logins.iter().enumerate() {
                let at = i.to_string();
                let path = ["postgres", "console", field, &at];
                if users.iter().any(|user| user.login.role == login.role) {
                    let found = format!("`{}`, which is there already", login.role);
                    self.fault(main, &path, found, "each role once");
                    continue;
                }
                if let Some(login) = self.login(main, &path, login, false) {
                    users.push(ConsoleUser { login, is_admin });
                }
            }
        }
        users
    }

    /// No two listeners on one address.
    pub(super) fn addresses(&mut self, main: &Place<'_>, config: &GatewayConfig) {
        if config.http.is_none() && config.postgres.is_none() {
            self.fault(main, &[], "neither `http` nor `postgres`", "at least one plane to serve");
        }
        let plain = config.http.iter().flat_map(|h| &h.listen);
        let tls = config.http.iter().filter_map(|h| h.tls.as_ref()).flat_map(|t| &t.listen);
        let http = plain.enumerate().map(|(i, a)| (&["http", "listen"][..], i, *a));
        let https = tls.enumerate().map(|(i, a)| (&["http", "tls", "listen"][..], i, *a));
        let postgres = config
            .postgres
            .iter()
            .flat_map(|p| &p.listen)
            .enumerate()
            .map(|(i, a)| (&["postgres", "listen"][..], i, *a));
        let mut taken: Vec<SocketAddr> = config.admin.iter().map(|a| a.listen).collect();
        for (field, i, address) in http.chain(https).chain(postgres) {
            if address.port() != 0 && taken.contains(&address) {
                let found = format!("`{address}`, which another listener has too");
                let i = i.to_string();
                let path: Vec<&str> = field.iter().copied().chain([i.as_str()]).collect();
                self.fault(main, &path, found, "an address of its own");
            }
            taken.push(address);
        }
        let caps = [
            ("http", config.http.as_ref().map(|h| h.max_connections.min(h.max_connections_per_address.unwrap_or(1)))),
            (
                "postgres",
                config
                    .postgres
                    .as_ref()
                    .map(|p| p.max_connections.min(p.max_unauthenticated).min(p.max_unauthenticated_per_address)),
            ),
        ];
        for (plane, cap) in caps {
            if cap == Some(0) {
                self.fault(main, &[plane], "a cap of 0 connections", "at least 1");
            }
        }
    }

    pub(super) fn admin(&mut self, main: &Place<'_>, config: &GatewayConfig) -> Option<Secret> {
        let admin = config.admin.as_ref()?;
        let given = [admin.token.is_some(), admin.token_file.is_some(), admin.token_env.is_some()];
        let token = self.secret(
            main,
            &["admin"],
            "token",
            admin.token.as_ref(),
            admin.token_file.as_ref(),
            admin.token_env.as_ref(),
        );
        if !admin.listen.ip().is_loopback() && !given.contains(&true) {
            self.fault(
                main,
                &["admin", "listen"],
                format!("`{}`, which is not loopback, without a token", admin.listen),
                "`token_file`, `token_env` or `token` beside it",
            );
        }
        if token.as_ref().is_some_and(|t| t.expose().len() < 16) {
            self.fault(main, &["admin", "token"], "a token of fewer than 16 characters", "a longer one");
        }
        token
    }
}

fn resolve_quota(quota: &QuotaConfig) -> PlaneQuota {
    let milliseconds = |d: HumanDuration| u64::try_from(d.0.as_millis()).unwrap_or(u64::MAX).max(1);
    let per_second = |amount: Option<u64>, burst: Option<u64>, seconds: u64| {
        amount.map(|amount| PerSecond { amount, burst: burst.unwrap_or(amount.saturating_mul(seconds)).max(1) })
    };
    let max_wait = quota.max_wait.map_or(DEFAULT_WAIT, |w| w.0);
    let classes = Class::ALL.map(|class| {
        let own = quota.classes.get(&class);
        ClassQuota {
            limit: own.and_then(|c| c.limit).unwrap_or(u32::MAX),
            queue: own.and_then(|c| c.queue).unwrap_or(u32::MAX),
            max_wait: own.and_then(|c| c.max_wait).map_or(max_wait, |w| w.0),
        }
    });
    PlaneQuota {
        reserved: quota.reserved.unwrap_or(0),
        limit: quota.limit.unwrap_or(u32::MAX),
        queue: quota.queue.unwrap_or(DEFAULT_QUEUE),
        max_wait,
        rate: per_second(quota.rate.map(u64::from), quota.rate_burst.map(u64::from), 1),
        work: per_second(quota.work.map(milliseconds), quota.work_burst.map(milliseconds), 10),
        bandwidth: per_second(quota.bandwidth.map(|b| b.0), quota.bandwidth_burst.map(|b| b.0), 10),
        classes,
    }
}

pub(super) fn resolve_plan(name: &PlanName, plan: &PlanConfig) -> Plan {
    Plan {
        name: name.clone(),
        weight: plan.weight.unwrap_or(1),
        http: resolve_quota(&plan.http),
        postgres: resolve_quota(&plan.postgres),
        max_body: plan.max_body.map_or(DEFAULT_BODY, |b| b.0),
        max_header: plan.max_header.map_or(MOST_HEADER, |b| b.0.min(MOST_HEADER)),
        max_url: plan.max_url.map_or(DEFAULT_URL, |b| b.0),
        max_clients: plan.max_clients.unwrap_or(DEFAULT_CLIENTS),
        max_websockets: plan.max_websockets.unwrap_or(DEFAULT_WEBSOCKETS),
        idle_in_transaction_timeout: plan.idle_in_transaction_timeout.map_or(DEFAULT_IDLE_IN_TRANSACTION, |d| d.0),
        statement_timeout: plan.statement_timeout.map(|d| d.0),
        transaction_timeout: plan.transaction_timeout.map(|d| d.0),
        idle_timeout: plan.idle_timeout.map(|d| d.0),
        login_rate: plan.login_rate,
    }
}

/// A plan with what a tenant has different from it; `None` when there is nothing.
pub(super) fn overlay(plan: &PlanConfig, own: &PlanConfig) -> Option<PlanConfig> {
    let quota = |plan: &QuotaConfig, own: &QuotaConfig| {
        let mut classes = plan.classes.clone();
        for (class, bounds) in &own.classes {
            let base = classes.entry(*class).or_default();
            base.limit = bounds.limit.or(base.limit);
            base.queue = bounds.queue.or(base.queue);
            base.max_wait = bounds.max_wait.or(base.max_wait);
        }
        // A burst belongs to its rate: a rate of the tenant's own does not inherit the plan's burst.
        let burst = |own_rate: bool| !own_rate;
        QuotaConfig {
            reserved: own.reserved.or(plan.reserved),
            limit: own.limit.or(plan.limit),
            queue: own.queue.or(plan.queue),
            max_wait: own.max_wait.or(plan.max_wait),
            rate: own.rate.or(plan.rate),
            rate_burst: own.rate_burst.or(plan.rate_burst.filter(|_| burst(own.rate.is_some()))),
            work: own.work.or(plan.work),
            work_burst: own.work_burst.or(plan.work_burst.filter(|_| burst(own.work.is_some()))),
            bandwidth: own.bandwidth.or(plan.bandwidth),
            bandwidth_burst: own.bandwidth_burst.or(plan.bandwidth_burst.filter(|_| burst(own.bandwidth.is_some()))),
            classes,
        }
    };
    let merged = PlanConfig {
        weight: own.weight.or(plan.weight),
        http: quota(&plan.http, &own.http),
        postgres: quota(&plan.postgres, &own.postgres),
        max_body: own.max_body.or(plan.max_body),
        max_header: own.max_header.or(plan.max_header),
        max_url: own.max_url.or(plan.max_url),
        max_clients: own.max_clients.or(plan.max_clients),
        max_websockets: own.max_websockets.or(plan.max_websockets),
        idle_in_transaction_timeout: own.idle_in_transaction_timeout.or(plan.idle_in_transaction_timeout),
        statement_timeout: own.statement_timeout.or(plan.statement_timeout),
        transaction_timeout: own.transaction_timeout.or(plan.transaction_timeout),
        idle_timeout: own.idle_timeout.or(plan.idle_timeout),
        login_rate: own.login_rate.or(plan.login_rate),
    };
    let differs = serde_json::to_value(own).ok() != serde_json::to_value(PlanConfig::default()).ok();
    differs.then_some(merged)
}

/// Fifteen sixteenths for expensive work, so that some slots always stay with short work; all when there is only one.
fn default_expensive(slots: u32) -> u32 {
    slots.saturating_sub(slots.div_ceil(16)).max(1)
}

fn resolve_cluster(
    name: &ClusterName,
    cluster: &ClusterConfig,
    connections: u32,
    tls_ca: Option<String>,
    tls_identity: Option<TlsFiles>,
    service: Option<(Login, String)>,
) -> Cluster {
    Cluster {
        name: name.clone(),
        servers: std::iter::once(&cluster.address).chain(&cluster.replicas).cloned().collect(),
        read_only: cluster.read_only,
        max_replica_lag: cluster.max_replica_lag.0,
        service,
        auth_query: cluster.auth_query.as_ref().map(|a| a.query.clone().unwrap_or_else(|| AUTH_QUERY.to_owned())),
        health_interval: cluster.health_interval.0,
        reconnect_wait: cluster.reconnect_wait.0,
        slots: cluster.slots,
        min_slots: cluster.min_slots.unwrap_or(cluster.slots),
        expensive_slots: cluster.expensive_slots.unwrap_or_else(|| default_expensive(cluster.slots)),
        connections,
        scheduling: cluster.scheduling,
        priorities: cluster.priorities,
        tls: cluster.tls,
        tls_ca,
        tls_identity,
        connect_timeout: cluster.connect_timeout.0,
        idle_timeout: cluster.idle_timeout.0,
        lifetime: cluster.lifetime.0,
        warm: cluster.warm,
    }
}

fn resolve_pool(
    name: &PoolName,
    pool: &PoolConfig,
    login: Option<Login>,
    maintenance: Option<Arc<Cluster>>,
    account: TenantId,
) -> Pool {
    Pool {
        name: name.clone(),
        servers: pool.servers.iter().map(|s| Server { address: s.address.clone(), gevent: s.gevent.clone() }).collect(),
        slots: pool.slots,
        min_slots: pool.min_slots.unwrap_or(pool.slots),
        coupled: pool.coupled,
        notifications: pool.notifications,
        expensive_slots: pool.expensive_slots.unwrap_or_else(|| default_expensive(pool.slots)),
        scheduling: pool.scheduling,
        priorities: pool.priorities,
        connect_timeout: pool.connect_timeout.0,
        response_timeout: pool.response_timeout.0,
        read_timeout: pool.read_timeout.0,
        websocket_timeout: pool.websocket_timeout.0,
        workers_from: pool.workers_from.clone(),
        filestore: None,
        filestore_bucket: None,
        wake: pool.wake.clone(),
        release: pool.release.as_deref().map(Arc::from),
        health: pool.health.clone(),
        maintenance_mode: None,
        login,
        maintenance,
        database_commands: pool.database_commands,
        account,
    }
}
