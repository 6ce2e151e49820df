//! Where a stage runs.

use std::sync::Arc;

use ndarray::ArrayView2;

use crate::error::Result;
use crate::linalg::{Compute, Cpu, Factorise, PureRust, Svd, SvdMethod, truncated_svd};

/// Where a stage runs: a device, who factorises, and a seed. No globals, no environment.
#[derive(Debug, Clone)]
pub struct Context {
    compute: Arc<dyn Compute>,
    factorise: Arc<dyn Factorise>,
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
        Self { compute, factorise: Arc::new(PureRust), seed }
    }

    /// The same with another implementation of the factorisations.
    #[must_use]
    pub fn with_factorise(self, factorise: Arc<dyn Factorise>) -> Self {
        Self { factorise, ..self }
    }

    /// The same with LAPACK for the factorisations.
    #[cfg(feature = "lapack")]
    #[must_use]
    pub fn with_lapack(self) -> Self {
        self.with_factorise(Arc::new(crate::linalg::Lapack))
    }

    /// The device.
    pub fn compute(&self) -> &dyn Compute {
        &*self.compute
    }

    /// Who factorises.
    pub fn factorise(&self) -> &dyn Factorise {
        &*self.factorise
    }

    /// The leading `rank` singular triplets of `A`, on this device, by who factorises here and by
    /// this seed; see [`truncated_svd`].
    ///
    /// # Errors
    /// As [`truncated_svd`].
    pub fn truncated_svd(
        &self,
        a: ArrayView2<'_, f32>,
        rank: usize,
        method: SvdMethod,
    ) -> Result<Svd> {
        truncated_svd(a, rank, method, self.seed, self.compute(), self.factorise())
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
