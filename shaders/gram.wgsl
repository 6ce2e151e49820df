// G <- [G +] X^T Y, accumulated to about 36 bits: f64 is not to be had on most devices.
//
// Shapes: X (t, p), Y (t, q) of any strides; G (p, q), row by row, of pairs (high, low) whose sum
// is the value.
// Bindings: 0 sizes, 1 X, 2 Y, 3 G.
// Workgroup: 16 x 16 threads, 4 x 4 of the 64 x 64 tile each; groups (ceil(q / 64), ceil(p / 64)).
// CPU twin: `Compute::add_gram` of src/linalg/cpu.rs.
//
// A factor is cut into two halves of 12 bits by a mask, so that every partial product is exact in
// 24 bits. The leading products are summed with their rounding errors (Knuth's TwoSum); the errors
// and the lesser products are summed beside them. After every slice of 16 rows both join the pair
// that lasts. WGSL lets a compiler reorder sums, which would make an error term 0: `opaque` hides
// a value behind an exclusive or with a zero that only the host knows.

struct Sizes {
    t: u32, p: u32, q: u32,
    // Leave out tiles below the diagonal: X is Y, and the host mirrors.
    upper: u32,
    // Add to G instead of overwriting it.
    add: u32,
    // 0.
    zero: u32,
    x_row: u32, x_col: u32,
    y_row: u32, y_col: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> g: array<vec2<f32>>;

const SIDE: u32 = 64u;
const DEPTH: u32 = 16u;

var<workgroup> left: array<vec4<f32>, 256>;
var<workgroup> right: array<vec4<f32>, 256>;

fn opaque_(v: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) ^ vec4(sizes.zero));
}

fn leading(v: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) & vec4(0xfffff000u));
}

struct Pair { high: vec4<f32>, low: vec4<f32> }

// high + low = a + b exactly.
fn two_sum(a: vec4<f32>, b: vec4<f32>) -> Pair {
    let sum = opaque_(a + b);
    let part = opaque_(sum - a);
    let rest = opaque_(sum - part);
    return Pair(sum, (a - rest) + (b - part));
}

// The pair plus s u for a scalar s given in halves.
fn multiply_add(sum: Pair, high: f32, low: f32, u: vec4<f32>, u_low: vec4<f32>) -> Pair {
    let next = two_sum(sum.high, high * u);
    return Pair(next.high, sum.low + (next.low + (high * u_low + (low * u + low * u_low))));
}

// The sum of two pairs, the second small beside the first.
fn join(a: Pair, b: Pair) -> Pair {
    let sum = two_sum(a.high, b.high);
    let rest = sum.low + b.low + a.low;
    return two_sum(sum.high, rest);
}

fn x_at(row: u32, col: u32) -> f32 {
    if row < sizes.t && col < sizes.p { return x[row * sizes.x_row + col * sizes.x_col]; }
    return 0.0;
}

fn y_at(row: u32, col: u32) -> f32 {
    if row < sizes.t && col < sizes.q { return y[row * sizes.y_row + col * sizes.y_col]; }
    return 0.0;
}

fn old(row: u32, col: u32) -> vec2<f32> {
    if sizes.add != 0u && row < sizes.p && col < sizes.q { return g[row * sizes.q + col]; }
    return vec2(0.0);
}

fn old_four(row: u32, col: u32) -> Pair {
    let a = old(row, col);
    let b = old(row, col + 1u);
    let c = old(row, col + 2u);
    let d = old(row, col + 3u);
    return Pair(vec4(a.x, b.x, c.x, d.x), vec4(a.y, b.y, c.y, d.y));
}

fn put(row: u32, col: u32, high: f32, low: f32) {
    if row < sizes.p && col < sizes.q { g[row * sizes.q + col] = vec2(high, low); }
}

fn put_four(row: u32, col: u32, sum: Pair) {
    put(row, col, sum.high.x, sum.low.x);
    put(row, col + 1u, sum.high.y, sum.low.y);
    put(row, col + 2u, sum.high.z, sum.low.z);
    put(row, col + 3u, sum.high.w, sum.low.w);
}

@compute @workgroup_size(16, 16)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    if sizes.upper != 0u && group.x < group.y { return; }
    let row = group.y * SIDE + 4u * local.y;
    let col = group.x * SIDE + 4u * local.x;
    var sum0 = old_four(row, col);
    var sum1 = old_four(row + 1u, col);
    var sum2 = old_four(row + 2u, col);
    var sum3 = old_four(row + 3u, col);
    let depth = thread / 16u;
    let at_x = group.y * SIDE + 4u * (thread % 16u);
    let at_y = group.x * SIDE + 4u * (thread % 16u);
    for (var start = 0u; start < sizes.t; start += DEPTH) {
        let t = start + depth;
        workgroupBarrier();
        left[thread] = vec4(
            x_at(t, at_x), x_at(t, at_x + 1u), x_at(t, at_x + 2u), x_at(t, at_x + 3u));
        right[thread] = vec4(
            y_at(t, at_y), y_at(t, at_y + 1u), y_at(t, at_y + 2u), y_at(t, at_y + 3u));
        workgroupBarrier();
        var part0 = Pair(vec4(0.0), vec4(0.0));
        var part1 = part0;
        var part2 = part0;
        var part3 = part0;
        for (var k = 0u; k < DEPTH; k++) {
            let a = left[k * 16u + local.y];
            let high = leading(a);
            let low = a - high;
            let b = right[k * 16u + local.x];
            let u = leading(b);
            let v = b - u;
            part0 = multiply_add(part0, high.x, low.x, u, v);
            part1 = multiply_add(part1, high.y, low.y, u, v);
            part2 = multiply_add(part2, high.z, low.z, u, v);
            part3 = multiply_add(part3, high.w, low.w, u, v);
        }
        sum0 = join(sum0, part0);
        sum1 = join(sum1, part1);
        sum2 = join(sum2, part2);
        sum3 = join(sum3, part3);
    }
    put_four(row, col, sum0);
    put_four(row + 1u, col, sum1);
    put_four(row + 2u, col, sum2);
    put_four(row + 3u, col, sum3);
}
