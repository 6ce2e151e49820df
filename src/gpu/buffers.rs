//! Device buffers that operations hand on to each other: an allocation costs more than most
//! products.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wgpu::{Buffer, BufferDescriptor, BufferUsages};

/// Bytes that idle buffers may occupy; beyond them they are freed.
const IDLE: u64 = 1 << 30;

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Read and written by kernels.
    Storage,
    /// Sizes of a kernel.
    Sizes,
    /// Read by the host.
    ReadBack,
}

impl Use {
    fn flags(self) -> BufferUsages {
        match self {
            Self::Storage => {
                BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC
            }
            Self::Sizes => BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            Self::ReadBack => BufferUsages::MAP_READ | BufferUsages::COPY_DST,
        }
    }
}

/// Buffers that no operation uses at the moment. The queue keeps its order, so a buffer may be
/// written again as soon as the commands that read it are submitted.
#[derive(Debug)]
pub(super) struct Pool {
    idle: Mutex<Vec<(Use, Buffer)>>,
    most: u64,
}

impl Pool {
    /// `most`: bytes of the largest buffer of the device.
    pub(super) fn new(most: u64) -> Self {
        Self { idle: Mutex::default(), most }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Use, Buffer)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `bytes`, of unspecified content.
    pub(super) fn take(&self, device: &wgpu::Device, kind: Use, bytes: u64) -> Lease<'_> {
        let size = class(bytes).min(self.most).max(bytes);
        let mut idle = self.idle();
        let found = idle.iter().position(|(other, b)| *other == kind && b.size() == size);
        let found = found.map(|at| idle.swap_remove(at).1);
        drop(idle);
        let buffer = found.unwrap_or_else(|| {
            let usage = kind.flags();
            device.create_buffer(&BufferDescriptor {
                label: None,
                size,
                usage,
                mapped_at_creation: false,
            })
        });
        Lease { pool: self, kind, buffer, bytes }
    }

    /// Frees what is idle.
    pub(super) fn clear(&self) {
        self.idle().clear();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.idle().len()
    }
}

/// Rounds up to an eighth of a power of two, so that blocks of similar sizes share buffers.
fn class(bytes: u64) -> u64 {
    bytes.next_multiple_of((bytes.next_power_of_two() / 8).max(256))
}

/// A buffer from a [`Pool`], to which it returns.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    pool: &'a Pool,
    kind: Use,
    pub(super) buffer: Buffer,
    /// The bytes that were asked for.
    pub(super) bytes: u64,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut idle = self.pool.idle();
        let held: u64 = idle.iter().map(|(_, b)| b.size()).sum();
        if held + self.buffer.size() <= IDLE {
            idle.push((self.kind, self.buffer.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_little() {
        assert_eq!([1, 256, 257, 4096, 4097].map(class), [256, 256, 512, 4096, 5120]);
        for bytes in [3_000, 1 << 20, 234_881_024, 234_881_028] {
            let size = class(bytes);
            assert!(size >= bytes && size <= bytes + bytes / 4, "{bytes} {size}");
        }
    }
}
