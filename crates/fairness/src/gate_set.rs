//! All gates of one plane, kept in step with the catalog.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use cofferdam_tenant::TenantId;

use crate::gate::Gate;
use crate::share::{GateConfig, Share};
use crate::sync::Arc;
use crate::time::Clock;

/// What one gate should look like.
#[derive(Debug, Clone)]
pub struct GateSpec {
    /// The pool or cluster.
    pub name: String,
    /// Its slots.
    pub config: GateConfig,
    /// The tenants placed there.
    pub shares: Vec<(TenantId, Share)>,
}

/// The gates of one plane by name. A gate keeps its identity, and its running work, across reloads.
pub struct GateSet {
    gates: RwLock<BTreeMap<String, Entry>>,
    clock: Arc<dyn Clock>,
}

struct Entry {
    gate: Arc<Gate>,
    tenants: Vec<TenantId>,
}

impl GateSet {
    /// No gates yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { gates: RwLock::new(BTreeMap::new()), clock }
    }

    /// Makes the gates what the specs say. Gates that are not named any more are forgotten; work that holds their
    /// permits finishes undisturbed.
    pub fn reconcile(&self, specs: impl IntoIterator<Item = GateSpec>) {
        let mut gates = self.gates.write().unwrap_or_else(PoisonError::into_inner);
        let mut old = std::mem::take(&mut *gates);
        for spec in specs {
            let tenants: Vec<TenantId> = spec.shares.iter().map(|(t, _)| *t).collect();
            let gate = match old.remove(&spec.name) {
                Some(entry) => {
                    // A tenant that moved away has no reservation here any more.
                    let kept: std::collections::HashSet<TenantId> = tenants.iter().copied().collect();
                    let gone = entry.tenants.iter().filter(|t| !kept.contains(t));
                    entry.gate.unregister(gone.copied());
                    if entry.gate.config() != spec.config {
                        entry.gate.configure(spec.config);
                    }
                    entry.gate
                }
                None => Gate::new(spec.config, Arc::clone(&self.clock)),
            };
            gate.register(spec.shares);
            gates.insert(spec.name, Entry { gate, tenants });
        }
    }

    /// Lets time pass for all of them: see [`Gate::advance`].
    pub fn advance(&self) {
        for (_, gate) in self.all() {
            gate.advance();
        }
    }

    /// A gate by name.
    pub fn get(&self, name: &str) -> Option<Arc<Gate>> {
        self.gates.read().unwrap_or_else(PoisonError::into_inner).get(name).map(|e| Arc::clone(&e.gate))
    }

    /// All gates, by name.
    pub fn all(&self) -> Vec<(String, Arc<Gate>)> {
        let gates = self.gates.read().unwrap_or_else(PoisonError::into_inner);
        gates.iter().map(|(name, e)| (name.clone(), Arc::clone(&e.gate))).collect()
    }
}

impl fmt::Debug for GateSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all()).finish()
    }
}
