//! Writing the interchange format.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ndarray::Array2;
use serde_json::{Value, json};

use super::stats_file::{MAX_EXPERTS, contradiction};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, LayerId, LinearView, Role, RoutingStats, Samples};
use crate::tensor_file::{NewTensor, encode_header};

/// Writes statistics in the interchange format, so that
/// [`StatsFile`](crate::calibrate::StatsFile) reads the same values back: counts, per-token
/// tensors, `f64` sums and tensors shaped like the experts exactly, norms and saliencies rounded to
/// `f32`.
///
/// `metadata` is free text, e.g. `model_type`; the keys `num_experts` and `layers` are written
/// by this function. The file is written aside and renamed, so that a reader sees the old or the
/// new file, never half of one. The same statistics give the same bytes.
///
/// # Errors
/// [`ErrorKind::Statistics`](crate::ErrorKind::Statistics) when the parts of a layer contradict
/// each other, [`ErrorKind::Io`](crate::ErrorKind::Io).
pub fn write_stats(
    path: impl AsRef<Path>,
    layers: &BTreeMap<LayerId, RoutingStats>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut writer = StatsWriter::create(path, metadata)?;
    for (&id, stats) in layers {
        writer.layer(id, stats)?;
    }
    writer.finish()
}

/// Writes a statistics file a layer at a time: nothing of a layer stays in memory.
///
/// The values go to a hidden file beside the target; the header, which lists them, is known last,
/// so [`StatsWriter::finish`] copies them behind it and renames. Dropped before, it leaves nothing
/// behind. The bytes are those of [`write_stats`].
#[derive(Debug)]
pub struct StatsWriter {
    path: PathBuf,
    aside: TemporaryFile,
    values: BufWriter<File>,
    placed: Vec<Placed>,
    end: u64,
    metadata: BTreeMap<String, String>,
    notes: Vec<Value>,
    sizes: Vec<usize>,
}

/// Refuses statistics whose file could not be read again.
pub(super) fn check_readable(stats: &RoutingStats) -> Result<()> {
    let misfit = |what: &str, expected: String, found: &dyn std::fmt::Display| {
        Err(contradiction(format!("{what}: expected {expected}, found {found}")))
    };
    let n = stats.experts();
    if n == 0 || n > MAX_EXPERTS {
        return misfit("experts", format!("1 to {MAX_EXPERTS}"), &n);
    }
    // They are stored as i64.
    let most = stats.tokens.min(i64::MAX as u64);
    if let Some(count) = stats.counts.iter().find(|&&count| count > most) {
        return misfit("count", format!("0..={most}"), count);
    }
    if stats.mean_output.as_ref().is_some_and(|mean| mean.ncols() == 0) {
        return misfit("width of the model", "1 or more".into(), &0);
    }
    // They are stored as f32.
    let most = f64::from(f32::MAX);
    let rounded = [(&stats.output_norm, "expert output norm"), (&stats.reap, "REAP saliency")];
    for (values, what) in rounded {
        if let Some(x) = values.iter().flatten().find(|&&x| x > most) {
            return misfit(what, format!("at most {most:e}"), x);
        }
    }
    Ok(())
}

/// A tensor whose values were written.
#[derive(Debug)]
struct Placed {
    name: String,
    dtype: &'static str,
    width: usize,
    shape: Vec<usize>,
    at: u64,
    bytes: u64,
}

