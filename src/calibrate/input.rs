//! What a path holds that a calibration is read from.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::file::tensor_names;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::tensor_file::Header;

/// What a path holds that a calibration is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// A statistics file.
    Statistics,
    /// Text, token ids, or a folder of these; see [`text`](super::text).
    Text,
}

impl InputKind {
    /// Looks at the content: a safetensors file with a tensor that statistics have
    /// (`layers.3.counts`) is a statistics file, one with a tensor of integers holds token ids, and
    /// everything else is text.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Format`] for a safetensors file that is damaged or is
    /// neither of the two, with its tensors. Each names the path.
    pub fn of(path: &Path) -> Result<Self> {
        // Several paths with commas between them are text.
        let list = !path.exists() && path.to_str().is_some_and(|text| text.contains(','));
        if list || path.is_dir() {
            return Ok(Self::Text);
        }
        Self::of_file(path).in_file(path)
    }

    fn of_file(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| Error::io("open", e))?;
        let mut first = Vec::new();
        let read = file.by_ref().take(9).read_to_end(&mut first);
        read.map_err(|e| Error::io("read", e))?;
        // The length of the header, and the brace that it begins with.
        let looks = first.len() == 9 && first[8] == b'{' && first[5..8] == [0; 3];
        let named = path.extension().is_some_and(|ending| ending == "safetensors");
        if !looks && !named {
            return Ok(Self::Text);
        }
        let header = Header::read(&file).map_err(|e| match e.kind() {
            ErrorKind::Format { reason, .. } => neither(reason.clone()),
            _ => e,
        })?;
        let names: Vec<&str> = header.tensors.iter().map(|entry| &*entry.name).collect();
        if names.iter().any(|name| tensor_names::split(name).is_some()) {
            return Ok(Self::Statistics);
        }
        if header.tensors.iter().any(|entry| entry.dtype.is_integer()) {
            return Ok(Self::Text);
        }
        let shown = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let found = if names.is_empty() { "no tensor".to_owned() } else { shown };
        let expected = "tensors of statistics (layers.0.counts) or token ids of an integer type";
        Err(neither(format!("expected {expected}, found {found}")))
    }
}

fn neither(reason: String) -> Error {
    ErrorKind::Format { format: "statistics or token ids (safetensors)", reason }.into()
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn files_are_told_apart_by_what_they_hold() {
        let dir = tempfile::tempdir().unwrap();
        let kind = |file: &str, names: &[&str], dtype: Dtype| {
            let path = dir.path().join(file);
            let views = names.iter().map(|name| {
                (*name, TensorView::new(dtype, vec![1, 1], &[0; 8][..dtype.bitsize() / 8]).unwrap())
            });
            std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
            InputKind::of(&path)
        };
        let ids = ["input_ids", "attention_mask"];
        assert_eq!(kind("ids.safetensors", &ids, Dtype::I64).unwrap(), InputKind::Text);
        let one = ["layers.0.counts"];
        assert_eq!(kind("one.safetensors", &one, Dtype::I32).unwrap(), InputKind::Statistics);
        assert_eq!(kind("stats.bin", &one, Dtype::I32).unwrap(), InputKind::Statistics);
        let error = kind("w.safetensors", &["lm_head.weight"], Dtype::F32).unwrap_err();
        assert!(error.to_string().contains("lm_head.weight"), "{error}");
        assert!(kind("empty.safetensors", &[], Dtype::F32).is_err());
        let text = dir.path().join("text.txt");
        std::fs::write(&text, "words").unwrap();
        assert_eq!(InputKind::of(&text).unwrap(), InputKind::Text);
        assert_eq!(InputKind::of(dir.path()).unwrap(), InputKind::Text);
        assert_eq!(InputKind::of(Path::new("a.txt,b.txt")).unwrap(), InputKind::Text);
        assert!(InputKind::of(&dir.path().join("none")).is_err());
    }
}
