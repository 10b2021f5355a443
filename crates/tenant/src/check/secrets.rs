//! Passwords, tokens and PEM files: read once, while the catalog is built.

use std::path::{Path, PathBuf};

use super::{Check, Place};
use crate::catalog::{Login, Password};
use crate::config::LoginConfig;
use crate::units::Secret;

impl Check<'_> {
    /// A login with its password, from wherever it comes. `asks`: whether the cluster can be asked for it.
    pub(super) fn login(&mut self, place: &Place<'_>, path: &[&str], login: &LoginConfig, asks: bool) -> Option<Login> {
        if login.role.is_empty() || login.role.len() > 63 {
            let mut role = path.to_vec();
            role.push("role");
            self.fault(place, &role, format!("`{}`", login.role), "a PostgreSQL role name of 1 to 63 bytes");
        }
        let given = [login.password.is_some(), login.password_file.is_some(), login.password_env.is_some()];
        if !given.contains(&true) {
            let known = self.user_list.get(&login.role).cloned();
            let Some(password) = known.or_else(|| asks.then_some(Password::Asked)) else {
                let expected = "`password_file`, `password_env` or `password`, \
                    or the role in `postgres.user_list`, or `auth_query` in its cluster";
                self.fault(place, path, "a login without a password", expected);
                return None;
            };
            return Some(Login { role: login.role.clone(), password });
        }
        let password = self.secret(
            place,
            path,
            "password",
            login.password.as_ref(),
            login.password_file.as_ref(),
            login.password_env.as_ref(),
        )?;
        Some(Login { role: login.role.clone(), password: Password::Plain(password) })
    }

    /// The file with passwords by role: lines of `"role" "password"`, as PgBouncer has it.
    pub(super) fn read_user_list(&mut self, place: &Place<'_>, file: &Path) {
        let text = match self.secrets.file(file) {
            Ok(text) => text,
            Err(error) => {
                let found = format!("`{}`, which cannot be read ({error})", file.display());
                return self.fault(place, &["postgres", "user_list"], found, "a readable file");
            }
        };
        for (n, line) in text.lines().enumerate() {
            // What is wrong is never shown: it may be a password.
            let mut wrong = |found: &str, expected: &str| {
                let found = format!("{}:{}: {found}", file.display(), n + 1);
                self.fault(place, &["postgres", "user_list"], found, expected);
            };
            if line.trim().is_empty() || line.trim_start().starts_with([';', '#']) {
                continue;
            }
            let Some((role, password)) = quoted(line.trim()).and_then(|(role, rest)| {
                let (password, _) = quoted(rest.trim_start())?;
                Some((role, password))
            }) else {
                wrong("a line that is none", "`\"role\" \"password\"`, with doubled quotes inside");
                continue;
            };
            if let Some(verifier) = password.strip_prefix("SCRAM-SHA-256$") {
                let parts = verifier.split_once('$').and_then(|(a, b)| Some((a.split_once(':')?, b.split_once(':')?)));
                if parts.is_none_or(|((iterations, _), _)| iterations.parse::<u32>().is_err()) {
                    wrong("a SCRAM verifier that is none", "`SCRAM-SHA-256$<iterations>:<salt>$<key>:<key>`");
                    continue;
                }
            }
            let is_md5 = password.len() == 35
                && password.strip_prefix("md5").is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
            let password = if is_md5 {
                Password::Stored(Secret::new(password.to_ascii_lowercase()))
            } else if password.starts_with("SCRAM-SHA-256$") {
                Password::Stored(Secret::new(password))
            } else if password.is_empty() {
                wrong("an empty password", "a password, or what PostgreSQL stores of it");
                continue;
            } else {
                Password::Plain(Secret::new(password))
            };
            if self.user_list.insert(role.clone(), password).is_some() {
                let found = format!("{}:{}: role `{role}` again", file.display(), n + 1);
                self.fault(place, &["postgres", "user_list"], found, "each role once");
            }
        }
    }

    /// A login that the gateway itself uses: nobody will ever show what it takes, so the password has to be there.
    pub(super) fn own_login(&mut self, place: &Place<'_>, path: &[&str], login: &LoginConfig) -> Option<Login> {
        let login = self.login(place, path, login, false)?;
        if matches!(&login.password, Password::Stored(stored) if stored.expose().starts_with("SCRAM")) {
            self.fault(place, path, "only a SCRAM verifier in `postgres.user_list`", "the password itself");
            return None;
        }
        Some(login)
    }

    /// A secret that there must be. `what` is what would be without it.
    pub(super) fn needed_secret(
        &mut self,
        place: &Place<'_>,
        path: &[&str],
        (what, name): (&str, &str),
        given: (Option<&Secret>, Option<&PathBuf>, Option<&String>),
    ) -> Option<Secret> {
        if given == (None, None, None) {
            let expected = format!("`{name}_file`, `{name}_env` or `{name}`");
            self.fault(place, path, format!("{what} without `{name}`"), expected);
        }
        self.secret(place, path, name, given.0, given.1, given.2)
    }

    pub(super) fn secret(
        &mut self,
        place: &Place<'_>,
        path: &[&str],
        name: &str,
        plain: Option<&Secret>,
        file: Option<&PathBuf>,
        env: Option<&String>,
    ) -> Option<Secret> {
        let count = usize::from(plain.is_some()) + usize::from(file.is_some()) + usize::from(env.is_some());
        if count > 1 {
            self.fault(place, path, format!("{count} of `{name}`, `{name}_file` and `{name}_env`"), "only one of them");
            return None;
        }
        if let Some(file) = file {
            let field = format!("{name}_file");
            let mut at = path.to_vec();
            at.push(&field);
            return match self.secrets.file(file) {
                Ok(text) if text.is_empty() => {
                    self.fault(place, &at, format!("`{}`, which is empty", file.display()), "a file with the secret");
                    None
                }
                Ok(text) => Some(Secret::new(text)),
                Err(error) => {
                    let found = format!("`{}`, which cannot be read ({error})", file.display());
                    self.fault(place, &at, found, "a readable file with the secret");
                    None
                }
            };
        }
        if let Some(env) = env {
            let field = format!("{name}_env");
            let mut at = path.to_vec();
            at.push(&field);
            let value = self.secrets.env(env).filter(|v| !v.is_empty());
            if value.is_none() {
                self.fault(place, &at, format!("`{env}`, which is not set"), "the name of a set environment variable");
            }
            return value.map(Secret::new);
        }
        if plain.is_some_and(|p| p.expose().is_empty()) {
            self.fault(place, path, format!("an empty `{name}`"), "a secret of at least one character");
            return None;
        }
        plain.cloned()
    }

    pub(super) fn pem(&mut self, place: &Place<'_>, path: &[&str], file: &Path) -> Option<String> {
        match self.secrets.file(file) {
            Ok(text) if text.contains("-----BEGIN ") => Some(text),
            Ok(_) => {
                self.fault(
                    place,
                    path,
                    format!("`{}`, which is not PEM", file.display()),
                    "a PEM file (`-----BEGIN …`)",
                );
                None
            }
            Err(error) => {
                let found = format!("`{}`, which cannot be read ({error})", file.display());
                self.fault(place, path, found, "a readable PEM file");
                None
            }
        }
    }
}

/// A string in double quotes, with doubled quotes inside, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix('"')?;
    let mut out = String::new();
    loop {
        let (part, after) = rest.split_once('"')?;
        out.push_str(part);
        match after.strip_prefix('"') {
            Some(more) => {
                out.push('"');
                rest = more;
            }
            None => return Some((out, after)),
        }
    }
}
