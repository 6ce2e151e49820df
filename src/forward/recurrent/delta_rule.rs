//! The gated delta rule (Gated Delta Networks, arXiv 2412.06464, eq. 10), in chunks.
//!
//! A head keeps a state `S: (d_key, d_value)`. Token `t` with decay `a = e^g` and strength `b`
//! does `S ← a S`, then `S ← S + k (b (v − Sᵀ k))ᵀ`, and reads `o = Sᵀ q`.
//!
//! A chunk of `C` tokens does the same by products of matrices (the WY form of arXiv 2406.06484,
//! §3): with `c_i` the decay from the start of the chunk to token `i` and `D_ij = c_i / c_j` for
//! `j ≤ i`, the corrections `U` solve `(I + strictly lower of diag(b) (K Kᵀ ⊙ D)) U = diag(b) (V −
//! diag(c) K S)`; then `O = diag(c) Q S + (Q Kᵀ ⊙ D) U` and `S ← c_C S + (diag(c_C / c) K)ᵀ U`. The
//! state is known when its chunk begins, so that one triangular system is solved where the usual
//! form solves two. A chunk of one token is the rule itself.
//!
//! Cost per token and head: `4 d_key d_value + 2 C (d_key + d_value)` multiplications.

use ndarray::{Array2, ArrayView1, ArrayView2, s};

use crate::error::{Error, Result};
use crate::linalg::{Compute, exp};

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;

/// The tokens of one head of one window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadTokens<'a> {
    /// `(t, d_key)`, normalised and scaled.
    pub(crate) q: ArrayView2<'a, f32>,
    /// `(t, d_key)`, normalised.
    pub(crate) k: ArrayView2<'a, f32>,
    /// `(t, d_value)`.
    pub(crate) v: ArrayView2<'a, f32>,
    /// `(t)` logarithms of the decays, at most 0.
    pub(crate) g: ArrayView1<'a, f32>,
    /// `(t)` strengths, 0 to 1.
    pub(crate) b: ArrayView1<'a, f32>,
}

/// Reads of all tokens, `(t, d_value)`; `state: (d_key, d_value)` moves on behind the last.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the parts do not fit each other.
pub(crate) fn delta_rule(
    tokens: HeadTokens<'_>,
    chunk: usize,
    state: &mut Array2<f32>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let (t, d_key) = tokens.k.dim();
    let d_value = tokens.v.ncols();
    if state.dim() != (d_key, d_value) {
        return Err(Error::shape("state of a head", (d_key, d_value), state.dim()));
    }
    let mut out = Array2::zeros((t, d_value));
    for start in (0..t).step_by(chunk.max(1)) {
        let rows = start..(start + chunk.max(1)).min(t);
        let part = HeadTokens {
            q: tokens.q.slice(s![rows.clone(), ..]),
            k: tokens.k.slice(s![rows.clone(), ..]),
            v: tokens.v.slice(s![rows.clone(), ..]),
            g: tokens.g.slice(s![rows.clone()]),
            b: tokens.b.slice(s![rows.clone()]),
        };
        let o = one_chunk(part, state, compute)?;
        out.slice_mut(s![rows, ..]).assign(&o);
    }
    Ok(out)
}

