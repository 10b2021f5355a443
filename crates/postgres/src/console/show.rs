//! What `SHOW` shows: PgBouncer's tables with its columns, and three of our own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cofferdam_tenant::{Catalog, PoolingMode, Tenant};

use super::command::Table;
use super::table::{Rows, row};
use crate::cache::Pool;
use crate::cancel::{CancelHandle, Doing};
use crate::plane::{PostgresPlane, Snapshot};
use crate::stats::{COUNTERS, Stats, averages};

const POOLED: &str = "transaction";
const COUNTED: [&str; COUNTERS] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "received",
    "sent",
    "xact_time",
    "query_time",
    "wait_time",
    "client_parse_count",
    "server_parse_count",
    "bind_count",
    "client_login_count",
];
const SOCKETS: &str = "type user database replication state addr port:i local_addr local_port:i connect_time request_time \
                       wait:i wait_us:i close_needed:i ptr link remote_pid:i tls application_name prepared_statements:i id:i";

/// A look at the plane.
pub(super) struct View<'a> {
    plane: &'a Arc<PostgresPlane>,
    snapshot: Arc<Snapshot>,
    clients: Vec<Arc<CancelHandle>>,
    now: Instant,
}

pub(super) fn show(plane: &Arc<PostgresPlane>, table: Table) -> Rows {
    let view = View { plane, snapshot: plane.snapshot(), clients: plane.cancels.all(), now: Instant::now() };
    match table {
        Table::Clients => view.clients(),
        Table::Servers => view.servers(),
        Table::Sockets => view.sockets(),
        Table::Pools => view.pools(),
        Table::Peers => Rows::new("peer_id:i host port:i pool_size:i"),
        Table::PeerPools => {
            Rows::new("peer_id:i cl_active_cancel_req:i cl_waiting_cancel_req:i sv_active_cancel:i sv_login:i")
        }
        Table::Databases => view.databases(),
        Table::Users => view.users(),
        Table::Lists => view.lists(),
        Table::Stats => view.stats(),
        Table::StatsTotals => view.stats_of(Stats::totals),
        Table::StatsAverages => view.stats_of(Stats::averages),
        Table::Totals => view.totals(),
        Table::Config => view.config(),
        Table::Version => one("version", concat!("Cofferdam ", env!("CARGO_PKG_VERSION"))),
        Table::State => view.state(),
        Table::Mem => Rows::new("name size:i used:i free:i memtotal:i"),
        Table::Fds => Rows::new(
            "fd:i task user database addr port:i cancel:q link:i client_encoding std_strings datestyle timezone password \
             scram_client_key:b scram_server_key:b",
        ),
        Table::DnsHosts => Rows::new("hostname ttl:q addrs"),
        Table::DnsZones => Rows::new("zonename serial:q count:i"),
        Table::Tenants => view.tenants(),
        Table::Gate => view.gates(),
        Table::Ledger => view.ledger(),
        Table::Setting(name, value) => one(name, value),
    }
}

fn one(column: &str, value: &str) -> Rows {
    let mut rows = Rows::new(column);
    rows.push(row![value]);
    rows
}

