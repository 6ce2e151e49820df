//! Compression of one merged layer: what the compressor promised is checked, and what it did is
//! measured for the report.

use crate::decompose::analysis::{mean_change, stable_rank};
use crate::error::{Error, Locate, Result};
use crate::model::{Activation, Expert, Factored, Grouping, MergedLayer, MoeLayer, Role};
use crate::par;
use crate::pipeline::report::{self, Change, CompressionReport, Kind, StableRanks};
use crate::stage::{Compressed, Compression, Compressor, Context, ExpertStorage, Kept};

/// Stable ranks of a layer's matrices before merging: for every group, and in it for gate (if any),
/// up and down, the mean over the group's members.
pub(crate) fn original_ranks(
    layer: &MoeLayer,
    grouping: &Grouping,
    cx: &Context,
) -> Result<Vec<f64>> {
    let ranks = stable_ranks(layer.experts(), cx)?;
    let roles = ranks.len() / layer.experts().len();
    let mean = |g: usize, role: usize| {
        let members = grouping.members(g);
        let sum: f64 = members.iter().map(|&e| ranks[e * roles + role]).sum();
        sum / members.len() as f64
    };
    let groups = 0..grouping.groups();
    Ok(groups
        .flat_map(|g| (0..roles).map(move |role| (g, role)))
        .map(|(g, role)| mean(g, role))
        .collect())
}

/// The layer with its experts compressed, and a report on it. `original` are the
/// [`original_ranks`].
///
/// # Errors
/// Those of the compressor; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange), with the
/// compressor's name, when it returns something else than its
/// [`storage`](Compressor::storage) says.
pub(crate) fn compress(
    compressor: &dyn Compressor,
    mut layer: MergedLayer,
    original: &[f64],
    task: &Compression<'_>,
    cx: &Context,
) -> Result<(MergedLayer, CompressionReport)> {
    let inputs = task.inputs.filter(|_| compressor.uses_inputs());
    let done = compressor.compress(&layer, &Compression { inputs, ..*task }, cx)?;
    check_result(compressor, &layer, task, &done)?;
    let merged = stable_ranks(&layer.experts, cx)?;
    let compressed = stable_ranks(&done.experts, cx)?;
    let report = describe(&layer, done.parameters, [original, &merged, &compressed]);
    layer.experts = done.experts;
    layer.factors = done.factors;
    Ok((layer, report))
}

/// Stable ranks of all matrices, expert by expert.
fn stable_ranks(experts: &[Expert], cx: &Context) -> Result<Vec<f64>> {
    let roles = |(e, expert): (usize, &Expert)| {
        expert.view().linears().map(|(role, _)| (e, role)).collect::<Vec<_>>()
    };
    let matrices: Vec<(usize, Role)> = experts.iter().enumerate().flat_map(roles).collect();
    let inner = cx.per_task();
    par::map(matrices.len(), |i| {
        let (e, role) = matrices[i];
        let linear = experts[e].view().linear(role);
        linear.map_or(Ok(0.0), |l| stable_rank(l.weight, &inner)).in_expert(e)
    })
}

/// Holds every compressor, a user's own included, to its promise.
fn check_result(
    compressor: &dyn Compressor,
    layer: &MergedLayer,
    task: &Compression<'_>,
    done: &Compressed,
) -> Result<()> {
    let what = || format!("result of compressor `{}`", compressor.name());
    let experts = layer.experts.len();
    if done.experts.len() != experts {
        return Err(Error::range(what(), format!("{experts} experts"), done.experts.len()));
    }
    let like = layer.experts[0].view();
    let storage = compressor.storage(like.up.weight.dim())?;
    let d_ff = match storage {
        ExpertStorage::HiddenUnits(units) => units,
        _ => like.d_ff(),
    };
    for (e, expert) in done.experts.iter().enumerate() {
        let found = kind(expert);
        let expected = Form { d_ff, ..kind(&layer.experts[e]) };
        if found != expected {
            let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
            return Err(Error::range(what(), expected, found)).in_expert(e);
        }
    }
    let same = storage.matrices(like.gate.is_some()).map(|kept| vec![kept; experts]);
    let kept = same.as_deref().or(match storage {
        ExpertStorage::Allocated => task.allocated,
        _ => None,
    });
    let factors = done.factors.as_deref().unwrap_or_default();
    for e in 0..factors.len().max(kept.map_or(0, <[_]>::len)) {
        let kept = kept.and_then(|kept| kept.get(e)).map_or(&[][..], |kept| kept);
        let found = factors.get(e).map_or(&[][..], |found| found);
        check_factors(what, kept, found).in_expert(e)?;
    }
    Ok(())
}

/// Factors of an expert's matrices against what is kept of them: of that structure, and within
/// that rank and number of rows. A folder holds no more than that, and no other export may.
fn check_factors(
    what: impl Fn() -> String,
    kept: &[Kept],
    found: &[Option<Factored>],
) -> Result<()> {
    for at in 0..kept.len().max(found.len()) {
        let promised = kept.get(at).copied().unwrap_or(Kept::Dense);
        let found = found.get(at).and_then(Option::as_ref);
        let fits = match (promised, found) {
            (Kept::Dense, None) => true,
            (Kept::Factors { budget, structure }, Some(found)) => {
                found.structure() == structure
                    && found.rank() <= budget.rank
                    && found.indices().len() == budget.rows
            }
            _ => false,
        };
        if !fits {
            let form = |f: &Factored| (f.structure(), f.rank(), f.indices().len());
            let found = found.map_or("a dense matrix".into(), |f| format!("{:?}", form(f)));
            return Err(Error::range(what(), format!("matrix {at} as {promised:?}"), found));
        }
    }
    Ok(())
}

/// What an expert is like, apart from its numbers.
#[derive(Debug, PartialEq)]
struct Form {
    activation: Activation,
    d_ff: usize,
    d_model: usize,
    gated: bool,
    biases: bool,
}

fn kind(expert: &Expert) -> Form {
    let view = expert.view();
    let biases = view.linears().any(|(_, linear)| linear.bias.is_some());
    Form {
        activation: view.activation,
        d_ff: view.d_ff(),
        d_model: view.d_model(),
        gated: view.gate.is_some(),
        biases,
    }
}

/// The report on a layer that is stored in `parameters` numbers now; `layer` is it before. The
/// stable ranks are those of the original, the merged and the compressed matrices.
fn describe(layer: &MergedLayer, parameters: u64, ranks: [&[f64]; 3]) -> CompressionReport {
    let experts = layer.experts.len() as u64;
    let kind = Kind::of(&layer.experts[0]);
    let parameters = Change { before: experts * kind.parameters, after: parameters };
    let router = layer.narrowed.as_ref().unwrap_or(&layer.router);
    let flops = |parameters: u64| {
        let kind = Kind { parameters: parameters / experts, ..kind };
        report::flops_per_token(kind, router.rule(), router.experts())
    };
    let [original, merged, compressed] = ranks;
    let mean = |ranks: &[f64]| ranks.iter().sum::<f64>() / ranks.len().max(1) as f64;
    CompressionReport {
        parameters,
        flops_per_token: Change {
            before: flops(parameters.before),
            after: flops(parameters.after),
        },
        stable_rank: StableRanks {
            original: mean(original),
            merged: mean(merged),
            compressed: mean(compressed),
            merging: mean_change(original, merged),
            compressing: mean_change(merged, compressed),
        },
    }
}
