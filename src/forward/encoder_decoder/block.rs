//! Blocks of a T5 encoder or decoder (arXiv 1910.10683) with Switch experts (arXiv 2101.03961).

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use super::norm;
use crate::error::{Error, Locate, Result};
use crate::families::SwitchSpec;
use crate::forward::attention::softmax::{Bias, Heads, Mask, Span, Terms, attend};
use crate::forward::load::Loader;
use crate::forward::moe::{FeedForward, Mlp};
use crate::forward::norm::RmsNorm;
use crate::forward::windows::{batches, check_windows};
use crate::model::{LayerId, Linear, Stack, TensorSource};
use crate::stage::Context;

/// The bucket of a distance (key minus query): half of the buckets hold one distance each, the
/// others grow logarithmically up to `max_distance`. Rounded to `f32` as in the reference.
fn bucket(distance: isize, both_ways: bool, buckets: usize, max_distance: usize) -> usize {
    let (base, buckets) = match (both_ways, distance > 0) {
        (true, true) => (buckets / 2, buckets / 2),
        (true, false) => (0, buckets / 2),
        (false, _) => (0, buckets),
    };
    let distance = if both_ways { distance.unsigned_abs() } else { (-distance).max(0) as usize };
    let exact = buckets / 2;
    if distance < exact {
        return base + distance;
    }
    let grown = (distance as f32 / exact as f32).ln()
        / (max_distance as f64 / exact as f64).ln() as f32
        * (buckets - exact) as f32;
    base + (exact + grown as usize).min(buckets - 1)
}

/// Relative position bias of a stack, which its first block stores for all: `(buckets, heads)`.
#[derive(Debug, Clone)]
pub(crate) struct RelativeBias {
    weight: Array2<f32>,
    both_ways: bool,
    max_distance: usize,
}

impl RelativeBias {
    pub(crate) fn load(source: &dyn TensorSource, spec: &SwitchSpec, stack: Stack) -> Result<Self> {
        let prefix = format!("{}block.0.layer.0.SelfAttention.", stack_prefix(source, stack));
        let name = "relative_attention_bias.weight";
        let weight = Loader::new(source, prefix).matrix(name, (spec.buckets, spec.heads))?;
        let both_ways = stack == Stack::Encoder;
        Ok(Self { weight, both_ways, max_distance: spec.max_distance })
    }

    /// The terms for windows of at most `reach + 1` tokens.
    pub(crate) fn up_to(&self, reach: usize) -> Bias {
        let (buckets, heads) = self.weight.dim();
        let table = Array2::from_shape_fn((heads, 2 * reach + 1), |(h, i)| {
            let distance = i as isize - reach as isize;
            self.weight[[bucket(distance, self.both_ways, buckets, self.max_distance), h]]
        });
        Bias { table, reach }
    }
}

pub(crate) fn stack_prefix(source: &dyn TensorSource, stack: Stack) -> String {
    let name = if stack == Stack::Encoder { "encoder" } else { "decoder" };
    format!("{}{name}.", source.prefix())
}

/// Attention whose scores are not scaled.
#[derive(Debug)]
struct Attention {
    norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: Heads,
}

impl Attention {
    fn load(layer: &Loader<'_>, name: &str, spec: &SwitchSpec) -> Result<Self> {
        let (d, inner) = (spec.d_model, spec.heads * spec.d_kv);
        let (heads, width) = (spec.heads, spec.d_kv);
        let part = layer.at(name);
        Ok(Self {
            norm: layer.norm("layer_norm", d, norm(spec))?,
            q: part.linear("q", (inner, d), false)?,
            k: part.linear("k", (inner, d), false)?,
            v: part.linear("v", (inner, d), false)?,
            o: part.linear("o", (d, inner), false)?,
            heads: Heads { heads, kv_heads: heads, d_key: width, d_value: width, scale: 1.0 },
        })
    }

    /// Attention of `norm(h)` to `context`, or to itself.
    fn forward(
        &self,
        hidden: ArrayView2<'_, f32>,
        context: Option<ArrayView2<'_, f32>>,
        spans: &[Span],
        mask: Mask,
        bias: Option<&Bias>,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let x = self.norm.forward(hidden)?;
        let context = context.unwrap_or(x.view());
        let q = self.q.view().forward(x.view(), cx.compute())?;
        let k = self.k.view().forward(context, cx.compute())?;
        let v = self.v.view().forward(context, cx.compute())?;
        let (qkv, terms) = ([q.view(), k.view(), v.view()], Terms { bias, sinks: None });
        let mixed = attend(qkv, spans, self.heads, mask, terms, cx)?;
        self.o.view().forward(mixed.view(), cx.compute())
    }
}

/// One block in memory: self-attention, in the decoder attention to the encoder, then dense MLP or
/// Switch experts. Each adds to the residual stream after a norm of its input.
#[derive(Debug)]
pub struct SwitchBlock {
    id: LayerId,
    own: Attention,
    cross: Option<Attention>,
    bias: RelativeBias,
    feed: FeedForward,
}

