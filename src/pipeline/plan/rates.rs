//! What this machine does in a second, measured on the model's own shapes.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use ndarray::Array2;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use super::shape::{Layer, Shape};
use crate::linalg::{exp, vectorised};
use crate::par;
use crate::stage::Context;

/// Time of one measurement.
const LONG: Duration = Duration::from_millis(100);
const SHORT: Duration = Duration::from_millis(40);
/// Longest sides of a product: larger ones are no faster, and take too long to try.
const SIDE: u64 = 1024;
/// Rows of a forward product, and tokens of a batch, in [`crate::forward`].
const ROWS: u64 = 512;
/// Places where a checkpoint is read, and bytes there.
const PLACES: u64 = 8;
const PIECE: u64 = 1 << 20;

/// What this machine does in a second, on all threads where a run uses all of them.
///
/// Other programs that run at the same time take their share of a measurement as they will of the
/// run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Floating-point operations of a forward pass: products of as many rows as an expert gets of
    /// a batch (at most 512) and of an expert's sides (at most 1024), one on every thread.
    pub flops: f64,
    /// The same with the rows that an expert gets of a step of distillation; `flops` without one.
    pub step_flops: f64,
    /// Values of `x / (1 + e^-x)`: activations and the exponentials of attention.
    pub exp: f64,
    /// Parameters that Adam moves.
    pub update: f64,
    /// Bytes in `f32` that are made of bf16, on one thread.
    pub convert: f64,
    /// Bytes that are hashed by SHA-256 on one thread.
    pub hash: f64,
    /// Bytes that are hashed by XXH3 on one thread.
    pub check: f64,
    /// Bytes that are read, at eight places in the model's files; `None` where they hold no data.
    pub read: Option<f64>,
    /// Processes that want each core, over the last minute, by `/proc/loadavg`; `None` without it.
    pub load: Option<f64>,
}

impl Rates {
    /// In about half a second; reads 8 MB of the files in `folder`.
    pub(super) fn measure(folder: &Path, shape: &Shape, step: u64, cx: &Context) -> Self {
        let largest = shape.layers.iter().max_by_key(|l| l.top_k * l.expert()).copied();
        let batch = (8 << 20) / shape.d_model.max(1);
        let rows = |l: &Layer| batch * l.top_k / l.experts.max(1);
        let steps = |l: &Layer| step * l.top_k / l.kept.max(1);
        let of = |rows: &dyn Fn(&Layer) -> u64| {
            let found = largest.map(|l| (rows(&l), l.d_model, l.d_ff));
            products(found.unwrap_or((ROWS, SIDE, SIDE)), cx)
        };
        let flops = of(&rows);
        let step_flops = if step == 0 { flops } else { of(&steps) };
        let bf16 = vec![half::bf16::ONE; 1 << 20];
        let mut wide = vec![0f32; bf16.len()];
        let convert = rate(4.0 * bf16.len() as f64, SHORT, || {
            wide.iter_mut().zip(&bf16).for_each(|(to, from)| *to = from.to_f32());
            black_box(&wide);
        });
        let bytes = vec![7u8; 1 << 20];
        let hash = rate(bytes.len() as f64, SHORT, || {
            black_box(Sha256::digest(&bytes));
        });
        let check = rate(bytes.len() as f64, SHORT, || {
            let mut hash = Xxh3::new();
            hash.update(&bytes);
            black_box(hash.digest());
        });
        let (exp, update) = (exponentials(), updates());
        Self {
            flops,
            step_flops,
            exp,
            update,
            convert,
            hash,
            check,
            read: read(folder),
            load: load(),
        }
    }
}

/// Units per second of work that holds `units`, over the tries that fit in `time` after one to warm
/// up.
fn rate(units: f64, time: Duration, mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut tries) = (Instant::now(), 0.0);
    while start.elapsed() < time {
        work();
        tries += 1.0;
    }
    units * tries / start.elapsed().as_secs_f64()
}

