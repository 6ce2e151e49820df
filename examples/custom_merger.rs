//! A merger of one's own in a whole run: the plain mean of the aligned members of a group.

#![allow(clippy::print_stdout)] // It is a command.

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::Calibration;
use mcsmoe::prelude::*;

#[derive(Debug)]
struct Mean;

impl Stage for Mean {
    fn name(&self) -> &str {
        "mean"
    }
}

impl Merger for Mean {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.average(&vec![1.0; members.experts.len()], cx)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let source = Checkpoint::open("tests/fixtures/mixtral-8e")?;
    let text = Calibration::text("tests/fixtures/text/calib", 512, 4096, 7);
    let recipe = Recipe::preset("m-smoe", Keep::Experts(4))?;
    let pipeline = recipe.builder()?.merger(Mean).build()?;
    let target = tempfile::tempdir()?;
    let report = pipeline.run().calibration(text).write(&source, target.path().join("half"))?;
    println!("{:?}: {} → {} experts", report.stages, report.experts.before, report.experts.after);
    Ok(())
}
