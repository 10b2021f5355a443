//! Passwords, tokens and PEM files: read once, while the catalog is built.

use std::path::{Path, PathBuf};

use super::{Check, Place};
use crate::catalog::Login;
use crate::config::LoginConfig;
use crate::units::Secret;

impl Check<'_> {
    pub(super) fn login(&mut self, place: &Place<'_>, path: &[&str], login: &LoginConfig) -> Option<Login> {
        if login.role.is_empty() || login.role.len() > 63 {
            let mut role = path.to_vec();
            role.push("role");
            self.fault(place, &role, format!("`{}`", login.role), "a PostgreSQL role name of 1 to 63 bytes");
        }
        let given = [login.password.is_some(), login.password_file.is_some(), login.password_env.is_some()];
        if !given.contains(&true) {
            self.fault(place, path, "a login without a password", "`password_file`, `password_env` or `password`");
            return None;
        }
        let password = self.secret(
            place,
            path,
            "password",
            login.password.as_ref(),
            login.password_file.as_ref(),
            login.password_env.as_ref(),
        )?;
        Some(Login { role: login.role.clone(), password })
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
