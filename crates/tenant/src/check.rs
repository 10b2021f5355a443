//! From decoded files to a catalog: everything that only the whole set can tell.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{Catalog, Cluster, Login, Plan, PlaneQuota, Pool, PostgresFront, Server, Tenant, TlsFiles};
use crate::config::ServerTls;
use crate::config::{ClusterConfig, GatewayConfig, LoginConfig, PlanConfig, PoolConfig, QuotaConfig, TenantFile};
use crate::diagnostic::{Diagnostic, Diagnostics, one_of};
use crate::ids::{ClusterName, PlanName, PoolName, TenantId};
use crate::schema::{gateway_schema, tenant_schema};
use crate::units::Secret;
use crate::yaml::Node;
use crate::{Secrets, Source, SourceSet};

const DEFAULT_QUEUE: u32 = 200;
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
const DEFAULT_BODY: u64 = 128 << 20; // what Odoo itself accepts
const DEFAULT_CLIENTS: u32 = 200;
const DEFAULT_WEBSOCKETS: u32 = 200;
const DEFAULT_IDLE_IN_TRANSACTION: Duration = Duration::from_secs(600);

pub(crate) fn read_main(source: &Source) -> Result<(GatewayConfig, Node), Diagnostics> {
    let mut faults = Vec::new();
    match decode::<GatewayConfig>(source, gateway_schema(), &mut faults) {
        Some(pair) => Ok(pair),
        None => Err(sorted(faults)),
    }
}

pub(crate) fn build(
    set: &SourceSet,
    secrets: &dyn Secrets,
    previous: Option<&Catalog>,
) -> Result<Catalog, Diagnostics> {
    let mut check = Check { faults: Vec::new(), secrets };
    let main = decode::<GatewayConfig>(&set.main, gateway_schema(), &mut check.faults);
    let tenants: Vec<_> = set
        .tenants
        .iter()
        .filter_map(|source| {
            decode::<TenantFile>(source, tenant_schema(), &mut check.faults).map(|(file, node)| (source, file, node))
        })
        .collect();
    let numbers = previous.map(|p| Arc::clone(&p.numbers)).unwrap_or_default();
    let catalog = main.map(|(config, node)| {
        check.catalog(&Place { source: &set.main, node: &node }, &config, &tenants, (*numbers).clone())
    });
    match catalog {
        Some(catalog) if check.faults.is_empty() => Ok(catalog),
        _ => Err(sorted(check.faults)),
    }
}

fn decode<T: serde::de::DeserializeOwned>(
    source: &Source,
    schema: &serde_json::Value,
    faults: &mut Vec<Diagnostic>,
) -> Option<(T, Node)> {
    let node = Node::parse(&source.path, &source.text).map_err(|d| faults.push(d)).ok()?;
    let value = node.decode(&source.path, schema, faults)?;
    Some((value, node))
}

fn sorted(mut faults: Vec<Diagnostic>) -> Diagnostics {
    faults.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    Diagnostics(faults)
}

/// A file and its tree: where a fault is said to be.
struct Place<'a> {
    source: &'a Source,
    node: &'a Node,
}

struct Check<'a> {
    faults: Vec<Diagnostic>,
    secrets: &'a dyn Secrets,
}

type TenantSource<'a> = (&'a Source, TenantFile, Node);

