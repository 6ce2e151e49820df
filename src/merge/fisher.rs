//! Fisher merging: averages weighted element by element by Fisher information.

use ndarray::{Array1, Array2, Zip};
use serde::{Deserialize, Serialize};

use super::weighted::ReferenceCompat;
use crate::error::{Error, Locate, Result};
use crate::linalg::{Compute, Term};
use crate::model::{Expert, ExpertView, Linear, Permutation, Role, RoutingStats};
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// `W' = Σ_i P_i(F_i) ⊙ P_i(W_i) / Σ_i P_i(F_i)`, element by element, for a diagonal Fisher
/// information `F_i ≥ 0` shaped like the weights.
///
/// An element that no member's loss depends on (`Σ F = 0`) is averaged with equal weights. Biases
/// without Fisher information are averaged with equal weights too.
///
/// Cost: `O(K d f)`; memory of three experts in `f64`.
///
/// Source: Matena and Raffel (arXiv 2111.09832), as a baseline of M-SMoE (arXiv 2310.01334, §4).
/// *Deviations:* the hidden units of `F_i` are permuted with those of `W_i`, which the published
/// code forgets when it aligns; no `1e-7` in the denominator unless [`ReferenceCompat`] asks for
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fisher {
    /// `Σ F + eps` as denominator, without a fallback where `Σ F = 0`.
    pub compat: Option<ReferenceCompat>,
}

impl Stage for Fisher {
    fn name(&self) -> &str {
        "fisher"
    }

    fn needs(&self) -> Needs {
        Needs::FISHER
    }
}

impl Merger for Fisher {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        let eps = self.compat.map(ReferenceCompat::check).transpose()?;
        let all = &members.layer.stats.fisher;
        let all = RoutingStats::need(all, self.name(), "Fisher information")?;
        let of = |&i: &usize| all.get(i).map(Expert::view);
        let fisher: Option<Vec<_>> = members.indices.iter().map(of).collect();
        let short = || Error::shape("Fisher information", members.layer.len(), all.len());
        let fisher = fisher.ok_or_else(short)?;
        for (f, &i) in fisher.iter().zip(members.indices) {
            check(f, &members.experts[0]).in_expert(i)?;
        }
        let average = |role| average(members, &fisher, role, eps, cx.compute());
        let missing = || Error::range("expert", "an up and a down projection", "none");
        Expert::new(
            average(Role::Gate)?,
            average(Role::Up)?.ok_or_else(missing)?,
            average(Role::Down)?.ok_or_else(missing)?,
            members.experts[0].activation,
        )
    }
}

/// Fisher information has the shapes of the weights and no negative entry.
fn check(fisher: &ExpertView<'_>, expert: &ExpertView<'_>) -> Result<()> {
    for (role, linear) in expert.linears() {
        let shape = linear.weight.dim();
        let found = fisher.linear(role).map(|l| l.weight);
        let Some(weight) = found.filter(|w| w.dim() == shape) else {
            return Err(Error::shape("Fisher information", shape, found.map(|w| w.dim())));
        };
        if let Some(x) = weight.iter().find(|&&x| x < 0.0) {
            return Err(Error::range("Fisher information", "0 or more", x));
        }
    }
    Ok(())
}

/// `Σ F ⊙ W`, `Σ F` and `Σ W`, in `f64`.
struct Sums {
    product: Array2<f64>,
    fisher: Array2<f64>,
    plain: Array2<f64>,
}

fn average(
    members: &Members<'_>,
    fisher: &[ExpertView<'_>],
    role: Role,
    eps: Option<f64>,
    compute: &dyn Compute,
) -> Result<Option<Linear>> {
    let Some(first) = members.experts[0].linear(role) else { return Ok(None) };
    let zero = || Array2::zeros(first.weight.dim());
    let mut sums = Sums { product: zero(), fisher: zero(), plain: zero() };
    let mut bias = first.bias.map(|b| Array1::<f64>::zeros(b.len()));
    for ((expert, fisher), p) in members.experts.iter().zip(fisher).zip(members.permutations) {
        let gathered = |of: &ExpertView<'_>| gather(of, role, p, compute);
        let (w, f) = (gathered(expert)?, gathered(fisher)?);
        Zip::from(&mut sums.product).and(&f).and(&w).for_each(|s, &f, &w| *s += wide(f) * wide(w));
        sums.fisher.zip_mut_with(&f, |s, &f| *s += wide(f));
        sums.plain.zip_mut_with(&w, |s, &w| *s += wide(w));
        if let (Some(sum), Some(b)) = (&mut bias, expert.linear(role).and_then(|l| l.bias)) {
            let at = |a: usize| if role == Role::Down { a } else { p.as_slice()[a] as usize };
            sum.iter_mut().enumerate().for_each(|(a, s)| *s += wide(b[at(a)]));
        }
    }
    let n = members.experts.len() as f64;
    let mut weight = Array2::zeros(first.weight.dim());
    Zip::from(&mut weight).and(&sums.product).and(&sums.fisher).and(&sums.plain).for_each(
        |out, &product, &fisher, &plain| {
            *out = match eps {
                Some(eps) if fisher + eps > 0.0 => product / (fisher + eps),
                _ if fisher > 0.0 => product / fisher,
                _ => plain / n,
            } as f32;
        },
    );
    Ok(Some(Linear { weight, bias: bias.map(|sum| sum.mapv(|s| (s / n) as f32)) }))
}

fn gather(
    expert: &ExpertView<'_>,
    role: Role,
    p: &Permutation,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let absent = || Error::range("expert", format!("a {role} projection"), "none");
    let matrix = expert.linear(role).ok_or_else(absent)?.weight;
    let gather = Some(p.as_slice());
    let (rows, cols) = if role == Role::Down { (None, gather) } else { (gather, None) };
    compute.weighted_sum(&[Term { weight: 1.0, matrix, rows, cols }])
}

fn wide(x: f32) -> f64 {
    f64::from(x)
}
