//! Groupings of the paper's own code on tiny random models, compared as partitions.

use crate::support::golden::Golden;
use mcsmoe::group::{Dominant, Spread};
use mcsmoe::model::{Budget, Grouping, LayerId, RoutingStats, SimilarityMatrix, Stack, Target};
use mcsmoe::stage::{Context, Grouper, LayerSummary};

/// Similarity and usage of a layer; `routed` (token, slot) pairs turn usage back into counts.
fn layer(golden: &Golden, names: (&str, &str), id: LayerId, routed: u64) -> LayerSummary {
    let usage = golden.vector(names.1);
    let count = |u: &f32| (f64::from(*u) * routed as f64).round() as u64;
    let counts: Vec<u64> = usage.iter().map(count).collect();
    assert_eq!(counts.iter().sum::<u64>(), routed);
    let table = golden.matrix(names.0).mapv(f64::from);
    LayerSummary {
        id,
        similarity: SimilarityMatrix::from_similarities(table).unwrap(),
        stats: RoutingStats::from_counts(counts, routed),
        candidates: None,
    }
}

/// The reference numbers its groups by the rank of their dominant expert: through `core[label]`
/// both sides name a group by its dominant.
fn assert_same(grouping: &Grouping, label: &[u32], core: &[u32], what: &str) {
    let expected: Vec<usize> = label.iter().map(|&g| core[g as usize] as usize).collect();
    let found: Vec<usize> =
        grouping.labels().iter().map(|g| grouping.dominants()[g.unwrap()]).collect();
    assert_eq!(found, expected, "{what}");
    assert_eq!(grouping.groups(), core.len(), "{what}");
}

#[test]
fn global_grouping_of_switch_equals_the_reference() {
    let golden = Golden::open("switch_grouping_global");
    // Group 3 on average over encoder layer 3 and decoder layers 1 and 3; encoder layer 1 is kept
    // whole, which here means that it is not handed to the grouper.
    let layers = [(Stack::Encoder, 3), (Stack::Decoder, 1), (Stack::Decoder, 3)];
    let names = layers.map(|(stack, index)| match stack {
        Stack::Encoder => format!("encoder.block.{index}.layer.1.mlp"),
        _ => format!("decoder.block.{index}.layer.2.mlp"),
    });
    let summaries: Vec<LayerSummary> = layers
        .into_iter()
        .zip(&names)
        .map(|((stack, index), name)| {
            let id = LayerId { stack, index };
            layer(&golden, (&format!("sim.{name}"), &format!("usage.{name}")), id, 80)
        })
        .collect();
    let budget = Budget::new(Target::Total(3 * 3));
    let groupings = Dominant::default().group(&summaries, &budget, &Context::cpu(0)).unwrap();
    for (grouping, name) in groupings.iter().zip(&names) {
        let (label, core) =
            (golden.indices(&format!("label.{name}")), golden.indices(&format!("core.{name}")));
        assert_same(grouping, &label, &core, name);
    }
    let counts: Vec<usize> = groupings.iter().map(Grouping::groups).collect();
    assert_eq!(counts, [2, 4, 3]);

    let whole = "encoder.block.1.layer.1.mlp";
    let mut core = golden.indices(&format!("core.{whole}"));
    core.sort_unstable();
    assert_eq!(core, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn uniform_grouping_of_mixtral_equals_the_reference() {
    let golden = Golden::open("mixtral_all");
    let names = [0, 1, 2].map(|l| format!("model.layers.{l}.block_sparse_moe"));
    let summaries: Vec<LayerSummary> = names
        .iter()
        .enumerate()
        .map(|(l, name)| {
            let (similarity, usage) = (format!("siml.{name}"), format!("usage.{name}"));
            layer(&golden, (&similarity, &usage), LayerId::causal(l), 120)
        })
        .collect();
    let budget = Budget::new(Target::PerLayer(2));
    for spread in [Spread::Uniform, Spread::Global] {
        let grouper = Dominant { spread, ..Dominant::default() };
        let groupings = grouper.group(&summaries, &budget, &Context::cpu(0)).unwrap();
        for (grouping, name) in groupings.iter().zip(&names) {
            let (label, core) =
                (golden.indices(&format!("label.{name}")), golden.indices(&format!("dom.{name}")));
            assert_same(grouping, &label, &core, name);
        }
    }
}
