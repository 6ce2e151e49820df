//! Laws of the factorisations, for every implementation in this build, on views of any strides.

#[allow(dead_code)]
use crate::support::backends::backends;
use mcsmoe::ErrorKind;
use mcsmoe::linalg::{Cpu, LinalgBackend, Randomized, SvdMethod, rsvd, truncated_svd};
use ndarray::{Array2, ArrayView2, array, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn matrix(m: usize, n: usize, seed: u64) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
}

const SHAPES: [(usize, usize); 8] =
    [(1, 1), (1, 6), (6, 1), (5, 9), (9, 5), (60, 60), (200, 40), (40, 200)];

/// One matrix, laid out in every way that a view can have: by rows, by columns, with gaps,
/// backwards, and as a part of a larger one.
fn layouts<T: Copy + Default>(a: &Array2<T>, check: &mut dyn FnMut(ArrayView2<'_, T>)) {
    let (m, n) = a.dim();
    check(a.view());
    let mut by_columns = Array2::default((n, m));
    by_columns.assign(&a.t());
    check(by_columns.t());
    let mut gaps = Array2::default((2 * m, 3 * n + 1));
    gaps.slice_mut(s![..;2, 1..;3]).assign(a);
    check(gaps.slice(s![..;2, 1..;3]));
    let mut backwards = Array2::default((m, n));
    backwards.slice_mut(s![..;-1, ..;-1]).assign(a);
    check(backwards.slice(s![..;-1, ..;-1]));
}

fn close(a: &Array2<f32>, b: &Array2<f32>, scale: f32) {
    assert_eq!(a.dim(), b.dim());
    let off = (a - b).iter().fold(0.0f32, |m, e| m.max(e.abs()));
    assert!(off <= 2e-5 * scale, "{off} of {scale}");
}

fn close64(a: &Array2<f64>, b: &Array2<f64>, scale: f64) {
    assert_eq!(a.dim(), b.dim());
    let off = (a - b).iter().fold(0.0f64, |m, e| m.max(e.abs()));
    assert!(off <= 1e-12 * scale, "{off} of {scale}");
}

#[test]
fn the_svd_multiplies_to_the_matrix_and_has_orthonormal_vectors() {
    for backend in backends() {
        for (m, n) in SHAPES {
            let (a, k) = (matrix(m, n, 1), m.min(n));
            let alone = backend.singular_values(a.view()).unwrap();
            layouts(&a, &mut |view| {
                let f = backend.svd(view).unwrap();
                assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((m, k), k, (k, n)));
                assert!(f.s.windows(2).all(|w| w[0] >= w[1]) && f.s[k - 1] >= 0.0);
                close(&f.product(&Cpu::new()).unwrap(), &a, f.s[0].max(1.0));
                close(&f.u.t().dot(&f.u), &Array2::eye(k), 1.0);
                close(&f.vt.dot(&f.vt.t()), &Array2::eye(k), 1.0);
                assert!(f.s.iter().zip(&alone).all(|(a, b)| (a - b).abs() <= 4e-6 * f.s[0]));
                assert!(f.u.is_standard_layout() && f.vt.is_standard_layout());
            });
        }
        let empty = backend.svd(Array2::zeros((0, 4)).view()).unwrap();
        assert_eq!((empty.u.dim(), empty.s.len(), empty.vt.dim()), ((0, 0), 0, (0, 4)));
        let zero = backend.svd(Array2::zeros((3, 2)).view()).unwrap();
        assert_eq!(zero.s, [0.0, 0.0]);
    }
}

#[test]
fn qr_multiplies_to_the_matrix_also_without_rank() {
    for backend in backends() {
        for (m, n) in SHAPES {
            let mut a = matrix(m, n, 2);
            for rank in ["full", "lost"] {
                if rank == "lost" {
                    a.column_mut(0).fill(0.0);
                }
                layouts(&a, &mut |view| {
                    let f = backend.qr(view).unwrap();
                    let k = m.min(n);
                    assert_eq!((f.q.dim(), f.r.dim()), ((m, k), (k, n)));
                    close(&f.q.dot(&f.r), &a, (m as f32).sqrt());
                    close(&f.q.t().dot(&f.q), &Array2::eye(k), 1.0);
                    assert!(f.r.indexed_iter().all(|((i, j), &x)| i <= j || x == 0.0));
                });
            }
        }
        let empty = backend.qr(Array2::zeros((3, 0)).view()).unwrap();
        assert_eq!((empty.q.dim(), empty.r.dim()), ((3, 0), (0, 0)));
    }
}

