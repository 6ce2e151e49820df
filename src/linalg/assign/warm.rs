//! First prices from the strongest common component of the gains.
//!
//! When `gain ≈ u wᵀ`, every row wants the same columns and an auction from flat prices is a long
//! price war. But the optimum of `u wᵀ` is known: sort both (rearrangement inequality). A few rows
//! tell whether there is such a component; gains without one keep flat prices.

use pulp::Arch;

use super::scan;

/// Rows that are looked at.
const SAMPLE: usize = 16;

/// Share of the sample's variance that the component must explain: four times what is expected
/// of unrelated rows.
const SHARE: f64 = 0.25;

/// First prices, and the standard deviation of what they do not explain.
pub(super) struct Warm {
    pub(super) price: Vec<f64>,
    pub(super) noise: f64,
}

/// Looks for a strong component; cost O(n), and one product with the matrix if there is one.
pub(super) fn prices(arch: Arch, gain: &[f32], n: usize) -> Warm {
    let rows: Vec<&[f32]> =
        (0..SAMPLE.min(n)).map(|s| &gain[s * n / SAMPLE.min(n) * n..][..n]).collect();
    let sample: Vec<Vec<f64>> = rows.iter().map(|row| centred(row)).collect();
    // Centring one side of the products is enough.
    let gram: Vec<Vec<f64>> =
        rows.iter().map(|a| sample.iter().map(|b| scan::dot(arch, a, b)).collect()).collect();
    let energy: f64 = gram.iter().enumerate().map(|(i, row)| row[i]).sum();
    let (strength, mix) = leading(&gram);
    let deviation = |energy: f64| (energy.max(0.0) / (sample.len() * n) as f64).sqrt();
    // NaN here is a gain that is not finite: whoever reads the whole matrix reports it.
    if strength.is_nan() || strength <= SHARE * energy {
        return Warm { price: vec![0.0; n], noise: deviation(energy) };
    }
    let mut w = vec![0.0; n];
    for (row, c) in sample.iter().zip(mix) {
        w.iter_mut().zip(row).for_each(|(w, r)| *w += c * r);
    }
    let square: f64 = w.iter().map(|w| w * w).sum();
    let u = gain.chunks_exact(n).map(|row| scan::dot(arch, row, &w) / square).collect();
    Warm { price: sorted_prices(u, &w), noise: deviation(energy - strength) }
}

fn centred(row: &[f32]) -> Vec<f64> {
    let mean = row.iter().map(|&g| f64::from(g)).sum::<f64>() / row.len() as f64;
    row.iter().map(|&g| f64::from(g) - mean).collect()
}

/// The largest eigenvalue of a positive semi-definite matrix and its eigenvector, roughly.
fn leading(gram: &[Vec<f64>]) -> (f64, Vec<f64>) {
    // Starting from the longest row, not from ones: those may be orthogonal to the answer.
    let longest = (0..gram.len()).max_by(|&a, &b| gram[a][a].total_cmp(&gram[b][b]));
    let mut x = longest.map_or_else(Vec::new, |i| gram[i].clone());
    let mut value = 0.0;
    for _ in 0..12 {
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm.is_nan() || norm == 0.0 {
            break;
        }
        x.iter_mut().for_each(|x| *x /= norm);
        let y: Vec<f64> =
            gram.iter().map(|row| row.iter().zip(&x).map(|(g, x)| g * x).sum()).collect();
        value = x.iter().zip(&y).map(|(x, y)| x * y).sum();
        x = y;
    }
    (value, x)
}

/// Optimal prices of `u wᵀ`: in sorted order, `price_{k+1} − price_k = u (w_{k+1} − w_k)` with any
/// `u` between `u_k` and `u_{k+1}`. The middle leaves both rows content by an equal margin.
fn sorted_prices(mut u: Vec<f64>, w: &[f64]) -> Vec<f64> {
    u.sort_unstable_by(f64::total_cmp);
    let mut order: Vec<u32> = (0..w.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| w[a as usize].total_cmp(&w[b as usize]).then(a.cmp(&b)));
    let mut price = vec![0.0; w.len()];
    for k in 1..w.len() {
        let (here, before) = (order[k] as usize, order[k - 1] as usize);
        price[here] = price[before] + (u[k] + u[k - 1]) / 2.0 * (w[here] - w[before]);
    }
    price
}
