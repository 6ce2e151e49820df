//! The bundled checkpoint and its statistics agree: reading, routing and running experts here gives
//! what transformers recorded.

use std::collections::BTreeSet;

use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::linalg::Cpu;
use mcsmoe::model::{LayerId, MoeLayer, RoutingStats, Samples};
use mcsmoe::stage::Needs;
use ndarray::{Array2, ArrayView2, Axis};

use crate::support::fixture;

const NEEDS: [Needs; 5] =
    [Needs::SAMPLES, Needs::REAP, Needs::OUTPUT_NORM, Needs::MEAN_OUTPUT, Needs::ROUTER_MASS];

fn layers() -> Vec<(MoeLayer, RoutingStats)> {
    let checkpoint = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let stats = StatsFile::open(fixture("mixtral-8e.stats.safetensors")).unwrap();
    let needs = NEEDS.into_iter().fold(Needs::LOGIT_GRAM, |a, b| a | b);
    let ids: Vec<LayerId> = checkpoint.layers().iter().map(|l| l.id).collect();
    assert_eq!(ids, (0..4).map(LayerId::causal).collect::<Vec<_>>());
    ids.into_iter()
        .map(|id| (checkpoint.read_layer(id).unwrap(), stats.layer(&id, needs).unwrap()))
        .collect()
}

/// Relative to the largest entry; both sides compute in f32, in other orders of additions.
fn close(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let largest = expected.iter().fold(0.0f32, |m, y| m.max(y.abs()));
    let error = (&found - &expected).iter().fold(0.0f32, |m, e| m.max(e.abs()));
    assert!(error <= 1e-5 * largest, "{what}: off by {error}, largest {largest}");
}

fn column(values: impl IntoIterator<Item = f64>) -> Array2<f32> {
    values.into_iter().map(|v| v as f32).collect::<ndarray::Array1<f32>>().insert_axis(Axis(1))
}

#[test]
fn routers_choose_and_weigh_as_transformers_did() {
    for (layer, stats) in layers() {
        let Samples { inputs, logits, routing, .. } = stats.samples.as_ref().unwrap();
        let ours = layer.router().logits(inputs.view(), &Cpu::new()).unwrap();
        close(ours.view(), logits.view(), "logits");
        // From the recorded logits, so that rounding cannot turn a near tie around.
        let ours = layer.router().route(logits.view()).unwrap();
        for t in 0..inputs.nrows() {
            let set = |e: &Array2<u32>| e.row(t).iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(set(&ours.experts), set(&routing.experts), "token {t}");
        }
        close(ours.weights.view(), routing.weights.view(), "applied weights");
        let mut counts = vec![0; layer.experts().len()];
        ours.experts.iter().for_each(|&e| counts[e as usize] += 1);
        assert_eq!(counts, stats.counts);
    }
}

#[test]
fn layers_compute_what_transformers_did() {
    for (layer, stats) in layers() {
        let samples = stats.samples.as_ref().unwrap();
        let ours = layer.routed_output(samples.inputs.view(), &Cpu::new()).unwrap();
        close(ours.view(), samples.routed_output.as_ref().unwrap().view(), "routed output");
    }
}

#[test]
fn per_expert_statistics_follow_from_samples_and_weights() {
    for (layer, stats) in layers() {
        let samples = stats.samples.as_ref().unwrap();
        let n = layer.experts().len();
        let (mut norm, mut reap, mut mass) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        let mut mean = Array2::<f32>::zeros((n, samples.inputs.ncols()));
        for (i, visits) in samples.routing.by_expert(n).into_iter().enumerate() {
            let tokens: Vec<usize> = visits.iter().map(|(t, _)| *t).collect();
            let x = samples.inputs.select(Axis(0), &tokens);
            let y = layer.experts()[i].view().forward(x.view(), &Cpu::new()).unwrap();
            let count = visits.len() as f64;
            for (row, (_, weight)) in y.rows().into_iter().zip(&visits) {
                let length = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                norm[i] += length / count;
                reap[i] += length * f64::from(*weight) / count;
                mass[i] += f64::from(*weight);
            }
            mean.row_mut(i).assign(&y.mean_axis(Axis(0)).unwrap());
        }
        let check = |ours: Vec<f64>, theirs: &Option<Vec<f64>>, what: &str| {
            close(column(ours).view(), column(theirs.clone().unwrap()).view(), what);
        };
        check(norm, &stats.output_norm, "output norm");
        check(reap, &stats.reap, "REAP saliency");
        check(mass, &stats.router_mass, "router mass");
        close(mean.view(), stats.mean_output.unwrap().view(), "mean output");
    }
}
