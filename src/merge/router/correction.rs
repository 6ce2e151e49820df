//! The correction bias of a narrowed router, rebuilt from loads.

use ndarray::{Array1, ArrayView2};

use crate::error::Result;
use crate::model::{Grouping, Router, Routing, Samples};
use crate::stage::Context;

const ROUNDS: usize = 200;
const STEP: f64 = 0.1;

/// Moves the correction bias of `router` until its groups are chosen as often as their members
/// were; see [`LogSumExpFit`](super::LogSumExpFit) for the rule.
pub(super) fn keep_loads(
    router: Router,
    samples: &Samples,
    grouping: &Grouping,
    cx: &Context,
) -> Result<Router> {
    let m = grouping.groups();
    let start = router.correction().cloned().unwrap_or_else(|| Array1::zeros(m));
    let target = targets(&samples.routing, grouping, router.rule().top_k);
    let logits = router.logits(samples.inputs.view(), cx.compute())?;
    let with = |bias: &Array1<f64>| {
        let bias = Some(bias.mapv(|b| b as f32));
        Router::new(router.weight().to_owned(), router.bias().cloned(), bias, *router.rule())
    };
    let mut bias = start.mapv(f64::from);
    let mut best: Option<(f64, Router)> = None;
    for round in 0..=ROUNDS {
        let candidate = with(&bias)?;
        let load = loads(&candidate, logits.view())?;
        let deviation: f64 = target.iter().zip(&load).map(|(t, l)| (t - l).abs()).sum();
        let step = STEP * (1.0 - round as f64 / ROUNDS as f64);
        bias.iter_mut().zip(target.iter().zip(&load)).for_each(|(b, (t, l))| *b += step * (t - l));
        if best.as_ref().is_none_or(|(least, _)| deviation < *least) {
            best = Some((deviation, candidate));
        }
    }
    Ok(best.map_or(router, |(_, best)| best))
}

/// The share of tokens that chose at least one member of each group, scaled to sum to top-k; no
/// share exceeds 1.
fn targets(routing: &Routing, grouping: &Grouping, top_k: usize) -> Vec<f64> {
    let mut visits = vec![0.0f64; grouping.groups()];
    for chosen in routing.experts.rows() {
        let label = |&e: &u32| grouping.labels().get(e as usize).copied().flatten();
        let mut groups: Vec<usize> = chosen.iter().filter_map(label).collect();
        groups.sort_unstable();
        groups.dedup();
        groups.into_iter().for_each(|g| visits[g] += 1.0);
    }
    fill(visits, top_k as f64)
}

/// Scales `shares` to sum to `total`, with what exceeds 1 spread over the others in proportion.
fn fill(mut shares: Vec<f64>, total: f64) -> Vec<f64> {
    let mut open: Vec<usize> = (0..shares.len()).collect();
    loop {
        let room = total - (shares.len() - open.len()) as f64;
        let sum: f64 = open.iter().map(|&g| shares[g]).sum();
        if sum == 0.0 {
            // Groups that nobody chose share what is left.
            open.iter().for_each(|&g| shares[g] = room / open.len() as f64);
            return shares;
        }
        open.iter().for_each(|&g| shares[g] *= room / sum);
        let (fit, over): (Vec<usize>, Vec<usize>) = open.iter().partition(|&&g| shares[g] <= 1.0);
        if over.is_empty() {
            return shares;
        }
        over.into_iter().for_each(|g| shares[g] = 1.0);
        open = fit;
    }
}

fn loads(router: &Router, logits: ArrayView2<'_, f32>) -> Result<Vec<f64>> {
    let tokens = logits.nrows().max(1) as f64;
    let mut loads = vec![0.0; router.experts()];
    router.route(logits)?.experts.iter().for_each(|&e| loads[e as usize] += 1.0 / tokens);
    Ok(loads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_scaled_within_one() {
        assert_eq!(fill(vec![1.0, 3.0], 1.0), [0.25, 0.75]);
        assert_eq!(fill(vec![8.0, 1.0, 1.0], 2.0), [1.0, 0.5, 0.5]);
        assert_eq!(fill(vec![0.0, 0.0], 2.0), [1.0, 1.0]);
        assert_eq!(fill(vec![5.0, 0.0, 0.0], 2.0), [1.0, 0.5, 0.5]);
    }
}
