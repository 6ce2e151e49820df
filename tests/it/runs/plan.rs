//! Plans of large models from their headers alone, which sparse files hold.

use std::fs;
use std::path::Path;

use crate::support::fixture;
use crate::support::sparse_models::{
    deepseek_v2_lite, deepseek_v3, gpt_oss_20b, mixtral_8x7b, olmoe_1b_7b, qwen3_30b_a3b,
    qwen3_235b_a22b, switch_base_8,
};
use mcsmoe::ErrorKind;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{
    Answer, Change, CompressChoice, ExportChoice, Keep, Output, PlanOptions, Recipe,
    RoutingGroupPolicy, RunPlan, merge_then_compress, plan,
};

fn of(model: &Path, recipe: &Recipe) -> mcsmoe::Result<RunPlan> {
    let source = Checkpoint::open(model)?;
    let options = PlanOptions { threads: 16, ..PlanOptions::default() };
    plan(&source, recipe, &Output::new(recipe.export), &options)
}

fn stock(preset: &str, keep: Keep) -> Recipe {
    Recipe::preset(preset, keep).unwrap().export(ExportChoice::Stock)
}

fn answers(plan: &RunPlan) -> Vec<Answer> {
    assert_eq!(plan.runtimes.iter().map(|r| r.runtime.to_string()).collect::<Vec<_>>(), RUNTIMES);
    plan.runtimes.iter().map(|r| r.answer).collect()
}

const RUNTIMES: [&str; 3] = ["transformers", "vllm", "llama.cpp"];

#[test]
fn mixtral_8x7b_is_planned_from_headers() {
    let model = mixtral_8x7b();
    let found = of(model.path(), &stock("fast", Keep::Experts(4))).unwrap();
    // 46.70 B as published; an expert has 3 · 4096 · 14336 parameters.
    assert_eq!(found.parameters.before, 46_702_792_704);
    let gone = 32 * 4 * (3 * 4096 * 14336 + 4096);
    assert_eq!(found.parameters.after, 46_702_792_704 - gone);
    assert_eq!(found.tensor_bytes.after, 2 * found.parameters.after);
    assert_eq!(found.expert_bytes.before, 2 * 32 * 8 * 3 * 4096 * 14336);
    assert_eq!((found.experts.before, found.experts.after), (256, 128));
    assert_eq!(found.shards, 10);
    // A layer in f32 is 5.6 GB, with its pages 8.5 GB; nothing near the model's 93 GB.
    assert!((8_400_000_000..20_000_000_000).contains(&found.memory.peak), "{:?}", found.memory);
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    let vllm = found.runtimes[1].notes.join("\n");
    assert!(vllm.contains("even over 1, 2, 4 ranks"), "{vllm}");
    // Two FLOPs a parameter that a token visits, and attention on top: 12.9 B of them.
    let cost = found.cost;
    let per_token = cost.calibrate as f64 / 16_384.0;
    assert!((25e9..27e9).contains(&per_token), "{cost:?}");
    assert_eq!(cost.total, cost.calibrate + cost.merge + cost.recover, "{cost:?}");
    let times = cost.calibrations.unwrap();
    assert!((times - cost.total as f64 / cost.calibrate as f64).abs() < 1e-9, "{cost:?}");
    // One pass reads every layer once.
    let Change { before, after } = found.tensor_bytes;
    assert_eq!((cost.read_bytes, cost.write_bytes), (before, after));

    let error = of(model.path(), &stock("fast", Keep::Experts(1))).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Budget { .. }), "{error}");
    assert!(error.to_string().contains("the router chooses 2"), "{error}");

    // A global budget: layers of unequal numbers, which no stock class reads.
    let native = Recipe::preset("mc-smoe", Keep::Total(128)).unwrap();
    let found = of(model.path(), &native).unwrap();
    let refused = [Answer::Accepts, Answer::Refuses, Answer::Refuses];
    assert!(found.spread && answers(&found) == refused);
    assert!(found.runtimes[0].notes.join("\n").contains("trust_remote_code=True"));
    assert!(found.runtimes[1].reasons.join("\n").contains("one number for all"));
    assert!(found.tensor_bytes.saved() > 0.8, "{:?}", found.tensor_bytes);
}

