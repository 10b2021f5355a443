//! Names that cannot be wrong once they exist: each is checked where it is parsed.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// A tenant's small number within one process: stable across reloads, not across restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub u32);

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $title:literal, $expected:expr, $pattern:expr, $parse:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// What a valid value looks like, for messages.
            pub const EXPECTED: &'static str = $expected;

            /// Checks and takes a value; the error is what was expected.
            pub fn parse(text: &str) -> Result<Self, &'static str> {
                let parse: fn(&str) -> Option<Cow<'_, str>> = $parse;
                parse(text).map(|s| Self(Arc::from(s.as_ref()))).ok_or(Self::EXPECTED)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = Cow::<'_, str>::deserialize(d)?;
                Self::parse(&text).map_err(|e| de::Error::invalid_value(de::Unexpected::Str(&text), &e))
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                $title.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "description": $expected, "pattern": $pattern })
            }
        }
    };
}

const LABEL: &str = "a name of 1 to 63 lower-case letters, digits and inner hyphens, such as `odoo-shared`";
const LABEL_PATTERN: &str = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$";

name_type!(
    /// A tenant's name, such as `acme-civil`: a DNS label, so that it can name Kubernetes objects and metrics alike.
    Slug, "Slug", "a slug of 1 to 63 lower-case letters, digits and inner hyphens, such as `acme-civil`",
    LABEL_PATTERN, parse_label
);
name_type!(
    /// The name of a pool: a group of Odoo servers that share workers.
    PoolName, "PoolName", LABEL, LABEL_PATTERN, parse_label
);
name_type!(
    /// The name of a cluster: one PostgreSQL server.
    ClusterName, "ClusterName", LABEL, LABEL_PATTERN, parse_label
);
name_type!(
    /// The name of a plan: a named set of quotas.
    PlanName, "PlanName", LABEL, LABEL_PATTERN, parse_label
);
name_type!(
    /// A PostgreSQL database name: 1 to 63 bytes, no control characters.
    DatabaseName, "DatabaseName", "a PostgreSQL database name of 1 to 63 bytes without control characters",
    "^[^\\u0000-\\u001f\\u007f]{1,63}$",
    |s| (!s.is_empty() && s.len() <= 63 && !s.chars().any(char::is_control)).then(|| s.into())
);
name_type!(
    /// A host name as clients send it: lower case, no port, no trailing dot, international names in their `xn--` form. Or,
    /// with an asterisk for its first label, all names that have another there.
    HostName, "HostName",
    "a host name without scheme, port or path, such as `acme.example.com`, or `*.acme.example.com`",
    "^[^\\u0000-\\u0020/?#@]{1,254}$", parse_host
);

impl HostName {
    /// What follows the asterisk and its dot, when the name stands for all names of one label more.
    pub fn wildcard_of(&self) -> Option<&str> {
        self.0.strip_prefix("*.")
    }
}

/// A host as an operator writes it: in any case, international or not, with an asterisk for its first label or without.
fn parse_host(text: &str) -> Option<Cow<'_, str>> {
    if let Some(parent) = text.strip_prefix("*.") {
        let parent = parse_host(parent)?;
        // `*.com` is nobody's, and an address has no names below it.
        let named = parent.contains('.') && parent.parse::<IpAddr>().is_err() && !parent.starts_with('*');
        return named.then(|| Cow::Owned(format!("*.{parent}")));
    }
    if text.is_ascii() {
        return normalize_host(text);
    }
    let ascii = idna::domain_to_ascii_strict(text).ok()?;
    normalize_host(&ascii).map(|host| Cow::Owned(host.into_owned()))
}

fn parse_label(s: &str) -> Option<Cow<'_, str>> {
    let bytes = s.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (!bytes.is_empty()
        && bytes.len() <= 63
        && bytes.iter().all(inner)
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-')
        .then_some(Cow::Borrowed(s))
}

/// A host in the one form that look-ups use: lower case, without a trailing dot; `None` when it is not a host.
///
/// A port must have been cut off before. Borrows when nothing needs changing, which is the usual case on a request path.
pub fn normalize_host(host: &str) -> Option<Cow<'_, str>> {
    if let Some(inner) = host.strip_prefix('[') {
        let address: IpAddr = inner.strip_suffix(']')?.parse().ok()?;
        return address.is_ipv6().then(|| Cow::Owned(format!("[{address}]")));
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.is_empty() || host.len() > 253 {
        return None;
    }
    let mut upper = false;
    for label in host.split('.') {
        let bytes = label.as_bytes();
        if bytes.is_empty() || bytes.len() > 63 || bytes[0] == b'-' || bytes[bytes.len() - 1] == b'-' {
            return None;
        }
        for b in bytes {
            match b {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => {}
                b'A'..=b'Z' => upper = true,
                _ => return None,
            }
        }
    }
    Some(if upper { Cow::Owned(host.to_ascii_lowercase()) } else { Cow::Borrowed(host) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_without_case_and_trailing_dot() {
        assert_eq!(normalize_host("ACME.Example.com.").unwrap(), "acme.example.com");
        assert_eq!(normalize_host("[::1]").unwrap(), "[::1]");
        for bad in ["", ".", "a..b", "-a.b", "a b", "acme.example.com:80", "[::1", "a/b", "é.example"] {
            assert_eq!(normalize_host(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_host_may_be_written_in_its_own_script_or_with_an_asterisk() {
        let parse = |text| HostName::parse(text).map(|host| host.as_str().to_owned());
        assert_eq!(parse("Bücher.example").unwrap(), "xn--bcher-kva.example");
        assert_eq!(parse("*.Acme.example.com.").unwrap(), "*.acme.example.com");
        assert_eq!(HostName::parse("*.acme.example").unwrap().wildcard_of(), Some("acme.example"));
        assert_eq!(HostName::parse("acme.example").unwrap().wildcard_of(), None);
        for bad in
            ["*", "*.", "*.com", "*.*.example.com", "a.*.example.com", "*a.example.com", "*.10.0.0.1", "b\u{fc}\u{0}.x"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn slugs_are_dns_labels() {
        assert!(Slug::parse("acme-civil").is_ok());
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(64)] {
            assert!(Slug::parse(bad).is_err(), "{bad}");
        }
    }
}
