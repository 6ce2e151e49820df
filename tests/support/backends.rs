//! Every implementation of the factorisations in this build; laws hold for each of them.

use std::sync::Arc;

use mcsmoe::linalg::{LinalgBackend, PureRust};
use mcsmoe::stage::Context;

pub(crate) fn backends() -> Vec<Arc<dyn LinalgBackend>> {
    vec![
        Arc::new(PureRust),
        #[cfg(feature = "lapack")]
        Arc::new(mcsmoe::linalg::Lapack),
    ]
}

pub(crate) fn contexts(seed: u64) -> Vec<Context> {
    backends().into_iter().map(|b| Context::cpu(seed).with_backend(b)).collect()
}
