//! Alignment against frozen permutations of the paper's own code.

use crate::support::golden::Golden;
use mcsmoe::align::{ActivationMatching, WeightMatching};
use mcsmoe::model::Expert;
use mcsmoe::stage::{AlignPair, Aligner, Context};

fn experts() -> Vec<Expert> {
    let file = Golden::open("switch_experts");
    let expert =
        |e| Expert::relu(file.matrix(&format!("wi.{e}")), file.matrix(&format!("wo.{e}"))).unwrap();
    (0..6).map(expert).collect()
}

fn check(aligner: &dyn Aligner, prefix: &str) {
    let (experts, file) = (experts(), Golden::open("switch_perms"));
    let inputs = file.matrix("hidden");
    for (e, target) in experts.iter().enumerate().skip(1) {
        let pair = AlignPair {
            reference: experts[0].view(),
            target: target.view(),
            inputs: Some(inputs.view()),
        };
        let found = aligner.align(&pair, &Context::cpu(0)).unwrap();
        assert_eq!(found.as_slice(), file.indices(&format!("{prefix}.{e}")), "{prefix}.{e}");
    }
}

#[test]
fn weight_matching_finds_the_permutations_of_the_paper() {
    check(&WeightMatching::default(), "perm.wo1");
    check(&WeightMatching { include_down: false, ..WeightMatching::default() }, "perm.wo0");
}

#[test]
fn activation_matching_finds_the_permutations_of_the_paper() {
    check(&ActivationMatching::default(), "perm.act");
}
