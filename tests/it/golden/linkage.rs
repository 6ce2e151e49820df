//! Agglomerative clustering gives scipy's partitions.
//!
//! The fixture comes from `tools/make_linkage_fixture.py`.

use std::collections::BTreeMap;

use mcsmoe::group::{Agglomerative, Linkage};
use mcsmoe::model::{Budget, Grouping, LayerId, Numbering, RoutingStats, SimilarityMatrix, Target};
use mcsmoe::stage::{Context, Grouper, LayerSummary};
use ndarray::Array2;
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    instances: Vec<Instance>,
}

#[derive(Deserialize)]
struct Instance {
    points: Vec<Vec<f64>>,
    cuts: Vec<usize>,
    labels: BTreeMap<Linkage, Vec<Vec<usize>>>,
}

fn layer(points: &[Vec<f64>]) -> LayerSummary {
    let n = points.len();
    let squared = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    let distance = Array2::from_shape_fn((n, n), |(i, j)| squared(&points[i], &points[j]).sqrt());
    LayerSummary {
        id: LayerId::causal(0),
        similarity: SimilarityMatrix::from_distances(distance).unwrap(),
        stats: RoutingStats::from_counts(vec![1; n], n as u64),
        candidates: None,
    }
}

/// The label of the first expert of each expert's group: the same for equal partitions.
fn canonical<T: PartialEq>(labels: &[T]) -> Vec<Option<usize>> {
    labels.iter().map(|l| labels.iter().position(|m| m == l)).collect()
}

#[test]
fn partitions_equal_those_of_scipy() {
    let fixture: Fixture =
        serde_json::from_str(include_str!("../../fixtures/scipy_linkage.json")).unwrap();
    assert_eq!(fixture.instances.len(), 40);
    let mut compared = 0;
    for Instance { points, cuts, labels } in &fixture.instances {
        assert_eq!(labels.len(), 4);
        let layers = [layer(points)];
        for (&linkage, labels) in labels {
            for (&m, expected) in cuts.iter().zip(labels) {
                let grouper = Agglomerative { linkage, ..Agglomerative::default() };
                let budget = Budget::new(Target::PerLayer(m));
                let groupings = grouper.group(&layers, &budget, &Context::cpu(0)).unwrap();
                let [grouping]: &[Grouping; 1] = groupings.as_slice().try_into().unwrap();
                assert_eq!(
                    canonical(grouping.labels()),
                    canonical(expected),
                    "{linkage:?} of {} points at {m}",
                    points.len()
                );
                assert_eq!(grouping, &grouping.renumbered(Numbering::ByDominant));
                compared += 1;
            }
        }
    }
    assert!(compared > 800, "only {compared} partitions were compared");
}
