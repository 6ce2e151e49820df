//! An open device: its queue, kernels and buffers, and how its failures become errors.

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{ErrorFilter, PollType, Queue, SubmissionIndex};

use super::adapter::{Adapter, Options, choose};
use super::buffers::Pool;
use super::kernels::Kernels;
use crate::error::{DeviceFault, Error, ErrorKind, Result};

/// Least bytes of a block: 256 numbers.
const MIN_BLOCK_BYTES: u64 = 1 << 10;

/// An open device.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) raw: wgpu::Device,
    pub(super) queue: Queue,
    pub(super) kernels: Kernels,
    pub(super) pool: Pool,
    name: String,
    block: u64,
    lost: Arc<Mutex<Option<String>>>,
    /// Errors that no scope was there to catch.
    stray: Arc<Mutex<Option<DeviceFault>>>,
}

impl Device {
    pub(super) fn open(options: &Options) -> Result<Self> {
        let adapter = choose(&options.adapter)?;
        let Adapter { name, backend, .. } = Adapter::of(0, &adapter);
        let name = format!("{name} ({backend})");
        // What the adapter has; what wgpu grants unasked is the least that a browser may have.
        let limits = adapter.limits();
        let request = wgpu::DeviceDescriptor {
            label: Some("mcsmoe"),
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&request));
        let (raw, queue) = opened.map_err(|e| {
            let fault = DeviceFault::Refused { reason: e.to_string() };
            error(&name, "opening", fault)
        })?;
        let (lost, stray) = (Arc::default(), Arc::default());
        watch(&raw, &lost, &stray);
        // Kernels index with u32, and a byte offset must fit as well.
        let bound = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let bound = bound.min(u64::from(u32::MAX));
        let block =
            options.block_bytes.map_or(bound, |bytes| bytes.clamp(MIN_BLOCK_BYTES, bound)) / 4 * 4;
        let scopes = Scopes::open(&raw);
        let kernels = Kernels::compile(&raw);
        let device = Self {
            pool: Pool::new(limits.max_buffer_size),
            raw,
            queue,
            kernels,
            name,
            block,
            lost,
            stray,
        };
        device.close("compiling the kernels", scopes, Ok(()))?;
        Ok(device)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.block
    }

    /// Numbers of 4 bytes in a block.
    pub(super) fn block_len(&self) -> usize {
        (self.block / 4) as usize
    }

    /// Runs an operation; what the driver reports on this thread meanwhile becomes its error.
    pub(super) fn run<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let scopes = Scopes::open(&self.raw);
        let done = work();
        self.close(operation, scopes, done)
    }

    fn close<T>(&self, operation: &'static str, scopes: Scopes, done: Result<T>) -> Result<T> {
        let found = scopes.close().or_else(|| lock(&self.stray).take());
        if found.is_some() || done.is_err() {
            // A lost device refuses without a reason; the reason is told to whoever polls.
            let _ = self.raw.poll(PollType::Poll);
        }
        let lost = lock(&self.lost).clone().map(|reason| DeviceFault::Lost { reason });
        let Some(fault) = lost.or(found) else { return done };
        if fault == DeviceFault::OutOfMemory {
            self.pool.clear();
        }
        Err(error(&self.name, operation, fault))
    }

    pub(super) fn refused(&self, operation: &'static str, reason: impl ToString) -> Error {
        error(&self.name, operation, DeviceFault::Refused { reason: reason.to_string() })
    }

    /// Waits until a submission is done.
    pub(super) fn wait(&self, submission: SubmissionIndex) -> Result<()> {
        let wait = PollType::Wait { submission_index: Some(submission), timeout: None };
        self.raw.poll(wait).map(drop).map_err(|e| self.refused("waiting", e))
    }
}

fn watch(
    raw: &wgpu::Device,
    lost: &Arc<Mutex<Option<String>>>,
    stray: &Arc<Mutex<Option<DeviceFault>>>,
) {
    let (lost, stray) = (lost.clone(), stray.clone());
    raw.set_device_lost_callback(move |reason, message| {
        lock(&lost).get_or_insert_with(|| format!("{reason:?}: {message}"));
    });
    // Without a handler wgpu panics.
    raw.on_uncaptured_error(Arc::new(move |e| {
        lock(&stray).get_or_insert_with(|| fault(&e));
    }));
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error(device: &str, operation: &'static str, fault: DeviceFault) -> Error {
    ErrorKind::Device { device: device.into(), operation, fault }.into()
}

/// What wgpu reports, in this crate's terms.
pub(super) fn fault(error: &wgpu::Error) -> DeviceFault {
    match error {
        wgpu::Error::OutOfMemory { .. } => DeviceFault::OutOfMemory,
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
            DeviceFault::Refused { reason: description.clone() }
        }
    }
}

/// One error scope of each kind, of this thread.
struct Scopes([wgpu::ErrorScopeGuard; 3]);

impl Scopes {
    fn open(raw: &wgpu::Device) -> Self {
        let filters = [ErrorFilter::Validation, ErrorFilter::Internal, ErrorFilter::OutOfMemory];
        Self(filters.map(|filter| raw.push_error_scope(filter)))
    }

    /// The most telling fault: an allocation that failed is followed by invalid uses of it.
    fn close(self) -> Option<DeviceFault> {
        let Self([validation, internal, memory]) = self;
        let found = [memory, internal, validation].map(|scope| pollster::block_on(scope.pop()));
        found.iter().flatten().next().map(fault)
    }
}
