//! Graphics cards, through Vulkan, Metal or DirectX 12: [`Gpu`] answers a [`Compute`] with compute
//! shaders. Feature `gpu`.
//!
//! ```no_run
//! use std::sync::Arc;
//! use mcsmoe::gpu::Gpu;
//! use mcsmoe::pipeline::{Keep, Recipe};
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let recipe = Recipe::preset("m-smoe", Keep::Fraction(0.5))?;
//! let pipeline = recipe.builder()?.compute(Arc::new(Gpu::new()?)).build()?;
//! # let _ = pipeline;
//! # Ok(())
//! # }
//! ```
//!
//! The kernels are the files of `shaders/`, one each. Each has a twin on the CPU and is tested
//! against it: products in `f32` in another order of additions, Gram matrices to about 36 bits in
//! pairs of `f32`, since few devices have `f64`. The same device gives the same bits every time;
//! two devices agree within rounding.
//!
//! An operation uploads its matrices block by block while the device works on the blocks before,
//! and reads its result back once. A block is no larger than what the device binds, so a matrix may
//! be larger. Matrices whose values all fit `bf16`, as those of most checkpoints do, cross in half
//! the bytes and are widened on the device. Assignments and small factorisations stay on the CPU.
//!
//! Nothing panics, and nothing falls back to the CPU: every failure is an
//! [`ErrorKind::Device`](crate::ErrorKind::Device).

mod adapter;
mod buffers;
mod compute;
mod device;
mod device_matrix;
mod gemm;
mod gram;
mod kernels;
mod mlp;
mod sum;
mod upload;

use std::fmt;
use std::sync::Arc;

pub use adapter::{Adapter, AdapterKind, Choice, Options};

use crate::error::Result;
use device::Device;

#[cfg(doc)]
use crate::linalg::Compute;

/// A graphics card as a [`Compute`]. Cheap to clone: clones share the device.
#[derive(Clone)]
pub struct Gpu {
    device: Arc<Device>,
}

impl Gpu {
    /// The adapter that the system prefers: a real card before a software renderer.
    ///
    /// # Errors
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) when there is none, or it gives no device.
    pub fn new() -> Result<Self> {
        Self::with(&Options::default())
    }

    /// A chosen adapter, and limits.
    ///
    /// # Errors
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) when there is no such adapter, or it gives
    /// no device.
    pub fn with(options: &Options) -> Result<Self> {
        Ok(Self { device: Arc::new(Device::open(options)?) })
    }

    /// The adapters that are present, in the order of [`Choice::Index`].
    pub fn adapters() -> Vec<Adapter> {
        adapter::list().iter().enumerate().map(|(i, a)| Adapter::of(i, a)).collect()
    }

    /// Bytes of the largest block that is bound at once; larger matrices are split.
    pub fn block_bytes(&self) -> u64 {
        self.device.block_bytes()
    }
}

/// Name and block size: what decides the bits of a result, so that an interrupted run knows them.
impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.device.name();
        f.debug_struct("Gpu")
            .field("name", &name)
            .field("block_bytes", &self.block_bytes())
            .finish()
    }
}

#[cfg(test)]
mod tests;
