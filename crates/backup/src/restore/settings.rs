//! What a database has beside its contents: who may connect, how many, and with which settings.

use tokio_postgres::Client;

use crate::server::{literal, quoted};

/// Who may connect to a database, and how many at a time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Access {
    /// Privilege, role (none: everybody), and whether it may be passed on.
    grants: Vec<(String, Option<String>, bool)>,
    limit: i32,
}

impl Access {
    /// What a database gives to others than its owner.
    pub(super) async fn of(client: &Client, database: &str) -> Result<Self, tokio_postgres::Error> {
        let query = "SELECT a.privilege_type::text, r.rolname::text, a.is_grantable, d.datconnlimit \
                     FROM pg_catalog.pg_database d \
                     LEFT JOIN LATERAL aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a \
                     ON a.grantee <> d.datdba \
                     LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee \
                     WHERE d.datname = $1 AND (a.grantee IS NULL OR a.grantee = 0 OR r.rolname IS NOT NULL)";
        let rows = client.query(query, &[&database]).await?;
        let grants = rows.iter().filter_map(|row| {
            let privilege: Option<String> = row.get(0);
            let known = privilege.filter(|p| matches!(p.as_str(), "CONNECT" | "TEMPORARY" | "CREATE"))?;
            Some((known, row.get(1), row.get(2)))
        });
        Ok(Self { grants: grants.collect(), limit: rows.first().map_or(-1, |row| row.get(3)) })
    }

    /// What everybody may: connect, and make temporary tables.
    pub(super) fn for_everybody(&self) -> Self {
        let everybodys =
            |(privilege, role, _): &&(String, Option<String>, bool)| role.is_none() && privilege != "CREATE";
        let grants = self.grants.iter().filter(everybodys).map(|(privilege, _, _)| (privilege.clone(), None, false));
        Self { grants: grants.collect(), limit: -1 }
    }

    /// Statements that give the same to another, each with its `;`.
    pub(super) fn grant(&self, database: &str) -> String {
        let database = quoted(database);
        let mut statements = format!("ALTER DATABASE {database} CONNECTION LIMIT {}; ", self.limit);
        for (privilege, role, pass_on) in &self.grants {
            let role = role.as_deref().map_or_else(|| "PUBLIC".to_owned(), quoted);
            let pass_on = if *pass_on { " WITH GRANT OPTION" } else { "" };
            statements.push_str(&format!("GRANT {privilege} ON DATABASE {database} TO {role}{pass_on}; "));
        }
        statements
    }
}

/// Statements that give the settings of one database, and those of roles in it, to another.
pub(super) async fn of(client: &Client, from: &str, to: &str) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "SELECT r.rolname::text, unnest(s.setconfig) FROM pg_catalog.pg_db_role_setting s \
                 LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole \
                 WHERE s.setdatabase = (SELECT oid FROM pg_catalog.pg_database WHERE datname = $1)";
    let rows = client.query(query, &[&from]).await?;
    let statement = |row: &tokio_postgres::Row| {
        let (role, setting): (Option<String>, String) = (row.get(0), row.get(1));
        let (name, value) = setting.split_once('=')?;
        let whom = match role {
            Some(role) => format!("ROLE {} IN DATABASE {}", quoted(&role), quoted(to)),
            None => format!("DATABASE {}", quoted(to)),
        };
        Some(format!("ALTER {whom} SET {} TO {}", parameter(name), written(name, value)))
    };
    Ok(rows.iter().filter_map(statement).collect())
}

/// The name of a parameter, which has a point in it when it is an extension's.
fn parameter(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// A value as `SET` takes it. Some parameters are lists, whose parts are quoted each.
fn written(name: &str, value: &str) -> String {
    let list = ["search_path", "temp_tablespaces", "local_preload_libraries", "session_preload_libraries"];
    if !list.contains(&name) || value.is_empty() {
        return literal(value);
    }
    let (mut parts, mut part, mut inside) = (Vec::new(), String::new(), false);
    let mut characters = value.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' if inside && characters.peek() == Some(&'"') => {
                part.push('"');
                characters.next();
            }
            '"' => inside = !inside,
            ',' if !inside => parts.push(std::mem::take(&mut part)),
            ' ' if !inside => {}
            other => part.push(other),
        }
    }
    parts.push(part);
    parts.iter().map(|part| literal(part)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_quoted_part_by_part_and_other_values_whole() {
        assert_eq!(written("search_path", r#""$user", public, "a, b""#), "'$user', 'public', 'a, b'");
        assert_eq!(written("search_path", r#""say ""hi""""#), r#"'say "hi"'"#);
        assert_eq!(written("statement_timeout", "1min, or so"), "'1min, or so'");
        assert_eq!(parameter("odoo.thing"), r#""odoo"."thing""#);
    }

    #[test]
    fn what_everybody_may_is_given_to_everybody_again() {
        let access = Access {
            grants: vec![("CONNECT".into(), None, false), ("CREATE".into(), Some("a\"b".into()), true)],
            limit: 7,
        };
        assert_eq!(
            access.grant("acme"),
            "ALTER DATABASE \"acme\" CONNECTION LIMIT 7; GRANT CONNECT ON DATABASE \"acme\" TO PUBLIC; \
             GRANT CREATE ON DATABASE \"acme\" TO \"a\"\"b\" WITH GRANT OPTION; "
        );
    }
}