#[test]
fn eigenvectors_multiply_to_the_lower_triangle() {
    for backend in backends() {
        for n in [1, 2, 7, 60] {
            let half = matrix(n, n, 3).mapv(f64::from);
            let full = &half + &half.t();
            // What is above the diagonal is not read.
            let a = Array2::from_shape_fn((n, n), |(i, j)| match i >= j {
                true => full[[i, j]],
                false => 1e9,
            });
            layouts(&a, &mut |view| {
                let e = backend.eigh(view).unwrap();
                let scaled = &e.vectors * &ndarray::aview1(&e.values);
                close64(&scaled.dot(&e.vectors.t()), &full, 10.0 * n as f64);
                close64(&e.vectors.t().dot(&e.vectors), &Array2::eye(n), 10.0 * n as f64);
                assert!(e.values.windows(2).all(|w| w[0] >= w[1]));
                let alone = backend.eigenvalues(view).unwrap();
                approx::assert_abs_diff_eq!(alone[..], e.values[..], epsilon = 1e-11);
            });
        }
        assert!(backend.eigh(Array2::zeros((0, 0)).view()).unwrap().values.is_empty());
    }
}

#[test]
fn cholesky_factors_and_solves() {
    for backend in backends() {
        for n in [1, 3, 50] {
            let x = matrix(2 * n, n, 4).mapv(f64::from);
            let gram = x.t().dot(&x) + Array2::<f64>::eye(n);
            let rhs = matrix(n, 4, 5).mapv(f64::from);
            // What is above the diagonal is not read, not even a NaN.
            let half = Array2::from_shape_fn((n, n), |(i, j)| match i >= j {
                true => gram[[i, j]],
                false => f64::NAN,
            });
            layouts(&half, &mut |view| {
                let lower = backend.cholesky(view).unwrap();
                close64(&lower.dot(&lower.t()), &gram, 10.0 * n as f64);
                assert!(lower.indexed_iter().all(|((i, j), &x)| i >= j || x == 0.0));
                layouts(&rhs, &mut |rhs| {
                    let x = backend.solve_spd(view, rhs).unwrap();
                    close64(&gram.dot(&x), &rhs.to_owned(), 100.0 * n as f64);
                    let x = backend.solve_ridged(&mut half.clone(), 0.5, rhs).unwrap();
                    close64(&(gram.dot(&x) + 0.5 * &x), &rhs.to_owned(), 100.0 * n as f64);
                });
            });
            let lower = backend.cholesky(half.view()).unwrap();
            let dirty = Array2::from_shape_fn((n, n), |(i, j)| match i >= j {
                true => lower[[i, j]],
                false => f64::NAN,
            });
            layouts(&dirty, &mut |view| {
                let down = backend.solve_lower(view, rhs.view()).unwrap();
                close64(&lower.dot(&down), &rhs, 10.0 * n as f64);
                let up = backend.solve_lower_transposed(view, rhs.view()).unwrap();
                close64(&lower.t().dot(&up), &rhs, 10.0 * n as f64);
            });
        }
        assert_eq!(backend.cholesky(Array2::zeros((0, 0)).view()).unwrap().len(), 0);
        let none = backend.solve_spd(Array2::eye(2).view(), Array2::zeros((2, 0)).view());
        assert_eq!(none.unwrap().dim(), (2, 0));
    }
}

#[test]
fn the_leading_triplets_meet_eckart_and_young() {
    let a = matrix(160, 220, 6);
    for backend in backends() {
        let sigma = backend.singular_values(a.view()).unwrap();
        for rank in [1, 20, 150] {
            let best: f64 = sigma[rank..].iter().map(|&s| f64::from(s).powi(2)).sum();
            let randomized = SvdMethod::Randomized(Randomized::default());
            for (method, excess) in
                [(SvdMethod::Full, 1e-4), (SvdMethod::Gram, 1e-4), (randomized, 2e-2)]
            {
                let f = truncated_svd(a.view(), rank, method, 7, &Cpu::new(), &*backend).unwrap();
                let gap = &a - &f.product(&Cpu::new()).unwrap();
                let found: f64 = gap.iter().map(|&e| f64::from(e).powi(2)).sum();
                let allowed = best * (1.0 - 1e-4)..=best * (1.0 + excess);
                assert!(allowed.contains(&found), "{method:?} {rank}: {found} {best}");
            }
        }
        let how = Randomized { tolerance: 1e-3, products: 40, ..Randomized::default() };
        let found = rsvd(a.view(), 8, &how, 3, &Cpu::new(), &*backend).unwrap();
        let best: f64 = sigma[8..].iter().map(|&s| f64::from(s).powi(2)).sum();
        assert!(!found.fell_back && found.residual <= best.sqrt() * (1.0 + how.tolerance));
    }
}

