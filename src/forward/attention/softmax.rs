//! Softmax attention, one window and head per task, over blocks of queries.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};

use crate::error::{Error, Result};
use crate::forward::math::{softmax, softmax_beside};
use crate::par;
use crate::stage::Context;

/// Queries whose scores are held at once.
const QUERIES: usize = 128;

/// Rows of queries that look at rows of keys. In causal attention the last query stands at the last
/// key, so `keys` may begin with tokens that have no query any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
}

/// Head counts and widths; `kv_heads` divides `heads`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d_key: usize,
    pub(crate) d_value: usize,
    /// Factor on the scores.
    pub(crate) scale: f32,
}

/// What a query may look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mask {
    /// Itself and what came before, at most `window` tokens in all.
    Causal { window: Option<usize> },
    /// Every key.
    None,
}

impl Mask {
    /// The keys that the query at `position` may look at, of `keys` keys.
    fn visible(self, position: usize, keys: usize) -> Range<usize> {
        match self {
            Self::None => 0..keys,
            Self::Causal { window } => {
                let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
                first..(position + 1).min(keys)
            }
        }
    }
}

/// A term on the scores of each head by distance, key position minus query position.
#[derive(Debug, Clone)]
pub(crate) struct Bias {
    /// `(heads, 2 · reach + 1)`: distances `−reach..=reach`.
    pub(crate) table: Array2<f32>,
    pub(crate) reach: usize,
}

impl Bias {
    /// Adds the terms of `head` to the scores of the query at `position` over keys from `first`.
    fn add(&self, head: usize, position: usize, first: usize, scores: &mut [f32]) {
        let start = (self.reach + first).saturating_sub(position);
        let terms = self.table.row(head);
        scores.iter_mut().zip(terms.iter().skip(start)).for_each(|(x, term)| *x += term);
    }
}

/// Terms of the scores besides the product of queries and keys.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Terms<'a> {
    /// By distance.
    pub(crate) bias: Option<&'a Bias>,
    /// `(heads)` logits of sinks: each takes its part of the softmax, and has no value.
    pub(crate) sinks: Option<ArrayView1<'a, f32>>,
}

/// `softmax(scale · Q Kᵀ + bias) V` per head: `Q: (t, heads · d_key)`, `K: (s, kv_heads · d_key)`,
/// `V: (s, kv_heads · d_value)`; returns `(t, heads · d_value)`.
pub(crate) fn attend(
    [q, k, v]: [ArrayView2<'_, f32>; 3],
    spans: &[Span],
    heads: Heads,
    mask: Mask,
    terms: Terms<'_>,
    cx: &Context,
) -> Result<Array2<f32>> {
    let group = heads.heads / heads.kv_heads.max(1);
    let single = cx.per_task();
    let parts = par::map(spans.len() * heads.heads, |task| {
        let (span, head) = (&spans[task / heads.heads], task % heads.heads);
        let slice = |x: &ArrayView2<'_, f32>, rows: &Range<usize>, h: usize, width: usize| {
            x.slice(s![rows.clone(), h * width..(h + 1) * width]).to_owned()
        };
        let kv = head / group.max(1);
        let q = slice(&q, &span.queries, head, heads.d_key);
        let k = slice(&k, &span.keys, kv, heads.d_key);
        let v = slice(&v, &span.keys, kv, heads.d_value);
        let bias = terms.bias.map(|bias| (bias, head));
        let sink = terms.sinks.and_then(|sinks| sinks.get(head).copied());
        one_head([q.view(), k.view(), v.view()], heads.scale, mask, (bias, sink), &single)
    })?;
    let mut out = Array2::zeros((q.nrows(), heads.heads * heads.d_value));
    for (task, part) in parts.iter().enumerate() {
        let (span, head) = (&spans[task / heads.heads], task % heads.heads);
        let cols = head * heads.d_value..(head + 1) * heads.d_value;
        out.slice_mut(s![span.queries.clone(), cols]).assign(part);
    }
    Ok(out)
}

