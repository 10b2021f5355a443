//! `health.yaml`: what is looked at, and whom it is told.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cofferdam_tenant::calendar::Calendar;
use cofferdam_tenant::yaml::{Node, Reader};
use cofferdam_tenant::{Catalog, Diagnostics, Secrets, Source};
use serde_json::Value;

pub use file::{
    ClusterFile, DiskFile, EmailFile, Encryption, FrontFile, GatewayFile, HealthFile, HistoryFile, KubernetesFile,
    LoginFile, NoticesFile, RedisFile, TenantFile, TierFile,
};

use crate::History;
use crate::engine::{Engine, EngineOptions, Hysteresis};
use crate::model::{CheckId, Subject};
use crate::probe::{
    BackupsProbe, CertificateProbe, ClusterLimits, ClusterProbe, Database, DiskProbe, GatewayProbe, HttpProbe,
    KubernetesProbe, KubernetesServer, LoginProbe, Probe, RedisProbe, TenantProbe, ThroughProbe, Tls, WebSocketProbe,
};
use crate::sink::{Email, Sinks};
use crate::slo::{ByObjective, Objective};
use crate::watcher::Watcher;

/// Everything that the file says, understood and checked.
pub struct Setup {
    /// The file as it is written.
    pub file: HealthFile,
    /// Calendars, by tenant.
    pub calendars: BTreeMap<String, Arc<Calendar>>,
    /// Calendars, by their own names.
    pub named_calendars: BTreeMap<String, Arc<Calendar>>,
    /// Objectives, as parts of one.
    pub objectives: ByObjective<f64>,
    /// How notices go out by e-mail, if they do.
    email: Option<Email>,
    history: Option<Database>,
    state: Option<PathBuf>,
    probes: Vec<Arc<dyn Probe>>,
    /// What a tenant cannot be well without.
    needs: Vec<(Subject, CheckId)>,
    /// What a check cannot be well without.
    needs_of_checks: Vec<(CheckId, CheckId)>,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("probes", &self.probes.len()).finish_non_exhaustive()
    }
}

/// The JSON Schema of `health.yaml`.
pub fn health_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(HealthFile).to_value())
}

impl Setup {
    /// The path of the gateway's configuration that a file refers to, if it does. For whoever loads both.
    pub fn catalog_of(source: &Source) -> Option<PathBuf> {
        let node = Node::parse(&source.path, &source.text).ok()?;
        node.decode::<HealthFile>(&source.path, health_schema(), &mut Vec::new())?.catalog
    }

    /// Reads a configuration. Every error is found, not only the first.
    pub fn read(source: &Source, catalog: Option<&Catalog>, secrets: &dyn Secrets) -> Result<Self, Diagnostics> {
        let node = Node::parse(&source.path, &source.text).map_err(|d| Diagnostics(vec![d]))?;
        let mut faults = Vec::new();
        let Some(file) = node.decode::<HealthFile>(&source.path, health_schema(), &mut faults) else {
            return Err(Diagnostics(faults));
        };
        let mut understanding = Understanding(Reader::new(source, &node, secrets, faults));
        let setup = understanding.setup(file, catalog);
        understanding.0.finish(setup)
    }

    /// Whether a tenant is among those that are looked at.
    pub fn knows(&self, tenant: &str) -> bool {
        self.objectives.contains_key(&(tenant.to_owned(), Objective::Availability))
    }

    /// The tenants that are looked at, by name.
    pub fn tenants(&self) -> Vec<&str> {
        let own = self.objectives.keys().filter(|(_, objective)| *objective == Objective::Availability);
        own.map(|(tenant, _)| tenant.as_str()).collect()
    }

    /// Where notices go. Fails, in words, where that cannot be.
    pub fn sinks(&self) -> Result<Sinks, String> {
        let notices = &self.file.notices;
        let mut sinks = Sinks::new(notices.webhook.as_deref(), notices.alertmanager.as_deref())?;
        if let Some(email) = &self.email {
            sinks = sinks.and_email(email)?;
        }
        Ok(sinks)
    }

    /// Where changes are kept, if they are.
    pub fn history(&self) -> Option<History> {
        let keep = self.file.history.as_ref()?.keep.0;
        Some(History::new(self.history.clone()?, keep))
    }

