//! Where a client's work goes, and on whose account.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use cofferdam_fairness::Rejection;
use cofferdam_tenant::{Catalog, Class, Login, PoolingMode, TenantId};

use crate::cache::{Key, Pool};
use crate::plane::{ClusterAccess, PostgresPlane, Snapshot};
use crate::process::class_of;
use crate::servers::Wanted;

/// Connections to the maintenance database that one pool's workers may hold.
const MAINTENANCE_CLIENTS: u32 = 1_000;

/// Where a session's work goes, and on whose account.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// Whom the work is charged to.
    pub(crate) account: TenantId,
    /// The name for messages.
    pub(crate) name: String,
    pub(crate) access: ClusterAccess,
    pub(crate) pool: Arc<Pool>,
    pub(crate) pooling: PoolingMode,
    pub(crate) class: Class,
    pub(crate) max_wait: Duration,
    /// The same for an Odoo process that turns out to run cron jobs.
    pub(crate) background_wait: Duration,
    /// Whether bytes are counted against a budget.
    pub(crate) metered: bool,
    pub(crate) idle_in_transaction: Duration,
    pub(crate) statement_timeout: Option<Duration>,
    pub(crate) transaction_timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_clients: u32,
    pub(crate) login_rate: Option<u32>,
}

/// What a client has asked for at login.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Requested<'a> {
    pub(crate) user: &'a str,
    pub(crate) database: &'a str,
    pub(crate) application_name: &'a str,
    /// All others.
    pub(crate) settings: &'a Arc<BTreeMap<String, String>>,
}

/// Where a session goes. `None` when its database is not known here, or the role may not open it any more.
pub(crate) fn route(snapshot: &Snapshot, requested: Requested<'_>) -> Option<Route> {
    let catalog = &snapshot.catalog;
    let role = requested.user;
    let pool = |access: &ClusterAccess, login: &Login| {
        let (database, settings) = (requested.database.to_owned(), Arc::clone(requested.settings));
        // A client that is logged in here may use the server as whom its tenant says.
        let login = access.cache.resolve(login);
        access.cache.pool(Key { database, login, settings, wanted: Wanted::Primary })
    };
    if requested.database == Catalog::MAINTENANCE_DATABASE {
        let (workers, login, cluster) = catalog.maintenance(role)?;
        let access = snapshot.clusters.get(&cluster.name)?.clone();
        return Some(Route {
            account: workers.account,
            name: format!("pool {}", workers.name),
            pool: pool(&access, login),
            access,
            pooling: PoolingMode::Transaction,
            class: Class::Admin,
            max_wait: Duration::from_secs(30),
            background_wait: Duration::from_secs(30),
            metered: false,
            idle_in_transaction: Duration::from_secs(600),
            statement_timeout: None,
            transaction_timeout: None,
            idle_timeout: None,
            max_clients: MAINTENANCE_CLIENTS,
            login_rate: None,
        });
    }
    let tenant = catalog.by_database(requested.database)?;
    let login = tenant.server_login(role)?;
    let cluster = tenant.cluster.as_ref()?;
    let class = class_of(requested.application_name);
    let access = snapshot.clusters.get(&cluster.name)?.clone();
    Some(Route {
        account: tenant.id,
        name: format!("tenant {}", tenant.slug),
        pool: pool(&access, login),
        access,
        pooling: tenant.pooling,
        class,
        max_wait: tenant.plan.postgres.max_wait(class),
        background_wait: tenant.plan.postgres.max_wait(Class::Background),
        metered: tenant.plan.postgres.bandwidth.is_some(),
        idle_in_transaction: tenant.plan.idle_in_transaction_timeout,
        statement_timeout: tenant.plan.statement_timeout,
        transaction_timeout: tenant.plan.transaction_timeout,
        idle_timeout: tenant.plan.idle_timeout,
        max_clients: tenant.plan.max_clients,
        login_rate: tenant.plan.login_rate,
    })
}

impl Route {
    /// What a client is told when it gets no slot: tenant, limit and wait (never another tenant's name).
    pub(crate) fn refusal(&self, rejection: &Rejection) -> String {
        format!("cofferdam: {}: {rejection}", self.name)
    }
}

/// Counts one client of a tenant as long as it lives.
#[derive(Debug)]
pub(crate) struct ClientCount {
    plane: Arc<PostgresPlane>,
    account: TenantId,
}

impl ClientCount {
    pub(crate) fn new(plane: &Arc<PostgresPlane>, route: &Route) -> Option<Self> {
        let mut clients = plane.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(route.account).or_default();
        if *count >= route.max_clients {
            return None;
        }
        *count += 1;
        drop(clients);
        Some(Self { plane: Arc::clone(plane), account: route.account })
    }
}

impl Drop for ClientCount {
    fn drop(&mut self) {
        let mut clients = self.plane.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.account);
            }
        }
    }
}
