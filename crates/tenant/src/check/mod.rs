//! From decoded files to a catalog: everything that only the whole set can tell.

mod house;
mod http;
mod secrets;
mod tenants;

use std::collections::HashMap;
use std::sync::Arc;

use crate::catalog::{Catalog, Password, Tenant};
use crate::config::{GatewayConfig, TenantFile};
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::ids::TenantId;
use crate::schema::{gateway_schema, tenant_schema};
use crate::yaml::Node;
use crate::{Secrets, Source, SourceSet};
use tenants::Owners;

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
    let mut check = Check { faults: Vec::new(), secrets, user_list: HashMap::new() };
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
    /// Passwords by role, for logins that give none.
    user_list: HashMap<String, Password>,
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
        if let Some(file) = config.postgres.as_ref().and_then(|p| p.user_list.as_ref()) {
            self.read_user_list(main, file);
        }
        let plans = self.plans(main, config);
        let clusters = self.clusters(main, config);
        let pools = self.pools(main, config, &clusters, &mut numbers);
        let postgres = self.postgres(main, config);
        let admin_token = self.admin(main, config);
        let http = self.http(main, config);
        self.addresses(main, config);

        let mut catalog = Catalog {
            tenants: Vec::with_capacity(files.len()),
            by_host: HashMap::with_capacity(files.len()),
            by_wildcard: HashMap::new(),
            by_database: HashMap::with_capacity(files.len()),
            by_slug: HashMap::with_capacity(files.len()),
            by_role: HashMap::new(),
            pools,
            clusters,
            plans,
            http,
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
            self.tenant(&place, file, &mut catalog, &mut numbers, &mut owners, &config.plans);
        }
        catalog.tenants.sort_by(|a, b| a.slug.cmp(&b.slug));
        self.reserved_fits(main, &catalog);
        catalog.numbers = Arc::new(numbers);
        catalog
    }

    /// Σ reserved must not exceed the slots, or the guarantee is a lie.
    fn reserved_fits(&mut self, main: &Place<'_>, catalog: &Catalog) {
        for (kind, name, slots, reserved, without) in catalog
            .pools
            .values()
            .map(|p| {
                let mine = |t: &&Arc<Tenant>| t.pool.as_ref().is_some_and(|q| q.name == p.name);
                let sum: u64 = catalog.tenants.iter().filter(mine).map(|t| u64::from(t.plan.http.reserved)).sum();
                let without = catalog.tenants.iter().filter(mine).filter(|t| t.plan.http.reserved == 0).count();
                ("pools", p.name.as_str(), p.slots, sum, without)
            })
            .chain(catalog.clusters.values().map(|c| {
                let mine = |t: &&Arc<Tenant>| t.cluster.as_ref().is_some_and(|q| q.name == c.name);
                let sum: u64 = catalog.tenants.iter().filter(mine).map(|t| u64::from(t.plan.postgres.reserved)).sum();
                let without = catalog.tenants.iter().filter(mine).filter(|t| t.plan.postgres.reserved == 0).count();
                // The accounts of pools that may open the maintenance database have no reservation either.
                let maintained = |p: &&Arc<crate::Pool>| p.maintenance.as_ref().is_some_and(|m| m.name == c.name);
                let without = without + catalog.pools.values().filter(maintained).count();
                ("clusters", c.name.as_str(), c.slots, sum, without)
            }))
        {
            let everybody = without == 0;
            if reserved > u64::from(slots) || (reserved == u64::from(slots) && !everybody) {
                self.fault(
                    main,
                    &[kind, name, "slots"],
                    format!("{slots} slots, of which the plans of the tenants placed here reserve {reserved}"),
                    "more slots than are reserved, or nothing is left for tenants without a reservation",
                );
            }
        }
    }
}

fn number(numbers: &mut HashMap<String, TenantId>, key: String) -> TenantId {
    let next = TenantId(numbers.len() as u32);
    *numbers.entry(key).or_insert(next)
}