impl View<'_> {
    fn all_pools(&self) -> Vec<Arc<Pool>> {
        self.snapshot.clusters.values().flat_map(|access| access.cache.pools()).collect()
    }

    /// Tenants whose database is served here.
    fn placed(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.snapshot.catalog.tenants().iter().filter(|t| t.cluster.is_some() && t.database.is_some())
    }

    fn clients_into(&self, rows: &mut Rows) {
        for client in &self.clients {
            let info = &client.info;
            let doing = client.doing(self.now);
            let (state, waited) = match doing {
                Doing::Nothing => ("idle", Duration::ZERO),
                Doing::Waiting(since) => ("waiting", since),
                Doing::Working(_) => ("active", Duration::ZERO),
            };
            let since = match doing {
                Doing::Nothing => Duration::ZERO,
                Doing::Waiting(since) | Doing::Working(since) => since,
            };
            rows.push(row![
                "C",
                &*info.user,
                &*info.database,
                "none",
                state,
                info.peer.ip().to_string(),
                info.peer.port(),
                info.local.map(|l| l.ip().to_string()),
                info.local.map(|l| l.port()),
                time(info.connected),
                time(SystemTime::now() - since),
                waited.as_secs(),
                waited.subsec_micros(),
                0u32,
                format!("c{}", client.pid),
                client.server_pid().map(|pid| format!("s{pid}")),
                0u32,
                if info.encrypted { "TLS" } else { "" },
                &*info.application_name,
                client.prepared(),
                client.pid,
            ]);
        }
    }

    fn clients(&self) -> Rows {
        let mut rows = Rows::new(SOCKETS);
        self.clients_into(&mut rows);
        rows
    }

    fn servers_into(&self, rows: &mut Rows) {
        let mut server = |target: &crate::upstream::CancelTarget, state: &str, link: Option<u32>, statements: u32| {
            let address = target.address();
            rows.push(row![
                "S",
                &*target.user,
                &*target.database,
                "none",
                state,
                address.host.as_str(),
                address.port,
                target.local.map(|l| l.ip().to_string()),
                target.local.map(|l| l.port()),
                time(target.connected),
                time(target.connected),
                0u32,
                0u32,
                0u32,
                format!("s{}", target.pid()),
                link.map(|pid| format!("c{pid}")),
                target.pid(),
                if target.is_encrypted() { "TLS" } else { "" },
                "",
                statements,
                target.pid(),
            ]);
        };
        for client in &self.clients {
            if let Some(target) = client.target() {
                server(&target, "active", Some(client.pid), 0);
            }
        }
        for pool in self.all_pools() {
            pool.each_idle(|upstream| server(&upstream.target, "idle", None, upstream.backend.statement_count()));
        }
    }

    fn servers(&self) -> Rows {
        let mut rows = Rows::new(SOCKETS);
        self.servers_into(&mut rows);
        rows
    }

    fn sockets(&self) -> Rows {
        // The columns of buffers are there for programs that look for them; ours are not kept by socket.
        let mut rows = Rows::new(SOCKETS);
        self.clients_into(&mut rows);
        self.servers_into(&mut rows);
        rows
    }

    fn pools(&self) -> Rows {
        #[derive(Default)]
        struct Counts {
            active: u32,
            waiting: u32,
            working: u32,
            idle: u32,
            login: u32,
            longest: Duration,
        }
        let mut all: BTreeMap<(String, String), Counts> = BTreeMap::new();
        for pool in self.all_pools() {
            let key = pool.key();
            let counts = all.entry((key.database.clone(), key.login.role.clone())).or_default();
            counts.idle += pool.idle_count();
            counts.login += pool.connecting();
        }
        for client in &self.clients {
            let info = &client.info;
            let counts = all.entry((info.database.to_string(), info.user.to_string())).or_default();
            match client.doing(self.now) {
                Doing::Waiting(since) => {
                    counts.waiting += 1;
                    counts.longest = counts.longest.max(since);
                }
                Doing::Working(_) | Doing::Nothing => counts.active += 1,
            }
            counts.working += u32::from(client.target().is_some());
        }
        let mut rows = Rows::new(
            "database user cl_active:i cl_waiting:i cl_active_cancel_req:i cl_waiting_cancel_req:i sv_active:i \
             sv_active_cancel:i sv_being_canceled:i sv_idle:i sv_used:i sv_tested:i sv_login:i maxwait:i maxwait_us:i \
             pool_mode load_balance_hosts",
        );
        for ((database, user), counts) in all {
            let mode = self.mode(&database);
            rows.push(row![
                database,
                user,
                counts.active,
                counts.waiting,
                0u32,
                0u32,
                counts.working,
                0u32,
                0u32,
                counts.idle,
                0u32,
                0u32,
                counts.login,
                counts.longest.as_secs(),
                counts.longest.subsec_micros(),
                mode,
                None::<&str>,
            ]);
        }
        rows
    }

    fn mode(&self, database: &str) -> &'static str {
        if super::is_console(database) {
            return "statement";
        }
        match self.snapshot.catalog.by_database(database).map(|t| t.pooling) {
            Some(PoolingMode::Session) => "session",
            _ => POOLED,
        }
    }

    fn databases(&self) -> Rows {
        let mut rows = Rows::new(
            "name host port:i database force_user pool_size:i min_pool_size:i reserve_pool_size:i server_lifetime:i \
             pool_mode load_balance_hosts max_connections:i current_connections:i max_client_connections:i \
             current_client_connections:i paused:i disabled:i",
        );
        let mut open: BTreeMap<String, u32> = BTreeMap::new();
        for pool in self.all_pools() {
            *open.entry(pool.key().database.clone()).or_default() += pool.idle_count();
        }
        let mut clients: BTreeMap<&str, u32> = BTreeMap::new();
        for client in &self.clients {
            *clients.entry(&client.info.database).or_default() += 1;
            if client.target().is_some() {
                *open.entry(client.info.database.to_string()).or_default() += 1;
            }
        }
        let maintained = self.snapshot.catalog.pools.values().filter_map(|p| p.maintenance.as_ref());
        let mut seen = BTreeSet::new();
        let maintenance = maintained.filter(|c| seen.insert(c.name.as_str().to_owned()));
        let tenants = self.placed().filter_map(|t| {
            let limit = t.plan.postgres.limit.min(t.cluster.as_ref()?.slots);
            Some((t.database.as_ref()?.as_str().to_owned(), t.cluster.as_ref()?, limit, t.plan.max_clients))
        });
        let maintenance = maintenance.map(|c| (Catalog::MAINTENANCE_DATABASE.to_owned(), c, c.slots, 0));
        for (name, cluster, slots, max_clients) in tenants.chain(maintenance) {
            let access = self.snapshot.clusters.get(&cluster.name);
            let primary = access.map_or(&cluster.servers[0], |access| access.cache.servers().primary());
            rows.push(row![
                name.as_str(),
                primary.host.as_str(),
                primary.port,
                name.as_str(),
                None::<&str>,
                slots,
                0u32,
                0u32,
                0u32,
                self.mode(&name),
                None::<&str>,
                cluster.connections,
                open.get(&name).copied().unwrap_or_default(),
                max_clients,
                clients.get(name.as_str()).copied().unwrap_or_default(),
                u32::from(self.plane.pauses.is_paused(&name)),
                u32::from(self.plane.pauses.is_disabled(&name)),
            ]);
        }
        rows
    }

    fn users(&self) -> Rows {
        let mut rows = Rows::new(
            "name pool_size reserve_pool_size pool_mode max_user_connections:i current_connections:i \
             max_user_client_connections:i current_client_connections:i",
        );
        let mut clients: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
        for login in self.snapshot.catalog.logins() {
            clients.entry(&login.role).or_default();
        }
        for client in &self.clients {
            let counts = clients.entry(&client.info.user).or_default();
            counts.0 += u32::from(client.target().is_some());
            counts.1 += 1;
        }
        for (name, (servers, clients)) in clients {
            rows.push(row![name, "", "", "", 0u32, servers, 0u32, clients]);
        }
        rows
    }

    fn lists(&self) -> Rows {
        let mut rows = Rows::new("list items:i");
        let usage = self.plane.usage();
        let open: u32 = usage.connections.values().map(|u| u.open).sum();
        let cap: u32 = self.snapshot.clusters.values().map(|a| a.cache.cluster().connections).sum();
        let users: BTreeSet<&str> = self.snapshot.catalog.logins().map(|l| l.role.as_str()).collect();
        for (name, items) in [
            ("databases", self.placed().count()),
            ("users", users.len()),
            ("peers", 0),
            ("pools", self.pools().len()),
            ("peer_pools", 0),
            ("free_clients", self.plane.connections.available_permits()),
            ("used_clients", self.clients.len()),
            ("login_clients", self.plane.logging_in()),
            ("free_servers", cap.saturating_sub(open) as usize),
            ("used_servers", open as usize),
            ("dns_names", 0),
            ("dns_zones", 0),
            ("dns_queries", 0),
            ("dns_pending", 0),
        ] {
            rows.push(row![name, items]);
        }
        rows
    }

    fn stats(&self) -> Rows {
        let columns = |prefix: &str| {
            COUNTED.map(|c| match (prefix, c) {
                ("avg", "received") => "avg_recv:n".to_owned(),
                _ => format!("{prefix}_{c}:n"),
            })
        };
        let mut rows = Rows::new(&format!("database {} {}", columns("total").join(" "), columns("avg").join(" ")));
        for (database, stats) in self.plane.stats() {
            let mut line = row![database];
            line.extend(stats.totals().iter().chain(&stats.averages()).map(|n| Some(n.to_string())));
            rows.push(line);
        }
        rows
    }

    fn stats_of(&self, figures: impl Fn(&Stats) -> [u64; COUNTERS]) -> Rows {
        let columns = COUNTED.map(|c| match c {
            "received" | "sent" => format!("bytes_{c}:n"),
            _ => format!("{c}:n"),
        });
        let mut rows = Rows::new(&format!("database {}", columns.join(" ")));
        for (database, stats) in self.plane.stats() {
            let mut line = row![database];
            line.extend(figures(&stats).iter().map(|n| Some(n.to_string())));
            rows.push(line);
        }
        rows
    }

    fn totals(&self) -> Rows {
        let mut total = [0u64; COUNTERS];
        for (_, stats) in self.plane.stats() {
            total.iter_mut().zip(stats.totals()).for_each(|(sum, n)| *sum += n);
        }
        let since = averages(&total, &[0; COUNTERS], self.plane.age());
        let mut rows = Rows::new("name value:n");
        for (prefix, figures) in [("total", total), ("avg", since)] {
            for (name, value) in COUNTED.iter().zip(figures) {
                let name = match *name {
                    "received" => "client_bytes",
                    "sent" => "server_bytes",
                    other => other,
                };
                rows.push(row![format!("{prefix}_{name}"), value]);
            }
        }
        rows
    }

    fn config(&self) -> Rows {
        let mut rows = Rows::new("key value default changeable");
        let Some(front) = &self.snapshot.catalog.postgres else { return rows };
        let config = &front.config;
        let listen: Vec<String> = config.listen.iter().map(ToString::to_string).collect();
        for (key, value, changeable) in [
            ("listen_addr", listen.join(","), "no"),
            ("auth_type", front.auth.as_str().to_owned(), "yes"),
            ("max_client_conn", config.max_connections.to_string(), "no"),
            ("max_unauthenticated", config.max_unauthenticated.to_string(), "no"),
            ("client_login_timeout", config.login_timeout.0.as_secs().to_string(), "yes"),
            ("max_user_connections", "0".to_owned(), "no"),
            ("pool_mode", POOLED.to_owned(), "yes"),
        ] {
            rows.push(row![key, value, None::<&str>, changeable]);
        }
        rows
    }

    fn state(&self) -> Rows {
        let mut rows = Rows::new("key value");
        let (active, paused, suspended) = self.plane.pauses.summary();
        for (key, is) in [("active", active), ("paused", paused), ("suspended", suspended)] {
            rows.push(row![key, if is { "yes" } else { "no" }]);
        }
        rows
    }

    fn tenants(&self) -> Rows {
        let mut rows = Rows::new(
            "tenant database cluster plan weight:i reserved:i slot_limit:i running:i waiting:i oldest_wait_us:q used_s:n \
             clients:i",
        );
        let mut clients: BTreeMap<&str, u32> = BTreeMap::new();
        for client in &self.clients {
            *clients.entry(&client.info.database).or_default() += 1;
        }
        for (cluster, access) in &self.snapshot.clusters {
            let waits: BTreeMap<_, _> =
                access.gate.pressures().into_iter().map(|p| (p.tenant, p.oldest_wait)).collect();
            for tenant in self.placed().filter(|t| t.cluster.as_ref().is_some_and(|c| c.name == *cluster)) {
                let usage = access.gate.tenant_usage(tenant.id);
                let database = tenant.database.as_ref().map_or("", |d| d.as_str());
                let oldest = waits.get(&tenant.id).copied().unwrap_or_default();
                rows.push(row![
                    tenant.slug.as_str(),
                    database,
                    cluster.as_str(),
                    tenant.plan.name.as_str(),
                    tenant.plan.weight,
                    tenant.plan.postgres.reserved,
                    tenant.plan.postgres.limit.min(access.cache.cluster().slots),
                    usage.running,
                    usage.waiting,
                    oldest.as_micros() as u64,
                    format!("{:.3}", usage.used.0),
                    clients.get(database).copied().unwrap_or_default(),
                ]);
            }
        }
        rows
    }

    fn gates(&self) -> Rows {
        let mut rows = Rows::new(
            "cluster slots:i open_slots:i open_expensive:i running:i expensive:i nested:i waiting:i inflation:n \
             connections:i idle_connections:i max_connections:i lowered:i busy_cores:n",
        );
        for (cluster, access) in &self.snapshot.clusters {
            let (gate, cache) = (access.gate.usage(), access.cache.usage());
            rows.push(row![
                cluster.as_str(),
                gate.slots,
                gate.open_slots,
                gate.open_expensive,
                gate.running,
                gate.expensive,
                gate.nested,
                gate.waiting,
                format!("{:.2}", gate.inflation),
                cache.open,
                cache.idle,
                access.cache.cluster().connections,
                cache.lowered,
                format!("{:.2}", gate.busy_cores),
            ]);
        }
        rows
    }

    /// Whose work waits: what the ledger between the planes is told.
    fn ledger(&self) -> Rows {
        let mut rows = Rows::new("tenant cluster running:i waiting:i oldest_wait_us:q");
        for (cluster, access) in &self.snapshot.clusters {
            for pressure in access.gate.pressures() {
                let tenant = self.snapshot.catalog.tenants().iter().find(|t| t.id == pressure.tenant);
                rows.push(row![
                    tenant.map(|t| t.slug.as_str()),
                    cluster.as_str(),
                    pressure.running,
                    pressure.waiting,
                    pressure.oldest_wait.as_micros() as u64,
                ]);
            }
        }
        rows
    }
}

/// As PgBouncer writes it.
fn time(at: SystemTime) -> String {
    let t = time::OffsetDateTime::from(at);
    let (year, month, day) = t.to_calendar_date();
    let month = u8::from(month);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", t.hour(), t.minute(), t.second())
}
