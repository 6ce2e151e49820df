// S <- [S +] w M[:, cols]: one term of a weighted sum of experts with permuted hidden units.
//
// Shapes: M (rows, cols) of any strides, S (rows, cols) row by row, gather (cols) indices.
// Bindings: 0 sizes, 1 M, 2 gather, 3 S.
// Workgroup: 64 x 4 threads, one element each; groups (ceil(cols / 64), ceil(rows / 4)).
// CPU twin: `Compute::weighted_sum` of src/linalg/cpu.rs.
//
// Rows are gathered on the way to the device, where it is a copy of rows like any other. Terms are
// added in their order, one dispatch each; the first overwrites S.

struct Sizes {
    rows: u32, cols: u32,
    row: u32, col: u32,
    weight: f32,
    // Whether this is the first term.
    first: u32,
    // Whether columns are gathered.
    gathered: u32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> m: array<f32>;
@group(0) @binding(2) var<storage, read> gather: array<u32>;
@group(0) @binding(3) var<storage, read_write> s: array<f32>;

@compute @workgroup_size(64, 4)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= sizes.cols || id.y >= sizes.rows { return; }
    var col = id.x;
    if sizes.gathered != 0u { col = gather[id.x]; }
    let term = sizes.weight * m[id.y * sizes.row + col * sizes.col];
    let at = id.y * sizes.cols + id.x;
    if sizes.first != 0u {
        s[at] = term;
    } else {
        s[at] += term;
    }
}
