// C <- alpha A B + beta C, one tile of 128 x 128 a workgroup, 8 x 8 of it a thread.
//
// Shapes: A (m, k), B (k, n) of any strides, C (m, n) row by row. beta = 0 does not read C.
// Bindings: 0 sizes, 1 A, 2 B, 3 C.
// Workgroup: 16 x 16 threads, 16 KiB of shared memory; groups (ceil(n / 128), ceil(m / 128)).
// CPU twin: `Compute::gemm` of src/linalg/cpu.rs.
//
// A and B come in slices of 16 along k, four neighbours of m or n to a vector. Which index runs
// fastest over the threads follows the matrix's layout, so that neighbouring threads read
// neighbouring words: A B^T, A B and A^T B are one kernel with two switches. The vector index is
// exclusive-ored with the depth, so that a column written by 16 threads falls on distinct banks.

struct Sizes {
    m: u32, k: u32, n: u32,
    a_row: u32, a_col: u32,
    b_row: u32, b_col: u32,
    c_row: u32,
    alpha: f32, beta: f32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;

// Whether the index that is summed over is the one whose neighbours lie side by side.
override A_DEEP: bool = true;
override B_DEEP: bool = true;

const DEPTH: u32 = 16u;
const WIDE: u32 = 32u;

var<workgroup> left: array<vec4<f32>, 512>;
var<workgroup> right: array<vec4<f32>, 512>;

fn slot(depth: u32, at: u32) -> u32 {
    return depth * WIDE + (at ^ (depth & 7u));
}

fn left_at(row: u32, depth: u32) -> f32 {
    if row < sizes.m && depth < sizes.k {
        return a[row * sizes.a_row + depth * sizes.a_col];
    }
    return 0.0;
}

fn right_at(depth: u32, col: u32) -> f32 {
    if depth < sizes.k && col < sizes.n {
        return b[depth * sizes.b_row + col * sizes.b_col];
    }
    return 0.0;
}

fn fill(thread: u32, row: u32, col: u32, start: u32) {
    for (var part = 0u; part < 2u; part++) {
        let i = thread + 256u * part;
        let a_depth = select(i / WIDE, i % DEPTH, A_DEEP);
        let a_four = select(i % WIDE, i / DEPTH, A_DEEP);
        let r = row + 4u * a_four;
        let ka = start + a_depth;
        left[slot(a_depth, a_four)] = vec4(
            left_at(r, ka), left_at(r + 1u, ka), left_at(r + 2u, ka), left_at(r + 3u, ka));
        let b_depth = select(i / WIDE, i % DEPTH, B_DEEP);
        let b_four = select(i % WIDE, i / DEPTH, B_DEEP);
        let s = col + 4u * b_four;
        let kb = start + b_depth;
        right[slot(b_depth, b_four)] = vec4(
            right_at(kb, s), right_at(kb, s + 1u), right_at(kb, s + 2u), right_at(kb, s + 3u));
    }
}

fn put(row: u32, col: u32, value: f32) {
    if row < sizes.m && col < sizes.n {
        let at = row * sizes.c_row + col;
        if sizes.beta == 0.0 {
            c[at] = sizes.alpha * value;
        } else {
            c[at] = sizes.alpha * value + sizes.beta * c[at];
        }
    }
}

fn put_four(row: u32, col: u32, values: vec4<f32>) {
    put(row, col, values.x);
    put(row, col + 1u, values.y);
    put(row, col + 2u, values.z);
    put(row, col + 3u, values.w);
}

@compute @workgroup_size(16, 16)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * 128u;
    let col = group.x * 128u;
    // Named, not an array: registers must not depend on a driver that unrolls loops.
    var c0 = vec4(0.0); var d0 = vec4(0.0);
    var c1 = vec4(0.0); var d1 = vec4(0.0);
    var c2 = vec4(0.0); var d2 = vec4(0.0);
    var c3 = vec4(0.0); var d3 = vec4(0.0);
    var c4 = vec4(0.0); var d4 = vec4(0.0);
    var c5 = vec4(0.0); var d5 = vec4(0.0);
    var c6 = vec4(0.0); var d6 = vec4(0.0);
    var c7 = vec4(0.0); var d7 = vec4(0.0);
    for (var start = 0u; start < sizes.k; start += DEPTH) {
        workgroupBarrier();
        fill(thread, row, col, start);
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth++) {
            let x = left[slot(depth, local.y)];
            let y = left[slot(depth, local.y + 16u)];
            let u = right[slot(depth, local.x)];
            let v = right[slot(depth, local.x + 16u)];
            c0 += x.x * u; d0 += x.x * v;
            c1 += x.y * u; d1 += x.y * v;
            c2 += x.z * u; d2 += x.z * v;
            c3 += x.w * u; d3 += x.w * v;
            c4 += y.x * u; d4 += y.x * v;
            c5 += y.y * u; d5 += y.y * v;
            c6 += y.z * u; d6 += y.z * v;
            c7 += y.w * u; d7 += y.w * v;
        }
    }
    let r = row + 4u * local.y;
    let s = col + 4u * local.x;
    put_four(r, s, c0); put_four(r, s + 64u, d0);
    put_four(r + 1u, s, c1); put_four(r + 1u, s + 64u, d1);
    put_four(r + 2u, s, c2); put_four(r + 2u, s + 64u, d2);
    put_four(r + 3u, s, c3); put_four(r + 3u, s + 64u, d3);
    put_four(r + 64u, s, c4); put_four(r + 64u, s + 64u, d4);
    put_four(r + 65u, s, c5); put_four(r + 65u, s + 64u, d5);
    put_four(r + 66u, s, c6); put_four(r + 66u, s + 64u, d6);
    put_four(r + 67u, s, c7); put_four(r + 67u, s + 64u, d7);
}
