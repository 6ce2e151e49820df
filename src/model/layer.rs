//! A Mixture-of-Experts layer, before and after merging.

use std::fmt;
use std::str::FromStr;

use ndarray::{Array2, ArrayView2, Axis};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::expert::Expert;
use super::expert::Factored;
use super::grouping::Grouping;
use super::router::Router;
use crate::error::{Error, Locate, Result};
use crate::linalg::Compute;
use crate::par;

/// The stack of blocks that a layer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stack {
    /// The only stack of a decoder-only model.
    Causal,
    /// The encoder of an encoder-decoder model.
    Encoder,
    /// The decoder of an encoder-decoder model.
    Decoder,
}

/// Which MoE layer. Written as in statistics files: `layers.3`, `encoder.layers.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct LayerId {
    /// The stack.
    pub stack: Stack,
    /// The block's index in its stack, dense blocks counted.
    pub index: usize,
}

impl LayerId {
    /// A layer of a decoder-only model.
    pub const fn causal(index: usize) -> Self {
        Self { stack: Stack::Causal, index }
    }

    /// The random numbers of this layer: a stream of its own under `seed`, so that neither the
    /// number of threads nor the choice of layers changes what a layer draws.
    pub(crate) fn random_numbers(self, seed: u64) -> ChaCha8Rng {
        let stack = match self.stack {
            Stack::Causal => 0,
            Stack::Encoder => 1,
            Stack::Decoder => 2,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream((stack << 32) | self.index as u64);
        rng
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stack = match self.stack {
            Stack::Causal => "",
            Stack::Encoder => "encoder.",
            Stack::Decoder => "decoder.",
        };
        write!(f, "{stack}layers.{}", self.index)
    }
}

impl FromStr for LayerId {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let (stack, rest) = match s.split_once('.') {
            Some(("encoder", rest)) => (Stack::Encoder, rest),
            Some(("decoder", rest)) => (Stack::Decoder, rest),
            _ => (Stack::Causal, s),
        };
        let index = rest.strip_prefix("layers.").and_then(|i| i.parse().ok());
        let index =
            index.ok_or_else(|| Error::range("layer", "[encoder.|decoder.]layers.INDEX", s))?;
        Ok(Self { stack, index })
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for LayerId {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

/// One MoE layer in memory: `n` experts of one kind and the router that chooses among them.
/// Shared experts are not part of it: they are never merged.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeLayer {
    id: LayerId,
    experts: Vec<Expert>,
    router: Router,
}

impl MoeLayer {
    /// Checks that the experts are of one kind and that the router knows each of them.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape), with layer and expert.
    pub fn new(id: LayerId, experts: Vec<Expert>, router: Router) -> Result<Self> {
        check_experts(&experts, &router).in_layer(id)?;
        if experts.len() != router.experts() {
            return Err(Error::shape("experts per router row", router.experts(), experts.len()))
                .in_layer(id);
        }
        Ok(Self { id, experts, router })
    }

    /// Which layer it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Its experts.
    pub fn experts(&self) -> &[Expert] {
        &self.experts
    }

    /// Its router.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Takes it apart: the experts and the router.
    pub fn into_parts(self) -> (Vec<Expert>, Router) {
        (self.experts, self.router)
    }

    /// `Σ_{i ∈ S(x)} g_i(x) E_i(x)` for every row of `X: (t, d_model)`: `(t, d_model)`. Shared
    /// experts are not included.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn routed_output(
        &self,
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<Array2<f32>> {
        let routing = self.router.route(self.router.logits(x, compute)?.view())?;
        let map: Vec<_> = (0..self.experts.len()).map(Some).collect();
        visited_sum(&self.experts, &routing.visits(&map, map.len()), x, compute)
    }
}

/// A layer after merging: `m ≤ n` experts, the grouping that led to them, the original `n`-row
/// router, and, when asked for, a router narrowed to `m` rows.
///
/// With the `n`-row router the output is `Σ_g (Σ_{i ∈ S(x) ∩ g} g_i(x)) Ê_g(x)`: a token of expert
/// `i` visits the expert of `i`'s group, and the weights of members that fire together add up. This
/// is the paper's semantics (arXiv 2310.01334, §3.2). Dropped experts cannot be chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedLayer {
    /// Which layer it is.
    pub id: LayerId,
    /// The merged experts, one per group.
    pub experts: Vec<Expert>,
    /// Which experts became which.
    pub grouping: Grouping,
    /// The original router, `n` rows.
    pub router: Router,
    /// The router over the merged experts, `m` rows.
    pub narrowed: Option<Router>,
    /// For each expert the factors of its matrices, gate (if any), up, down, when they are those
    /// of a compression, `None` for a matrix that stayed dense; a native export keeps them. Whoever
    /// changes the experts clears them.
    pub factors: Option<Vec<Vec<Option<Factored>>>>,
}

impl MergedLayer {
    /// Checks that experts, grouping and routers fit each other.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape).
    pub fn new(
        id: LayerId,
        experts: Vec<Expert>,
        grouping: Grouping,
        router: Router,
        narrowed: Option<Router>,
    ) -> Result<Self> {
        check_experts(&experts, &router).in_layer(id)?;
        let found = (experts.len(), router.experts());
        if found != (grouping.groups(), grouping.experts()) {
            let expected = (grouping.groups(), grouping.experts());
            return Err(Error::shape("merged layer (groups, experts)", expected, found))
                .in_layer(id);
        }
        let rows = narrowed.as_ref().map_or(experts.len(), Router::experts);
        if rows != experts.len() {
            return Err(Error::shape("narrowed router", experts.len(), rows)).in_layer(id);
        }
        Ok(Self { id, experts, grouping, router, narrowed, factors: None })
    }

