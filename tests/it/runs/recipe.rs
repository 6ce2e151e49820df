//! What a recipe may say: every key of every method, presets and what changes them, formats.

use mcsmoe::ErrorKind;
use mcsmoe::merge::Weighting;
use mcsmoe::pipeline::{
    AlignChoice, CompressChoice, ExportChoice, GroupChoice, Keep, MergeChoice, Recipe,
    RecoverChoice, RouterChoice, SimilarityChoice,
};

/// The stages of a recipe, the key that names the method, and the names.
const STAGES: &[(&str, &str, &[&str])] = &[
    ("similarity", "metric", SimilarityChoice::NAMES),
    ("align", "method", AlignChoice::NAMES),
    ("group", "method", GroupChoice::NAMES),
    ("merge", "method", MergeChoice::NAMES),
    ("router", "method", RouterChoice::NAMES),
    ("recover", "method", RecoverChoice::NAMES),
    ("compress", "method", CompressChoice::NAMES),
];

fn refused(text: &str) -> String {
    let error = Recipe::from_toml(text).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Recipe { .. }), "{error}");
    error.to_string()
}

/// The keys that an error lists as allowed.
fn allowed(error: &str) -> Vec<String> {
    let listed = error.split_once("expected").map_or("", |(_, listed)| listed);
    listed.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The options of a method, as the error about an unknown one lists them.
fn options(stage: &str, tag: &str, method: &str) -> Vec<String> {
    let (open, close) = if stage == "recover" { ("[[", "]]") } else { ("[", "]") };
    let error = refused(&format!(
        "preset = \"fast\"\nkeep.experts = 4\n{open}{stage}{close}\n{tag} = \"{method}\"\n\
         mispelt = 1\n"
    ));
    assert!(error.contains("mispelt") && error.contains(stage), "{stage} {method}: {error}");
    allowed(&error)
}

#[test]
fn a_misspelt_option_of_any_method_is_refused() {
    for (stage, tag, names) in STAGES {
        names.iter().for_each(|name| drop(options(stage, tag, name)));
    }
    for (table, option) in [
        ("[merge]\nmethod = \"weighted\"\n[merge.compat]\nepps = 1e-7", "epps"),
        ("[constraints]\nprotect_layer = []", "protect_layer"),
        ("[keep]\nexpert = 4", "expert"),
        ("sed = 3", "sed"),
    ] {
        let keep = if table.contains("[keep]") { "" } else { "keep.experts = 4\n" };
        let error = refused(&format!("{keep}preset = \"m-smoe\"\n{table}\n"));
        assert!(error.contains(&format!("`{option}`")), "{error}");
    }
}

#[test]
fn the_page_of_keys_lists_every_key_of_every_method() {
    let page = include_str!("../../../docs/RECIPE_KEYS.md");
    let section = |title: &str| {
        let begin = page.find(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("{title}"));
        let rest = &page[begin + 4..];
        rest[..rest.find("\n## ").unwrap_or(rest.len())].to_owned()
    };
    for (stage, tag, names) in STAGES {
        let section = section(stage);
        let listed: Vec<&str> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name))
            .collect();
        assert_eq!(&listed[..], *names, "the rows of {stage}");
        for name in *names {
            let row = section.lines().find(|l| l.starts_with(&format!("| `{name}`"))).unwrap();
            for option in options(stage, tag, name) {
                assert!(row.contains(&format!("`{option}")), "{stage} {name}: {option}");
            }
        }
    }
    let top = section("Keys of a recipe");
    for key in allowed(&refused("preset = \"fast\"\nkeep.experts = 4\nmispelt = 1\n")) {
        assert!(top.contains(&format!("| `{key}`")), "{key}");
    }
}

#[test]
fn methods_are_named_in_the_documents_as_in_recipes() {
    let methods = include_str!("../../../docs/METHODS.md");
    let titles: Vec<&str> = methods.lines().filter_map(|l| l.strip_prefix("### ")).collect();
    for (stage, _, names) in STAGES {
        for name in *names {
            let named = |title: &&&str| {
                title.split(" (").next().unwrap_or(title).split(", ").any(|part| part == *name)
            };
            assert!(titles.iter().any(|title| named(&title)), "METHODS has no `{name}` ({stage})");
        }
    }
}

