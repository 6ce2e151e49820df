//! The graphics cards that are present, and the choice of one.

use std::fmt;

use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor};

use crate::error::{DeviceFault, Error, ErrorKind, Result};

/// What an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterKind {
    /// A card with its own memory.
    Discrete,
    /// One that shares the processor's memory.
    Integrated,
    /// A card behind a virtual machine.
    Virtual,
    /// A program that plays a card on the processor, such as llvmpipe: for tests.
    Software,
    /// Unknown.
    Other,
}

/// An adapter that is present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// Its place in the system's list.
    pub index: usize,
    /// Its name, as the driver gives it.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// What it is.
    pub kind: AdapterKind,
    /// Driver and version.
    pub driver: String,
}

impl Adapter {
    pub(super) fn of(index: usize, adapter: &wgpu::Adapter) -> Self {
        let info = adapter.get_info();
        let kind = match info.device_type {
            DeviceType::DiscreteGpu => AdapterKind::Discrete,
            DeviceType::IntegratedGpu => AdapterKind::Integrated,
            DeviceType::VirtualGpu => AdapterKind::Virtual,
            DeviceType::Cpu => AdapterKind::Software,
            DeviceType::Other => AdapterKind::Other,
        };
        let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
        Self { index, name: info.name, backend: info.backend.to_string(), kind, driver }
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.index, self.name, self.backend)
    }
}

/// Which adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Choice {
    /// The first of the best kind: discrete, integrated, virtual, other, software.
    #[default]
    Best,
    /// The one at this place of [`Gpu::adapters`](super::Gpu::adapters).
    Index(usize),
    /// The first whose name holds this, in any case.
    Name(String),
}

/// How a [`Gpu`](super::Gpu) is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Which adapter.
    pub adapter: Choice,
    /// Bytes of the largest block, if less than what the adapter binds; at least 1 KiB. Tests reach
    /// the splitting of large matrices by it.
    pub block_bytes: Option<u64>,
}

impl Options {
    /// Options with an adapter by name.
    pub fn named(name: impl Into<String>) -> Self {
        Self { adapter: Choice::Name(name.into()), ..Self::default() }
    }

    /// Options with an adapter by its place in the list.
    pub fn index(index: usize) -> Self {
        Self { adapter: Choice::Index(index), ..Self::default() }
    }

    /// The same with a bound on a block.
    #[must_use]
    pub fn block_bytes(mut self, bytes: u64) -> Self {
        self.block_bytes = Some(bytes);
        self
    }
}

/// All adapters of the compiled backends, in the system's order.
pub(super) fn list() -> Vec<wgpu::Adapter> {
    let descriptor = InstanceDescriptor {
        backends: Backends::VULKAN | Backends::METAL | Backends::DX12,
        // Validation layers, where installed, slow every call; kernels are validated by tests.
        flags: wgpu::InstanceFlags::empty(),
        ..InstanceDescriptor::new_without_display_handle()
    };
    let backends = descriptor.backends;
    pollster::block_on(Instance::new(descriptor).enumerate_adapters(backends))
}

/// The chosen adapter.
pub(super) fn choose(choice: &Choice) -> Result<wgpu::Adapter> {
    let mut all = list();
    let described: Vec<Adapter> = all.iter().enumerate().map(|(i, a)| Adapter::of(i, a)).collect();
    match pick(choice, &described) {
        Some(at) => Ok(all.swap_remove(at)),
        None => Err(absent(choice, &described)),
    }
}

fn pick(choice: &Choice, all: &[Adapter]) -> Option<usize> {
    match choice {
        Choice::Best => all.iter().min_by_key(|a| (a.kind as u8, a.index)).map(|a| a.index),
        Choice::Index(index) => all.get(*index).map(|a| a.index),
        Choice::Name(name) => {
            let name = name.to_lowercase();
            all.iter().find(|a| a.name.to_lowercase().contains(&name)).map(|a| a.index)
        }
    }
}

fn absent(choice: &Choice, all: &[Adapter]) -> Error {
    let present: Vec<String> = all.iter().map(ToString::to_string).collect();
    let present = if present.is_empty() { "none".into() } else { present.join(", ") };
    let device = match choice {
        Choice::Best => "gpu".into(),
        Choice::Index(index) => format!("gpu {index}"),
        Choice::Name(name) => name.clone(),
    };
    let fault = DeviceFault::Absent { present };
    ErrorKind::Device { device, operation: "opening", fault }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_card_comes_first_and_names_match_in_part() {
        let adapter = |index, name: &str, kind| Adapter {
            index,
            name: name.into(),
            backend: "vulkan".into(),
            kind,
            driver: String::new(),
        };
        let all = [
            adapter(0, "llvmpipe", AdapterKind::Software),
            adapter(1, "Intel Arc", AdapterKind::Integrated),
            adapter(2, "NVIDIA H100", AdapterKind::Discrete),
        ];
        assert_eq!(pick(&Choice::Best, &all), Some(2));
        assert_eq!(pick(&Choice::Best, &all[..2]), Some(1));
        assert_eq!(pick(&Choice::Name("nvidia".into()), &all), Some(2));
        assert_eq!(pick(&Choice::Index(1), &all), Some(1));
        assert_eq!(pick(&Choice::Index(3), &all), None);
        let error = absent(&Choice::Name("radeon".into()), &all[1..2]).to_string();
        let expected = "opening on device `radeon`: no such adapter; present: \
            1: Intel Arc (vulkan)";
        assert_eq!(error, expected);
        assert!(absent(&Choice::Best, &[]).to_string().ends_with("present: none"));
    }
}
