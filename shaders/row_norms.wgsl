// s_i = sum_j A[i, j]^2, to about 36 bits.
//
// Shapes: A (rows, cols) of any strides; s (rows) of pairs (high, low) whose sum is the value.
// Bindings: 0 sizes, 1 A, 2 s.
// Workgroup: 256 threads on one row; groups (min(rows, 65535), ceil(rows / 65535)).
// CPU twin: the sum of squares in `rsvd` of src/linalg/rsvd.rs, through `Held::row_squares`.
//
// The arithmetic is that of gram.wgsl.

struct Sizes {
    rows: u32, cols: u32,
    row: u32, col: u32,
    // Add to s instead of overwriting it.
    add: u32,
    // 0.
    zero: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read_write> s: array<vec2<f32>>;

var<workgroup> parts: array<vec2<f32>, 256>;

fn opaque_(v: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(v) ^ sizes.zero);
}

// (high, low) with high + low = a + b exactly.
fn two_sum(a: f32, b: f32) -> vec2<f32> {
    let sum = opaque_(a + b);
    let part = opaque_(sum - a);
    let rest = opaque_(sum - part);
    return vec2(sum, (a - rest) + (b - part));
}

fn join(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let sum = two_sum(a.x, b.x);
    return two_sum(sum.x, sum.y + b.y + a.y);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.x + group.y * 65535u;
    if row >= sizes.rows { return; }
    var sum = vec2(0.0);
    for (var j = thread; j < sizes.cols; j += 256u) {
        let value = a[row * sizes.row + j * sizes.col];
        let high = bitcast<f32>(bitcast<u32>(value) & 0xfffff000u);
        let low = value - high;
        sum = join(sum, vec2(high * high, 2.0 * high * low + low * low));
    }
    parts[thread] = sum;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half /= 2u) {
        if thread < half { parts[thread] = join(parts[thread], parts[thread + half]); }
        workgroupBarrier();
    }
    if thread == 0u {
        var whole = parts[0];
        if sizes.add != 0u { whole = join(s[row], whole); }
        s[row] = whole;
    }
}