#[test]
fn one_key_of_a_preset_can_be_changed() {
    let text = "preset = \"ream\"\nkeep.experts = 4\n[merge]\nby = \"uniform\"\n";
    let changed = Recipe::from_toml(text).unwrap();
    let mut expected = Recipe::preset("ream", Keep::Experts(4)).unwrap();
    let MergeChoice::Weighted(merge) = &mut expected.merge else { panic!("{expected:?}") };
    merge.by = Weighting::Uniform;
    assert_eq!(changed, expected);
    // A method that is named begins with its own defaults, not with the preset's options.
    let text = "preset = \"ream\"\nkeep.experts = 4\n[merge]\nmethod = \"weighted\"\n";
    let MergeChoice::Weighted(merge) = Recipe::from_toml(text).unwrap().merge else { panic!() };
    assert_eq!(merge.by, Weighting::Usage);
    let error = refused("preset = \"hc-smoe\"\nkeep.experts = 4\n[compress]\nrank = 3\n");
    assert!(error.contains("compress") && error.contains("method"), "{error}");
}

#[test]
fn fast_as_a_stock_folder_is_what_nothing_else_asks_for() {
    let fast = Recipe::preset("fast", Keep::Fraction(0.5)).unwrap();
    assert_eq!(fast.export, ExportChoice::Stock);
    assert_eq!(Recipe::from_toml("[keep]\nfraction = 0.5\n").unwrap(), fast);
    assert_eq!(Recipe::from_toml("preset = \"fast\"\nkeep.fraction = 0.5\n").unwrap(), fast);
    assert_eq!(Recipe::DEFAULT_PRESET, "fast");
    for &preset in Recipe::PRESETS {
        let recipe = Recipe::preset(preset, Keep::Fraction(0.5)).unwrap();
        let factors = recipe.compress.is_some();
        assert_eq!(recipe.export == ExportChoice::Native, factors, "{preset}");
        assert!(Recipe::preset_file(preset).unwrap().starts_with("# "), "{preset}");
    }
    let error = refused("keep.experts = 4\n[merge]\nmethod = \"weighted\"\n");
    assert!(error.contains("similarity") && error.contains("`preset`"), "{error}");
}

#[test]
fn a_recipe_reads_as_what_was_written() {
    for &preset in Recipe::PRESETS {
        let mut recipe = Recipe::preset(preset, Keep::Total(5)).unwrap();
        assert_eq!(Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap(), recipe);
        // What a preset has and the recipe has not must not come back.
        recipe.recover.clear();
        recipe.recover_tokens = None;
        recipe.compress = None;
        let read = Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap();
        assert_eq!(Recipe { preset: None, ..read }, Recipe { preset: None, ..recipe });
    }
}

#[test]
fn json_is_read_as_json() {
    let text = "{\n\t\"preset\": \"fast\",\n\t\"keep\": {\"experts\": 4},\n\t\"seed\": 1e0\n}";
    let error = Recipe::from_json(text).unwrap_err().to_string();
    assert!(error.contains("seed") || error.contains("1.0"), "{error}");
    let text = text.replace("1e0", "1");
    assert_eq!(Recipe::from_json(&text).unwrap().seed, 1);
    for bad in ["preset: fast\nkeep: {experts: 4}", "{\"keep\": {\"experts\": 4},}"] {
        assert!(Recipe::from_json(bad).is_err(), "{bad}");
    }
    let twice = "{\"keep\": {\"experts\": 4, \"experts\": 2}}";
    assert!(Recipe::from_json(twice).unwrap_err().to_string().contains("twice"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recipe.json");
    std::fs::write(&file, text).unwrap();
    assert_eq!(Recipe::read(&file).unwrap().seed, 1);
}
