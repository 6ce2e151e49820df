//! What a least-squares fit of one layer takes.

use super::shape::Layer;
use crate::recover::{CHOICE_TOKENS, LeastSquares, MAX_BLOCK, Solver};

/// The sizes that decide how a fit is solved.
pub(super) struct FitSize {
    solver: Solver,
    /// That are tried.
    ridges: f64,
    features: f64,
    fitted: f64,
    /// Every tenth window is held out.
    judging: f64,
}

impl FitSize {
    /// On `t` tokens, those that judge included.
    pub(super) fn of(fit: &LeastSquares, layer: &Layer, t: u64) -> Self {
        let features = (layer.kept * layer.d_ff) as usize;
        let judging = t / 10;
        let fitted = fit.subsampled(features, (t - judging) as usize);
        let solver = fit.solver(features, fitted);
        // What is no ridge is refused by the fit.
        let ridges = fit.candidates(features, fitted).map_or(0, |ridges| ridges.len()) as f64;
        let (features, fitted) = (features as f64, fitted as f64);
        Self { solver, ridges, features, fitted, judging: judging as f64 }
    }

    /// Rows that are seen.
    pub(super) fn rows(&self) -> f64 {
        self.fitted + self.judging
    }

    /// FLOPs.
    pub(super) fn operations(&self, fit: &LeastSquares, layer: &Layer) -> f64 {
        let &Self { ref solver, ridges, features, fitted, judging } = self;
        let (k, d_ff, d) = (layer.top_k as f64, layer.d_ff as f64, layer.d_model as f64);
        let pass = |rows: f64| rows * k * d_ff * d;
        let seen = |rows: f64| 6.0 * pass(rows);
        let solved = |n: f64, columns: f64| n.powi(3) / 3.0 + 2.0 * n * n * columns;
        let products = |rows: f64| rows * rows * k * k * d_ff / layer.kept.max(1) as f64;
        let few = fitted.min(CHOICE_TOKENS as f64);
        let chosen = ridges * solved(few, judging);
        match solver {
            Solver::Features => {
                let gram = fitted * k * k * d_ff * d_ff;
                let passes = 2.0 * pass(fitted) + 2.0 * pass(judging) * ridges;
                seen(self.rows()) + gram + ridges * solved(features, d) + passes
            }
            Solver::Tokens => {
                let wide = products(self.rows()) + solved(fitted, d);
                seen(self.rows()) + chosen + wide + 2.0 * pass(self.rows() + judging)
            }
            Solver::Blocks => {
                let choice = seen(few + judging) + products(few + judging) + chosen;
                let block = d_ff.min(MAX_BLOCK as f64);
                let inverses = fitted * k * d_ff * block + 7.0 / 3.0 * features * block * block;
                let each = 4.0 * pass(fitted) + 2.0 * features * block * d;
                let passes = each * fit.iterations as f64;
                choice + seen(self.rows()) + inverses + passes + 2.0 * pass(judging)
            }
        }
    }

    /// Bytes.
    pub(super) fn bytes(&self, layer: &Layer) -> u64 {
        let hidden = |rows: f64| 4.0 * rows * (layer.top_k * layer.d_ff) as f64;
        let added = 4.0 * self.features * layer.d_model as f64;
        let n = self.rows();
        let bytes = match self.solver {
            Solver::Features => hidden(n) + 24.0 * self.features * self.features,
            Solver::Tokens => {
                let system = 16.0 * n * n + 24.0 * n * layer.d_model as f64;
                hidden(n + self.judging) + system + 2.0 * added
            }
            Solver::Blocks => {
                let block = (layer.d_ff as f64).min(MAX_BLOCK as f64);
                let residuals = 8.0 * n * layer.d_model as f64;
                hidden(n) + residuals + 4.0 * self.features * block + 3.0 * added
            }
        };
        bytes as u64
    }
}
