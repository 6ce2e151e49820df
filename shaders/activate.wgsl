// H <- w act(G + g) (U + u), or H <- w act(H + g) without a gate: an expert's hidden units.
//
// Shapes: H (t, f) row by row, G before and the hidden units after; U (t, f); bias (2 f): g, then
// u; w (t), the router's weight of each token.
// Bindings: 0 sizes, 1 H, 2 U, 3 bias, 4 w.
// Workgroup: 64 x 4 threads, one element each; groups (ceil(f / 64), ceil(t / 4)).
// CPU twin: `Activation::gate` and `Activation::apply` of src/linalg/activation.rs.

struct Sizes {
    t: u32, f: u32,
    // 0 SiLU, 1 GELU, 2 GELU by tanh, 3 ReLU, 4 clamped SwiGLU.
    act: u32,
    gated: u32, biased: u32, weighted: u32,
    // Slope and limit of the clamped kind.
    alpha: f32, limit: f32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> h: array<f32>;
@group(0) @binding(2) var<storage, read> up: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;

// x s(y). The exponent is bounded because exp beyond the range of f32 need not be infinite here.
fn swish(x: f32, y: f32) -> f32 {
    return x / (1.0 + exp(min(-y, 88.0)));
}

// Abramowitz and Stegun 7.1.26.
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.3275911 * abs(x));
    var poly = 1.061405429 * t;
    poly = (poly - 1.453152027) * t;
    poly = (poly + 1.421413741) * t;
    poly = (poly - 0.284496736) * t;
    poly = (poly + 0.254829592) * t;
    return (1.0 - poly * exp(max(-x * x, -88.0))) * sign(x);
}

fn activation(x: f32) -> f32 {
    switch sizes.act {
        case 0u: { return swish(x, x); }
        case 1u: { return 0.5 * x * (1.0 + erf(x * 0.70710678)); }
        // 1 + tanh(z) = 2 s(2 z).
        case 2u: { return swish(x, 1.5957692 * (x + 0.044715 * x * x * x)); }
        case 3u: { return max(x, 0.0); }
        default: {
            let cut = min(x, sizes.limit);
            return swish(cut, sizes.alpha * cut);
        }
    }
}

@compute @workgroup_size(64, 4)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= sizes.f || id.y >= sizes.t { return; }
    let at = id.y * sizes.f + id.x;
    var x = h[at];
    if sizes.biased != 0u { x += bias[id.x]; }
    var y = activation(x);
    if sizes.gated != 0u {
        var u = up[at];
        if sizes.biased != 0u { u += bias[sizes.f + id.x]; }
        if sizes.act == 4u { u = clamp(u, -sizes.limit, sizes.limit) + 1.0; }
        y *= u;
    }
    if sizes.weighted != 0u { y *= weights[id.y]; }
    h[at] = y;
}
