use ndarray::{Array1, Array2, ArrayView2, s};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use pulp::Arch;

use super::scan::{self, Sieve};
use super::{Assignment, assign, assign_within};
use crate::error::ErrorKind;

/// The oracle: the textbook O(n³) Hungarian method with row and column potentials, in `f64`.
fn hungarian(gain: &ArrayView2<'_, f32>) -> f64 {
    let n = gain.nrows();
    let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    let mut row = vec![0; n + 1];
    for i in 1..=n {
        row[0] = i;
        let mut way = vec![0; n + 1];
        let (mut low, mut used) = (vec![f64::INFINITY; n + 1], vec![false; n + 1]);
        let mut j0 = 0;
        while row[j0] != 0 {
            used[j0] = true;
            let (i0, mut delta, mut j1) = (row[j0], f64::INFINITY, 0);
            for j in (1..=n).filter(|&j| !used[j]) {
                let cost = -f64::from(gain[[i0 - 1, j - 1]]) - u[i0] - v[j];
                if cost < low[j] {
                    (low[j], way[j]) = (cost, j0);
                }
                if low[j] < delta {
                    (delta, j1) = (low[j], j);
                }
            }
            for j in 0..=n {
                if used[j] {
                    u[row[j]] += delta;
                    v[j] -= delta;
                } else {
                    low[j] -= delta;
                }
            }
            j0 = j1;
        }
        while j0 != 0 {
            row[j0] = row[way[j0]];
            j0 = way[j0];
        }
    }
    (1..=n).map(|j| f64::from(gain[[row[j] - 1, j - 1]])).sum()
}

fn by_brute_force(gain: &ArrayView2<'_, f32>, row: usize, used: u32) -> f64 {
    if row == gain.nrows() {
        return 0.0;
    }
    let open = (0..gain.ncols()).filter(|j| used & (1 << j) == 0);
    let with = |j| f64::from(gain[[row, j]]) + by_brute_force(gain, row + 1, used | (1 << j));
    open.map(with).fold(f64::NEG_INFINITY, f64::max)
}

/// A permutation, its objective, and a gap that covers the optimum.
fn check(gain: &ArrayView2<'_, f32>, found: &Assignment, optimum: f64) {
    let n = gain.nrows();
    let mut seen = vec![false; n];
    found.columns.iter().for_each(|&j| seen[j as usize] = true);
    assert!(found.columns.len() == n && seen.into_iter().all(|s| s), "not a permutation");
    let total: f64 = (0..n).map(|i| f64::from(gain[[i, found.columns[i] as usize]])).sum();
    assert_eq!(found.objective, total);
    // The oracle's own sum is rounded too.
    let largest = gain.iter().fold(0.0, |m: f64, g| m.max(f64::from(g.abs())));
    let rounding = (n * n) as f64 * f64::EPSILON * largest;
    assert!(found.gap >= 0.0 && optimum - found.objective <= found.gap + rounding);
}

/// What [`assign`] promises, with room for prices that are up to `4 n` times the gains.
fn check_exact(gain: &ArrayView2<'_, f32>, optimum: f64) -> Assignment {
    let found = assign(gain.view()).unwrap();
    check(gain, &found, optimum);
    let (n, largest) = (gain.nrows() as f64, gain.iter().fold(0.0, |m: f32, g| m.max(g.abs())));
    let rounding = 20.0 * n * n * f64::EPSILON * f64::from(largest);
    assert!(found.gap <= rounding, "gap {} above {rounding}", found.gap);
    assert!((optimum - found.objective).abs() <= rounding, "{optimum} {}", found.objective);
    found
}

fn normal(n: usize, m: usize, rng: &mut ChaCha8Rng) -> Array2<f32> {
    // Irwin and Hall: the sum of twelve uniforms is normal enough.
    Array2::from_shape_simple_fn((n, m), || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)
}

fn shuffled(n: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order
}