impl Check<'_> {
    fn fault(&mut self, place: &Place<'_>, path: &[&str], found: impl Into<String>, expected: impl Into<String>) {
        let at = place.node.locate(path);
        let mut field = String::new();
        for step in path {
            if step.bytes().all(|b| b.is_ascii_digit()) {
                field.push_str(&format!("[{step}]"));
            } else {
                if !field.is_empty() {
                    field.push('.');
                }
                field.push_str(step);
            }
        }
        self.faults.push(Diagnostic {
            file: place.source.path.clone(),
            line: at.line,
            column: at.column,
            field,
            found: found.into(),
            expected: expected.into(),
        });
    }

    fn catalog(
        &mut self,
        main: &Place<'_>,
        config: &GatewayConfig,
        files: &[TenantSource<'_>],
        mut numbers: HashMap<String, TenantId>,
    ) -> Catalog {
        let plans = self.plans(main, config);
        let clusters = self.clusters(main, config);
        let pools = self.pools(main, config, &clusters, &mut numbers);
        let postgres = self.postgres(main, config);
        let admin_token = self.admin(main, config);
        self.http(main, config);

        let mut catalog = Catalog {
            tenants: Vec::with_capacity(files.len()),
            by_host: HashMap::with_capacity(files.len()),
            by_database: HashMap::with_capacity(files.len()),
            by_slug: HashMap::with_capacity(files.len()),
            by_role: HashMap::new(),
            pools,
            clusters,
            plans,
            http: config.http.clone(),
            postgres,
            admin: config.admin.as_ref().map(|a| a.listen),
            admin_token,
            drain_timeout: config.drain_timeout.0,
            tenants_directory: config.tenants.clone(),
            numbers: Arc::default(),
        };
        let mut owners = Owners::default();
        for (source, file, node) in files {
            let place = Place { source, node };
            self.tenant(&place, file, &mut catalog, &mut numbers, &mut owners);
        }
        catalog.tenants.sort_by(|a, b| a.slug.cmp(&b.slug));
        self.reserved_fits(main, &catalog);
        catalog.numbers = Arc::new(numbers);
        catalog
    }

    fn plans(&mut self, main: &Place<'_>, config: &GatewayConfig) -> BTreeMap<PlanName, Arc<Plan>> {
        let mut plans = BTreeMap::new();
        for (name, plan) in &config.plans {
            let weight = plan.weight.unwrap_or(1);
            if !(1..=10_000).contains(&weight) {
                self.fault(
                    main,
                    &["plans", name.as_str(), "weight"],
                    format!("`{weight}`"),
                    "a weight from 1 to 10000",
                );
            }
            for (plane, quota) in [("http", &plan.http), ("postgres", &plan.postgres)] {
                let limit = quota.limit.unwrap_or(u32::MAX);
                if limit == 0 {
                    let path = ["plans", name.as_str(), plane, "limit"];
                    self.fault(main, &path, "`0`", "a limit of at least 1 slot");
                } else if quota.reserved > limit {
                    let path = ["plans", name.as_str(), plane, "reserved"];
                    self.fault(
                        main,
                        &path,
                        format!("`{}`", quota.reserved),
                        format!("at most the plan's own limit of {limit}"),
                    );
                }
                if quota.max_wait.is_some_and(|w| w.0.is_zero()) {
                    let path = ["plans", name.as_str(), plane, "max_wait"];
                    self.fault(main, &path, "`0s`", "a wait above zero; `queue: 0` refuses instead of waiting");
                }
            }
            for (field, value) in [("max_clients", plan.max_clients), ("max_websockets", plan.max_websockets)] {
                if value == Some(0) {
                    self.fault(main, &["plans", name.as_str(), field], "`0`", "at least 1");
                }
            }
            plans.insert(name.clone(), Arc::new(resolve_plan(name, plan)));
        }
        plans
    }

    fn clusters(&mut self, main: &Place<'_>, config: &GatewayConfig) -> BTreeMap<ClusterName, Arc<Cluster>> {
        let mut clusters = BTreeMap::new();
        for (name, cluster) in &config.clusters {
            let path = ["clusters", name.as_str()];
            self.slots(main, &path, cluster.slots, cluster.expensive_slots);
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
            if cluster.tls == ServerTls::VerifyFull && cluster.tls_ca.is_none() {
                self.fault(
                    main,
                    &[path[0], path[1], "tls"],
                    "`verify-full` without `tls_ca`",
                    "`tls_ca: <PEM file>` beside it, to verify against",
                );
            }
            clusters.insert(name.clone(), Arc::new(resolve_cluster(name, cluster, connections, tls_ca)));
        }
        clusters
    }

    fn pools(
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
            self.slots(main, &path, pool.slots, pool.expensive_slots);
            if pool.servers.is_empty() {
                self.fault(main, &[path[0], path[1], "servers"], "an empty list", "at least one server");
            }
            let login = pool.login.as_ref().and_then(|l| self.login(main, &["pools", name.as_str(), "login"], l));
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
            pools.insert(name.clone(), Arc::new(resolve_pool(name, pool, login, maintenance, account)));
        }
        pools
    }

    fn slots(&mut self, main: &Place<'_>, path: &[&str; 2], slots: u32, expensive: Option<u32>) {
        if !(1..=100_000).contains(&slots) {
            self.fault(main, &[path[0], path[1], "slots"], format!("`{slots}`"), "between 1 and 100000 slots");
        }
        if let Some(expensive) = expensive.filter(|e| *e == 0 || *e > slots) {
            self.fault(
                main,
                &[path[0], path[1], "expensive_slots"],
                format!("`{expensive}`"),
                format!("between 1 and the {slots} slots"),
            );
        }
    }

    fn postgres(&mut self, main: &Place<'_>, config: &GatewayConfig) -> Option<PostgresFront> {
        let postgres = config.postgres.as_ref()?;
        if postgres.listen.is_empty() {
            self.fault(main, &["postgres", "listen"], "an empty list", "at least one address");
        }
        if postgres.require_tls && postgres.tls.is_none() {
            self.fault(
                main,
                &["postgres", "require_tls"],
                "`true` without `tls`",
                "`tls: { certificate, key }` beside it",
            );
        }
        let tls = postgres.tls.as_ref().and_then(|tls| {
            let certificate = self.pem(main, &["postgres", "tls", "certificate"], &tls.certificate);
            let key = self.pem(main, &["postgres", "tls", "key"], &tls.key);
            Some(TlsFiles { certificate: certificate?, key: Secret::new(key?) })
        });
        Some(PostgresFront { auth: postgres.auth, tls, config: postgres.clone() })
    }

    fn http(&mut self, main: &Place<'_>, config: &GatewayConfig) {
        if config.http.as_ref().is_some_and(|h| h.listen.is_empty()) {
            self.fault(main, &["http", "listen"], "an empty list", "at least one address");
        }
        for (field, zero) in config.http.iter().flat_map(|h| {
            [
                ("header_timeout", h.header_timeout.0.is_zero()),
                ("body_timeout", h.body_timeout.0.is_zero()),
                ("keepalive_timeout", h.keepalive_timeout.0.is_zero()),
                ("write_timeout", h.write_timeout.0.is_zero()),
            ]
        }) {
            if zero {
                self.fault(main, &["http", field], "`0s`", "a time above zero");
            }
        }
    }

    fn admin(&mut self, main: &Place<'_>, config: &GatewayConfig) -> Option<Secret> {
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

    fn tenant(
        &mut self,
        place: &Place<'_>,
        file: &TenantFile,
        catalog: &mut Catalog,
        numbers: &mut HashMap<String, TenantId>,
        owners: &mut Owners,
    ) {
        let slug = &file.tenant;
        let here = &place.source.path;
        if let Some(other) = owners.slugs.insert(slug.as_str().to_owned(), here.clone()) {
            self.fault(
                place,
                &["tenant"],
                format!("`{slug}`, which {} defines too", other.display()),
                "a name of its own",
            );
        }
        for (i, host) in file.hosts.iter().enumerate() {
            if let Some(other) = owners.hosts.insert(host.as_str().to_owned(), here.clone()) {
                let found = format!("`{host}`, which {} has too", other.display());
                self.fault(place, &["hosts", &i.to_string()], found, "a host that no other tenant has");
            }
        }
        if let Some(database) = &file.database {
            if database.as_str() == Catalog::MAINTENANCE_DATABASE || database.as_str().starts_with("template") {
                let found = format!("`{database}`, which belongs to PostgreSQL itself");
                self.fault(place, &["database"], found, "the tenant's own database");
            }
            if let Some(other) = owners.databases.insert(database.as_str().to_owned(), here.clone()) {
                let found = format!("`{database}`, which {} has too", other.display());
                self.fault(place, &["database"], found, "a database that no other tenant has");
            }
        }
        let pool = self.placed(place, "pool", file.placement.pool.as_ref().map(PoolName::as_str), &catalog.pools);
        let cluster =
            self.placed(place, "cluster", file.placement.cluster.as_ref().map(ClusterName::as_str), &catalog.clusters);
        if file.placement.pool.is_none() && file.placement.cluster.is_none() {
            self.fault(place, &["placement"], "neither `pool` nor `cluster`", "at least one of them");
        }
        if !file.hosts.is_empty() && file.placement.pool.is_none() {
            self.fault(place, &["placement"], "`hosts` without a pool", "`pool`: where requests for the hosts go");
        }
        if file.placement.pool.is_some() && file.hosts.is_empty() {
            self.fault(place, &["hosts"], "no host", "at least one host, since the tenant is placed in a pool");
        }
        if file.placement.cluster.is_some() && file.database.is_none() {
            self.fault(place, &["database"], "nothing", "the database, since the tenant is placed on a cluster");
        }
        let login = file.login.as_ref().and_then(|l| self.login(place, &["login"], l));
        if let (Some(own), Some(Some(pool_login))) = (&login, pool.as_ref().map(|p| p.login.as_ref()))
            && own.role == pool_login.role
        {
            let found = format!("`{}`, the role of its pool's login", own.role);
            self.fault(place, &["login", "role"], found, "a role of the tenant's own");
        }
        if file.placement.cluster.is_some()
            && file.login.is_none()
            && pool.as_ref().is_none_or(|p| p.login.is_none())
            && (pool.is_some() || file.placement.pool.is_none())
        {
            self.fault(
                place,
                &["placement", "cluster"],
                "a cluster, but no login",
                "`login: { role, password }` here or in the tenant's pool: nobody could open the database",
            );
        }
        let Some(plan) = catalog.plans.get(file.plan.as_str()) else {
            let expected = one_of("a plan", file.plan.as_str(), catalog.plans.keys().map(PlanName::as_str));
            self.fault(place, &["plan"], format!("`{}`", file.plan), expected);
            return;
        };
        let tenant = Arc::new(Tenant {
            id: number(numbers, format!("tenant:{slug}")),
            slug: slug.clone(),
            hosts: file.hosts.clone(),
            database: file.database.clone(),
            pool,
            cluster,
            plan: Arc::clone(plan),
            login,
            pooling: file.pooling,
        });
        for host in &tenant.hosts {
            catalog.by_host.insert(host.clone(), Arc::clone(&tenant));
        }
        if let Some(database) = &tenant.database {
            catalog.by_database.insert(database.clone(), Arc::clone(&tenant));
        }
        if let Some(login) = &tenant.login {
            catalog.by_role.insert(login.role.clone(), Arc::clone(&tenant));
        }
        catalog.by_slug.insert(slug.clone(), Arc::clone(&tenant));
        catalog.tenants.push(tenant);
    }

    fn placed<K: Ord + std::borrow::Borrow<str>, T>(
        &mut self,
        place: &Place<'_>,
        kind: &str,
        name: Option<&str>,
        known: &BTreeMap<K, Arc<T>>,
    ) -> Option<Arc<T>> {
        let name = name?;
        let found = known.get(name);
        if found.is_none() {
            let expected = one_of(&format!("a {kind}"), name, known.keys().map(std::borrow::Borrow::borrow));
            self.fault(place, &["placement", kind], format!("`{name}`"), expected);
        }
        found.cloned()
    }

    /// Σ reserved must not exceed the slots, or the guarantee is a lie.
    fn reserved_fits(&mut self, main: &Place<'_>, catalog: &Catalog) {
        for (kind, name, slots, reserved) in catalog
            .pools
            .values()
            .map(|p| {
                let mine = |t: &&Arc<Tenant>| t.pool.as_ref().is_some_and(|q| q.name == p.name);
                let sum: u64 = catalog.tenants.iter().filter(mine).map(|t| u64::from(t.plan.http.reserved)).sum();
                ("pools", p.name.as_str(), p.slots, sum)
            })
            .chain(catalog.clusters.values().map(|c| {
                let mine = |t: &&Arc<Tenant>| t.cluster.as_ref().is_some_and(|q| q.name == c.name);
                let sum: u64 = catalog.tenants.iter().filter(mine).map(|t| u64::from(t.plan.postgres.reserved)).sum();
                ("clusters", c.name.as_str(), c.slots, sum)
            }))
        {
            if reserved > u64::from(slots) {
                self.fault(
                    main,
                    &[kind, name, "slots"],
                    format!("{slots} slots, of which the plans of the tenants placed here reserve {reserved}"),
                    "at least as many slots as are reserved, or smaller reservations",
                );
            }
        }
    }

    fn login(&mut self, place: &Place<'_>, path: &[&str], login: &LoginConfig) -> Option<Login> {
        if login.role.is_empty() || login.role.len() > 63 {
            let mut role = path.to_vec();
            role.push("role");
            self.fault(place, &role, format!("`{}`", login.role), "a PostgreSQL role name of 1 to 63 bytes");
        }
        let given = [login.password.is_some(), login.password_file.is_some(), login.password_env.is_some()];
        if !given.contains(&true) {
            self.fault(place, path, "a login without a password", "`password_file`, `password_env` or `password`");
            return None;
        }
        let password = self.secret(
            place,
            path,
            "password",
            login.password.as_ref(),
            login.password_file.as_ref(),
            login.password_env.as_ref(),
        )?;
        Some(Login { role: login.role.clone(), password })
    }

    fn secret(
        &mut self,
        place: &Place<'_>,
        path: &[&str],
        name: &str,
        plain: Option<&Secret>,
        file: Option<&PathBuf>,
        env: Option<&String>,
    ) -> Option<Secret> {
        let count = usize::from(plain.is_some()) + usize::from(file.is_some()) + usize::from(env.is_some());
        if count > 1 {
            self.fault(place, path, format!("{count} of `{name}`, `{name}_file` and `{name}_env`"), "only one of them");
            return None;
        }
        if let Some(file) = file {
            let field = format!("{name}_file");
            let mut at = path.to_vec();
            at.push(&field);
            return match self.secrets.file(file) {
                Ok(text) if text.is_empty() => {
                    self.fault(place, &at, format!("`{}`, which is empty", file.display()), "a file with the secret");
                    None
                }
                Ok(text) => Some(Secret::new(text)),
                Err(error) => {
                    let found = format!("`{}`, which cannot be read ({error})", file.display());
                    self.fault(place, &at, found, "a readable file with the secret");
                    None
                }
            };
        }
        if let Some(env) = env {
            let field = format!("{name}_env");
            let mut at = path.to_vec();
            at.push(&field);
            let value = self.secrets.env(env).filter(|v| !v.is_empty());
            if value.is_none() {
                self.fault(place, &at, format!("`{env}`, which is not set"), "the name of a set environment variable");
            }
            return value.map(Secret::new);
        }
        plain.cloned()
    }

    fn pem(&mut self, place: &Place<'_>, path: &[&str], file: &Path) -> Option<String> {
        match self.secrets.file(file) {
            Ok(text) if text.contains("-----BEGIN ") => Some(text),
            Ok(_) => {
                self.fault(
                    place,
                    path,
                    format!("`{}`, which is not PEM", file.display()),
                    "a PEM file (`-----BEGIN …`)",
                );
                None
            }
            Err(error) => {
                let found = format!("`{}`, which cannot be read ({error})", file.display());
                self.fault(place, path, found, "a readable PEM file");
                None
            }
        }
    }
}

