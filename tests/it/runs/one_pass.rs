//! A run on text reads every layer once where it can, and has the bytes of one that cannot.

use std::fs;
use std::sync::Mutex;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::group::{Absorb, Dominant, LayerScale, Prune, Spread};
use mcsmoe::merge::router::DominantRow;
use mcsmoe::merge::{DominantOnly, Weighted};
use mcsmoe::model::{Budget, Grouping, Importance, LayerId};
use mcsmoe::pipeline::{
    AlignWhen, Calibration, Constraints, ExportChoice, Keep, LayerReport, Observer, Output, Phase,
    Pipeline, PipelineBuilder, RecoverOn, Report, Tokens,
};
use mcsmoe::recover::LeastSquares;
use mcsmoe::similarity::RouterLogits;
use mcsmoe::stage::{Context, Grouper, LayerSummary, Needs, Stage};
use mcsmoe::{Result, align};

use crate::support::files::{Files, contents};
use crate::support::fixture;

/// A grouper that has to see all layers: it does not tell how many experts each keeps.
#[derive(Debug)]
struct Together<G>(G);

impl<G: Grouper> Stage for Together<G> {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }
}

impl<G: Grouper> Grouper for Together<G> {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Grouping>> {
        self.0.group(layers, budget, cx)
    }
}

fn text() -> Calibration {
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    Tokens::read(&source, &fixture("text/calib"), Some(64), 1024, 7).unwrap().into()
}

/// Which phases a run has gone through, in order.
#[derive(Default)]
struct Phases(Mutex<Vec<(LayerId, Phase)>>);

impl Observer for Phases {
    fn layer_started(&self, layer: LayerId, phase: Phase, _: usize, _: usize) {
        self.0.lock().unwrap().push((layer, phase));
    }

    fn layer_finished(&self, _: &LayerReport) {}
}

fn run(pipeline: &Pipeline, export: ExportChoice) -> (Report, Files, Vec<(LayerId, Phase)>) {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) =
        (Checkpoint::open(fixture("mixtral-8e")).unwrap(), dir.path().join("target"));
    let phases = Phases::default();
    let output = Output::new(export);
    let report = pipeline
        .run()
        .calibration(text().clone())
        .output(output)
        .observer(&phases)
        .write(&source, &target)
        .unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    (report, contents(&target), phases.0.into_inner().unwrap())
}

const SALIENT: Dominant =
    Dominant { importance: Importance::Reap, spread: Spread::Uniform, scale: LayerScale::None };

fn same_in_one_pass_and_two(
    builder: &dyn Fn() -> PipelineBuilder,
    grouper: impl Grouper + Clone + 'static,
    export: ExportChoice,
) {
    let one = builder().grouper(grouper.clone()).build().unwrap();
    let two = builder().grouper(Together(grouper)).build().unwrap();
    let ((one, files, phases), (report, expected, passes)) = (run(&one, export), run(&two, export));
    assert_eq!(one, report);
    assert_eq!(files, expected);
    let of =
        |phase: Phase, all: &[(LayerId, Phase)]| all.iter().position(|(_, p)| *p == phase).unwrap();
    // The first layer is merged before the second is calibrated, or after the last was.
    assert_eq!(of(Phase::Merge, &phases), 2);
    assert_eq!(passes.iter().rposition(|(_, p)| *p == Phase::Calibrate), Some(3));
    assert!(of(Phase::Merge, &passes) > 3);
}

fn base() -> PipelineBuilder {
    Pipeline::builder().similarity(RouterLogits::default()).keep(Keep::Experts(4)).seed(3)
}

#[test]
fn merged_by_usage_in_a_common_order() {
    let builder = || {
        let (aligner, when) = (align::WeightMatching::default(), AlignWhen::BeforeGrouping);
        base()
            .align(aligner, align::Reference::FirstExpert, when)
            .merger(Weighted::default())
            .router(DominantRow)
    };
    same_in_one_pass_and_two(&builder, Dominant::default(), ExportChoice::Stock);
}

#[test]
fn pruned_with_a_protected_layer() {
    let protect = || Constraints {
        protect_layers: [LayerId::causal(1)].into(),
        protect_experts: [(LayerId::causal(2), [5].into())].into(),
        ..Constraints::default()
    };
    let builder = || base().merger(DominantOnly).constraints(protect());
    let (importance, scale) = (Importance::Reap, LayerScale::None);
    let prune = Prune { importance, absorb: Absorb::Drop, spread: Spread::Uniform, scale };
    let one = builder().grouper(prune).build().unwrap();
    let two = builder().grouper(Together(prune)).build().unwrap();
    let (one, two) = (run(&one, ExportChoice::Native), run(&two, ExportChoice::Native));
    assert_eq!((one.0, one.1), (two.0, two.1));
}

#[test]
fn recovered_on_a_part_of_the_text() {
    let (stock, native) = (ExportChoice::Stock, ExportChoice::Native);
    for (export, on) in [
        (stock, RecoverOn::SameInput),
        (native, RecoverOn::SameInput),
        (stock, RecoverOn::OwnStream),
        (stock, RecoverOn::Original),
    ] {
        let builder = || {
            let recovered = base()
                .merger(DominantOnly)
                .recoverer(LeastSquares::default())
                .recover_on(on)
                .recover_tokens(Some(512));
            if export == ExportChoice::Stock { recovered.router(DominantRow) } else { recovered }
        };
        same_in_one_pass_and_two(&builder, SALIENT, export);
    }
}