/// Operations per second of `(rows, inner) · (inner, cols)`, one product on every thread.
fn products((rows, inner, cols): (u64, u64, u64), cx: &Context) -> f64 {
    let side = |n: u64, most: u64| n.clamp(1, most) as usize;
    let (rows, inner, cols) = (side(rows, ROWS), side(inner, SIDE), side(cols, SIDE));
    let value = |(i, j): (usize, usize)| (i * 7 + j * 13) as f32 % 5.0 - 2.0;
    let x = Array2::from_shape_fn((rows, inner), value);
    let w = Array2::from_shape_fn((cols, inner), value);
    let (tasks, single) = (4 * rayon::current_num_threads(), cx.per_task());
    rate(2.0 * (tasks * rows * inner * cols) as f64, LONG, || {
        let done = par::map(tasks, |_| {
            let mut out = Array2::zeros((rows, cols));
            single.compute().gemm(1.0, x.view(), w.t(), 0.0, out.view_mut())?;
            Ok(black_box(out).len())
        });
        black_box(done.is_ok());
    })
}

/// Units per second where every thread has an array of `units`, compiled as the crate's own loops.
fn on_every_thread(units: usize, work: impl Fn(&mut [f32]) + Sync) -> f64 {
    let threads = rayon::current_num_threads();
    let mut values = vec![1.5f32; threads * units];
    rate((threads * units) as f64, SHORT, || {
        par::for_each_chunk(&mut values, units, |_, part| vectorised(|| work(part)));
        black_box(&values);
    })
}

fn exponentials() -> f64 {
    #[inline(always)]
    fn silu(values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x = 1.5 + *x / (1.0 + exp(-*x)) * 1e-3);
    }
    on_every_thread(
        1 << 14,
        #[inline(always)]
        |values: &mut [f32]| silu(values),
    )
}

/// Four arrays of a megabyte for every thread, as large experts have them out of cache.
fn updates() -> f64 {
    #[inline(always)]
    fn adam(values: &mut [f32]) {
        let (weights, rest) = values.split_at_mut(values.len() / 4);
        let (gradient, moments) = rest.split_at_mut(weights.len());
        let (mean, square) = moments.split_at_mut(weights.len());
        let moments = mean.iter_mut().zip(square);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            *m = 0.9 * *m + 0.1 * *g;
            *v = 0.999 * *v + 1e-3 * *g * *g;
            *w -= 1e-9 * *m / (v.sqrt() + 1e-8);
        }
    }
    on_every_thread(
        1 << 20,
        #[inline(always)]
        |values: &mut [f32]| adam(values),
    ) / 4.0
}

/// Bytes per second at eight places of the files with weights, of which some may be cached and
/// others not; `None` where there is none, or a file has holes in place of data.
fn read(folder: &Path) -> Option<f64> {
    let files: Vec<_> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter_map(|path| Some((File::open(&path).ok()?, fs::metadata(&path).ok()?)))
        .collect();
    if files.iter().any(|(_, meta)| hollow(meta)) {
        return None;
    }
    let all: u64 = files.iter().map(|(_, meta)| meta.len()).sum();
    let (mut buffer, mut done) = (vec![0u8; PIECE as usize], 0);
    let start = Instant::now();
    for place in 0..PLACES {
        let mut at = all / PLACES * place;
        let found = files.iter().find(|(_, meta)| {
            let here = at < meta.len();
            at -= if here { 0 } else { meta.len() };
            here
        });
        let mut file = &found?.0;
        file.seek(SeekFrom::Start(at)).ok()?;
        done += file.read(&mut buffer).ok()?;
        black_box(&buffer);
        if start.elapsed() > 2 * LONG {
            break;
        }
    }
    (done > 0).then(|| done as f64 / start.elapsed().as_secs_f64())
}

fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some(load / cores as f64)
}

/// Whether a file has no data behind most of its bytes.
#[cfg(unix)]
fn hollow(meta: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    meta.blocks() * 512 < meta.len() / 2
}

#[cfg(not(unix))]
fn hollow(_: &fs::Metadata) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_holes_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.safetensors");
        assert_eq!(read(dir.path()), None);
        fs::write(&file, vec![1u8; 3 << 20]).unwrap();
        assert!(read(dir.path()).is_some_and(|rate| rate > 1e5));
        File::create(dir.path().join("b.safetensors")).unwrap().set_len(1 << 30).unwrap();
        assert_eq!(read(dir.path()), None);
    }
}