/// Which file has claimed what.
#[derive(Default)]
struct Owners {
    slugs: HashMap<String, PathBuf>,
    hosts: HashMap<String, PathBuf>,
    databases: HashMap<String, PathBuf>,
}

fn number(numbers: &mut HashMap<String, TenantId>, key: String) -> TenantId {
    let next = TenantId(numbers.len() as u32);
    *numbers.entry(key).or_insert(next)
}

fn resolve_quota(quota: &QuotaConfig) -> PlaneQuota {
    PlaneQuota {
        reserved: quota.reserved,
        limit: quota.limit.unwrap_or(u32::MAX),
        queue: quota.queue.unwrap_or(DEFAULT_QUEUE),
        max_wait: quota.max_wait.map_or(DEFAULT_WAIT, |w| w.0),
    }
}

fn resolve_plan(name: &PlanName, plan: &PlanConfig) -> Plan {
    Plan {
        name: name.clone(),
        weight: plan.weight.unwrap_or(1),
        http: resolve_quota(&plan.http),
        postgres: resolve_quota(&plan.postgres),
        max_body: plan.max_body.map_or(DEFAULT_BODY, |b| b.0),
        max_clients: plan.max_clients.unwrap_or(DEFAULT_CLIENTS),
        max_websockets: plan.max_websockets.unwrap_or(DEFAULT_WEBSOCKETS),
        idle_in_transaction_timeout: plan.idle_in_transaction_timeout.map_or(DEFAULT_IDLE_IN_TRANSACTION, |d| d.0),
    }
}

/// Three quarters for expensive work, so that some slots always stay with short work; all when there is only one.
fn default_expensive(slots: u32) -> u32 {
    (slots - slots.div_ceil(4)).max(1)
}

fn resolve_cluster(name: &ClusterName, cluster: &ClusterConfig, connections: u32, tls_ca: Option<String>) -> Cluster {
    Cluster {
        name: name.clone(),
        address: cluster.address.clone(),
        slots: cluster.slots,
        expensive_slots: cluster.expensive_slots.unwrap_or_else(|| default_expensive(cluster.slots)),
        connections,
        scheduling: cluster.scheduling,
        tls: cluster.tls,
        tls_ca,
        connect_timeout: cluster.connect_timeout.0,
        idle_timeout: cluster.idle_timeout.0,
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
        expensive_slots: pool.expensive_slots.unwrap_or_else(|| default_expensive(pool.slots)),
        scheduling: pool.scheduling,
        connect_timeout: pool.connect_timeout.0,
        response_timeout: pool.response_timeout.0,
        read_timeout: pool.read_timeout.0,
        websocket_timeout: pool.websocket_timeout.0,
        login,
        maintenance,
        account,
    }
}
