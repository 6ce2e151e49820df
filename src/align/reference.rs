//! Who keeps its order of hidden units, and who is lined up with whom.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{ExpertView, LinearView, Measure, Permutation, SimilarityMatrix};
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
const LARGE: usize = 4096;

/// Lines up the members of one group: for each of `indices`, in order, the permutation to apply.
///
/// `experts` are the members, `dominant` the position of the dominant one in `indices`, and
/// `similarity` the table of the whole layer, which only [`Reference::Medoid`] reads. The reference
/// gets the identity; with [`Reference::FirstExpert`] it need not be a member. A group of one is
/// left alone. Cost: one alignment per other member; memory: up to `d_ff` = 4096 a gain matrix per
/// thread, above it two (1.6 GB at `d_ff` = 14336), with the inputs of each pair when the aligner
/// reads samples.
///
/// # Errors
/// [`ErrorKind::Shape`] when the lists do not fit each other, [`ErrorKind::Missing`] without a
/// similarity table, samples or expert 0 where they are needed, else those of the aligner, with the
/// expert.
#[allow(clippy::too_many_arguments)] // Each is a different thing that the caller holds already.
pub fn align_group(
    aligner: &dyn Aligner,
    reference: Reference,
    layer: &LayerView<'_>,
    indices: &[usize],
    dominant: usize,
    experts: &[ExpertView<'_>],
    similarity: Option<&SimilarityMatrix>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let n = indices.len();
    if n == 0 || experts.len() != n || dominant >= n {
        return Err(Error::shape("group to align", (n, n), (experts.len(), dominant)));
    }
    if n == 1 {
        return Ok(vec![Permutation::identity(experts[0].d_ff())]);
    }
    let position = match reference {
        Reference::FirstExpert => indices.iter().position(|&i| i == 0),
        Reference::LowestIndex => (0..n).min_by_key(|&a| indices[a]),
        Reference::Dominant => Some(dominant),
        Reference::Medoid => Some(medoid(similarity, indices)?),
    };
    let frame = match position {
        Some(a) => Frame { index: indices[a], expert: shorter(experts[a]) },
        None => Frame { index: 0, expert: shorter(first_expert(layer, aligner.name())?) },
    };
    line_up(aligner, frame, layer, indices, experts, LARGE, cx)
}

/// Lines up all experts of a layer, before similarities are computed: a permutation per expert.
///
/// [`Reference::FirstExpert`] and [`Reference::LowestIndex`] are the same here. Since there is no
/// similarity table yet, [`Reference::Medoid`] is the medoid by cosine of the router's response:
/// of the logits over all tokens when the statistics hold their Gram matrix, else of the router's
/// rows. Neither depends on the order of hidden units. Cost and memory as [`align_group`].
///
/// # Errors
/// As [`align_group`]; [`ErrorKind::Missing`] when the view holds no experts.
pub fn align_layer(
    aligner: &dyn Aligner,
    reference: Reference,
    layer: &LayerView<'_>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let experts: Vec<_> = layer.experts(aligner.name())?.iter().map(|e| e.view()).collect();
    let indices: Vec<usize> = (0..experts.len()).collect();
    let counts = layer.stats.counts.iter().take(experts.len()).enumerate();
    let most_used = counts.min_by_key(|&(i, &count)| (std::cmp::Reverse(count), i));
    let dominant = most_used.map_or(0, |(i, _)| i);
    let response = match reference {
        Reference::Medoid => Some(router_response(layer, cx)?),
        _ => None,
    };
    let table = response.as_ref();
    align_group(aligner, reference, layer, &indices, dominant, &experts, table, cx)
}

/// Fails when the two experts are not of one kind.
pub(super) fn check_pair(pair: &AlignPair<'_>) -> Result<()> {
    if pair.reference.same_kind(&pair.target) {
        return Ok(());
    }
    let shapes = (pair.reference.up.weight.dim(), pair.target.up.weight.dim());
    Err(Error::shape("experts to align (of one kind)", shapes.0, shapes.1))
}

/// The expert to line up with.
#[derive(Clone, Copy)]
struct Frame<'a> {
    index: usize,
    expert: ExpertView<'a>,
}

fn line_up(
    aligner: &dyn Aligner,
    frame: Frame<'_>,
    layer: &LayerView<'_>,
    indices: &[usize],
    experts: &[ExpertView<'_>],
    large: usize,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let samples = match aligner.needs().contains(Needs::SAMPLES) {
        true => Some(layer.stats.need_samples(aligner.name())?),
        false => None,
    };
    let one = |a: usize, cx: &Context| {
        let (index, target) = (indices[a], experts[a]);
        if index == frame.index {
            return Ok(Permutation::identity(target.d_ff()));
        }
        let inputs = samples.map(|s| s.inputs_of(&[frame.index, index]));
        let inputs = inputs.as_ref().map(|x| x.view());
        let pair = AlignPair { reference: shorter(frame.expert), target: shorter(target), inputs };
        aligner.align(&pair, cx).in_expert(index)
    };
    if frame.expert.d_ff() <= large {
        let task = cx.per_task();
        return par::map(indices.len(), |a| one(a, &task));
    }
    // The reference itself costs nothing, so it takes no place beside another pair.
    let mut found = vec![Permutation::identity(frame.expert.d_ff()); indices.len()];
    let others: Vec<usize> = (0..indices.len()).filter(|&a| indices[a] != frame.index).collect();
    for two in others.chunks(2) {
        let aligned = par::map(two.len(), |i| one(two[i], cx))?;
        two.iter().zip(aligned).for_each(|(&a, p)| found[a] = p);
    }
    Ok(found)
}

/// The same expert under a shorter borrow: array views are invariant in their lifetime, and a pair
/// joins the experts with inputs that live only as long as the pair.
fn shorter<'b, 'a: 'b>(expert: ExpertView<'a>) -> ExpertView<'b> {
    let linear = |l: LinearView<'a>| LinearView {
        weight: l.weight.reborrow(),
        bias: l.bias.map(|b| b.reborrow()),
    };
    ExpertView {
        gate: expert.gate.map(linear),
        up: linear(expert.up),
        down: linear(expert.down),
        activation: expert.activation,
    }
}

fn first_expert<'a>(layer: &LayerView<'a>, stage: &str) -> Result<ExpertView<'a>> {
    let experts = layer.experts(stage)?;
    experts.first().map(|e| e.view()).ok_or_else(|| Error::shape("layer", "an expert", 0))
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
        let run = |large| {
            let frame = Frame { index: 2, expert: experts[2] };
            let (aligner, cx) = (WeightMatching::default(), Context::cpu(0));
            let all = [0, 1, 2, 3, 4, 5];
            line_up(&aligner, frame, &view, &all, &experts, large, &cx).unwrap()
        };
        assert_eq!(run(0), run(LARGE));
        assert_eq!(run(0).iter().filter(|p| p.is_identity()).count(), 1);
    }
}
