//! What an operator changes of a request's way: its headers, and which of two pools it goes to.

use cofferdam_tenant::{Canary, HeaderChanges};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use pingora_error::Result;
use pingora_http::{RequestHeader, ResponseHeader};

use crate::session::cookies;

/// Where a browser has gone first, and goes again.
const COOKIE: &str = "cofferdam_canary";

/// Changes of headers, parsed.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
}

impl Changes {
    /// What cannot be a header was refused with the configuration.
    pub(crate) fn new(config: &HeaderChanges) -> Self {
        let name = |text: &String| HeaderName::try_from(text.as_str()).ok();
        let set = config.set.iter().filter_map(|(n, v)| name(n).zip(HeaderValue::try_from(v.as_str()).ok()));
        Self { remove: config.remove.iter().filter_map(name).collect(), set: set.collect() }
    }

    pub(crate) fn of_request(&self, head: &mut RequestHeader) -> Result<()> {
        for name in &self.remove {
            head.remove_header(name);
        }
        for (name, value) in &self.set {
            head.insert_header(name.clone(), value.clone())?;
        }
        Ok(())
    }

    pub(crate) fn of_response(&self, head: &mut ResponseHeader) -> Result<()> {
        for name in &self.remove {
            head.remove_header(name);
        }
        for (name, value) in &self.set {
            head.insert_header(name.clone(), value.clone())?;
        }
        Ok(())
    }
}

/// Which pool a request goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Whether it is the canary's.
    pub(crate) canary: bool,
    /// Whether the browser has to be told, so that it stays there.
    pub(crate) is_new: bool,
}

/// Chooses by header, by what was chosen for this browser before, or by lot. `lot` is any number, as evenly spread as may be.
pub(crate) fn choose(canary: &Canary, headers: &HeaderMap, lot: u64) -> Choice {
    if canary.header.as_ref().is_some_and(|name| headers.contains_key(name)) {
        return Choice { canary: true, is_new: false };
    }
    let before = cookies(headers).find_map(|(name, value)| (name == COOKIE.as_bytes()).then_some(value));
    match before {
        // Whoever was chosen goes back when there is no canary any more.
        Some(b"1") if canary.weight > 0 => Choice { canary: true, is_new: false },
        Some(b"0") if canary.weight < 100 => Choice { canary: false, is_new: false },
        _ => Choice { canary: lot % 100 < u64::from(canary.weight), is_new: canary.weight > 0 },
    }
}

/// The cookie that keeps a browser where it is.
pub(crate) fn cookie(choice: Choice) -> Option<String> {
    choice
        .is_new
        .then(|| format!("{COOKIE}={}; Path=/; Max-Age=86400; HttpOnly; SameSite=Lax", u8::from(choice.canary)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};

    use super::*;

    fn canary(weight: u32) -> Canary {
        let main = "http: { listen: ['127.0.0.1:0'] }\npools: { next: { servers: [{ address: 'a:1' }], slots: 1 } }\n";
        let set = SourceSet { main: Source::new("main", main), tenants: Vec::new() };
        let catalog = Catalog::build(&set, &NoSecrets, None).unwrap();
        let pool = Arc::clone(catalog.pools.values().next().unwrap());
        Canary { pool, weight, header: Some("x-canary".into()) }
    }

    fn ask(weight: u32, headers: &[(&str, &str)], lot: u64) -> (bool, bool) {
        let pairs = headers.iter().map(|(k, v)| (k.parse::<HeaderName>().unwrap(), v.parse().unwrap()));
        let choice = choose(&canary(weight), &pairs.collect(), lot);
        (choice.canary, choice.is_new)
    }

    #[test]
    fn a_browser_stays_where_it_went_first() {
        let chosen = (0..1_000).filter(|lot| ask(10, &[], *lot).0).count();
        assert_eq!(chosen, 100);
        assert_eq!(ask(10, &[], 7), (true, true));
        assert_eq!(ask(10, &[("cookie", "a=b; cofferdam_canary=1")], 70), (true, false));
        assert_eq!(ask(10, &[("cookie", "cofferdam_canary=0")], 7), (false, false));
        assert_eq!(ask(10, &[("cookie", "cofferdam_canary=x")], 7), (true, true));
        assert_eq!(ask(0, &[("cookie", "cofferdam_canary=1")], 7), (false, false));
        assert_eq!(ask(100, &[("cookie", "cofferdam_canary=0")], 7), (true, true));
        assert_eq!(ask(0, &[("x-canary", "")], 99), (true, false));
    }
}
