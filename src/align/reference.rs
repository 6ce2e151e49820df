//! Who keeps its order of hidden units, and who is lined up with whom.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{ExpertView, Grouping, Measure, Permutation, Samples, SimilarityMatrix};
use crate::par;
use crate::stage::{AlignPair, Aligner, Context, LayerView, Needs};

/// The expert that keeps its order of hidden units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// Expert 0 of the layer, for every group: one common frame. The paper's code aligns this way
    /// before it merges.
    #[default]
    FirstExpert,
    /// The lowest-index member of the group: the paper's code when it aligns while merging.
    LowestIndex,
    /// The group's dominant expert; of a whole layer, the most used one (ties: lowest index).
    Dominant,
    /// The member most similar to all others together (ties: lowest index).
    Medoid,
}

/// Up to this many hidden units as many pairs are aligned at a time as there are threads, each on
/// one thread; above it two pairs, whose products use all threads. A pair holds a gain matrix of
/// `d_ff²` `f32`, 64 MiB here: the memory is `threads × 64 MiB` or two large gains. Two and not
/// one, because the assignment runs on one thread and would leave the others idle.
pub const ALONE: usize = 4096;

/// Lines up every group of a layer: a permutation per expert of the layer, in order.
///
/// Each group's reference gets the identity, and so do dropped experts and groups of one; with
/// [`Reference::FirstExpert`] the reference need not be a member. `similarity` is the table of the
/// layer, which only [`Reference::Medoid`] reads. Cost: one alignment per other member, over all
/// groups at once, so that many small groups keep every thread busy. Memory: up to `d_ff` = 4096 a
/// gain matrix per thread, above it two (1.6 GB at `d_ff` = 14336), with the inputs of each pair
/// when the aligner reads samples.
///
/// # Errors
/// [`ErrorKind::Shape`] when the grouping does not fit, [`ErrorKind::Missing`] without a similarity
/// table, samples or experts where they are needed, else those of the aligner, with the expert.
pub fn align_groups(
    aligner: &dyn Aligner,
    reference: Reference,
    layer: &LayerView<'_>,
    grouping: &Grouping,
    similarity: Option<&SimilarityMatrix>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let experts: Vec<_> = layer.experts(aligner.name())?.iter().map(|e| e.view()).collect();
    if grouping.experts() != experts.len() {
        return Err(Error::shape("grouping to align", experts.len(), grouping.experts()));
    }
    let mut frames: Vec<Option<usize>> = vec![None; experts.len()];
    for g in 0..grouping.groups() {
        let members = grouping.members(g);
        if members.len() > 1 {
            let frame = frame_of(reference, grouping, g, similarity)?;
            members.into_iter().for_each(|i| frames[i] = Some(frame));
        }
    }
    line_up(aligner, &frames, layer, &experts, ALONE, cx)
}

/// The expert that group `g` is lined up with; it need not be a member.
///
/// # Errors
/// [`ErrorKind::Missing`] when the medoid is asked for without a similarity table.
pub fn frame_of(
    reference: Reference,
    grouping: &Grouping,
    g: usize,
    similarity: Option<&SimilarityMatrix>,
) -> Result<usize> {
    let members = grouping.members(g);
    Ok(match reference {
        Reference::FirstExpert => 0,
        Reference::LowestIndex => members[0],
        Reference::Dominant => grouping.dominants()[g],
        Reference::Medoid => members[medoid(similarity, &members)?],
    })
}

