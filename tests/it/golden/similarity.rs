//! Similarities against frozen tables of the paper's own code, which computes in f32.

use crate::support::golden::Golden;
use mcsmoe::model::{
    Expert, LayerId, MoeLayer, Router, RoutingRule, RoutingStats, SimilarityMatrix, Stack,
};
use mcsmoe::similarity::{ExpertWeights, RouterLogits, RouterWeights};
use mcsmoe::stage::{Context, LayerView, Similarity};
use ndarray::{Array2, ArrayView2, Axis, concatenate};

fn close(found: &SimilarityMatrix, expected: &Array2<f32>, what: &str) {
    let error = (&found.similarities() - &expected.mapv(f64::from)).mapv(f64::abs);
    assert!(error.iter().all(|&e| e <= 1e-5), "{what}: {error}");
}

fn with_gram(logits: ArrayView2<'_, f32>) -> RoutingStats {
    let logits = logits.mapv(f64::from);
    let counts = vec![0; logits.ncols()];
    let tokens = logits.nrows() as u64;
    RoutingStats {
        logit_gram: Some(logits.t().dot(&logits)),
        ..RoutingStats::from_counts(counts, tokens)
    }
}

/// Logits are stored per batch and layer; the paper's code concatenates the batches along tokens.
#[test]
fn mixtral_tables_match_the_paper() {
    let file = Golden::open("mixtral_all");
    for l in 0..3 {
        let block = format!("model.layers.{l}.block_sparse_moe");
        let part = |e: usize, w: &str| file.matrix(&format!("{block}.experts.{e}.{w}.weight"));
        let expert = |e| Expert::swiglu(part(e, "w1"), part(e, "w3"), part(e, "w2")).unwrap();
        let gate = file.matrix(&format!("{block}.gate.weight"));
        let router = Router::new(gate, None, None, RoutingRule::softmax(2, true)).unwrap();
        let layer =
            MoeLayer::new(LayerId::causal(l), (0..4).map(expert).collect(), router).unwrap();
        let batches = [0, 1].map(|batch| file.matrix(&format!("logits.{batch}.{l}")));
        let logits = concatenate(Axis(0), &[batches[0].view(), batches[1].view()]).unwrap();
        let stats = with_gram(logits.view());
        let view = LayerView::of(&layer, &stats);
        let metrics: [(&dyn Similarity, &str); 3] = [
            (&ExpertWeights::default(), "simw"),
            (&RouterWeights::default(), "simg"),
            (&RouterLogits::default(), "siml"),
        ];
        for (metric, prefix) in metrics {
            let found = metric.similarity(&view, &Context::cpu(0)).unwrap();
            let name = format!("{prefix}.{block}");
            close(&found, &file.matrix(&name), &name);
        }
    }
}

/// Logits are stored as (batch, tokens, experts) of a single forward pass.
#[test]
fn switch_router_logits_match_the_paper() {
    let file = Golden::open("switch_grouping_global");
    let router =
        Router::new(Array2::ones((6, 2)), None, None, RoutingRule::softmax(1, false)).unwrap();
    for (stack, word, slot) in [(Stack::Encoder, "encoder", 1), (Stack::Decoder, "decoder", 2)] {
        for index in [1, 3] {
            let logits = file.cube(&format!("logits.{word}.{index}"));
            let logits = logits.into_shape_with_order((80, 6)).unwrap();
            let stats = with_gram(logits.view());
            let view = LayerView::new(LayerId { stack, index }, &router, &stats);
            let found = RouterLogits::default().similarity(&view, &Context::cpu(0)).unwrap();
            let name = format!("sim.{word}.block.{index}.layer.{slot}.mlp");
            close(&found, &file.matrix(&name), &name);
        }
    }
}
