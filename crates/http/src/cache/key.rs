//! Which requests have an answer that may be kept, and what it is kept under.

use std::sync::Arc;

use cofferdam_tenant::{Pool, PoolName, TenantId};
use http::Method;
use http::header;
use pingora_http::RequestHeader;

/// What an answer is kept under. Files of the program are the same for all tenants of a release, but what a tenant serves in
/// the place of such a file need not be, and must not reach another's browser: so everything is kept per tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) tenant: TenantId,
    /// Another pool has other files, and so has another release.
    pub(crate) pool: PoolName,
    pub(crate) release: Option<Arc<str>>,
    pub(crate) scheme: &'static str,
    pub(crate) host: String,
    /// The target as it was sent, with its query.
    pub(crate) target: Vec<u8>,
}

/// The key of a request, if its answer may be kept: `None` for everything that is not a static file or a compiled asset.
pub(crate) fn key(
    head: &RequestHeader,
    path: &str,
    scheme: &'static str,
    host: &str,
    tenant: TenantId,
    pool: &Pool,
) -> Option<Key> {
    let readable =
        matches!(head.method, Method::GET | Method::HEAD) && !head.headers.contains_key(header::AUTHORIZATION);
    if readable { key_of_target(head, path, scheme, host, tenant, pool) } else { None }
}

/// The key of a target, whatever is done with it.
pub(crate) fn key_of_target(
    head: &RequestHeader,
    path: &str,
    scheme: &'static str,
    host: &str,
    tenant: TenantId,
    pool: &Pool,
) -> Option<Key> {
    let mut segments = path.split('/').skip(1);
    let (first, second, third) = (segments.next()?, segments.next()?, segments.next()?);
    let raw = head.raw_path();
    let is_asset = (first, second) == ("web", "assets");
    // These stand for whatever is newest, or are made for one developer.
    let is_newest = || matches!(third, "any" | "%") || raw.windows(5).any(|w| w == b"debug");
    if !(second == "static" || is_asset && !is_newest()) {
        return None;
    }
    // What is not in its plain form may mean something else to the server than to us.
    let plain = raw.split(|b| *b == b'?').next() == Some(path.as_bytes());
    plain.then(|| Key {
        tenant,
        pool: pool.name.clone(),
        release: pool.release.clone(),
        scheme,
        host: host.to_owned(),
        target: raw.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};

    use super::*;

    fn key_of(method: &str, target: &str, headers: &[(&str, &str)]) -> Option<Key> {
        let mut head = RequestHeader::build(method, target.as_bytes(), None).unwrap();
        for (name, value) in headers {
            head.append_header((*name).to_owned(), *value).unwrap();
        }
        let path = crate::route::canonical(target).into_owned();
        let main = "http: { listen: ['127.0.0.1:0'] }\npools: { odoo: { servers: [{ address: 'a:1' }], slots: 1 } }\n";
        let set = SourceSet { main: Source::new("main", main), tenants: Vec::new() };
        let catalog = Catalog::build(&set, &NoSecrets, None).unwrap();
        key(&head, &path, "https", "acme.example.com", TenantId(1), catalog.pools.values().next().unwrap())
    }

    /// The table of routes: what may be kept, and what never.
    #[test]
    fn static_files_and_compiled_assets_are_kept_and_nothing_else() {
        for kept in ["/web/static/src/a.js?v=1", "/sale/static/description/icon.png", "/web/assets/1a2b3c4/web.min.js"]
        {
            assert!(key_of("GET", kept, &[]).is_some(), "{kept}");
        }
        for never in [
            "/web/assets/any/web.assets_web.min.js",
            "/web/assets/debug/web.assets_web.js",
            "/web/assets/1a2b3c4/debug/x.js",
            "/web/assets/1a2b3c4/x.js?debug=assets",
            "/web/assets/%/x.js",
            "/web/static/%2e%2e/x",
            "/web//static/x.js",
            "/web/webclient/load_menus/1a2b",
            "/web/webclient/translations/1a2b",
            "/web/content/1",
            "/web/image/1",
            "/web/static",
            "/",
        ] {
            assert_eq!(key_of("GET", never, &[]), None, "{never}");
        }
        assert_eq!(key_of("POST", "/web/static/a.js", &[]), None);
        assert_eq!(key_of("GET", "/web/static/a.js", &[("Authorization", "Bearer x")]), None);
    }
}
