//! The compiled kernels, and one dispatch of one of them.

use std::num::NonZeroU64;

use bytemuck::Pod;
use wgpu::{
    BindGroupDescriptor, BindGroupEntry, BindingResource, BufferBinding, CommandEncoder,
    CommandEncoderDescriptor, ComputePassDescriptor, ComputePipeline, ComputePipelineDescriptor,
    PipelineCompilationOptions, ShaderModule, ShaderSource, SubmissionIndex,
};

use super::buffers::{Lease, Use};
use super::device::Device;

/// Most workgroups along one axis that WebGPU guarantees.
pub(super) const GROUPS: u32 = 65_535;

/// One pipeline a kernel; products have one for each pair of layouts.
#[derive(Debug)]
pub(super) struct Kernels {
    /// Index `2 · (A runs along k) + (B runs along k)`.
    pub(super) gemm: [ComputePipeline; 4],
    pub(super) gram: ComputePipeline,
    pub(super) row_norms: ComputePipeline,
    pub(super) weighted_sum: ComputePipeline,
    pub(super) activate: ComputePipeline,
    pub(super) unpack: ComputePipeline,
}

macro_rules! shader {
    ($device:expr, $name:literal) => {
        $device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some($name),
            source: ShaderSource::Wgsl(include_str!(concat!("../../shaders/", $name)).into()),
        })
    };
}

impl Kernels {
    pub(super) fn compile(device: &wgpu::Device) -> Self {
        let gemm = shader!(device, "gemm.wgsl");
        let plain = |module: &ShaderModule| pipeline(device, module, &[]);
        Self {
            gemm: [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
                .map(|(a, b)| pipeline(device, &gemm, &[("A_DEEP", a), ("B_DEEP", b)])),
            gram: plain(&shader!(device, "gram.wgsl")),
            row_norms: plain(&shader!(device, "row_norms.wgsl")),
            weighted_sum: plain(&shader!(device, "weighted_sum.wgsl")),
            activate: plain(&shader!(device, "activate.wgsl")),
            unpack: plain(&shader!(device, "unpack.wgsl")),
        }
    }
}

fn pipeline(
    device: &wgpu::Device,
    module: &ShaderModule,
    constants: &[(&str, f64)],
) -> ComputePipeline {
    device.create_compute_pipeline(&ComputePipelineDescriptor {
        label: None,
        layout: None,
        module,
        entry_point: Some("main"),
        compilation_options: PipelineCompilationOptions {
            constants,
            // Every kernel writes its shared memory before it reads it.
            zero_initialize_workgroup_memory: false,
        },
        cache: None,
    })
}

/// Commands that are submitted together, and the buffers that must not be handed on before.
///
/// What the host writes reaches the device before the next submission, not in the order of the
/// commands: no buffer may be written twice in one batch.
pub(super) struct Batch<'d> {
    pub(super) device: &'d Device,
    pub(super) encoder: CommandEncoder,
    held: Vec<Lease<'d>>,
}

impl<'d> Batch<'d> {
    pub(super) fn new(device: &'d Device) -> Self {
        let encoder = device.raw.create_command_encoder(&CommandEncoderDescriptor::default());
        Self { device, encoder, held: Vec::new() }
    }

    /// A buffer that the caller keeps at least until the batch is submitted.
    pub(super) fn take(&self, kind: Use, bytes: u64) -> Lease<'d> {
        self.device.pool.take(&self.device.raw, kind, bytes)
    }

    /// Keeps a buffer until the batch is submitted.
    pub(super) fn hold(&mut self, lease: Lease<'d>) {
        self.held.push(lease);
    }

    /// Records one dispatch: `sizes` is binding 0, the buffers are those after it.
    pub(super) fn dispatch<S: Pod>(
        &mut self,
        pipeline: &ComputePipeline,
        sizes: S,
        buffers: &[&Lease<'_>],
        [x, y]: [u32; 2],
    ) {
        if x == 0 || y == 0 {
            return;
        }
        // Uniform structs are as long as a multiple of 16 bytes.
        let bytes = bytemuck::bytes_of(&sizes);
        let uniform = self.take(Use::Sizes, bytes.len().next_multiple_of(16) as u64);
        self.device.queue.write_buffer(&uniform.buffer, 0, bytes);
        let all = std::iter::once(&uniform).chain(buffers.iter().copied());
        let entry =
            |(i, l): (usize, &Lease<'_>)| (i as u32, l.buffer.clone(), NonZeroU64::new(l.bytes));
        let all: Vec<_> = all.enumerate().map(entry).collect();
        let entries: Vec<BindGroupEntry<'_>> = all
            .iter()
            .map(|(binding, buffer, size)| BindGroupEntry {
                binding: *binding,
                resource: BindingResource::Buffer(BufferBinding { buffer, offset: 0, size: *size }),
            })
            .collect();
        let bind_group = self.device.raw.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let mut pass = self.encoder.begin_compute_pass(&ComputePassDescriptor::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        pass.dispatch_workgroups(x, y, 1);
        drop(pass);
        self.hold(uniform);
    }

    /// Starts the work; returns at once.
    pub(super) fn submit(self) -> SubmissionIndex {
        let index = self.device.queue.submit([self.encoder.finish()]);
        drop(self.held);
        index
    }
}

/// A buffer for a binding that a kernel does not read.
pub(super) fn unused<'d>(batch: &Batch<'d>) -> Lease<'d> {
    batch.take(Use::Storage, 16)
}

/// Workgroups that cover `n` elements, `each` apiece.
pub(super) fn groups(n: usize, each: usize) -> u32 {
    n.div_ceil(each) as u32
}
