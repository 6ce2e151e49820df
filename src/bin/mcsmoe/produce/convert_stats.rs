//! `convert-stats`: statistics from JSON, to JSON, or to a smaller file.

use std::path::{Path, PathBuf};

use mcsmoe::calibrate::{StatsFile, StatsWriter, statistics_from_json, statistics_to_json};
use mcsmoe::stage::Needs;
use serde_json::json;

use crate::exit::{Failure, Outcome};
use crate::show::{Show, bytes};

/// Convert statistics: JSON to the interchange format and back, or a file without its samples.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A .safetensors or .json file.
    from: PathBuf,
    /// A .safetensors or .json file to write; JSON has no per-token samples.
    to: PathBuf,
    /// Leave per-token samples out, which are most of a file.
    #[arg(long)]
    no_samples: bool,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    if args.to.exists() {
        return Err(Failure::Usage(format!("{} exists", args.to.display())));
    }
    match (ending(&args.from)?, ending(&args.to)?) {
        (Ending::Json, Ending::Json) => {
            return Err(Failure::Usage("both files are JSON".into()));
        }
        (Ending::Json, Ending::Safetensors) => statistics_from_json(&args.from, &args.to)?,
        (Ending::Safetensors, Ending::Json) => statistics_to_json(&args.from, &args.to)?,
        (Ending::Safetensors, Ending::Safetensors) => copy(args)?,
    }
    let size = |path: &Path| std::fs::metadata(path).map(|data| data.len());
    let (before, after) = (size(&args.from)?, size(&args.to)?);
    let value = json!({ "stats": args.to, "bytes": { "before": before, "after": after } });
    show.result(&value, |out| writeln!(out, "{} → {}", bytes(before), bytes(after)))
}

enum Ending {
    Json,
    Safetensors,
}

fn ending(path: &Path) -> Outcome<Ending> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("json") => Ok(Ending::Json),
        Some("safetensors") => Ok(Ending::Safetensors),
        _ => Err(Failure::Usage(format!("{}: neither .json nor .safetensors", path.display()))),
    }
}

/// Layer by layer, with everything that the file holds, or all but the samples.
fn copy(args: &Args) -> Outcome {
    let file = StatsFile::open(&args.from)?;
    let metadata = file.model_type().map(|family| ("model_type".to_owned(), family.to_owned()));
    let mut writer = StatsWriter::create(&args.to, &metadata.into_iter().collect())?;
    for id in file.layers() {
        let mut needs = file.available(id);
        if args.no_samples {
            needs = needs.without(Needs::SAMPLES);
        }
        writer.layer(*id, &file.layer(id, needs)?)?;
    }
    Ok(writer.finish()?)
}