impl SwitchBlock {
    /// Reads a block.
    ///
    /// # Errors
    /// Those of the source; [`ErrorKind::Shape`](crate::ErrorKind::Shape) for a tensor that does
    /// not fit the configuration and [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a
    /// NaN or infinite weight, with layer and tensor.
    pub(crate) fn load(source: &dyn TensorSource, spec: &SwitchSpec, id: LayerId) -> Result<Self> {
        let prefix = format!("{}block.{}.", stack_prefix(source, id.stack), id.index);
        let block = Self::read(source, spec, id, &prefix).in_layer(id)?;
        source.release(&prefix);
        Ok(block)
    }

    fn read(
        source: &dyn TensorSource,
        spec: &SwitchSpec,
        id: LayerId,
        prefix: &str,
    ) -> Result<Self> {
        let layers = Loader::new(source, format!("{prefix}layer."));
        let decoder = id.stack == Stack::Decoder;
        let last = layers.at(if decoder { "2" } else { "1" });
        let mlp = if source.is_moe(id) {
            Mlp::sparse(source, id, None, Some(spec.capacity))?
        } else {
            let size = (spec.d_model, spec.d_ff);
            Mlp::Dense(Box::new(last.at("mlp").two(size, spec.activation)?))
        };
        let cross = || Attention::load(&layers.at("1"), "EncDecAttention", spec);
        Ok(Self {
            id,
            own: Attention::load(&layers.at("0"), "SelfAttention", spec)?,
            cross: decoder.then(cross).transpose()?,
            bias: RelativeBias::load(source, spec, id.stack)?,
            feed: FeedForward::new(id, last.norm("layer_norm", spec.d_model, norm(spec))?, mlp),
        })
    }

    /// Which block it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The last part of the block.
    pub fn feed(&self) -> &FeedForward {
        &self.feed
    }

    /// The same, to take its experts out.
    pub fn feed_mut(&mut self) -> &mut FeedForward {
        &mut self.feed
    }

    /// Everything before the MLP. `encoded`: the encoder's output and windows, one for each of the
    /// decoder's; `None` in the encoder.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for windows that are not consecutive
    /// ranges over all rows, [`ErrorKind::Shape`](crate::ErrorKind::Shape) when encoder and decoder
    /// windows do not pair up.
    pub fn attention_half(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        encoded: Option<(ArrayView2<'_, f32>, &[Range<usize>])>,
        cx: &Context,
    ) -> Result<()> {
        check_windows(windows, hidden.nrows())?;
        let pairs = encoded.map_or(windows.len(), |(_, sources)| sources.len());
        if pairs != windows.len() || encoded.is_some() != self.cross.is_some() {
            return Err(Error::shape("encoder windows", windows.len(), pairs)).in_layer(self.id);
        }
        let longest = windows.iter().map(ExactSizeIterator::len).max().unwrap_or(1);
        let bias = self.bias.up_to(longest.max(1) - 1);
        let mask = match self.id.stack {
            Stack::Encoder => Mask::None,
            _ => Mask::Causal { window: None },
        };
        let mut done = 0;
        for batch in batches(windows) {
            let sources = encoded.map(|(states, all)| (states, &all[done..done + batch.len()]));
            done += batch.len();
            self.batch(hidden, batch, sources, mask, &bias, cx).in_layer(self.id)?;
        }
        Ok(())
    }

    fn batch(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        encoded: Option<(ArrayView2<'_, f32>, &[Range<usize>])>,
        mask: Mask,
        bias: &Bias,
        cx: &Context,
    ) -> Result<()> {
        let (rows, local) = shifted(windows);
        let mut rows = hidden.slice_mut(s![rows, ..]);
        let own = |w: &Range<usize>| Span { queries: w.clone(), keys: w.clone() };
        let spans: Vec<_> = local.iter().map(own).collect();
        let mixed = self.own.forward(rows.view(), None, &spans, mask, Some(bias), cx)?;
        rows += &mixed;
        let (Some(cross), Some((states, sources))) = (&self.cross, encoded) else { return Ok(()) };
        let (source_rows, keys) = shifted(sources);
        let pair = |(queries, keys)| Span { queries, keys };
        let spans: Vec<_> = local.into_iter().zip(keys).map(pair).collect();
        let states = states.slice(s![source_rows, ..]);
        rows += &cross.forward(rows.view(), Some(states), &spans, Mask::None, None, cx)?;
        Ok(())
    }
}

/// The rows that consecutive windows cover, and the windows relative to their start.
fn shifted(windows: &[Range<usize>]) -> (Range<usize>, Vec<Range<usize>>) {
    let start = windows.first().map_or(0, |w| w.start);
    let end = windows.last().map_or(start, |w| w.end);
    (start..end, windows.iter().map(|w| w.start - start..w.end - start).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_begin_where_the_reference_begins_them() {
        // First distance of each bucket in transformers 5.24 (32 buckets, 128 tokens).
        let starts = |both_ways| {
            let of = |d: usize| bucket(-(d as isize), both_ways, 32, 128);
            (1..300).filter(|&d| of(d) != of(d - 1)).collect::<Vec<_>>()
        };
        assert_eq!(starts(true), [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]);
        assert_eq!(
            starts(false),
            [
                1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19, 21, 24, 27, 31, 35, 40,
                46, 52, 59, 67, 77, 87, 99, 113
            ]
        );
        assert_eq!(bucket(5, true, 32, 128), 16 + 5);
        assert_eq!(bucket(5, false, 32, 128), 0);
    }
}
