//! What can be said to the console.

/// A command, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Show(Table),
    Help,
    /// Of one database, or of all.
    Pause(Option<String>),
    Resume(Option<String>),
    Suspend,
    Reconnect(Option<String>),
    WaitClose(Option<String>),
    Kill(Option<String>),
    KillClient(u32),
    Disable(String),
    Enable(String),
    Reload,
    Shutdown,
    /// `SET application_name = …` and the like of drivers: accepted, without effect.
    Nothing(&'static str),
}

/// What `SHOW` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    Clients,
    Servers,
    Sockets,
    Pools,
    Peers,
    PeerPools,
    Databases,
    Users,
    Lists,
    Stats,
    StatsTotals,
    StatsAverages,
    Totals,
    Config,
    Version,
    State,
    Mem,
    Fds,
    DnsHosts,
    DnsZones,
    Tenants,
    Gate,
    Ledger,
    /// Settings that drivers ask for, as if it were a server.
    Setting(&'static str, &'static str),
}

const TABLES: [(&str, Table); 23] = [
    ("clients", Table::Clients),
    ("servers", Table::Servers),
    ("sockets", Table::Sockets),
    ("active_sockets", Table::Sockets),
    ("pools", Table::Pools),
    ("peers", Table::Peers),
    ("peer_pools", Table::PeerPools),
    ("databases", Table::Databases),
    ("users", Table::Users),
    ("lists", Table::Lists),
    ("stats", Table::Stats),
    ("stats_totals", Table::StatsTotals),
    ("stats_averages", Table::StatsAverages),
    ("totals", Table::Totals),
    ("config", Table::Config),
    ("version", Table::Version),
    ("state", Table::State),
    ("mem", Table::Mem),
    ("fds", Table::Fds),
    ("dns_hosts", Table::DnsHosts),
    ("tenants", Table::Tenants),
    ("gate", Table::Gate),
    ("ledger", Table::Ledger),
];

/// Settings that drivers ask for.
const SETTINGS: [(&str, &str); 7] = [
    ("client_encoding", "UTF8"),
    ("datestyle", "ISO"),
    ("standard_conforming_strings", "on"),
    ("timezone", "GMT"),
    ("default_transaction_isolation", "read committed"),
    ("transaction_isolation", "read committed"),
    ("search_path", ""),
];

impl Command {
    /// Whether viewers may give it.
    pub(crate) fn only_shows(&self) -> bool {
        match self {
            // It tells descriptors of other clients' sockets.
            Self::Show(table) => *table != Table::Fds,
            Self::Help | Self::Nothing(_) => true,
            _ => false,
        }
    }
}

/// Reads one command; the error says what was expected.
pub(crate) fn parse(text: &str) -> Result<Command, String> {
    let text = text.trim().trim_end_matches(';').trim();
    let (first, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let rest = rest.trim();
    let first = first.to_ascii_lowercase();
    let of_all_or_one = |rest: &str| if rest.is_empty() { Ok(None) } else { name(rest).map(Some) };
    match first.as_str() {
        "show" => show(rest),
        "pause" => Ok(Command::Pause(of_all_or_one(rest)?)),
        "resume" => Ok(Command::Resume(of_all_or_one(rest)?)),
        "reconnect" => Ok(Command::Reconnect(of_all_or_one(rest)?)),
        "wait_close" => Ok(Command::WaitClose(of_all_or_one(rest)?)),
        "kill" => Ok(Command::Kill(of_all_or_one(rest)?)),
        "kill_client" => {
            rest.parse().map(Command::KillClient).map_err(|_| format!("found `{rest}`, expected an id of SHOW CLIENTS"))
        }
        "disable" => Ok(Command::Disable(name(rest)?)),
        "enable" => Ok(Command::Enable(name(rest)?)),
        "suspend" if rest.is_empty() => Ok(Command::Suspend),
        "reload" if rest.is_empty() => Ok(Command::Reload),
        "shutdown" => match rest.to_ascii_lowercase().as_str() {
            "" | "wait_for_clients" | "wait_for_servers" => Ok(Command::Shutdown),
            _ => Err(format!("found `{rest}` after SHUTDOWN, expected WAIT_FOR_CLIENTS or nothing")),
        },
        "help" => Ok(Command::Help),
        "begin" => Ok(Command::Nothing("BEGIN")),
        "commit" => Ok(Command::Nothing("COMMIT")),
        "rollback" => Ok(Command::Nothing("ROLLBACK")),
        "set" if is_harmless(rest) => Ok(Command::Nothing("SET")),
        "set" => Err("settings are changed in the configuration file; RELOAD reads it again".to_owned()),
        "" => Ok(Command::Nothing("")),
        other => Err(format!("unknown command `{other}`; SHOW HELP lists those there are")),
    }
}

/// What drivers set on every connection.
fn is_harmless(rest: &str) -> bool {
    let word =
        rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').find(|w| !w.eq_ignore_ascii_case("session"));
    let known = [
        "application_name",
        "extra_float_digits",
        "datestyle",
        "timezone",
        "time",
        "client_encoding",
        "statement_timeout",
    ];
    word.is_some_and(|word| known.iter().any(|k| word.eq_ignore_ascii_case(k)))
}

fn show(rest: &str) -> Result<Command, String> {
    let words: Vec<String> = rest.split_whitespace().map(str::to_ascii_lowercase).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let wanted = match words[..] {
        [] | ["help"] => return Ok(Command::Help),
        ["transaction", "isolation", "level"] => "transaction_isolation",
        ["time", "zone"] => "timezone",
        [one] => one,
        _ => return Err(format!("found `{rest}` after SHOW, expected one word")),
    };
    if wanted == "dns_zones" {
        return Ok(Command::Show(Table::DnsZones));
    }
    if let Some((_, table)) = TABLES.iter().find(|(name, _)| *name == wanted) {
        return Ok(Command::Show(*table));
    }
    if let Some((name, value)) = SETTINGS.iter().find(|(name, _)| *name == wanted) {
        return Ok(Command::Show(Table::Setting(name, value)));
    }
    let names: Vec<String> = TABLES.iter().map(|(name, _)| name.to_ascii_uppercase()).collect();
    Err(format!("cannot show `{wanted}`, expected one of {}", names.join(", ")))
}

/// A name of a database, perhaps quoted.
fn name(text: &str) -> Result<String, String> {
    let text = text.trim();
    let plain = match text.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').map(|inner| inner.replace("\"\"", "\"")),
        None => (!text.contains(char::is_whitespace)).then(|| text.to_owned()),
    };
    plain.filter(|name| !name.is_empty()).ok_or_else(|| format!("found `{text}`, expected the name of a database"))
}

