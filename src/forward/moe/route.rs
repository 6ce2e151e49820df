//! Routing: where the tokens of a layer go.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use crate::error::{Locate, Result};
use crate::model::{MergedLayer, Router, Routing, close_dropped};
use crate::stage::Context;

/// Which router of a merged layer chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The `n`-row router and the map to merged experts: the exact semantics, and those of a layer
    /// that was not merged.
    #[default]
    Mapped,
    /// The router narrowed to the merged experts (stock exports); the `n`-row one without it.
    Narrowed,
}

/// Where the tokens of a layer go.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// `(t, n)` router logits, as the router gives them.
    pub logits: Array2<f32>,
    /// Chosen router rows and applied weights.
    pub routing: Routing,
    /// `(t, k)` whether the expert had room for the token; `None` without a capacity.
    pub kept: Option<Array2<bool>>,
    /// For each expert of the layer the tokens that visit it, ascending, and their weights.
    /// Members of a group that fire together add up; dropped tokens are not listed.
    pub visits: Vec<Vec<(usize, f32)>>,
}

/// Routes every row of `X: (t, d_model)`.
///
/// `capacity`: how many tokens of one window an expert takes, in order of position (Switch). It
/// counts by router row, before the map.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width, with the layer.
pub fn route(
    layer: &MergedLayer,
    choice: Choice,
    x: ArrayView2<'_, f32>,
    windows: &[Range<usize>],
    capacity: Option<usize>,
    cx: &Context,
) -> Result<Routed> {
    let (router, map) = layer.choosing(choice == Choice::Narrowed);
    let logits = router.logits(x, cx.compute()).in_layer(layer.id)?;
    let routing = if map.contains(&None) {
        let mut open = logits.clone();
        close_dropped(&mut open, &map);
        router.route(open.view())
    } else {
        router.route(logits.view())
    };
    let routing = routing.in_layer(layer.id)?;
    let kept = capacity.map(|capacity| within_capacity(&routing, router, windows, capacity));
    let room = |t, slot| kept.as_ref().is_none_or(|kept| kept[[t, slot]]);
    let visits = routing.visits_where(&map, layer.grouping.groups(), room);
    Ok(Routed { logits, routing, kept, visits })
}

fn within_capacity(
    routing: &Routing,
    router: &Router,
    windows: &[Range<usize>],
    capacity: usize,
) -> Array2<bool> {
    let mut kept = Array2::from_elem(routing.experts.dim(), true);
    for window in windows {
        let mut load = vec![0usize; router.experts()];
        for t in window.clone() {
            for (slot, &e) in routing.experts.row(t).iter().enumerate() {
                load[e as usize] += 1;
                kept[[t, slot]] = load[e as usize] <= capacity;
            }
        }
    }
    kept
}
