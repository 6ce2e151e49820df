//! Pages and model cards on the disk.

use std::io;
use std::path::Path;

use mcsmoe::Error;
use mcsmoe::error::Locate;
use mcsmoe::pipeline::Report;
use mcsmoe::report::{Details, Quality, html, model_card, with_original, with_text};

use crate::common::Places;
use crate::exit::Outcome;

const CARD: &str = "README.md";

/// Writes the model card into the target; the text of the source's card is kept in it.
pub(crate) fn card(places: &Places, report: &Report, quality: Option<Quality>) -> Outcome {
    let Places { model, target, .. } = places;
    let base_model = Details::hub_name(model);
    let details = Details { base_model, quality, ..Details::read(target)? };
    let file = target.join(CARD);
    match (text(&file)?, text(&model.join(CARD))?) {
        (None, Some(original)) => {
            write(&file, &with_original(&model_card(report, &details), &original))
        }
        _ => renew(report, &details, &file),
    }
}

/// Writes a model card; other text that is in the file stays.
pub(crate) fn renew(report: &Report, details: &Details, file: &Path) -> Outcome {
    let card = model_card(report, details);
    match text(file)? {
        None => write(file, &card),
        Some(existing) => write(file, &with_text(&card, &existing)),
    }
}

/// Writes the page.
pub(crate) fn page(
    target: &Path,
    report: &Report,
    quality: Option<Quality>,
    file: &Path,
) -> Outcome {
    let details = Details { quality, ..Details::read(target)? };
    write(file, &html(report, &details)?)
}

/// The text of a file, if there is one. Bytes that are no UTF-8 are replaced.
fn text(file: &Path) -> Outcome<Option<String>> {
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read model card", error)).in_file(file).map_err(Into::into),
    }
}

fn write(file: &Path, text: &str) -> Outcome {
    let written = std::fs::write(file, text).map_err(|e| Error::io("write", e));
    Ok(written.in_file(file)?)
}