#[test]
fn bad_input_is_refused_alike() {
    for backend in backends() {
        let b: &dyn LinalgBackend = &*backend;
        for bad in [f32::NAN, f32::INFINITY] {
            let a = array![[1.0, 2.0], [bad, 4.0]];
            for error in [
                b.svd(a.view()).unwrap_err(),
                b.singular_values(a.view()).unwrap_err(),
                b.qr(a.view()).unwrap_err(),
                b.eigh(a.mapv(f64::from).view()).unwrap_err(),
                b.eigenvalues(a.mapv(f64::from).view()).unwrap_err(),
            ] {
                let refused = matches!(error.kind(), ErrorKind::NotFinite { index: 2, .. });
                assert!(refused, "{} {error}", b.name());
            }
        }
        let wide = Array2::<f64>::zeros((2, 3));
        let rhs = array![[1.0], [1.0]];
        for error in [
            b.eigh(wide.view()).unwrap_err(),
            b.cholesky(wide.view()).unwrap_err(),
            b.solve_spd(array![[1.0]].view(), rhs.view()).unwrap_err(),
            b.solve_lower(array![[1.0]].view(), rhs.view()).unwrap_err(),
        ] {
            assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{} {error}", b.name());
        }
        let indefinite =
            [[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[f64::NAN, 0.0], [0.0, 1.0]]];
        for bad in indefinite {
            let bad = ndarray::arr2(&bad);
            for error in [
                b.cholesky(bad.view()).unwrap_err(),
                b.solve_spd(bad.view(), rhs.view()).unwrap_err(),
            ] {
                let refused = matches!(error.kind(), ErrorKind::Numerical { .. });
                assert!(refused, "{} {error}", b.name());
            }
        }
        let singular = array![[1.0, 0.0], [1.0, 0.0]];
        for error in [
            b.solve_lower(singular.view(), rhs.view()).unwrap_err(),
            b.solve_lower_transposed(singular.view(), rhs.view()).unwrap_err(),
        ] {
            assert!(matches!(error.kind(), ErrorKind::Numerical { .. }), "{} {error}", b.name());
        }
        let nan = b.solve_lower(array![[1.0]].view(), array![[f64::NAN]].view()).unwrap_err();
        assert!(matches!(nan.kind(), ErrorKind::NotFinite { .. }), "{nan}");
        let small = array![[f64::MIN_POSITIVE]];
        let over = b.solve_lower(small.view(), array![[1e300]].view()).unwrap_err();
        assert!(matches!(over.kind(), ErrorKind::Numerical { .. }), "{over}");
    }
}

/// That a library is linked shows only where it is called.
#[cfg(feature = "lapack")]
#[test]
fn lapack_and_pure_rust_agree() {
    use mcsmoe::linalg::{Lapack, PureRust};
    let a = matrix(150, 90, 8);
    let (ours, theirs) = (PureRust.svd(a.view()).unwrap(), Lapack.svd(a.view()).unwrap());
    assert!(ours.s.iter().zip(&theirs.s).all(|(a, b)| (a - b).abs() <= 1e-5 * ours.s[0]));
    let low = |f: &mcsmoe::linalg::Svd| f.clone().truncated(30).product(&Cpu::new()).unwrap();
    close(&low(&ours), &low(&theirs), ours.s[0]);
    assert_ne!(ours, theirs, "two implementations that never differ in a bit are one");
    let gram = a.mapv(f64::from).t().dot(&a.mapv(f64::from));
    let (ours, theirs) = (PureRust.eigh(gram.view()).unwrap(), Lapack.eigh(gram.view()).unwrap());
    approx::assert_abs_diff_eq!(ours.values[..], theirs.values[..], epsilon = 1e-10);
    let space = |e: &mcsmoe::linalg::Eigh| {
        let v = e.vectors.slice(s![.., ..30]).to_owned();
        v.dot(&v.t())
    };
    close64(&space(&ours), &space(&theirs), 1e3);
    let lower = PureRust.cholesky(gram.view()).unwrap();
    close64(&lower, &Lapack.cholesky(gram.view()).unwrap(), 10.0);
    assert_eq!(Lapack.name(), "lapack");
}