/// The text of `SHOW HELP`.
pub(crate) const HELP: &str = "\
SHOW CLIENTS|SERVERS|POOLS|DATABASES|USERS|LISTS|STATS|STATS_TOTALS|STATS_AVERAGES|TOTALS|CONFIG|STATE|VERSION|MEM|SOCKETS
SHOW TENANTS|GATE|LEDGER
PAUSE [database]       no transaction begins; returns when none runs
RESUME [database]      transactions begin again
SUSPEND                as PAUSE for everything, connections stay open
RECONNECT [database]   server connections are opened anew, each when its transaction ends
WAIT_CLOSE [database]  returns when those that RECONNECT left are closed
KILL [database]        as PAUSE at once: clients and server connections are cut off
KILL_CLIENT id         one client, by its id in SHOW CLIENTS
DISABLE|ENABLE database  turn new clients away, or not any more
RELOAD                 read the configuration again
SHUTDOWN               finish transactions and end";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_read_in_any_case_with_and_without_a_database() {
        for (text, command) in [
            ("SHOW POOLS;", Command::Show(Table::Pools)),
            ("show  stats_totals", Command::Show(Table::StatsTotals)),
            ("pause", Command::Pause(None)),
            ("PAUSE acme ;", Command::Pause(Some("acme".into()))),
            ("RESUME \"My \"\"db\"", Command::Resume(Some("My \"db".into()))),
            ("KILL_CLIENT 17", Command::KillClient(17)),
            ("SET application_name = 'x'", Command::Nothing("SET")),
            (
                "SHOW TRANSACTION ISOLATION LEVEL",
                Command::Show(Table::Setting("transaction_isolation", "read committed")),
            ),
            ("SHUTDOWN WAIT_FOR_CLIENTS", Command::Shutdown),
        ] {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
        for wrong in
            ["SHOW EVERYTHING", "DISABLE", "KILL_CLIENT x", "DROP DATABASE x", "SET pool_size = 3", "PAUSE a b"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    /// Rule 21: each command is authorised.
    #[test]
    fn viewers_only_look() {
        for text in [
            "PAUSE",
            "RESUME",
            "SUSPEND",
            "KILL",
            "KILL_CLIENT 1",
            "RECONNECT",
            "RELOAD",
            "SHUTDOWN",
            "DISABLE x",
            "ENABLE x",
            "WAIT_CLOSE",
            "SHOW FDS",
        ] {
            assert!(!parse(text).unwrap().only_shows(), "{text}");
        }
        for (name, table) in TABLES {
            assert_eq!(parse(&format!("SHOW {name}")).unwrap().only_shows(), table != Table::Fds, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC{0,80}") {
            let _ = parse(&text);
        }
    }
}
