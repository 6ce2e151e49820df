//! What the presets cost on one layer of real size, as a multiple of its calibration.
//!
//! ```text
//! cargo bench --bench real_size -- [SHAPE] [TOKENS] [DIVIDE]
//! ```
//!
//! `SHAPE` is `qwen3-30b-a3b` (128 experts of 768 × 2048, 8 a token) or `mixtral` (8 of 14336 ×
//! 4096, 2 a token), both sides of every matrix divided by `DIVIDE`; half of the experts are kept.
//! Without arguments a sixteenth of the former on 2,048 tokens, which takes seconds.
//!
//! The layer is random. Calibration is the forward pass of its routed experts: attention, which
//! calibration also pays for, is left out. Recoverers are those of the presets; of distillation one
//! epoch is measured and the others are counted. A run takes minutes to hours, which is why this is
//! no criterion benchmark: that wants ten.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // A command.

use std::time::Instant;

use mcsmoe::model::{Expert, Grouping, LayerId, MergedLayer, MoeLayer, Router, RoutingRule};
use mcsmoe::pipeline::{Keep, Recipe, RecoverChoice};
use mcsmoe::recover::Distill;
use mcsmoe::stage::{Context, Recoverer, Recovery};
use ndarray::{Array2, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Shape {
    d_model: usize,
    d_ff: usize,
    experts: usize,
    top_k: usize,
}

fn shape(name: &str, divide: usize) -> Shape {
    let (d_model, d_ff, experts, top_k) = match name {
        "qwen3-30b-a3b" => (2048, 768, 128, 8),
        "mixtral" => (4096, 14_336, 8, 2),
        other => panic!("no shape `{other}`: qwen3-30b-a3b or mixtral"),
    };
    Shape { d_model: d_model / divide, d_ff: d_ff / divide, experts, top_k }
}

/// Uniform values of variance 1 / columns.
fn matrix(rows: usize, cols: usize, rng: &mut impl Rng) -> Array2<f32> {
    let width = (12.0 / cols as f32).sqrt();
    Array2::from_shape_simple_fn((rows, cols), || {
        (rng.next_u32() as f32 / u32::MAX as f32 - 0.5) * width
    })
}

fn layer(of: &Shape) -> MoeLayer {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (d, f) = (of.d_model, of.d_ff);
    let mut expert = || {
        let (gate, up) = (matrix(f, d, &mut rng), matrix(f, d, &mut rng));
        Expert::swiglu(gate, up, matrix(d, f, &mut rng)).unwrap()
    };
    let experts = (0..of.experts).map(|_| expert()).collect();
    let rows = matrix(of.experts, d, &mut ChaCha8Rng::seed_from_u64(2)) * 3.0;
    let router = Router::new(rows, None, None, RoutingRule::softmax(of.top_k, true)).unwrap();
    MoeLayer::new(LayerId::causal(0), experts, router).unwrap()
}

/// The first half of the experts and their rows of the router.
fn halved(layer: MoeLayer) -> MergedLayer {
    let (mut experts, router) = layer.into_parts();
    let kept = experts.len() / 2;
    let narrowed = router.select(&(0..kept).collect::<Vec<_>>(), *router.rule()).unwrap();
    let label = (0..experts.len()).map(|e| (e < kept).then_some(e)).collect();
    let grouping = Grouping::new(label, (0..kept).collect()).unwrap();
    experts.truncate(kept);
    MergedLayer::new(LayerId::causal(0), experts, grouping, router, Some(narrowed)).unwrap()
}

/// Peak of resident memory in MB since the start; `None` where the system does not say.
fn peak_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024 / 1_000_000)
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed().as_secs_f64())
}

/// Runs one recoverer of a preset; returns the layer, and the seconds of all its epochs.
fn recovered(
    choice: &RecoverChoice,
    task: &Recovery<'_>,
    merged: MergedLayer,
    cx: &Context,
) -> (MergedLayer, f64) {
    let (one, epochs): (Box<dyn Recoverer>, usize) = match choice.clone() {
        RecoverChoice::LeastSquares(fit) => (Box::new(fit), 1),
        RecoverChoice::Distill(fit) => {
            let epochs = fit.epochs;
            (Box::new(Distill { epochs: 1, ..fit }), epochs)
        }
        other => panic!("a preset that was not expected: {other:?}"),
    };
    let (layer, seconds) = timed(|| one.recover(task, merged, cx).unwrap());
    println!("    {:<14} {seconds:9.2} s, times {epochs}", one.name());
    (layer, seconds * epochs as f64)
}

fn main() {
    // Cargo adds `--bench`, and `--test` when it only wants to see that it runs.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let number = |at: usize, default: usize| args.get(at).map_or(default, |n| n.parse().unwrap());
    let name = args.first().map_or("qwen3-30b-a3b", String::as_str);
    let (default_tokens, default_divide) = if args.is_empty() { (2048, 16) } else { (8192, 1) };
    let (tokens, divide) = (number(1, default_tokens), number(2, default_divide));
    let of = shape(name, divide);
    let cx = Context::cpu(0);
    let x = matrix(tokens, of.d_model, &mut ChaCha8Rng::seed_from_u64(3));
    let x = x * (of.d_model as f32).sqrt();
    let original = layer(&of);
    let (targets, calibration) = timed(|| original.routed_output(x.view(), cx.compute()).unwrap());
    let merged = halved(original);
    println!("{name} / {divide}, {tokens} tokens, {} threads", rayon::current_num_threads());
    println!("  calibration {calibration:.2} s");
    for preset in ["fast", "balanced", "best"] {
        let recipe = Recipe::preset(preset, Keep::Fraction(0.5)).unwrap();
        let seen = recipe.recover_tokens.map_or(tokens, |most| most.min(tokens));
        let rows = s![..seen, ..];
        let task = Recovery {
            inputs: x.slice(rows),
            targets: targets.slice(rows),
            narrowed: true,
            held_out: seen / 10,
        };
        let mut total = calibration;
        let mut layer = merged.clone();
        for choice in &recipe.recover {
            let (next, seconds) = recovered(choice, &task, layer, &cx);
            (layer, total) = (next, total + seconds);
        }
        let (before, after) = (task.error(&merged, &cx).unwrap(), task.error(&layer, &cx).unwrap());
        println!(
            "  {preset:<8} {:.2} times calibration, {total:.2} s; held-out error {before:.4} to \
             {after:.4}; peak {} MB",
            total / calibration,
            peak_mb().map_or("?".into(), |mb| mb.to_string())
        );
    }
}