/// Lines up some experts of a layer with one, without the others: a permutation for each of
/// `indices`. `frame` is the index of the expert that keeps its order, and the expert itself;
/// `layer` need not hold experts.
///
/// Cost and memory: as [`align_groups`] up to `d_ff` = [`ALONE`].
///
/// # Errors
/// [`ErrorKind::Missing`] without samples where they are needed, else those of the aligner, with
/// the expert.
pub fn align_members(
    aligner: &dyn Aligner,
    frame: (usize, ExpertView<'_>),
    indices: &[usize],
    experts: &[ExpertView<'_>],
    layer: &LayerView<'_>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let pairs = Pairs::new(aligner, layer)?;
    let task = cx.per_task();
    par::map(indices.len(), |i| pairs.align(frame, (indices[i], experts[i]), &task))
}

/// Lines up all experts of a layer, before similarities are computed: a permutation per expert.
///
/// [`Reference::FirstExpert`] and [`Reference::LowestIndex`] are the same here. Since there is no
/// similarity table yet, [`Reference::Medoid`] is the medoid by cosine of the router's response:
/// of the logits over all tokens when the statistics hold their Gram matrix, else of the router's
/// rows. Neither depends on the order of hidden units. Cost and memory as [`align_groups`].
///
/// # Errors
/// As [`align_groups`]; [`ErrorKind::Missing`] when the view holds no experts.
pub fn align_layer(
    aligner: &dyn Aligner,
    reference: Reference,
    layer: &LayerView<'_>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let experts: Vec<_> = layer.experts(aligner.name())?.iter().map(|e| e.view()).collect();
    let indices: Vec<usize> = (0..experts.len()).collect();
    let frame = match reference {
        Reference::FirstExpert | Reference::LowestIndex => 0,
        Reference::Dominant => {
            let counts = layer.stats.counts.iter().take(experts.len()).enumerate();
            let most_used = counts.min_by_key(|&(i, &count)| (std::cmp::Reverse(count), i));
            most_used.map_or(0, |(i, _)| i)
        }
        Reference::Medoid => medoid(Some(&router_response(layer, cx)?), &indices)?,
    };
    line_up(aligner, &vec![Some(frame); experts.len()], layer, &experts, ALONE, cx)
}

/// Fails when the two experts are not of one kind.
pub(super) fn check_pair(pair: &AlignPair<'_>) -> Result<()> {
    if pair.reference.same_kind(&pair.target) {
        return Ok(());
    }
    let shapes = (pair.reference.up.weight.dim(), pair.target.up.weight.dim());
    Err(Error::shape("experts to align (of one kind)", shapes.0, shapes.1))
}

/// `frames[i]` is the expert that expert `i` is lined up with, if any.
fn line_up(
    aligner: &dyn Aligner,
    frames: &[Option<usize>],
    layer: &LayerView<'_>,
    experts: &[ExpertView<'_>],
    large: usize,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let pairs = Pairs::new(aligner, layer)?;
    let one = |i: usize, cx: &Context| match frames[i] {
        Some(frame) => pairs.align((frame, experts[frame]), (i, experts[i]), cx),
        None => Ok(Permutation::identity(experts[i].d_ff())),
    };
    if experts.first().is_none_or(|e| e.d_ff() <= large) {
        let task = cx.per_task();
        return par::map(experts.len(), |i| one(i, &task));
    }
    let mut found: Vec<_> = experts.iter().map(|e| Permutation::identity(e.d_ff())).collect();
    // A reference itself costs nothing, so it takes no place beside another pair.
    let moved: Vec<usize> =
        (0..experts.len()).filter(|&i| frames[i].is_some_and(|frame| frame != i)).collect();
    for two in moved.chunks(2) {
        let aligned = par::map(two.len(), |i| one(two[i], cx))?;
        two.iter().zip(aligned).for_each(|(&i, p)| found[i] = p);
    }
    Ok(found)
}

/// Pairs of experts of one layer, with the inputs that an aligner asks for.
struct Pairs<'a> {
    aligner: &'a dyn Aligner,
    samples: Option<&'a Samples>,
}

impl<'a> Pairs<'a> {
    fn new(aligner: &'a dyn Aligner, layer: &LayerView<'a>) -> Result<Self> {
        let samples = match aligner.needs().contains(Needs::SAMPLES) {
            true => Some(layer.stats.need_samples(aligner.name())?),
            false => None,
        };
        Ok(Self { aligner, samples })
    }

    fn align(
        &self,
        (frame, reference): (usize, ExpertView<'_>),
        (i, target): (usize, ExpertView<'_>),
        cx: &Context,
    ) -> Result<Permutation> {
        if i == frame {
            return Ok(Permutation::identity(target.d_ff()));
        }
        let inputs = self.samples.map(|s| s.inputs_of(&[frame, i]));
        let inputs = inputs.as_ref().map(|x| x.view());
        let (reference, target) = (reference.reborrow(), target.reborrow());
        self.aligner.align(&AlignPair { reference, target, inputs }, cx).in_expert(i)
    }
}

/// Position of the member with the largest sum of similarities to the others.
fn medoid(similarity: Option<&SimilarityMatrix>, indices: &[usize]) -> Result<usize> {
    let Some(table) = similarity else {
        let (stage, needs) = ("alignment to the medoid".into(), "a similarity table".into());
        let remedy = "choose another reference, or compute a similarity first".into();
        return Err(ErrorKind::Missing { stage, needs, remedy }.into());
    };
    let table = table.select(indices)?;
    let sums: Vec<f64> = table
        .similarities()
        .rows()
        .into_iter()
        .enumerate()
        .map(|(a, row)| row.sum() - row[a])
        .collect();
    let better = |a: &usize, b: &usize| {
        sums[*b].total_cmp(&sums[*a]).then_with(|| indices[*a].cmp(&indices[*b]))
    };
    Ok((0..indices.len()).min_by(better).unwrap_or(0))
}

/// Cosine similarity of the experts' router logits, or of their router rows.
fn router_response(layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
    let n = layer.len();
    match &layer.stats.logit_gram {
        Some(gram) if gram.dim() == (n, n) => {
            SimilarityMatrix::from_gram(gram.view(), Measure::Cosine)
        }
        _ => {
            let mut gram = ndarray::Array2::zeros((n, n));
            cx.compute().add_gram(layer.router.weight().t(), &mut gram)?;
            SimilarityMatrix::from_gram(gram.view(), Measure::Cosine)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::align::WeightMatching;
    use crate::model::{Expert, LayerId, MoeLayer, Router, RoutingRule, RoutingStats};
    use ndarray::Array2;

    #[test]
    fn large_experts_line_up_like_small_ones() {
        let matrix = |rows, cols, seed: usize| {
            let value = |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1013) as f32 / 506.5 - 1.0;
            Array2::from_shape_fn((rows, cols), value)
        };
        let expert = |i| Expert::relu(matrix(30, 6, i), matrix(6, 30, i + 9)).unwrap();
        let router = Router::new(matrix(6, 6, 1), None, None, RoutingRule::softmax(1, false));
        let layer =
            MoeLayer::new(LayerId::causal(0), (0..6).map(expert).collect(), router.unwrap());
        let (layer, stats) = (layer.unwrap(), RoutingStats::from_counts(vec![1; 6], 6));
        let view = LayerView::of(&layer, &stats);
        let experts: Vec<_> = layer.experts().iter().map(Expert::view).collect();
        let frames = [Some(2), Some(2), Some(2), None, Some(5), Some(5)];
        let run = |large| {
            let (aligner, cx) = (WeightMatching::default(), Context::cpu(0));
            line_up(&aligner, &frames, &view, &experts, large, &cx).unwrap()
        };
        assert_eq!(run(0), run(ALONE));
        assert_eq!(run(0).iter().filter(|p| p.is_identity()).count(), 3);
    }
}