impl StatsWriter {
    /// Begins a file; `metadata` as in [`write_stats`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn create(path: impl AsRef<Path>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let path = path.as_ref();
        let aside = TemporaryFile::of(path);
        let mut open = File::options();
        open.read(true).write(true).create(true).truncate(true);
        let file = open.open(&aside.values).map_err(|e| Error::io("write statistics", e));
        Ok(Self {
            path: path.into(),
            values: BufWriter::with_capacity(1 << 20, file.in_file(path)?),
            aside,
            placed: Vec::new(),
            end: 0,
            metadata: metadata.clone(),
            notes: Vec::new(),
            sizes: Vec::new(),
        })
    }

    /// Writes one layer. [`write_stats`] writes them in ascending order; so should others.
    ///
    /// # Errors
    /// [`ErrorKind::Statistics`](crate::ErrorKind::Statistics) when its parts contradict each other
    /// (an expert that was chosen more often than there are tokens) or it was written before,
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn layer(&mut self, id: LayerId, stats: &RoutingStats) -> Result<()> {
        self.write_layer(id, stats).in_layer(id).in_file(&self.path)
    }

    fn write_layer(&mut self, id: LayerId, stats: &RoutingStats) -> Result<()> {
        stats.validate(stats.experts(), width(stats))?;
        check_readable(stats)?;
        let note = note(id, stats);
        if self.notes.iter().any(|other| other["name"] == note["name"]) {
            return Err(contradiction("the layer was written before".into()));
        }
        self.notes.push(note);
        self.sizes.push(stats.experts());
        for Part { name, shape, values } in parts_of(id, stats) {
            let (dtype, width, at) = (values.dtype(), values.width(), self.end);
            let bytes = (shape.iter().product::<usize>() * width) as u64;
            values.write(&mut self.values).map_err(|e| Error::io("write statistics", e))?;
            self.placed.push(Placed { name, dtype, width, shape, at, bytes });
            self.end += bytes;
        }
        Ok(())
    }

    /// Puts the header before the values and gives the file its name.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn finish(mut self) -> Result<()> {
        // Wide types first: every tensor stays aligned to its own width.
        self.placed.sort_by_key(|part| std::cmp::Reverse(part.width));
        let tensors = self.placed.iter().map(|part| NewTensor {
            name: &part.name,
            dtype: part.dtype,
            shape: &part.shape,
            bytes: part.bytes,
        });
        let header = encode_header(&self.notes(), tensors);
        let mut join = || -> io::Result<()> {
            self.values.flush()?;
            let mut values = self.values.get_ref();
            let mut out = BufWriter::with_capacity(1 << 20, File::create(&self.aside.whole)?);
            out.write_all(&header)?;
            for part in &self.placed {
                values.seek(SeekFrom::Start(part.at))?;
                io::copy(&mut values.take(part.bytes), &mut out)?;
            }
            out.into_inner()?.sync_all()?;
            fs::rename(&self.aside.whole, &self.path)
        };
        join().map_err(|e| Error::io("write statistics", e)).in_file(&self.path)
    }

    /// The caller's metadata and what a reader cannot see in the tensors.
    fn notes(&self) -> BTreeMap<String, String> {
        let mut notes = self.metadata.clone();
        notes.insert("layers".into(), Value::Array(self.notes.clone()).to_string());
        match self.sizes.split_first() {
            Some((n, rest)) if rest.iter().all(|other| other == n) => {
                notes.insert("num_experts".into(), n.to_string());
            }
            // Layers of different sizes have no common number.
            _ => {
                notes.remove("num_experts");
            }
        }
        notes
    }
}

/// Hidden names in the target's folder, so that the rename stays within one file system; the files
/// are removed in the end, whatever happened.
#[derive(Debug)]
pub(super) struct TemporaryFile {
    values: PathBuf,
    pub(super) whole: PathBuf,
}

impl TemporaryFile {
    pub(super) fn of(path: &Path) -> Self {
        let hidden = |kind: &str| {
            let mut name = OsString::from(".");
            name.push(path.file_name().unwrap_or_default());
            name.push(format!(".{}.{kind}", std::process::id()));
            path.with_file_name(name)
        };
        Self { values: hidden("values"), whole: hidden("partial") }
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        for path in [&self.values, &self.whole] {
            // Usually there is nothing to remove; if it fails there is nobody to tell.
            let _ = fs::remove_file(path);
        }
    }
}

fn width(stats: &RoutingStats) -> usize {
    let samples = stats.samples.as_ref().map(|s| s.inputs.ncols());
    samples.or(stats.mean_output.as_ref().map(|m| m.ncols())).unwrap_or(0)
}

/// What the metadata say of a layer.
fn note(id: LayerId, stats: &RoutingStats) -> Value {
    let mut note = json!({ "name": id.to_string(), "tokens": stats.tokens });
    if let Some(samples) = &stats.samples {
        note["top_k"] = json!(samples.routing.experts.ncols());
        if samples.tokens() as u64 != stats.tokens {
            note["samples"] = json!(samples.tokens());
        }
    }
    note
}

