//! Tests of internals: a lost device, the pool, the meaning of wgpu's errors.

use ndarray::Array2;

use super::device::fault;
use super::{Choice, Gpu, Options};
use crate::error::{DeviceFault, ErrorKind};
use crate::linalg::Compute;

#[test]
fn the_device_crosses_threads() {
    fn pinned<T: Send + Sync + Clone + 'static>() {}
    pinned::<Gpu>();
}

#[test]
fn an_absent_adapter_is_an_error_that_lists_those_present() {
    for adapter in [Choice::Index(9999), Choice::Name("no such card".into())] {
        let error = Gpu::with(&Options { adapter, block_bytes: None }).unwrap_err();
        let ErrorKind::Device { fault: DeviceFault::Absent { present }, .. } = error.kind() else {
            panic!("{error}");
        };
        assert!(!present.is_empty());
    }
}

#[test]
fn the_drivers_errors_keep_their_kind() {
    let source = || Box::new(std::fmt::Error);
    let memory = wgpu::Error::OutOfMemory { source: source() };
    assert_eq!(fault(&memory), DeviceFault::OutOfMemory);
    let description = "too large".to_owned();
    let refused = wgpu::Error::Validation { source: source(), description };
    assert_eq!(fault(&refused), DeviceFault::Refused { reason: "too large".into() });
}

/// The rest needs an adapter; `tests/it/laws/compute.rs` decides whether its absence is a failure.
#[test]
fn buffers_come_back_and_a_lost_device_says_so() {
    let Ok(gpu) = Gpu::new() else { return };
    let a = Array2::from_elem((3, 5), 0.1f32);
    let product = |gpu: &Gpu| {
        let mut out = Array2::zeros((3, 3));
        gpu.gemm(1.0, a.view(), a.t(), 0.0, out.view_mut()).map(|()| out)
    };
    product(&gpu).unwrap();
    let idle = gpu.device.pool.len();
    product(&gpu).unwrap();
    assert!(idle > 0);
    assert_eq!(gpu.device.pool.len(), idle);
    gpu.device.raw.destroy();
    let error = product(&gpu).unwrap_err();
    let ErrorKind::Device { device, fault, .. } = error.kind() else { panic!("{error}") };
    assert!(matches!(fault, DeviceFault::Lost { .. }), "{error}");
    assert_eq!(device, gpu.name());
    assert!(product(&gpu).is_err());
}