    /// The directory in which is remembered what has to outlive a watch, if it is.
    pub fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// Looks at something else too.
    pub fn add(&mut self, probe: Arc<dyn Probe>) {
        self.probes.push(probe);
    }

    /// A watcher that looks at everything. With `at_once`, one look is believed: for somebody who asks once.
    pub fn watcher(&self, at_once: bool) -> Watcher {
        let hysteresis = if at_once { Hysteresis { worse_after: 1, better_after: 1 } } else { Hysteresis::default() };
        let stale_after = self.file.interval.0 * 5;
        let mut engine = Engine::new(EngineOptions { hysteresis, stale_after, ..EngineOptions::default() });
        for (subject, check) in &self.needs {
            engine.subject_needs(subject.clone(), check.clone());
        }
        for (check, other) in &self.needs_of_checks {
            engine.needs(check.clone(), other.clone());
        }
        Watcher::new(self.probes.clone(), engine, self.file.concurrency as usize)
    }
}

/// Whether something is an address that can be asked by HTTP.
fn is_web(url: &str) -> bool {
    reqwest::Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
}

/// Understands the file.
struct Understanding<'a>(Reader<'a>);

impl<'a> std::ops::Deref for Understanding<'a> {
    type Target = Reader<'a>;

    fn deref(&self) -> &Reader<'a> {
        &self.0
    }
}

