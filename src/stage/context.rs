//! The context of a stage: device, linear-algebra backend, seed.

use std::sync::Arc;

use ndarray::ArrayView2;

use crate::error::Result;
use crate::linalg::{Compute, Cpu, LinalgBackend, PureRust, Svd, SvdMethod, truncated_svd};

/// Where a stage runs: a device, a linear-algebra backend, and a seed. No globals, no environment.
#[derive(Debug, Clone)]
pub struct Context {
    compute: Arc<dyn Compute>,
    backend: Arc<dyn LinalgBackend>,
    seed: u64,
}

impl Context {
    /// The CPU, over the caller's rayon pool.
    pub fn cpu(seed: u64) -> Self {
        Self::on(Arc::new(Cpu::new()), seed)
    }

    /// The graphics card that the system prefers; see [`Gpu::new`](crate::gpu::Gpu::new).
    ///
    /// # Errors
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) when there is none: it never falls back to
    /// the CPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(seed: u64) -> crate::Result<Self> {
        Ok(Self::on(Arc::new(crate::gpu::Gpu::new()?), seed))
    }

    /// A given device; factorisations are always solved on the CPU.
    pub fn on(compute: Arc<dyn Compute>, seed: u64) -> Self {
        Self { compute, backend: Arc::new(PureRust), seed }
    }

    /// The same with another linear-algebra backend.
    #[must_use]
    pub fn with_backend(self, backend: Arc<dyn LinalgBackend>) -> Self {
        Self { backend, ..self }
    }

    /// The same with LAPACK for the factorisations.
    #[cfg(feature = "lapack")]
    #[must_use]
    pub fn with_lapack(self) -> Self {
        self.with_backend(Arc::new(crate::linalg::Lapack))
    }

    /// The device.
    pub fn compute(&self) -> &dyn Compute {
        &*self.compute
    }

    /// The linear-algebra backend.
    pub fn backend(&self) -> &dyn LinalgBackend {
        &*self.backend
    }

    /// The leading `rank` singular triplets of `A`, by this device, backend and
    /// seed; see [`truncated_svd`].
    ///
    /// # Errors
    /// As [`truncated_svd`].
    pub fn truncated_svd(
        &self,
        a: ArrayView2<'_, f32>,
        rank: usize,
        method: SvdMethod,
    ) -> Result<Svd> {
        truncated_svd(a, rank, method, self.seed, self.compute(), self.backend())
    }

    /// The same context for use inside a task that runs in parallel with others.
    pub fn per_task(&self) -> Self {
        Self { compute: self.compute.per_task(), ..self.clone() }
    }

    /// The seed of every random choice.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}