/// A tensor to be written; values are converted on the way out.
struct Part<'a> {
    name: String,
    shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    F64(Box<dyn Iterator<Item = f64> + 'a>),
    I64(Box<dyn Iterator<Item = i64> + 'a>),
    F32(Box<dyn Iterator<Item = f32> + 'a>),
    I32(Box<dyn Iterator<Item = i32> + 'a>),
}

impl Values<'_> {
    fn dtype(&self) -> &'static str {
        match self {
            Self::F64(_) => "F64",
            Self::I64(_) => "I64",
            Self::F32(_) => "F32",
            Self::I32(_) => "I32",
        }
    }

    fn width(&self) -> usize {
        match self {
            Self::F64(_) | Self::I64(_) => 8,
            Self::F32(_) | Self::I32(_) => 4,
        }
    }

    fn write(self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::F64(mut values) => values.try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Self::I64(mut values) => values.try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Self::F32(mut values) => values.try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Self::I32(mut values) => values.try_for_each(|x| out.write_all(&x.to_le_bytes())),
        }
    }
}

impl<'a> Part<'a> {
    fn new(id: LayerId, name: &str, shape: &[usize], values: Values<'a>) -> Self {
        Self { name: format!("{id}.{name}"), shape: shape.to_vec(), values }
    }

    fn matrix(id: LayerId, name: &str, array: &'a Array2<f32>) -> Self {
        Self::new(id, name, array.shape(), Values::F32(Box::new(array.iter().copied())))
    }
}

fn parts_of(id: LayerId, stats: &RoutingStats) -> Vec<Part<'_>> {
    let n = stats.experts();
    let mut parts = vec![counts(id, stats)];
    if let Some(gram) = &stats.logit_gram {
        parts.push(Part::new(id, "logit_gram", &[n, n], wide(gram.iter())));
    }
    if let Some(mass) = &stats.router_mass {
        parts.push(Part::new(id, "router_mass", &[n], wide(mass.iter())));
    }
    for (name, vector) in [("expert_out_norm", &stats.output_norm), ("reap_saliency", &stats.reap)]
    {
        let Some(vector) = vector else { continue };
        let rounded = Box::new(vector.iter().map(|&x| x as f32));
        parts.push(Part::new(id, name, &[n], Values::F32(rounded)));
    }
    if let Some(mean) = &stats.mean_output {
        parts.push(Part::matrix(id, "expert_mean_output", mean));
    }
    if let Some(samples) = &stats.samples {
        parts.extend(sample_parts(id, samples));
    }
    for (kind, tensors) in [("grad", &stats.gradients), ("fisher", &stats.fisher)] {
        let Some(tensors) = tensors else { continue };
        parts.extend(expert_parts(id, kind, tensors));
    }
    parts
}

fn wide<'a>(values: impl Iterator<Item = &'a f64> + 'a) -> Values<'a> {
    Values::F64(Box::new(values.copied()))
}

/// Counts beyond `i32` are rare but legal: the format allows both widths.
fn counts(id: LayerId, stats: &RoutingStats) -> Part<'_> {
    let counts = stats.counts.iter();
    let values = match stats.counts.iter().all(|&c| i32::try_from(c).is_ok()) {
        true => Values::I32(Box::new(counts.map(|&c| c as i32))),
        false => Values::I64(Box::new(counts.map(|&c| c as i64))),
    };
    Part::new(id, "counts", &[stats.experts()], values)
}

fn sample_parts(id: LayerId, samples: &Samples) -> impl Iterator<Item = Part<'_>> {
    let chosen = &samples.routing.experts;
    let indices = Values::I32(Box::new(chosen.iter().map(|&e| e as i32)));
    let matrices = [
        ("topk_weights", Some(&samples.routing.weights)),
        ("router_logits", Some(&samples.logits)),
        ("moe_input", Some(&samples.inputs)),
        ("routed_output", samples.routed_output.as_ref()),
    ];
    let matrices =
        matrices.into_iter().filter_map(move |(name, array)| Some(Part::matrix(id, name, array?)));
    std::iter::once(Part::new(id, "topk_indices", chosen.shape(), indices)).chain(matrices)
}

fn expert_parts<'a>(id: LayerId, kind: &str, tensors: &'a [Expert]) -> Vec<Part<'a>> {
    let Some(first) = tensors.first() else { return Vec::new() };
    let part = |(role, linear): (Role, LinearView<'a>)| {
        let (rows, cols) = linear.weight.dim();
        let of_role = move |e: &'a Expert| e.view().linear(role).map(|l| l.weight);
        let values = tensors.iter().filter_map(of_role).flat_map(|w| w.into_iter().copied());
        let name = format!("{kind}.{role}");
        Part::new(id, &name, &[tensors.len(), rows, cols], Values::F32(Box::new(values)))
    };
    first.view().linears().map(part).collect()
}