fn one_chunk(
    HeadTokens { q, k, v, g, b }: HeadTokens<'_>,
    state: &mut Array2<f32>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let (n, d_value) = v.dim();
    let mut total = 0.0f64;
    let mut log = Vec::with_capacity(n);
    for &g in g {
        total += f64::from(g);
        log.push(total);
    }
    let decay = |from: f64, to: f64| exp((to - from) as f32);
    let between =
        Array2::from_shape_fn((n, n), |(i, j)| if j > i { 0.0 } else { decay(log[j], log[i]) });
    // Right-hand side: b (v − c k S).
    let mut u = Array2::zeros((n, d_value));
    compute.gemm(1.0, k, state.view(), 0.0, u.view_mut())?;
    for i in 0..n {
        let c = decay(0.0, log[i]);
        let row = u.row_mut(i);
        row.into_iter().zip(v.row(i)).for_each(|(u, v)| *u = b[i] * (v - c * *u));
    }
    let mut kk = Array2::zeros((n, n));
    compute.gemm(1.0, k, k.t(), 0.0, kk.view_mut())?;
    for i in 1..n {
        let (above, mut rest) = u.view_mut().split_at(ndarray::Axis(0), i);
        let mut row = rest.row_mut(0);
        for (j, other) in above.rows().into_iter().enumerate() {
            row.scaled_add(-b[i] * kk[[i, j]] * between[[i, j]], &other);
        }
    }
    // Reads: c q S + (Q Kᵀ ⊙ D) U.
    let mut out = Array2::zeros((n, d_value));
    compute.gemm(1.0, q, state.view(), 0.0, out.view_mut())?;
    for (i, mut row) in out.rows_mut().into_iter().enumerate() {
        let c = decay(0.0, log[i]);
        row.mapv_inplace(|o| o * c);
    }
    compute.gemm(1.0, q, k.t(), 0.0, kk.view_mut())?;
    kk *= &between;
    compute.gemm(1.0, kk.view(), u.view(), 1.0, out.view_mut())?;
    // The state behind the chunk.
    let mut left = k.to_owned();
    for (i, mut row) in left.rows_mut().into_iter().enumerate() {
        let c = decay(log[i], total);
        row.mapv_inplace(|k| k * c);
    }
    compute.gemm(1.0, left.t(), u.view(), decay(0.0, total), state.view_mut())?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::Array1;

    fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 131 + j * 71 + seed * 37) as f32 * 0.61).sin()
        })
    }

    fn normalised(mut x: Array2<f32>) -> Array2<f32> {
        for mut row in x.rows_mut() {
            let norm = row.dot(&row).sqrt();
            row /= norm;
        }
        x
    }

    /// The rule of the module's first lines, in f64.
    fn step_by_step(tokens: HeadTokens<'_>, state: &mut Array2<f64>) -> Array2<f64> {
        let HeadTokens { q, k, v, g, b } = tokens;
        let mut out = Array2::zeros(v.dim());
        for t in 0..v.nrows() {
            let (q, k, v) = (q.row(t).mapv(f64::from), k.row(t).mapv(f64::from), v.row(t));
            state.mapv_inplace(|s| s * f64::from(g[t]).exp());
            let known = state.t().dot(&k);
            for ((i, j), s) in state.indexed_iter_mut() {
                *s += k[i] * f64::from(b[t]) * (f64::from(v[j]) - known[j]);
            }
            out.row_mut(t).assign(&state.t().dot(&q));
        }
        out
    }

    #[test]
    fn chunks_of_any_size_equal_the_rule_step_by_step() {
        let (t, d_key, d_value) = (150, 8, 5);
        let (q, k) = (normalised(values(t, d_key, 1)), normalised(values(t, d_key, 2)));
        let v = values(t, d_value, 3);
        for strong in [false, true] {
            let g = Array1::from_shape_fn(t, |i| {
                let g = (i as f32 * 0.7).sin().abs();
                if strong { -9.0 * g } else { -0.05 * g }
            });
            let b = Array1::from_shape_fn(t, |i| 0.5 + 0.5 * (i as f32 * 1.3).sin());
            let (q, k, v) = (q.view(), k.view(), v.view());
            let tokens = HeadTokens { q, k, v, g: g.view(), b: b.view() };
            let start = values(d_key, d_value, 4);
            let mut expected_state = start.mapv(f64::from);
            let expected = step_by_step(tokens, &mut expected_state);
            for chunk in [1, 7, 64, 150, 1000] {
                let mut state = start.clone();
                let out = delta_rule(tokens, chunk, &mut state, &Cpu::new()).unwrap();
                let error = |a: &Array2<f32>, b: &Array2<f64>| {
                    (a.mapv(f64::from) - b).iter().fold(0.0f64, |m, e| m.max(e.abs()))
                };
                assert!(error(&out, &expected) < 2e-6, "{chunk} {}", error(&out, &expected));
                assert!(error(&state, &expected_state) < 2e-6, "{chunk}");
            }
        }
    }
}
