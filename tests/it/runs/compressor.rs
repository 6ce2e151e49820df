//! A compressor of a user's own: plugged in by one call, and held to what it promises.

use std::path::Path;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::decompose::{MatrixBudget, PerMatrix, TruncatedSvd, reduced};
use mcsmoe::model::{Expert, Factored, Linear, MergedLayer, Structure};
use mcsmoe::pipeline::{Calibration, ExportChoice, Keep, Output, Recipe, Report, Silent};
use mcsmoe::prelude::*;
use ndarray::{Array2, ArrayView2};

use crate::support::fixture;

const EXPORTS: [(&str, ExportChoice); 3] = [
    ("stock", ExportChoice::Stock),
    ("native", ExportChoice::Native),
    ("expanded", ExportChoice::Expanded),
];

fn run(
    compressor: impl Compressor + 'static,
    export: ExportChoice,
    target: &Path,
) -> Result<Report> {
    let recipe = Recipe::preset("m-smoe", Keep::Experts(4))?.export(export);
    let pipeline = recipe.builder()?.compressor(compressor).build()?;
    let source = Checkpoint::open(fixture("mixtral-8e"))?;
    let stats = Calibration::from(fixture("mixtral-8e.stats.safetensors"));
    pipeline
        .run()
        .calibration(stats.clone())
        .output(Output::new(export))
        .observer(&Silent)
        .write(&source, target)
}

/// Keeps the signs of the down projection and forgets the rest.
#[derive(Debug)]
struct Signs;

impl Stage for Signs {
    fn name(&self) -> &str {
        "signs"
    }
}

fn signs(expert: &Expert) -> Result<Expert> {
    let activation = expert.view().activation;
    let (gate, up, down) = expert.clone().into_parts();
    let down = Linear { weight: down.weight.mapv(f32::signum), bias: down.bias };
    Expert::new(gate, up, down, activation)
}

impl Compressor for Signs {
    fn compress(
        &self,
        layer: &MergedLayer,
        _: &Compression<'_>,
        _: &Context,
    ) -> Result<Compressed> {
        Ok(Compressed::dense(layer.experts.iter().map(signs).collect::<Result<_>>()?))
    }
}

#[test]
fn it_is_written_in_every_export_and_reported_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for (name, export) in EXPORTS {
        let target = dir.path().join(name);
        let report = run(Signs, export, &target).unwrap();
        assert!(report.stages.contains(&"compress signs".to_owned()), "{:?}", report.stages);
        let found = report.compression.unwrap();
        assert_eq!(found.parameters.before, found.parameters.after);
        let model = Checkpoint::open(&target).unwrap();
        for layer in model.layers() {
            for expert in model.read_merged(layer.id).unwrap().experts {
                assert!(expert.view().down.weight.iter().all(|x| x.abs() == 1.0));
            }
        }
    }
}

/// Breaks one promise.
#[derive(Debug, Clone, Copy)]
enum Broken {
    AnExpertTooFew,
    FewerUnits,
    UnpromisedFactors,
    MissingFactors,
}

impl Stage for Broken {
    fn name(&self) -> &str {
        "broken"
    }
}

impl Compressor for Broken {
    fn compress(
        &self,
        layer: &MergedLayer,
        _: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed> {
        let mut experts = layer.experts.clone();
        match self {
            Self::AnExpertTooFew => drop(experts.pop()),
            Self::FewerUnits => experts[1] = reduced(&experts[1].view(), &[0, 1, 2])?,
            Self::UnpromisedFactors => {
                let none = || vec![None, None, None];
                let mut factors: Vec<_> = layer.experts.iter().map(|_| none()).collect();
                let (m, n) = layer.experts[0].view().up.weight.dim();
                factors[0][1] =
                    Some(Factored::low_rank(Array2::ones((m, 1)), Array2::ones((1, n)))?);
                return Compressed::from_factors(layer, factors, cx);
            }
            Self::MissingFactors => {}
        }
        Ok(Compressed::dense(experts))
    }

    fn storage(&self, up: (usize, usize)) -> Result<ExpertStorage> {
        match self {
            Self::MissingFactors => {
                let budget = MatrixBudget { rank: 4, rows: None, structure: Structure::Rows };
                PerMatrix::new(TruncatedSvd::default(), budget).storage(up)
            }
            _ => Ok(ExpertStorage::Dense),
        }
    }
}

#[test]
fn a_broken_promise_is_an_error_that_names_the_compressor() {
    let dir = tempfile::tempdir().unwrap();
    for (broken, names) in [
        (Broken::AnExpertTooFew, "result of compressor `broken`: expected 4 experts, found 3"),
        (Broken::FewerUnits, "layers.0: expert 1: result of compressor `broken`"),
        (Broken::UnpromisedFactors, "layers.0: expert 0: result of compressor `broken`"),
        (Broken::MissingFactors, "found a dense matrix"),
    ] {
        for (name, export) in EXPORTS {
            let target = dir.path().join(name);
            let error = run(broken, export, &target).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
            assert!(error.to_string().contains(names), "{broken:?} {name}: {error}");
            assert!(!target.exists(), "{broken:?} {name}");
        }
    }
}

/// Gives one rank more than it may.
#[derive(Debug)]
struct OverBudget;

impl Stage for OverBudget {
    fn name(&self) -> &str {
        "over-budget"
    }
}

impl Decomposer for OverBudget {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        let more = RankBudget { rank: budget.rank + 1, ..*budget };
        TruncatedSvd::default().decompose(weight, moments, &more, cx)
    }
}

#[test]
fn a_decomposer_over_its_budget_is_refused_in_every_export() {
    let dir = tempfile::tempdir().unwrap();
    let budget = MatrixBudget { rank: 4, rows: None, structure: Structure::Rows };
    for (name, export) in EXPORTS {
        let target = dir.path().join(name);
        let error = run(PerMatrix::new(OverBudget, budget), export, &target).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("result of compressor `over-budget`"), "{name}: {text}");
        assert!(!target.exists(), "{name}");
    }
}