#[test]
fn qwen3_235b_is_planned_from_headers() {
    let model = qwen3_235b_a22b();
    let found = of(model.path(), &stock("m-smoe", Keep::Fraction(0.75))).unwrap();
    assert!((235_000_000_000..235_200_000_000).contains(&found.parameters.before));
    assert_eq!(found.experts_per_layer, vec![96; 94]);
    assert!(found.memory.peak < 32_000_000_000, "{:?}", found.memory);
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    let vllm = found.runtimes[1].notes.join("\n");
    assert!(vllm.contains("1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48 ranks"), "{vllm}");
    // Rank 32 and a tenth of the rows, from the paper.
    let recipe = Recipe {
        compress: Some(CompressChoice::Svd { rank: 64 }),
        ..stock("m-smoe", Keep::Experts(64))
    };
    let native = recipe.clone().export(ExportChoice::Native);
    let (stock, native) = (of(model.path(), &recipe).unwrap(), of(model.path(), &native).unwrap());
    assert!(native.tensor_bytes.after < stock.tensor_bytes.after / 2, "factors are smaller");
}

#[test]
fn deepseek_v3_is_planned_from_headers() {
    let model = deepseek_v3();
    let found = of(model.path(), &stock("fast", Keep::Experts(128))).unwrap();
    // 671 B as published and the layer of prediction; as bf16 half of the experts are as large.
    assert!((682_000_000_000..685_000_000_000).contains(&found.parameters.before), "{found:?}");
    assert!(
        (0.9..1.1).contains(&(found.expert_bytes.after as f64 / found.expert_bytes.before as f64))
    );
    let (why, n) = found.dropped.iter().find(|(why, _)| why.contains("multi-token")).unwrap();
    assert!(*n > 1500, "{why}: {n}");
    assert!(found.dropped.keys().any(|why| why.contains("dequantised")));
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    for runtime in &found.runtimes {
        assert!(runtime.notes.join("\n").contains("multi-token-prediction"), "{runtime:?}");
    }
    // Eight routing groups divide 128 experts, not 100; flattened, any number will do.
    let odd = stock("fast", Keep::Experts(100));
    let error = of(model.path(), &odd).unwrap_err();
    assert!(error.to_string().contains("do not divide into 8 routing groups"), "{error}");
    let flat = Recipe { routing_groups: RoutingGroupPolicy::Flatten, ..odd };
    assert_eq!(of(model.path(), &flat).unwrap().experts_per_layer, vec![100; 58]);
}

type Make = fn() -> tempfile::TempDir;

/// A section of docs/RECIPES.md: the model, what is said of it, and the recipe.
fn sections() -> Vec<(String, String, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/RECIPES.md");
    let text = fs::read_to_string(file).unwrap();
    let of_one = |section: &str| {
        let (name, rest) = section.split_once('\n').unwrap();
        let (said, rest) = rest.split_once("```toml\n").unwrap();
        let (recipe, after) = rest.split_once("```\n").unwrap();
        assert!(!after.contains("```"), "{name}: one recipe");
        (name.to_owned(), format!("{said}{after}"), recipe.to_owned())
    };
    text.split("\n## ").skip(1).map(of_one).collect()
}

