//! A target size shared by the matrices of all layers.

use std::collections::BTreeMap;

use crate::decompose::ranks::{Allocation, allocate};
use crate::error::{ErrorKind, Result};
use crate::model::{LayerId, Structure};
use crate::stage::{Kept, RankBudget, Spectrum};

/// What is kept of every matrix, layer by layer and expert by expert, so that the matrices take at
/// most `target − fixed` bytes, by [`allocate`]. `surveyed` has the spectra of each layer with the
/// bytes of a number as their [unit](Spectrum::unit); `fixed` is what no rank changes.
///
/// # Errors
/// [`ErrorKind::Budget`], with the least size that can be reached, when rank `least_rank` in every
/// matrix is too much; else those of [`allocate`].
pub fn allocate_bytes(
    surveyed: Vec<(LayerId, Vec<Vec<Spectrum>>)>,
    (target, fixed): (u64, u64),
    least_rank: usize,
) -> Result<BTreeMap<LayerId, Vec<Vec<Kept>>>> {
    let mut counts: Vec<(LayerId, Vec<usize>)> = Vec::new();
    let mut spectra = Vec::new();
    for (id, experts) in surveyed {
        counts.push((id, experts.iter().map(Vec::len).collect()));
        spectra.extend(experts.into_iter().flatten());
    }
    let left = target.saturating_sub(fixed) as usize;
    let chosen = allocate(&spectra, left, least_rank).map_err(|error| {
        // The matrices' share of the bytes says nothing to who asked for a size.
        let Some(least) = least_bytes(&spectra, least_rank) else { return error };
        let least = fixed + least;
        let percent = 100.0 * least as f64 / target.max(1) as f64;
        let reason = format!(
            "the least reachable size is {least} bytes, at rank {least_rank} in every matrix: \
             {percent:.1} % of the {target} bytes asked for; keep fewer experts or allow more"
        );
        ErrorKind::Budget { reason }.into()
    })?;
    let mut chosen = chosen.into_iter().map(kept);
    let mut of_expert = |matrices: usize| chosen.by_ref().take(matrices).collect();
    let mut of_layer = |experts: Vec<usize>| experts.into_iter().map(&mut of_expert).collect();
    Ok(counts.into_iter().map(|(id, experts)| (id, of_layer(experts))).collect())
}

fn kept(allocation: Allocation) -> Kept {
    match allocation {
        Allocation::Dense => Kept::Dense,
        Allocation::Rank(rank) => {
            Kept::Factors { budget: RankBudget::rank(rank), structure: Structure::Rows }
        }
    }
}

/// What the least rank takes in all matrices, if those are spectra at all.
fn least_bytes(spectra: &[Spectrum], rank: usize) -> Option<u64> {
    let size = |s: &Spectrum| {
        let (m, n) = s.shape;
        (s.unit * (rank * (m + n)).min(m * n)) as u64
    };
    let valid = spectra.iter().all(|s| s.weight.is_finite() && s.weight >= 0.0);
    valid.then(|| spectra.iter().map(size).sum())
}
