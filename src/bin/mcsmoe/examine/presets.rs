//! `presets`: the named recipes, which users may copy and change.

use std::collections::BTreeMap;

use mcsmoe::Recipe;

use crate::exit::Outcome;
use crate::show::Show;

/// List the presets, or print one in full as the file of a recipe.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The preset to print; add `keep` to it and it is a whole recipe.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(Recipe::PRESETS))]
    name: Option<String>,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    let names = match &args.name {
        Some(name) => vec![name.as_str()],
        None => Recipe::PRESETS.to_vec(),
    };
    let mut files = BTreeMap::new();
    for &name in &names {
        files.insert(name, Recipe::preset_file(name)?);
    }
    show.result(&files, |out| match &args.name {
        Some(name) => write!(out, "{}", files[name.as_str()]),
        None => names.iter().try_for_each(|name| {
            let about: Vec<&str> =
                files[name].lines().map_while(|line| line.strip_prefix("# ")).collect();
            writeln!(out, "{name}\n    {}", about.join("\n    "))
        }),
    })
}