impl std::ops::DerefMut for Understanding<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Understanding<'_> {
    fn setup(&mut self, file: HealthFile, catalog: Option<&Catalog>) -> Setup {
        let interval = file.interval.0;
        if !(Duration::from_secs(1)..=Duration::from_secs(3_600)).contains(&interval) {
            self.fault(&["interval"], file.interval.to_string(), "from `1s` to `1h`");
        }
        self.notices(&file.notices);
        if let Some(kept) = file.history.as_ref().filter(|kept| kept.keep.0 < Duration::from_secs(3_600)) {
            self.fault(&["history", "keep"], kept.keep.to_string(), "at least `1h`");
        }
        if file.concurrency == 0 {
            self.fault(&["concurrency"], "0", "at least 1");
        }
        self.part(&["availability"], file.availability);
        self.part(&["latency"], file.latency);
        for (name, tier) in &file.tiers {
            for (field, part) in [("availability", tier.availability), ("latency", tier.latency)] {
                if let Some(part) = part {
                    self.part(&["tiers", name, field], part);
                }
            }
        }
        let email = file.notices.email.as_ref().and_then(|email| self.email(email));
        let mut probes: Vec<Arc<dyn Probe>> = Vec::new();
        let mut needs = Vec::new();
        let (mut clusters, mut fronts, mut history) = (BTreeMap::new(), BTreeMap::new(), None);
        if let Some(kept) = file.history.as_ref().filter(|kept| !file.clusters.contains_key(&kept.cluster)) {
            let expected = format!("one of {}", names(file.clusters.keys()));
            self.fault(&["history", "cluster"], format!("`{}`", kept.cluster), expected);
        }
        for (name, cluster) in &file.clusters {
            self.port(&["clusters", name, "port"], cluster.port);
            if let Some(front) = &cluster.gateway {
                self.port(&["clusters", name, "gateway", "port"], front.port);
            }
            let Some(server) = self.cluster(name, cluster) else { continue };
            if let Some(kept) = file.history.as_ref().filter(|kept| kept.cluster == *name) {
                history = Some(Database { database: kept.database.clone(), ..server.clone() });
            }
            let limits = ClusterLimits { replicas: cluster.replicas, ..ClusterLimits::default() };
            probes.push(Arc::new(ClusterProbe::new(name, &server, limits, interval)));
            let field = ["clusters", name, "tenant_password_file"];
            let Some(password) = self.secret_file(&field, cluster.tenant_password_file.as_deref()) else { continue };
            let server = match &cluster.tenant_user {
                Some(user) => Database { user: user.clone(), password, ..server },
                None if password.is_some() => {
                    self.fault(&field, "a password", "`tenant_user`, whose password it is");
                    continue;
                }
                None => server,
            };
            if let Some(front) = &cluster.gateway {
                let field = ["clusters", name, "gateway", "tls"];
                match self.tls(&field, &front.tls).map(|tls| Tls::read(&tls)) {
                    Some(Ok(tls)) => {
                        let (host, port) = (front.host.clone(), front.port);
                        fronts.insert(name.clone(), Database { host, port, tls, ..server.clone() });
                    }
                    Some(Err(error)) => self.fault(&field, error, "a file with certificates"),
                    None => {}
                }
            }
            clusters.insert(name.clone(), server);
        }
        for (name, redis) in &file.redis {
            self.port(&["redis", name, "port"], redis.port);
            let field = ["redis", name, "password_file"];
            let Some(password) = self.secret_file(&field, redis.password_file.as_deref()) else { continue };
            match RedisProbe::new(name, &redis.host, redis.port, password.as_ref(), interval) {
                Ok(probe) => probes.push(Arc::new(probe)),
                Err(error) => self.fault(&["redis", name], error, "the address of a Redis server"),
            }
        }
        for (name, gateway) in &file.gateways {
            if !is_web(&gateway.admin) {
                let expected = "an address such as `http://127.0.0.1:9180`";
                self.fault(&["gateways", name, "admin"], format!("`{}`", gateway.admin), expected);
                continue;
            }
            let field = ["gateways", name, "token_file"];
            let Some(token) = self.secret_file(&field, gateway.token_file.as_deref()) else { continue };
            match GatewayProbe::new(name, &gateway.admin, token, interval) {
                Ok(probe) => probes.push(Arc::new(probe)),
                Err(error) => {
                    let found = format!("`{}`: {error}", gateway.admin);
                    self.fault(&["gateways", name, "admin"], found, "the address of an admin listener");
                }
            }
        }
        for (name, cluster) in &file.kubernetes {
            let authorities = match &cluster.ca_file {
                Some(path) => match self.file(&["kubernetes", name, "ca_file"], path) {
                    Some(text) => Some(text),
                    None => continue,
                },
                None => None,
            };
            let token_file = cluster.token_file.as_deref().map(|path| self.path(path));
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if cluster.namespace.is_empty() || !cluster.namespace.chars().all(plain) {
                let found = format!("`{}`", cluster.namespace);
                self.fault(&["kubernetes", name, "namespace"], found, "lower-case letters, digits and `-`");
            }
            match KubernetesServer::new(&cluster.server, token_file, authorities.as_deref()) {
                Ok(server) => probes.push(Arc::new(KubernetesProbe {
                    name: name.clone(),
                    namespace: cluster.namespace.clone(),
                    api: Arc::new(server),
                    interval,
                })),
                Err(error) => {
                    let found = format!("`{}`: {error}", cluster.server);
                    self.fault(&["kubernetes", name], found, "the address of an API server, and its authorities");
                }
            }
        }
        for (name, disk) in &file.disks {
            if !(0.0 < disk.warn && disk.warn < disk.fail && disk.fail <= 100.0) {
                let found = format!("{} and {}", disk.warn, disk.fail);
                self.fault(&["disks", name], found, "`warn` below `fail`, both per cent");
            }
            let (path, limits) = (self.path(&disk.path), (disk.warn, disk.fail));
            probes.push(Arc::new(DiskProbe::new(name, path, limits, interval)));
        }
        let known = self.calendars(&file);
        let mut tenants = file.tenants.clone();
        for tenant in catalog.into_iter().flat_map(Catalog::tenants) {
            let plan = tenant.plan.name.to_string();
            if let Some(entry) = tenants.get_mut(tenant.slug.as_str()).filter(|_| file.tiers.contains_key(&plan)) {
                entry.tier.get_or_insert_with(|| plan.clone());
            }
            let (Some(database), Some(cluster)) = (&tenant.database, &tenant.cluster) else { continue };
            let entry = tenants.entry(tenant.slug.to_string()).or_default();
            if file.tiers.contains_key(&plan) {
                entry.tier.get_or_insert(plan);
            }
            entry.database.get_or_insert_with(|| database.to_string());
            entry.cluster.get_or_insert_with(|| cluster.name.to_string());
        }
        let (mut calendars, mut objectives) = (BTreeMap::new(), BTreeMap::new());
        for (name, tenant) in &tenants {
            let tier = match &tenant.tier {
                Some(tier) if !file.tiers.contains_key(tier) => {
                    let expected = format!("one of {}", names(file.tiers.keys()));
                    self.fault(&["tenants", name, "tier"], format!("`{tier}`"), expected);
                    TierFile::default()
                }
                Some(tier) => file.tiers[tier].clone(),
                None => TierFile::default(),
            };
            let own = TenantFile { page_within: tenant.page_within.or(tier.page_within), ..tenant.clone() };
            self.tenant(name, &own, &file, (&clusters, &fronts), &mut probes, &mut needs);
            for (objective, own, of_tier, of_all) in [
                (Objective::Availability, tenant.availability, tier.availability, file.availability),
                (Objective::Latency, tenant.latency, tier.latency, file.latency),
            ] {
                if let Some(own) = own {
                    self.part(&["tenants", name, objective.as_str()], own);
                }
                // As a part of one, without what a binary fraction makes of the division.
                let part = (own.or(of_tier).unwrap_or(of_all) * 1e7).round() / 1e9;
                objectives.insert((name.clone(), objective), part);
            }
            if let Some(calendar) = &tenant.calendar {
                if let Some(calendar) = known.get(calendar) {
                    calendars.insert(name.clone(), Arc::clone(calendar));
                } else if !file.calendars.contains_key(calendar) {
                    let expected = format!("one of {}", names(file.calendars.keys()));
                    self.fault(&["tenants", name, "calendar"], format!("`{calendar}`"), expected);
                }
            }
        }
        if let Some(path) = &file.backups {
            let (stale_after, drill_age) = (Duration::from_secs(120), (40.0 * 86_400.0, 100.0 * 86_400.0));
            let names = tenants.keys().cloned().collect();
            probes.push(Arc::new(BackupsProbe::new(self.path(path), names, stale_after, drill_age, interval)));
        }
        for (name, service) in &file.services {
            for tenant in service.tenants.iter().filter(|tenant| !tenants.contains_key(*tenant)) {
                let expected = format!("one of {}", names(tenants.keys()));
                self.fault(&["services", name, "tenants"], format!("`{tenant}`"), expected);
            }
            if service.tenants.is_empty() {
                self.fault(&["services", name, "tenants"], "nobody", "a tenant");
            }
            if !self.is_content() {
                continue;
            }
            let aspects: BTreeSet<String> = probes
                .iter()
                .flat_map(|probe| probe.checks())
                .filter(|check| matches!(&check.subject, Subject::Tenant(tenant) if service.tenants.contains(tenant)))
                .map(|check| check.aspect)
                .collect();
            for check in service.checks.iter().filter(|check| !aspects.contains(*check)) {
                let expected = format!("one of {}", names(aspects.iter()));
                self.fault(&["services", name, "checks"], format!("`{check}`"), expected);
            }
        }
        let state = file.state_directory.as_ref().map(|path| self.path(path));
        // Whoever goes through the gateway gets nowhere without it; of several, another may have served.
        let mut needs_of_checks = Vec::new();
        if let (Some(gateway), 1) = (file.gateways.keys().next(), file.gateways.len()) {
            let own = probes.iter().flat_map(|probe| probe.checks());
            let through = ["page", "login", "websocket", "database through the gateway"];
            let through = own.filter(|check| {
                matches!(check.subject, Subject::Tenant(_)) && through.contains(&check.aspect.as_str())
            });
            needs_of_checks.extend(through.map(|check| (check, GatewayProbe::reachable(gateway))));
        }
        // A certificate can be seen where a page can be had.
        let checks: BTreeSet<CheckId> = probes.iter().flat_map(|probe| probe.checks()).collect();
        for check in checks.iter().filter(|check| check.aspect.starts_with("certificate of ")) {
            let page = CheckId { subject: check.subject.clone(), aspect: "page".to_owned() };
            if checks.contains(&page) {
                needs_of_checks.push((check.clone(), page));
            }
        }
        if probes.is_empty() && self.is_content() {
            self.fault(&["clusters"], "nothing to look at", "a cluster, a tenant with a page, or a Redis server");
        }
        Setup {
            file,
            calendars,
            named_calendars: known,
            objectives,
            email,
            history,
            state,
            probes,
            needs,
            needs_of_checks,
        }
    }

    fn notices(&mut self, notices: &NoticesFile) {
        for (field, url) in [("webhook", &notices.webhook), ("alertmanager", &notices.alertmanager)] {
            if let Some(url) = url.as_ref().filter(|url| !is_web(url)) {
                let expected = "an address such as `http://127.0.0.1:9093`";
                // An address may have something secret in it.
                let found = url.split(['?', '#']).next().unwrap_or_default();
                self.fault(&["notices", field], format!("`{found}`"), expected);
            }
        }
        if let Some(repeat) = notices.repeat.filter(|repeat| repeat.0 < Duration::from_secs(60)) {
            self.fault(&["notices", "repeat"], repeat.to_string(), "at least `1m`");
        }
        if let Some(email) = &notices.email
            && email.port == Some(0)
        {
            self.port(&["notices", "email", "port"], 0);
        }
    }

    fn port(&mut self, field: &[&str], port: u16) {
        if port == 0 {
            self.fault(field, "0", "a port from 1 to 65535");
        }
    }

    fn calendars(&mut self, file: &HealthFile) -> BTreeMap<String, Arc<Calendar>> {
        let mut known = BTreeMap::new();
        for (name, config) in &file.calendars {
            match Calendar::new(config) {
                Ok(calendar) => drop(known.insert(name.clone(), Arc::new(calendar))),
                Err(errors) => {
                    for error in errors {
                        let field: Vec<&str> = error.field.iter().map(String::as_str).collect();
                        self.fault(&[&["calendars", name.as_str()], &field[..]].concat(), error.found, error.expected);
                    }
                }
            }
        }
        known
    }

    fn tenant(
        &mut self,
        name: &str,
        tenant: &TenantFile,
        file: &HealthFile,
        (clusters, fronts): (&BTreeMap<String, Database>, &BTreeMap<String, Database>),
        probes: &mut Vec<Arc<dyn Probe>>,
        needs: &mut Vec<(Subject, CheckId)>,
    ) {
        let (interval, subject) = (file.interval.0, Subject::Tenant(name.to_owned()));
        let only = if file.clusters.len() == 1 { file.clusters.keys().next().cloned() } else { None };
        if let Some(cluster) = tenant.cluster.clone().or(only) {
            match clusters.get(&cluster) {
                Some(server) => {
                    let database = tenant.database.clone().unwrap_or_else(|| name.to_owned());
                    let database = Database { database, ..server.clone() };
                    let limits = crate::probe::TenantLimits::default();
                    if let Some(front) = fronts.get(&cluster) {
                        let (host, port, tls) = (front.host.clone(), front.port, front.tls.clone());
                        let database = Database { host, port, tls, ..database.clone() };
                        let (tenant, latency) = (name.to_owned(), limits.latency.0);
                        probes.push(Arc::new(ThroughProbe { tenant, database, latency, interval }));
                    }
                    probes.push(Arc::new(TenantProbe::new(name, database, limits, interval)));
                    needs.push((subject.clone(), ClusterProbe::reachable(&cluster)));
                }
                None if file.clusters.contains_key(&cluster) => {}
                None => {
                    let expected = format!("one of {}", names(file.clusters.keys()));
                    self.fault(&["tenants", name, "cluster"], format!("`{cluster}`"), expected);
                }
            }
        } else if tenant.database.is_some() {
            let expected = format!("one of {}", names(file.clusters.keys()));
            self.fault(&["tenants", name], "no `cluster`", expected);
        }
        if let Some(url) = tenant.page.as_ref().filter(|url| !is_web(url)) {
            self.fault(
                &["tenants", name, "page"],
                format!("`{url}`"),
                "an address such as `https://acme.example.com/web/login`",
            );
        } else if let Some(url) = &tenant.page {
            let within = tenant.page_within.map_or(2.0, |within| within.0.as_secs_f64());
            match HttpProbe::new(name, url, tenant.connect, tenant.expect.clone(), (within, within * 5.0), interval) {
                Ok(probe) => {
                    probes.push(Arc::new(probe));
                    self.at_site(name, url, tenant, probes);
                }
                Err(error) => {
                    self.fault(&["tenants", name, "page"], format!("`{url}`: {error}"), "an address of a page");
                }
            }
            if let Some((host, port)) = of_https(url) {
                let connect = tenant.connect.map_or_else(|| format!("{host}:{port}"), |at| at.to_string());
                let interval = interval.max(Duration::from_secs(300));
                let tenant = name.to_owned();
                probes.push(Arc::new(CertificateProbe { tenant, host, connect, limits: (21.0, 7.0), interval }));
            }
        }
        if tenant.page_within.is_some_and(|within| within.0.is_zero()) {
            self.fault(&["tenants", name, "page_within"], "`0s`", "a time above zero");
        }
        if tenant.page.is_none() {
            if file.clusters.is_empty() && tenant.redis.is_none() {
                self.fault(&["tenants", name], "nothing to look at", "a `cluster` with its database, or a `page`");
            }
            for (field, given) in [
                ("websocket", tenant.websocket),
                ("login", tenant.login.is_some()),
                ("expect", tenant.expect.is_some()),
                ("connect", tenant.connect.is_some()),
            ] {
                if given {
                    self.fault(&["tenants", name, field], "no `page`", "a `page`, at whose site that is");
                }
            }
        }
        if let Some(redis) = &tenant.redis {
            if file.redis.contains_key(redis) {
                needs.push((subject, CheckId::shared(&format!("redis {redis}"), "reachable")));
            } else {
                let expected = format!("one of {}", names(file.redis.keys()));
                self.fault(&["tenants", name, "redis"], format!("`{redis}`"), expected);
            }
        }
    }

    /// What is looked at beside a page, at the same site.
    fn at_site(&mut self, name: &str, url: &str, tenant: &TenantFile, probes: &mut Vec<Arc<dyn Probe>>) {
        // Each opens a connection or a session in Odoo: not as often as a page is fetched.
        let rarely = Duration::from_secs(300);
        if tenant.websocket {
            match WebSocketProbe::new(name, url, tenant.connect, rarely) {
                Ok(probe) => probes.push(Arc::new(probe)),
                Err(error) => self.fault(&["tenants", name, "page"], error, "an address of a page"),
            }
        }
        let Some(login) = &tenant.login else { return };
        let field = ["tenants", name, "login", "password_file"];
        let Some(Some(password)) = self.secret_file(&field, Some(&login.password_file)) else { return };
        let database = tenant.database.as_deref().unwrap_or(name);
        match LoginProbe::new(name, url, tenant.connect, database, &login.user, password, rarely) {
            Ok(probe) => probes.push(Arc::new(probe)),
            Err(error) => self.fault(&["tenants", name, "page"], error, "an address of a page"),
        }
    }

    fn email(&mut self, config: &EmailFile) -> Option<Email> {
        let field = ["notices", "email", "password_file"];
        let password = self.secret_file(&field, config.password_file.as_deref())?;
        let login = match (&config.user, password) {
            (Some(user), Some(password)) => Some((user.clone(), password)),
            (None, None) => None,
            _ => {
                let expected = "both `user` and `password_file`, or neither";
                self.fault(&["notices", "email"], "one of `user` and `password_file`", expected);
                return None;
            }
        };
        if login.is_some() && config.encryption == Encryption::None {
            let expected = "`starttls` or `implicit`: the password would be seen by others";
            self.fault(&["notices", "email", "encryption"], "`none`, with a password", expected);
            return None;
        }
        if config.to.is_empty() {
            self.fault(&["notices", "email", "to"], "nobody", "an address");
        }
        let mut address = |path: &[&str], text: &str| {
            let mailbox = text.parse().ok();
            if mailbox.is_none() {
                self.fault(path, format!("`{text}`"), "an address such as `Operations <ops@example.com>`");
            }
            mailbox
        };
        let from = address(&["notices", "email", "from"], &config.from);
        let to: Vec<_> = config
            .to
            .iter()
            .enumerate()
            .filter_map(|(n, text)| address(&["notices", "email", "to", &n.to_string()], text))
            .collect();
        let authorities = match &config.ca_file {
            None => None,
            Some(file) => {
                let field = ["notices", "email", "ca_file"];
                let text = self.file(&field, file)?;
                if let Err(error) = Email::authorities(&text) {
                    self.fault(&field, format!("`{}`: {error}", file.display()), "a file with certificates");
                    return None;
                }
                Some(text)
            }
        };
        Some(Email {
            server: config.server.clone(),
            port: config.port,
            encryption: config.encryption,
            authorities,
            login,
            from: from?,
            to,
        })
    }

    fn cluster(&mut self, name: &str, config: &ClusterFile) -> Option<Database> {
        let (file, variable) = (config.password_file.as_deref(), config.password_env.as_deref());
        let password = self.password(&["clusters", name], file, variable)?;
        let field = ["clusters", name, "tls"];
        let tls = match Tls::read(&self.tls(&field, &config.tls)?) {
            Ok(tls) => tls,
            Err(error) => {
                self.fault(&field, error, "a file with certificates");
                return None;
            }
        };
        Some(Database {
            host: config.host.clone(),
            port: config.port,
            user: config.user.clone(),
            password,
            tls,
            database: config.maintenance.clone(),
        })
    }

    fn part(&mut self, path: &[&str], per_cent: f64) {
        if !(50.0..100.0).contains(&per_cent) {
            self.fault(path, per_cent.to_string(), "per cent from 50 to below 100");
        }
    }
}