    /// The output with the `n`-row router and the expert map (native and expanded exports).
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn mapped_output(
        &self,
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<Array2<f32>> {
        visited_sum(&self.experts, &self.visits(false, x, compute)?, x, compute)
    }

    /// The output with the narrowed router (stock export), if there is one.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn narrowed_output(
        &self,
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<Option<Array2<f32>>> {
        if self.narrowed.is_none() {
            return Ok(None);
        }
        visited_sum(&self.experts, &self.visits(true, x, compute)?, x, compute).map(Some)
    }
}

fn check_experts(experts: &[Expert], router: &Router) -> Result<()> {
    let Some(first) = experts.first() else {
        return Err(Error::shape("MoE layer", "at least one expert", 0));
    };
    let first = first.view();
    for (i, expert) in experts.iter().enumerate() {
        let view = expert.view();
        if !view.same_kind(&first) {
            let shapes = (first.up.weight.dim(), view.up.weight.dim());
            return Err(Error::shape("experts of one kind", shapes.0, shapes.1)).in_expert(i);
        }
    }
    if router.weight().ncols() != first.d_model() {
        return Err(Error::shape("router width", first.d_model(), router.weight().ncols()));
    }
    Ok(())
}

/// Gathers the tokens of each expert, runs it on them, the experts in parallel, and adds the
/// weighted outputs in expert order, so that the rounding does not depend on the number of threads.
fn visited_sum(
    experts: &[Expert],
    visits: &[Vec<(usize, f32)>],
    x: ArrayView2<'_, f32>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let outputs = par::map(experts.len().min(visits.len()), |e| {
        let tokens: Vec<usize> = visits[e].iter().map(|(t, _)| *t).collect();
        experts[e].view().forward(x.select(Axis(0), &tokens).view(), compute)
    })?;
    let mut out = Array2::zeros(x.dim());
    for (visits, outputs) in visits.iter().zip(outputs) {
        for ((t, w), y) in visits.iter().zip(outputs.rows()) {
            out.row_mut(*t).scaled_add(*w, &y);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use crate::model::RoutingRule;
    use ndarray::{Array2, array};

    #[test]
    fn layer_names_round_trip() {
        for name in ["layers.0", "encoder.layers.11", "decoder.layers.3"] {
            assert_eq!(name.parse::<LayerId>().unwrap().to_string(), name);
        }
        assert!("block.3".parse::<LayerId>().is_err());
    }

    fn scaling(by: f32) -> Expert {
        Expert::relu(Array2::eye(2), Array2::eye(2) * by).unwrap()
    }

    #[test]
    fn co_firing_members_of_a_group_add_their_weights() {
        let router = Router::new(
            array![[1.0, 0.0], [1.0, 0.0], [-9.0, 0.0]],
            None,
            None,
            RoutingRule::softmax(2, true),
        )
        .unwrap();
        let grouping = Grouping::new(vec![Some(0), Some(0), Some(1)], vec![0, 2]).unwrap();
        let experts = vec![scaling(3.0), scaling(5.0)];
        let merged = MergedLayer::new(LayerId::causal(0), experts, grouping, router, None).unwrap();
        let y = merged.mapped_output(array![[1.0, 2.0]].view(), &Cpu::new()).unwrap();
        approx::assert_abs_diff_eq!(y, array![[3.0, 6.0]], epsilon = 1e-6);
    }

    #[test]
    fn dropped_experts_are_not_chosen() {
        let router =
            Router::new(array![[1.0, 0.0], [9.0, 0.0]], None, None, RoutingRule::softmax(1, false));
        let grouping = Grouping::new(vec![Some(0), None], vec![0]).unwrap();
        let merged = MergedLayer::new(
            LayerId::causal(0),
            vec![scaling(2.0)],
            grouping,
            router.unwrap(),
            None,
        );
        let y = merged.unwrap().mapped_output(array![[1.0, 1.0]].view(), &Cpu::new()).unwrap();
        approx::assert_abs_diff_eq!(y, array![[2.0, 2.0]], epsilon = 1e-6);
    }

    #[test]
    fn misfits_name_layer_and_expert() {
        let router = Router::new(Array2::eye(2), None, None, RoutingRule::softmax(1, false));
        let odd = Expert::relu(Array2::ones((3, 2)), Array2::ones((2, 3))).unwrap();
        let error = MoeLayer::new(LayerId::causal(7), vec![scaling(1.0), odd], router.unwrap())
            .unwrap_err();
        assert!(error.to_string().starts_with("layers.7: expert 1: experts of one kind"));
    }
}