#[test]
fn recipes_of_common_models_are_planned() {
    let models: [(&str, Make); 7] = [
        ("Mixtral-8x7B", mixtral_8x7b),
        ("Qwen3-30B-A3B", qwen3_30b_a3b),
        ("DeepSeek-V2-Lite", deepseek_v2_lite),
        ("DeepSeek-V3", deepseek_v3),
        ("gpt-oss-20b", gpt_oss_20b),
        ("OLMoE-1B-7B", olmoe_1b_7b),
        ("Switch-base-8", switch_base_8),
    ];
    let sections = sections();
    let names: Vec<&str> = sections.iter().map(|(name, ..)| &**name).collect();
    assert_eq!(names, models.map(|(name, _)| name));
    for ((name, said, recipe), (_, model)) in sections.iter().zip(models) {
        let recipe = Recipe::from_toml(recipe).unwrap_or_else(|e| panic!("{name}: {e}"));
        let model = model();
        let source = Checkpoint::open(model.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let options = PlanOptions { threads: 16, ..PlanOptions::default() };
        let found = plan(&source, &recipe, &Output::new(recipe.export), &options);
        let found = found.unwrap_or_else(|e| panic!("{name}: {e}"));
        let gigabytes = |n: u64| format!("{:.1}", n as f64 / 1e9);
        let (bytes, experts) = (found.tensor_bytes, found.experts);
        let row = format!(
            "{} → {} experts, {} → {} GB, peak memory {} GB",
            experts.before,
            experts.after,
            gigabytes(bytes.before),
            gigabytes(bytes.after),
            gigabytes(found.memory.peak)
        );
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(&row), "{name}: the document should say: {row}");
        let [transformers, vllm, llama] = answers(&found)[..] else { panic!() };
        let stock = recipe.export == ExportChoice::Stock;
        assert_eq!(transformers, Answer::Accepts, "{name}");
        let served = stock && name != "Switch-base-8";
        for answer in [vllm, llama] {
            assert_eq!(answer == Answer::Accepts, served, "{name}: {:?}", found.runtimes);
        }
    }
}

#[test]
fn what_is_planned_is_what_is_written() {
    let (model, stats) = (fixture("mixtral-8e"), fixture("mixtral-8e.stats.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&model).unwrap();
    let kinds = [
        ("fast", Keep::Experts(4), ExportChoice::Stock),
        ("m-smoe", Keep::Total(18), ExportChoice::Native),
        ("mc-smoe", Keep::Experts(5), ExportChoice::Native),
        ("hc-smoe", Keep::Experts(3), ExportChoice::Expanded),
    ];
    for (preset, keep, export) in kinds {
        let mut recipe = Recipe::preset(preset, keep).unwrap().export(export);
        recipe.shard_bytes = 900_000;
        let output = Output { shard_bytes: 900_000, ..Output::new(export) };
        let options = PlanOptions { text: false, ..PlanOptions::default() };
        let planned = plan(&source, &recipe, &output, &options).unwrap();
        assert_eq!((planned.cost.calibrate, planned.cost.calibrations), (0, None));
        let target = dir.path().join(preset);
        let report = merge_then_compress(&model, &stats, &target, &recipe).unwrap();
        let written = report.written.unwrap();
        assert_eq!(planned.parameters, written.parameters, "{preset}");
        assert_eq!(planned.tensor_bytes, written.tensor_bytes, "{preset}");
        assert_eq!(planned.expert_bytes, written.expert_bytes, "{preset}");
        assert_eq!(planned.experts, report.experts, "{preset}");
        let shards = fs::read_dir(&target)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "safetensors"));
        // Where a global budget spreads experts, files are cut at other places.
        assert!(planned.spread || planned.shards == shards.count(), "{preset}");
    }
}

#[test]
fn a_plan_refuses_what_a_run_refuses() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mixtral-8e");
    let source = Checkpoint::open(&model).unwrap();
    let recipe = Recipe::from_toml("keep.experts = 4\npreset = 'fast'\nmerge.method = 'fisher'");
    let (recipe, dir) = (recipe.unwrap(), tempfile::tempdir().unwrap());
    let ids = mcsmoe::pipeline::Tokens::Windows(vec![(0..64).collect()]);
    let run = merge_then_compress(&model, ids, dir.path().join("target"), &recipe).unwrap_err();
    let plan = plan(&source, &recipe, &Output::new(recipe.export), &PlanOptions::default());
    assert_eq!(plan.unwrap_err().to_string(), run.to_string());
}