fn of_https(url: &str) -> Option<(String, u16)> {
    let url = reqwest::Url::parse(url).ok()?;
    (url.scheme() == "https").then(|| Some((url.host_str()?.to_owned(), url.port_or_known_default()?)))?
}

fn names<'a>(known: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<String> = known.map(|name| format!("`{name}`")).collect();
    if names.is_empty() { "none: there is none in the file".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_tenant::NoSecrets;

    #[test]
    fn every_error_is_told_with_its_place() {
        let wrong = "
interval: 10ms
clusters: { main: { host: a, user: odoo }, other: { host: b, user: odoo, password_env: NOPE } }
tenants:
  acme: { database: acme }
  beta: { cluster: mian, calendar: xmas, redis: r }
  core: { page: not-a-page, availability: 120 }
  dora: { cluster: main, expect: well }
calendars: { de: { time_zone: Mars/Olympus, events: [{ name: a, kind: payroll, business_days: 0 }] } }
services: { payroll: { title: Payroll, tenants: [nobody] }, close: { title: Close } }
redis: { r0: { host: r, port: 0 } }
gateways: { g: { admin: 'localhost:9180' } }
notices: { alertmanager: '127.0.0.1:9093', webhook: 'not a url?token=secret', repeat: 0s }
history: { cluster: main, database: health, keep: 0s }
";
        let error = Setup::read(&Source::new("/etc/health.yaml", wrong), None, &NoSecrets).unwrap_err().to_string();
        for expected in [
            "health.yaml:2:11: interval: found 10ms, expected from `1s` to `1h`",
            "clusters.other.password_env: found `NOPE`, which is not set",
            "tenants.acme: found no `cluster`, expected one of `main`, `other`",
            "tenants.beta.cluster: found `mian`",
            "tenants.beta.calendar: found `xmas`, expected one of `de`",
            "tenants.beta.redis: found `r`, expected one of `r0`",
            "tenants.core.page: found `not-a-page`",
            "tenants.core.availability: found 120",
            "calendars.de.time_zone: found `Mars/Olympus`",
            "calendars.de.events.0.business_days: found 0",
            "tenants.dora.expect: found no `page`",
            "services.close.tenants: found nobody, expected a tenant",
            "redis.r0.port: found 0",
            "gateways.g.admin: found `localhost:9180`, expected an address such as",
            "notices.alertmanager: found `127.0.0.1:9093`, expected an address such as",
            "notices.webhook: found `not a url`",
            "notices.repeat: found 0s, expected at least `1m`",
            "history.keep: found 0s, expected at least `1h`",
            "services.payroll.tenants: found `nobody`, expected one of `acme`, `beta`, `core`, `dora`",
        ] {
            assert!(error.contains(expected), "{expected}\n{error}");
        }
        assert!(!error.contains("secret"), "{error}");
        // What a service needs must be something that is looked at.
        let typo = "clusters: { main: { host: a, user: odoo } }\ntenants: { acme: {} }\n\
                    services: { payroll: { title: Payroll, tenants: [acme], checks: [database, pgae] } }\n";
        let error = Setup::read(&Source::new("h.yaml", typo), None, &NoSecrets).unwrap_err().to_string();
        assert!(
            error.contains("services.payroll.checks: found `pgae`, expected one of `bloat`, `cron`, `database`"),
            "{error}"
        );
    }
}
