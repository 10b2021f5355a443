//! Quantities with their unit in the type: durations, sizes, addresses, secrets.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A length of time written with its unit: `250ms`, `30s`, `5m`, `2h`, `1d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(pub Duration);

/// A number of bytes written with its unit: `512B`, `64KiB`, `128MiB`, `2GiB` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A `host:port` to connect to. The host may be a name; it is resolved when the gateway connects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Addresses of one network: `10.0.0.0/8`, `2001:db8::/32`, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(IpNet);

/// A password or token. Never displayed and never serialized.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

const DURATION: &str = "a duration such as `250ms`, `30s`, `5m`, `2h` or `1d`";
const SIZE: &str = "a size such as `512B`, `64KiB`, `128MiB` or `2GiB`";
const NETWORK: &str = "a network such as `10.0.0.0/8` or `2001:db8::/32`, or a single address";
const ENDPOINT: &str = "a host and port such as `127.0.0.1:8069` or `db.internal:5432`";

impl HumanDuration {
    /// Parses the written form. Whole numbers with one unit; at most 100 years.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        let total = number.checked_mul(milliseconds)?;
        (total <= 36_525 * 86_400_000).then(|| Self(Duration::from_millis(total)))
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        match ms {
            0 => f.write_str("0s"),
            _ if ms.is_multiple_of(86_400_000) => write!(f, "{}d", ms / 86_400_000),
            _ if ms.is_multiple_of(3_600_000) => write!(f, "{}h", ms / 3_600_000),
            _ if ms.is_multiple_of(60_000) => write!(f, "{}m", ms / 60_000),
            _ if ms.is_multiple_of(1_000) => write!(f, "{}s", ms / 1_000),
            _ => write!(f, "{ms}ms"),
        }
    }
}

impl ByteSize {
    /// Parses the written form. Whole numbers with one unit.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let shift = match unit {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Endpoint {
    /// Parses `host:port` or `[v6]:port`.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return (address.port() != 0).then(|| Self { host: address.ip().to_string(), port: address.port() });
        }
        let (host, port) = text.rsplit_once(':')?;
        let port: u16 = port.parse().ok().filter(|p| *p != 0)?;
        let host = crate::ids::normalize_host(host)?;
        Some(Self { host: host.into_owned(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Network {
    /// What counts as one client: an address, and of IPv6 all of the network that has it, because whoever has one of its addresses has
    /// them all.
    pub fn of_one_client(address: IpAddr) -> IpAddr {
        match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
            v4 @ IpAddr::V4(_) => v4,
        }
    }

    /// Parses `address/length`, or an address alone. Bits beyond the length must be zero: `10.1.0.0/8` is a mistake.
    pub fn parse(text: &str) -> Option<Self> {
        let net = match text.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => text.parse().ok()?,
        };
        (net.network() == net.addr()).then_some(Self(net))
    }

    /// Whether an address belongs to it. An IPv4 address inside IPv6 counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// Whether an address belongs to one of several.
    pub fn any(networks: &[Self], address: IpAddr) -> bool {
        networks.iter().any(|network| network.contains(address))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself. Callers must not log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number = text[..digits].parse().ok()?;
    Some((number, text[digits..].trim_start_matches(' ')))
}

macro_rules! written_as_text {
    ($name:ident, $expected:expr, $pattern:expr) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = Cow::<'_, str>::deserialize(d)?;
                Self::parse(&text)
                    .ok_or_else(|| de::Error::invalid_value(de::Unexpected::Str(&text), &$expected))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "description": $expected, "pattern": $pattern })
            }
        }
    };
}

written_as_text!(HumanDuration, DURATION, "^[0-9]+ ?(ms|s|m|min|h|d)$");
written_as_text!(ByteSize, SIZE, "^[0-9]+ ?(B|KiB|MiB|GiB|TiB)$");
written_as_text!(Network, NETWORK, "^[0-9a-fA-F:.]+(/[0-9]{1,3})?$");
written_as_text!(Endpoint, ENDPOINT, "^.+:[0-9]{1,5}$");

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Self)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("…")
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "a secret in plain text; prefer the _file or _env form" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_written_duration_reads_back(ms in 0u64..3_000_000_000) {
            let d = HumanDuration(Duration::from_millis(ms));
            prop_assert_eq!(HumanDuration::parse(&d.to_string()), Some(d));
        }

        #[test]
        fn a_written_size_reads_back(bytes in any::<u64>()) {
            let size = ByteSize(bytes);
            prop_assert_eq!(ByteSize::parse(&size.to_string()), Some(size));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = (HumanDuration::parse(&text), ByteSize::parse(&text), Endpoint::parse(&text));
        }
    }

    #[test]
    fn a_number_without_unit_is_not_a_duration() {
        for bad in ["30", "s", "", "1.5s", "-1s", "30 parsecs", "999999999999d"] {
            assert_eq!(HumanDuration::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_network_holds_its_own_addresses_and_no_stray_bits() {
        let ten = Network::parse("10.0.0.0/8").unwrap();
        assert!(ten.contains("10.255.0.1".parse().unwrap()) && ten.contains("::ffff:10.0.0.1".parse().unwrap()));
        assert!(!ten.contains("11.0.0.1".parse().unwrap()) && !ten.contains("::1".parse().unwrap()));
        assert!(Network::parse("::1").unwrap().contains("::1".parse().unwrap()));
        for bad in ["10.1.0.0/8", "10.0.0.0/33", "ten", "", "10.0.0.0/"] {
            assert_eq!(Network::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn endpoints_take_names_and_both_address_families() {
        for good in ["127.0.0.1:8069", "[::1]:5432", "db.internal:5432"] {
            assert_eq!(Endpoint::parse(good).unwrap().to_string(), good);
        }
        for bad in ["db", "db:0", "db:70000", ":80", "http://db:80"] {
            assert_eq!(Endpoint::parse(bad), None, "{bad}");
        }
    }
}
