// f32 from bf16: a matrix whose values fit bf16 crosses to the device in half the bytes.
//
// Shapes: packed (ceil(n / 2)) words of two bf16, the earlier in the low half; values (n).
// Bindings: 0 sizes, 1 packed, 2 values.
// Workgroup: 256 threads, one word each; groups (min(words / 256, 65535), the rest).
// CPU twin: `widen` of src/gpu/upload.rs, its inverse being `narrow`.

struct Sizes {
    n: u32,
    // Words that one row of workgroups covers.
    stride: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> packed: array<u32>;
@group(0) @binding(2) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let word = id.x + id.y * sizes.stride;
    let at = 2u * word;
    if at >= sizes.n { return; }
    values[at] = bitcast<f32>(packed[word] << 16u);
    if at + 1u < sizes.n { values[at + 1u] = bitcast<f32>(packed[word] & 0xffff0000u); }
}
