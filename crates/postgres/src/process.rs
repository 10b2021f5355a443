//! Which clients are one Odoo process, and what that tells about their work.
//!
//! Odoo names its connections `odoo-<pid>`. A worker serves one request at a time, but opens a second transaction
//! inside the first (a sequence, a log entry, the next cron job), and the first does not go on before the second is
//! done. When every slot is held by a first transaction and every second one waits for a slot, nobody ever goes on. So
//! a transaction of a process that already holds a slot for the same tenant is *nested* and does not queue. And a
//! process that listens on `cron_trigger` is a cron worker: what it does is background work.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cofferdam_tenant::{Class, TenantId};

/// The processes that have clients here.
#[derive(Debug, Default)]
pub(crate) struct Processes(Mutex<HashMap<Name, Weak<Process>>>);

type Name = (IpAddr, String);

/// One process: as many of its clients as are connected.
#[derive(Debug)]
pub(crate) struct Process {
    name: Name,
    registry: Weak<Processes>,
    is_cron: AtomicBool,
    /// Slots that its transactions hold, by account. A process works for one or two.
    holding: Mutex<Vec<(TenantId, u32)>>,
}

/// A slot held by a process, while it is held.
#[derive(Debug)]
pub(crate) struct Holding {
    process: Arc<Process>,
    account: TenantId,
}

impl Processes {
    /// The process that a client belongs to; `None` when its name does not tell.
    pub(crate) fn of_client(self: &Arc<Self>, peer: IpAddr, application_name: &str) -> Option<Arc<Process>> {
        let pid = application_name.strip_prefix("odoo-")?;
        if pid.is_empty() || pid.len() > 10 || !pid.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let name = (peer, application_name.to_owned());
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(process) = known.get(&name).and_then(Weak::upgrade) {
            return Some(process);
        }
        let process = Arc::new(Process {
            name: name.clone(),
            registry: Arc::downgrade(self),
            is_cron: AtomicBool::new(false),
            holding: Mutex::default(),
        });
        known.insert(name, Arc::downgrade(&process));
        Some(process)
    }
}

impl Process {
    /// Takes note that it waits for cron triggers.
    pub(crate) fn runs_cron(&self) {
        self.is_cron.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_cron(&self) -> bool {
        self.is_cron.load(Ordering::Relaxed)
    }

    /// Whether it holds a slot of this account already.
    pub(crate) fn holds(&self, account: TenantId) -> bool {
        self.held().iter().any(|(a, n)| *a == account && *n > 0)
    }

    /// Counts a slot that it holds from now on.
    pub(crate) fn hold(self: &Arc<Self>, account: TenantId) -> Holding {
        let mut held = self.held();
        match held.iter_mut().find(|(a, _)| *a == account) {
            Some((_, n)) => *n += 1,
            None => held.push((account, 1)),
        }
        drop(held);
        Holding { process: Arc::clone(self), account }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Vec<(TenantId, u32)>> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut held = self.process.held();
        if let Some(position) = held.iter().position(|(a, _)| *a == self.account) {
            held[position].1 -= 1;
            if held[position].1 == 0 {
                held.swap_remove(position);
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(registry) = self.registry.upgrade() else { return };
        let mut known = registry.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Another client may have made a new entry meanwhile.
        if known.get(&self.name).is_some_and(|p| p.strong_count() == 0) {
            known.remove(&self.name);
        }
    }
}

/// What kind of work a client's transactions are, as far as its application name tells.
pub(crate) fn class_of(application_name: &str) -> Class {
    const BACKGROUND: [&str; 7] =
        ["cofferdam-backup", "pg_dump", "pg_restore", "pg_basebackup", "pgbackrest", "barman", "odoo-cron"];
    const ADMIN: [&str; 4] = ["psql", "pgadmin", "dbeaver", "cofferdam"];
    let name = application_name.to_ascii_lowercase();
    let is_one = |names: &[&str]| names.iter().any(|n| name.starts_with(n));
    if is_one(&BACKGROUND) || name.contains("queue_job") {
        Class::Background
    } else if is_one(&ADMIN) {
        Class::Admin
    } else {
        Class::Rpc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_process_are_told_from_others_and_forgotten_when_they_leave() {
        let processes = Arc::new(Processes::default());
        let (here, there) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = processes.of_client(here, "odoo-17").unwrap();
        let second = processes.of_client(here, "odoo-17").unwrap();
        let other = processes.of_client(there, "odoo-17").unwrap();
        let holding = first.hold(TenantId(1));
        assert!(second.holds(TenantId(1)) && !second.holds(TenantId(2)) && !other.holds(TenantId(1)));
        drop(holding);
        assert!(!second.holds(TenantId(1)));
        drop((first, second, other));
        assert!(processes.0.lock().unwrap().is_empty());
        for name in ["odoo-", "odoo-x", "psql", "odoo-1-2", "odoo-12345678901"] {
            assert!(processes.of_client(here, name).is_none(), "{name}");
        }
    }

    #[test]
    fn programs_are_known_by_their_names() {
        assert_eq!(class_of("pg_dump"), Class::Background);
        assert_eq!(class_of("pgAdmin 4 - DB:acme"), Class::Admin);
        assert_eq!(class_of("odoo-4711"), Class::Rpc);
        assert_eq!(class_of(""), Class::Rpc);
    }
}