/// Rows of `a` in another order, with noise, against `a`: `(gain, planted)`.
fn planted(n: usize, d: usize, noise: f32, rng: &mut ChaCha8Rng) -> (Array2<f32>, Vec<usize>) {
    let (a, order) = (normal(n, d, rng), shuffled(n, rng));
    let mut b = normal(n, d, rng) * noise;
    for (i, &to) in order.iter().enumerate() {
        let mut row = b.row_mut(to);
        row += &a.row(i);
    }
    (a.dot(&b.t()), order)
}

fn outer(u: &Array1<f32>, w: &Array1<f32>) -> Array2<f32> {
    Array2::from_shape_fn((u.len(), w.len()), |(i, j)| u[i] * w[j])
}

/// One matrix of each family that has been slow or wrong in some solver.
fn families(n: usize, seed: u64) -> Vec<(&'static str, Array2<f32>)> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let noise = normal(n, n, rng);
    let (u, w) = (normal(1, n, rng).row(0).to_owned(), normal(1, n, rng).row(0).to_owned());
    let (a, b) = (normal(n, 2 * n, rng), normal(n, 2 * n, rng));
    let flat = normal(n, 2, rng).dot(&normal(2, n, rng));
    let blocks = normal(n / 16 + 1, n / 16 + 1, rng);
    let blocks = Array2::from_shape_fn((n, n), |(i, j)| blocks[[i / 16, j / 16]]);
    let columns = Array2::from_shape_fn((n, n), |(i, j)| 3.0 * u[i] + 5.0 * w[j]) + &noise;
    let sparse = noise.mapv(|x| f32::from(x > 2.0));
    let line = Array2::from_shape_fn((n, n), |(i, j)| -(u[i] - w[j]).abs());
    vec![
        ("unrelated", a.dot(&b.t())),
        ("noisy 0.5", planted(n, 2 * n, 0.5, rng).0),
        ("noisy 8", planted(n, 2 * n, 8.0, rng).0),
        ("rank 1", outer(&u, &w)),
        ("rank 1, noise 1e-3", outer(&u, &w) + 1e-3 * &noise),
        ("rank 1, noise 1e-2", outer(&u, &w) + 1e-2 * &noise),
        ("rank 1, positive", outer(&u.mapv(f32::exp), &w.mapv(f32::exp))),
        ("rank 2", flat),
        ("constant", Array2::from_elem((n, n), 3.0)),
        ("zero", Array2::zeros((n, n))),
        ("rounded", noise.mapv(f32::round)),
        ("offset", &noise + 1e6),
        ("tiny", &noise * 1e-30),
        ("huge", &noise * 1e30),
        ("blocks", blocks),
        ("strong columns", columns),
        ("sparse", sparse),
        ("points on a line", line),
    ]
}

