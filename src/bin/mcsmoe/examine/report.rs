//! `report`: what a run did, from the manifest that it left in its target.

use std::io::{self, Write};
use std::path::PathBuf;

use mcsmoe::pipeline::Report;
use mcsmoe::report::{Details, Quality, layer_outcomes, outcomes};

use crate::artifacts;
use crate::exit::Outcome;
use crate::show::{Show, bytes, change, count};

/// Groups, output errors and savings of a merged checkpoint; as a page with pictures or a model
/// card too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder that a run has written.
    target: PathBuf,
    /// Write the report as one HTML page that loads nothing.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a model card; in a file that exists only what an earlier card wrote is replaced.
    #[arg(long, value_name = "FILE")]
    card: Option<PathBuf>,
    /// Perplexity or divergence for both: what `evaluate --json` or `run --evaluate TEXT --json`
    /// printed. It is kept in the folder; unless given, the one that was kept last is used.
    #[arg(long, value_name = "FILE")]
    evaluation: Option<PathBuf>,
    /// The original's name on a model hub, for the card.
    #[arg(long, value_name = "ORGANISATION/MODEL")]
    base_model: Option<String>,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    let report = Report::read(&args.target)?;
    let quality = match &args.evaluation {
        Some(file) => {
            let quality = Quality::read(file)?;
            quality.keep(&args.target)?;
            Some(quality)
        }
        None => Quality::kept(&args.target)?,
    };
    if let Some(file) = &args.html {
        artifacts::page(&args.target, &report, quality.clone(), file)?;
    }
    if let Some(file) = &args.card {
        let base_model = args.base_model.clone();
        let details = Details { base_model, quality, ..Details::read(&args.target)? };
        artifacts::renew(&report, &details, file)?;
    }
    show.result(&report, |out| {
        text(&report, out)?;
        for file in [&args.html, &args.card].into_iter().flatten() {
            writeln!(out, "{}: written", file.display())?;
        }
        Ok(())
    })
}

/// The most characters of a layer's list of experts; `--json` has all.
const STAY_WIDTH: usize = 48;

/// The report for people.
pub(crate) fn text(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}; {} tokens", report.stages.join(", "), count(report.tokens))?;
    calibration(report, out)?;
    writeln!(out, "experts of the original: {}", outcomes(report))?;
    writeln!(out, "{:<18} {:>9}  {:>11}  experts that stay", "layer", "experts", "output err.")?;
    for layer in &report.layers {
        let error = layer
            .output_error
            .map_or("-".into(), |e| format!("{:.1}%", 100.0 * e.narrowed.unwrap_or(e.mapped)));
        let experts = format!("{} → {}", layer.experts.before, layer.experts.after);
        let stay = layer_outcomes(report, layer, STAY_WIDTH);
        writeln!(out, "{:<18} {experts:>9}  {error:>11}  {stay}", layer.layer)?;
    }
    change(out, "MoE FLOPs per token", report.flops_per_token, count)?;
    if let Some(found) = &report.compression {
        change(out, "expert parameters, dense and factored", found.parameters, count)?;
        let rank = found.stable_rank;
        let (before, merged, after) = (rank.original, rank.merged, rank.compressed);
        writeln!(out, "mean stable rank: {before:.2} → {merged:.2} → {after:.2}")?;
    }
    if let Some(written) = &report.written {
        writeln!(out, "export: {}", written.export)?;
        change(out, "parameters", written.parameters, count)?;
        change(out, "expert bytes", written.expert_bytes, bytes)?;
        change(out, "tensor bytes", written.tensor_bytes, bytes)?;
    }
    Ok(())
}

/// Fewer tokens than this say little of an expert.
const FEW_TOKENS: u64 = 16;

/// The sources of the text, and the experts that few tokens reached.
fn calibration(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let calibration = report.calibration.as_ref();
    for source in calibration.and_then(|found| found.text.as_ref()).iter().flat_map(|t| &t.sources)
    {
        let (name, windows, tokens) = (&source.name, source.windows, count(source.tokens));
        writeln!(out, "text {name}: {tokens} tokens in {windows} windows")?;
    }
    for (layer, experts) in report.rarely_reached(FEW_TOKENS) {
        writeln!(out, "{layer}: fewer than {FEW_TOKENS} tokens reached experts {experts:?}")?;
    }
    Ok(())
}
