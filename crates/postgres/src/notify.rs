//! Which notifications on the shared maintenance database a client may see.
//!
//! Odoo's processes listen on the database `postgres`, which all tenants of a cluster share: `imbus` carries what is to
//! be shown in browsers, `cron_trigger` says whose jobs are due. A process that serves one pool must not learn what
//! happens in the databases of another.

use std::borrow::Cow;
use std::collections::HashSet;

use cofferdam_tenant::{Catalog, NotificationPolicy};

use crate::client::Established;
use crate::plane::{PostgresPlane, Snapshot};

/// What of a notification a client sees.
pub(crate) enum Visible<'a> {
    All,
    Part(Cow<'a, str>),
    Nothing,
}

/// Whether a client may hear everything that is said in its database.
pub(crate) fn hears_all(snapshot: &Snapshot, client: &Established) -> bool {
    let mut pools = snapshot.catalog.pools.values();
    client.database() != Catalog::MAINTENANCE_DATABASE
        || pools.any(|p| p.account == client.route.account && p.notifications == NotificationPolicy::All)
}

/// What of a notification a client may see.
pub(crate) fn visible<'a>(plane: &PostgresPlane, client: &Established, channel: &str, payload: &'a str) -> Visible<'a> {
    if client.database() != Catalog::MAINTENANCE_DATABASE || !matches!(channel, "imbus" | "cron_trigger") {
        return Visible::All;
    }
    let snapshot = plane.snapshot();
    let catalog = &snapshot.catalog;
    let Some(pool) = catalog.pools.values().find(|pool| pool.account == client.route.account) else {
        return Visible::Nothing;
    };
    if pool.notifications == NotificationPolicy::All {
        return Visible::All;
    }
    let of_pool = catalog.tenants().iter().filter(|t| t.pool.as_ref().is_some_and(|p| p.account == pool.account));
    let databases: HashSet<&str> = of_pool.filter_map(|t| Some(t.database.as_ref()?.as_str())).collect();
    if channel == "cron_trigger" {
        return if databases.contains(payload) { Visible::All } else { Visible::Nothing };
    }
    own_part(payload, |database| databases.contains(database))
}

/// The part of an `imbus` payload, a JSON array of channels that each begin with their database, that belongs to
/// databases of one's own. What is not of that form belongs to nobody.
fn own_part(payload: &str, is_own: impl Fn(&str) -> bool) -> Visible<'_> {
    let Ok(channels) = serde_json::from_str::<Vec<serde_json::Value>>(payload) else { return Visible::Nothing };
    let all = channels.len();
    let own: Vec<_> = channels.into_iter().filter(|c| c.get(0).and_then(|d| d.as_str()).is_some_and(&is_own)).collect();
    match own.len() {
        0 => Visible::Nothing,
        n if n == all => Visible::All,
        _ => Visible::Part(Cow::Owned(serde_json::Value::Array(own).to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(payload: &str) -> Option<String> {
        match own_part(payload, |database| database == "acme") {
            Visible::All => Some(payload.to_owned()),
            Visible::Part(part) => Some(part.into_owned()),
            Visible::Nothing => None,
        }
    }

    #[test]
    fn only_channels_of_own_databases_are_seen() {
        let own = r#"[["acme","res.partner",3],["acme","broadcast"]]"#;
        assert_eq!(seen(own).as_deref(), Some(own), "untouched, byte for byte");
        let mixed = r#"[["acme","res.partner",3],["bolt","res.partner",4]]"#;
        assert_eq!(seen(mixed).as_deref(), Some(r#"[["acme","res.partner",3]]"#));
        for nothing in [r#"[["bolt","x"]]"#, "[]", "[1]", r#"{"acme":1}"#, "acme", "", "[[[]]]", r#"["acme"]"#] {
            assert_eq!(seen(nothing), None, "{nothing}");
        }
    }
}