#[test]
fn every_family_matches_the_oracle() {
    for n in [1, 2, 17, 64, 65, 130, 200] {
        for (name, gain) in families(n, n as u64) {
            let optimum = hungarian(&gain.view());
            let exact = check_exact(&gain.view(), optimum);
            for relative in [f64::INFINITY, 1e-1, 1e-3, 1e-6] {
                let found = assign_within(gain.view(), relative).unwrap();
                check(&gain.view(), &found, optimum);
                let met = found.gap <= relative * found.objective.abs();
                assert!(met || found == exact, "{name} {n}: {found:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn small_matrices_match_brute_force(
        (n, values) in (0_usize..8).prop_flat_map(|n| {
            // Few distinct values, so that most matrices are full of ties.
            (Just(n), prop::collection::vec(-3_i8..4, n * n))
        }),
        scale in prop::sample::select(vec![1.0_f32, 0.1, 1e6]),
    ) {
        let values = values.into_iter().map(|x| f32::from(x) * scale).collect();
        let gain = Array2::from_shape_vec((n, n), values).unwrap();
        check_exact(&gain.view(), by_brute_force(&gain.view(), 0, 0));
    }
}

#[test]
fn a_planted_permutation_is_recovered() {
    let (gain, order) = planted(300, 600, 0.5, &mut ChaCha8Rng::seed_from_u64(7));
    let found = assign(gain.view()).unwrap();
    assert!(found.columns.iter().zip(&order).all(|(&j, &to)| j as usize == to));
}

#[test]
fn the_layout_changes_neither_the_optimum_nor_the_error() {
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let wide = normal(60, 120, rng);
    let strided = wide.slice(s![.., ..;2]);
    let dense = strided.as_standard_layout().into_owned();
    let expected = assign(dense.view()).unwrap();
    assert_eq!(assign(strided).unwrap(), expected);
    let column_major = dense.t().as_standard_layout().into_owned();
    assert_eq!(assign(column_major.t()).unwrap().columns, expected.columns);
}

#[test]
fn repeated_solves_have_the_same_bits() {
    for (_, gain) in families(90, 11) {
        for relative in [0.0, 1e-3] {
            let once = assign_within(gain.view(), relative).unwrap();
            assert_eq!(once, assign_within(gain.view(), relative).unwrap());
        }
    }
}

#[test]
fn empty_and_single() {
    let none = assign(Array2::zeros((0, 0)).view()).unwrap();
    assert_eq!(none, Assignment { columns: vec![], objective: 0.0, gap: 0.0 });
    let one = assign(Array2::from_elem((1, 1), -2.5).view()).unwrap();
    assert_eq!((one.columns, one.objective), (vec![0], -2.5));
}

#[test]
fn bad_input_is_an_error() {
    let oblong = assign(Array2::zeros((2, 3)).view()).unwrap_err();
    assert!(matches!(oblong.kind(), ErrorKind::Shape { .. }));
    for gap in [-1e-9, f64::NAN] {
        let error = assign_within(Array2::zeros((2, 2)).view(), gap).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }));
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (i, j) in [(0, 0), (40, 77), (99, 99)] {
            let mut gain = normal(100, 100, &mut ChaCha8Rng::seed_from_u64(1));
            (gain[[i, j]], gain[[99, 98]]) = (bad, f32::NAN);
            let expected = if (i, j) == (99, 99) { 9998 } else { 100 * i + j };
            let column_major = gain.t().as_standard_layout().into_owned();
            for view in [gain.view(), column_major.t()] {
                let error = assign(view).unwrap_err();
                let ErrorKind::NotFinite { index, .. } = error.kind() else { panic!("{error}") };
                assert_eq!(*index, expected);
            }
        }
    }
}

#[test]
fn the_sieve_keeps_the_best_and_bounds_the_rest_on_every_instruction_set() {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    for n in [1, 7, 63, 64, 65, 200, 1100, 2500] {
        // Rounded, so that many columns tie at the threshold.
        let gain = normal(1, n, rng).mapv(|x| (4.0 * x).round()).into_raw_vec_and_offset().0;
        let price: Vec<f64> = (0..n).map(|_| f64::from(rng.random_range(0..4))).collect();
        let value = |j: usize| f64::from(gain[j]) - price[j];
        let start = n / 3;
        let mut order: Vec<usize> = (start..n).chain(0..start).collect();
        order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
        for k in [1, 2, 16, 150, n].into_iter().filter(|&k| k <= n) {
            for floor in [f64::NEG_INFINITY, value(order[k - 1])] {
                let mut bounds = vec![];
                for arch in [Arch::Scalar, Arch::new()] {
                    let mut sieve = Sieve::new(arch, n);
                    bounds.push(sieve.top(&gain, &price, k, floor, start).to_bits());
                    let mut found: Vec<usize> = sieve.top.iter().map(|x| x.1 as usize).collect();
                    let mut expected = order[..k].to_vec();
                    found.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(found, expected, "n = {n}, k = {k}");
                }
                let expected = order.get(k).map_or(f64::NEG_INFINITY, |&j| value(j));
                assert!(bounds.iter().all(|&b| b == expected.to_bits()), "n = {n}, k = {k}");
            }
        }
        let best = |arch| scan::best(arch, &gain, &price);
        assert_eq!((best(Arch::Scalar), best(Arch::new())), (value(order[0]), value(order[0])));
        let dot = |arch| scan::dot(arch, &gain, &price).to_bits();
        assert_eq!(dot(Arch::Scalar), dot(Arch::new()));
    }
}
