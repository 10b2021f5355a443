//! The tenants' files, each by itself and against the others.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use super::house::{overlay, resolve_plan};
use super::{Check, Place, number};
use crate::catalog::{Catalog, Login, Password, Tenant};
use crate::config::{PlanConfig, TenantFile};
use crate::diagnostic::one_of;
use crate::ids::{ClusterName, PlanName, PoolName, TenantId};

/// Which file has claimed what.
#[derive(Default)]
pub(super) struct Owners {
    pub(super) slugs: HashMap<String, PathBuf>,
    pub(super) hosts: HashMap<String, PathBuf>,
    pub(super) databases: HashMap<String, PathBuf>,
}

impl Check<'_> {
    pub(super) fn tenant(
        &mut self,
        place: &Place<'_>,
        file: &TenantFile,
        catalog: &mut Catalog,
        numbers: &mut HashMap<String, TenantId>,
        owners: &mut Owners,
        plans: &BTreeMap<PlanName, PlanConfig>,
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
        self.reach(place, file, catalog.http.as_ref().is_some_and(|h| h.config.wildcard_hosts));
        if let Some(database) = &file.database {
            if database.as_str() == Catalog::MAINTENANCE_DATABASE || database.as_str().starts_with("template") {
                let found = format!("`{database}`, which belongs to PostgreSQL itself");
                self.fault(place, &["database"], found, "the tenant's own database");
            }
            if matches!(database.as_str(), "cofferdam" | "pgbouncer") {
                let found = format!("`{database}`, which is the name of the console");
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
        let asks = cluster.as_ref().is_some_and(|c| c.auth_query.is_some());
        let login = file.login.as_ref().and_then(|l| self.login(place, &["login"], l, asks));
        let pool_login = pool.as_ref().and_then(|p| p.login.as_ref());
        if pool_login.is_some_and(|l| l.password == Password::Asked) && file.placement.cluster.is_some() && !asks {
            let found = "a cluster without `auth_query`, and a pool whose login has no password";
            self.fault(
                place,
                &["placement", "cluster"],
                found,
                "`auth_query` there, or a password for the pool's login",
            );
        }
        let server_login = file.server_login.as_ref().and_then(|l| self.own_login(place, &["server_login"], l));
        let mut users: Vec<Login> = Vec::new();
        for (i, user) in file.users.iter().enumerate() {
            let i = i.to_string();
            let pool_login = pool.as_ref().and_then(|p| p.login.as_ref());
            if users.iter().chain(&login).chain(pool_login).any(|other| other.role == user.role) {
                let found = format!("`{}`, which may open the database already", user.role);
                self.fault(place, &["users", &i, "role"], found, "each role once");
                continue;
            }
            users.extend(self.login(place, &["users", &i], user, asks));
        }
        if let (Some(own), Some(Some(pool_login))) = (&login, pool.as_ref().map(|p| p.login.as_ref()))
            && own.role == pool_login.role
        {
            let found = format!("`{}`, the role of its pool's login", own.role);
            self.fault(place, &["login", "role"], found, "a role of the tenant's own");
        }
        if file.placement.cluster.is_some()
            && file.login.is_none()
            && file.users.is_empty()
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
        let pool_login = pool.as_ref().and_then(|p| p.login.as_ref());
        for (i, role) in file.replication.iter().enumerate() {
            if !login.iter().chain(pool_login).chain(&users).any(|l| l.role == *role) {
                let found = format!("`{role}`, which may not open the database");
                self.fault(
                    place,
                    &["replication", &i.to_string()],
                    found,
                    "the role of `login`, of `users` or of the pool's login",
                );
            }
        }
        self.quotas(place, &["quotas"], &file.quotas);
        let Some(plan) = catalog.plans.get(file.plan.as_str()) else {
            let expected = one_of("a plan", file.plan.as_str(), catalog.plans.keys().map(PlanName::as_str));
            self.fault(place, &["plan"], format!("`{}`", file.plan), expected);
            return;
        };
        let merged = plans.get(file.plan.as_str()).and_then(|plan| overlay(plan, &file.quotas));
        for (plane, quota) in merged.iter().flat_map(|m| [("http", &m.http), ("postgres", &m.postgres)]) {
            for (field, burst, rate) in [
                ("rate", quota.rate_burst.is_some(), quota.rate.is_some()),
                ("work", quota.work_burst.is_some(), quota.work.is_some()),
                ("bandwidth", quota.bandwidth_burst.is_some(), quota.bandwidth.is_some()),
            ] {
                if burst && !rate {
                    let found = format!("`{field}_burst`, but no `{field}` here or in the plan");
                    self.fault(place, &["quotas", plane], found, format!("`{field}` too"));
                }
            }
        }
        let plan = merged.map_or_else(|| Arc::clone(plan), |merged| Arc::new(resolve_plan(&file.plan, &merged)));
        let own = [(&file.quotas.http, "http", &plan.http), (&file.quotas.postgres, "postgres", &plan.postgres)];
        for (own, plane, quota) in own {
            // What is wrong with the plan itself has been said there.
            if (own.reserved.is_some() || own.limit.is_some()) && quota.reserved > quota.limit {
                let found = format!("{} slots reserved and a limit of {}, with its plan", quota.reserved, quota.limit);
                self.fault(place, &["quotas", plane], found, "no more reserved than the limit");
            }
        }
        let offered = catalog.http.as_ref().is_some_and(|h| h.config.tls.is_some());
        let canary = self.canary(place, file, &catalog.pools);
        self.header_policy(place, &["headers"], &file.headers);
        let tls = self.tenant_tls(place, file, offered);
        let maintenance_mode = self.maintenance_mode(place, &["maintenance_mode"], file.maintenance_mode.as_ref());
        let tenant = Arc::new(Tenant {
            id: number(numbers, format!("tenant:{slug}")),
            slug: slug.clone(),
            hosts: file.hosts.clone(),
            database: file.database.clone(),
            pool,
            cluster,
            plan,
            login,
            users,
            server_login,
            replication: file.replication.clone(),
            pooling: file.pooling,
            canary,
            headers: file.headers.clone(),
            maintenance_mode,
            tls,
            networks: file.networks.clone(),
            internal_routes: file.internal_routes.clone(),
        });
        for host in &tenant.hosts {
            match host.wildcard_of() {
                Some(parent) => catalog.by_wildcard.insert(parent.to_owned(), Arc::clone(&tenant)),
                None => catalog.by_host.insert(host.clone(), Arc::clone(&tenant)),
            };
        }
        if let Some(database) = &tenant.database {
            catalog.by_database.insert(database.clone(), Arc::clone(&tenant));
        }
        for login in tenant.login.iter().chain(&tenant.users) {
            catalog.by_role.insert(login.role.clone(), login.clone());
        }
        catalog.by_slug.insert(slug.clone(), Arc::clone(&tenant));
        catalog.tenants.push(tenant);
    }

    pub(super) fn placed<K: Ord + std::borrow::Borrow<str>, T>(
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
}
