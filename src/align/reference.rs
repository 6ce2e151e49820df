//! The reference of an alignment: which expert keeps its order of hidden units.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{ExpertView, Grouping, Measure, Permutation, Samples, SimilarityMatrix};
use crate::par;
use crate::stage::{AlignPair, Aligner, Context, LayerView, Needs};

/// The expert that keeps its order of hidden units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// Expert 0 of the layer, for every group: one common order. The paper's code aligns this way
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

/// Hidden units up to which as many pairs are aligned at a time as there are threads, each on one
/// thread; above it two pairs, whose products use all threads. A pair holds a gain matrix of
/// `d_ff²` `f32`, 64 MiB here: the memory is `threads × 64 MiB` or two large gains. Two and not
/// one, because the assignment runs on one thread and would leave the others idle.
pub(crate) const PARALLEL_THRESHOLD: usize = 4096;

/// Aligns every group of a layer: a permutation per expert of the layer, in order.
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
    let mut references: Vec<Option<usize>> = vec![None; experts.len()];
    for g in 0..grouping.groups() {
        let members = grouping.members(g);
        if members.len() > 1 {
            let kept = reference_of(reference, grouping, g, similarity)?;
            members.into_iter().for_each(|i| references[i] = Some(kept));
        }
    }
    align_units(aligner, &references, layer, &experts, PARALLEL_THRESHOLD, cx)
}

/// The expert whose order of hidden units group `g` takes over; it need not be a member.
///
/// # Errors
/// [`ErrorKind::Missing`] when the medoid is asked for without a similarity table.
pub(crate) fn reference_of(
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

/// Aligns some experts of a layer with one, without the others: a permutation for each of
/// `indices`. `reference` is the index of the expert that keeps its order, and the expert itself;
/// `layer` need not hold experts.
///
/// Cost and memory: as [`align_groups`] up to `d_ff` = [`PARALLEL_THRESHOLD`].
///
/// # Errors
/// [`ErrorKind::Missing`] without samples where they are needed, else those of the aligner, with
/// the expert.
pub(crate) fn align_members(
    aligner: &dyn Aligner,
    reference: (usize, ExpertView<'_>),
    indices: &[usize],
    experts: &[ExpertView<'_>],
    layer: &LayerView<'_>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let pairs = Pairs::new(aligner, layer)?;
    let task = cx.per_task();
    par::map(indices.len(), |i| pairs.align(reference, (indices[i], experts[i]), &task))
}

/// Aligns all experts of a layer, before similarities are computed: a permutation per expert.
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
    let kept = match reference {
        Reference::FirstExpert | Reference::LowestIndex => 0,
        Reference::Dominant => {
            let counts = layer.stats.counts.iter().take(experts.len()).enumerate();
            let most_used = counts.min_by_key(|&(i, &count)| (std::cmp::Reverse(count), i));
            most_used.map_or(0, |(i, _)| i)
        }
        Reference::Medoid => medoid(Some(&router_response(layer, cx)?), &indices)?,
    };
    align_units(aligner, &vec![Some(kept); experts.len()], layer, &experts, PARALLEL_THRESHOLD, cx)
}

/// Fails when the two experts are not of one kind.
pub(super) fn check_pair(pair: &AlignPair<'_>) -> Result<()> {
    if pair.reference.same_kind(&pair.target) {
        return Ok(());
    }
    let shapes = (pair.reference.up.weight.dim(), pair.target.up.weight.dim());
    Err(Error::shape("experts to align (of one kind)", shapes.0, shapes.1))
}

/// Aligns each expert `i` with expert `references[i]`, if there is one.
fn align_units(
    aligner: &dyn Aligner,
    references: &[Option<usize>],
    layer: &LayerView<'_>,
    experts: &[ExpertView<'_>],
    large: usize,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let pairs = Pairs::new(aligner, layer)?;
    let one = |i: usize, cx: &Context| match references[i] {
        Some(kept) => pairs.align((kept, experts[kept]), (i, experts[i]), cx),
        None => Ok(Permutation::identity(experts[i].d_ff())),
    };
    if experts.first().is_none_or(|e| e.d_ff() <= large) {
        let task = cx.per_task();
        return par::map(experts.len(), |i| one(i, &task));
    }
    let mut found: Vec<_> = experts.iter().map(|e| Permutation::identity(e.d_ff())).collect();
    // A reference itself costs nothing, so it takes no place beside another pair.
    let moved: Vec<usize> =
        (0..experts.len()).filter(|&i| references[i].is_some_and(|kept| kept != i)).collect();
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
        (kept, reference): (usize, ExpertView<'_>),
        (i, target): (usize, ExpertView<'_>),
        cx: &Context,
    ) -> Result<Permutation> {
        if i == kept {
            return Ok(Permutation::identity(target.d_ff()));
        }
        let inputs = self.samples.map(|s| s.inputs_of(&[kept, i]));
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
        let references = [Some(2), Some(2), Some(2), None, Some(5), Some(5)];
        let run = |large| {
            let (aligner, cx) = (WeightMatching::default(), Context::cpu(0));
            align_units(&aligner, &references, &view, &experts, large, &cx).unwrap()
        };
        assert_eq!(run(0), run(PARALLEL_THRESHOLD));
        assert_eq!(run(0).iter().filter(|p| p.is_identity()).count(), 3);
    }
}