fn one_head(
    [q, k, v]: [ArrayView2<'_, f32>; 3],
    scale: f32,
    mask: Mask,
    (bias, sink): (Option<(&Bias, usize)>, Option<f32>),
    cx: &Context,
) -> Result<Array2<f32>> {
    let (t, keys) = (q.nrows(), k.nrows());
    let past = match mask {
        Mask::None => 0,
        Mask::Causal { .. } => keys
            .checked_sub(t)
            .ok_or_else(|| Error::shape("causal attention", format!("{t} keys or more"), keys))?,
    };
    let mut out = Array2::zeros((t, v.ncols()));
    for (block, mut rows) in out.axis_chunks_iter_mut(Axis(0), QUERIES).enumerate() {
        let first = block * QUERIES;
        let n = rows.nrows();
        let seen =
            mask.visible(past + first, keys).start..mask.visible(past + first + n - 1, keys).end;
        let (q, k) = (q.slice(s![first..first + n, ..]), k.slice(s![seen.clone(), ..]));
        let mut scores = Array2::zeros((n, seen.len()));
        cx.compute().gemm(scale, q, k.t(), 0.0, scores.view_mut())?;
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let position = past + first + i;
            let visible = mask.visible(position, keys);
            let visible = visible.start - seen.start..visible.end - seen.start;
            let Some(row) = row.as_slice_mut() else {
                return Err(Error::bug("scores of a query are not in memory order"));
            };
            if let Some((bias, head)) = bias {
                bias.add(head, position, seen.start, row);
            }
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            match sink {
                None => softmax(&mut row[visible]),
                Some(sink) => softmax_beside(&mut row[visible], sink),
            }
        }
        cx.compute().gemm(1.0, scores.view(), v.slice(s![seen, ..]), 0.0, rows.view_mut())?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 31 + j * 17 + seed * 7) as f32 * 0.37).sin()
        })
    }

    /// The definition, in f64.
    fn naive(
        [q, k, v]: [ArrayView2<'_, f32>; 3],
        span: &Span,
        heads: Heads,
        window: Option<usize>,
    ) -> Array2<f64> {
        let mut out = Array2::zeros((span.queries.len(), heads.heads * heads.d_value));
        let past = span.keys.len() - span.queries.len();
        for h in 0..heads.heads {
            let kv = h / (heads.heads / heads.kv_heads);
            for i in 0..span.queries.len() {
                let keys: Vec<usize> =
                    (0..=past + i).filter(|j| window.is_none_or(|w| past + i - j < w)).collect();
                let score = |j: &usize| -> f64 {
                    let dot = |c: usize| {
                        f64::from(q[[span.queries.start + i, h * heads.d_key + c]])
                            * f64::from(k[[span.keys.start + j, kv * heads.d_key + c]])
                    };
                    (0..heads.d_key).map(dot).sum::<f64>() * f64::from(heads.scale)
                };
                let weights: Vec<f64> = keys.iter().map(|j| score(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for c in 0..heads.d_value {
                    let value =
                        |j: &usize| f64::from(v[[span.keys.start + j, kv * heads.d_value + c]]);
                    out[[i, h * heads.d_value + c]] =
                        keys.iter().zip(&weights).map(|(j, w)| value(j) * w / total).sum();
                }
            }
        }
        out
    }

    #[test]
    fn causal_windows_follow_the_definition() {
        let heads = Heads { heads: 4, kv_heads: 2, d_key: 6, d_value: 3, scale: 0.7 };
        let (q, k, v) = (values(310, 24, 1), values(310, 12, 2), values(310, 6, 3));
        let spans =
            [Span { queries: 0..300, keys: 0..300 }, Span { queries: 300..310, keys: 300..310 }];
        for window in [None, Some(1), Some(5), Some(150)] {
            let mask = Mask::Causal { window };
            let (qkv, cx) = ([q.view(), k.view(), v.view()], Context::cpu(0));
            let out = attend(qkv, &spans, heads, mask, Terms::default(), &cx).unwrap();
            for span in &spans {
                let expected = naive(qkv, span, heads, window);
                let found = out.slice(s![span.queries.clone(), ..]);
                let error = (&found.mapv(f64::from) - &expected).mapv(f64::abs);
                assert!(error.iter().all(|&e| e < 2e-6), "{window:?}");
            }
        }
    }

    #[test]
    fn past_keys_give_the_last_rows_of_the_whole() {
        let heads = Heads { heads: 2, kv_heads: 2, d_key: 4, d_value: 4, scale: 1.0 };
        let (q, k, v) = (values(9, 8, 1), values(9, 8, 2), values(9, 8, 3));
        let span = [Span { queries: 0..2, keys: 0..9 }];
        let mask = Mask::Causal { window: Some(4) };
        let last = q.slice(s![7.., ..]);
        let (qkv, cx) = ([last, k.view(), v.view()], Context::cpu(0));
        let out = attend(qkv, &span, heads, mask, Terms::default(), &cx);
        let whole = naive(
            [q.view(), k.view(), v.view()],
            &Span { queries: 0..9, keys: 0..9 },
            heads,
            Some(4),
        );
        let error = &out.unwrap().mapv(f64::from) - &whole.slice(s![7.., ..]);
        assert!(error.iter().all(|e| e.abs() < 1e-6));
    }
}
