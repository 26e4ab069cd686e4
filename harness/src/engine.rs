//! The engine: a dump through a pipeline into a container, and back.
//!
//! Work is cut into jobs (one chunk of one layer and role; more where a plugin needs the decoded keys or earlier tokens) that run in
//! parallel. Results are handed over in stored order, so the same input gives the same bytes for any number of threads. A bounded number
//! of bytes is in flight, whatever the size of the dump; only a plugin that needs earlier tokens makes it hold a layer.

mod decode;
mod encode;

use std::panic::{AssertUnwindSafe, catch_unwind};

use gearbox_core::{Chunk, Context, DType, Error, ErrorKind, Needs, Pipeline, Result, Role, Shape};
use rayon::prelude::*;

pub use decode::{Decoded, decode};
pub use encode::{Encoded, check, encode, offered, train};

/// Bytes of tensors that are in flight at a time, unless two chunks alone are larger.
const BATCH_BYTES: usize = 16 << 20;
/// Chunks up to this size are worked on while those before them are handed over; with larger ones that would take too much memory.
const OVERLAP_BYTES: usize = 32 << 20;
/// Larger chunks are worked on alone: a codec takes up to five times its chunk (`gear-delta` on noise), and peak memory is to stay below
/// 256 MiB + 8 × the largest chunk.
const ALONE_BYTES: usize = 64 << 20;
/// Jobs that are in flight at a time.
const BATCH_JOBS: usize = 1024;

/// What one sequence cost.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SequenceCost {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Number of chunks.
    pub chunks: usize,
    /// Time in the pipeline, summed over chunks, one thread each.
    pub ns: u64,
}

/// Which chunks must be coded one after the other.
#[derive(Clone, Copy)]
struct Grain {
    /// Values after the keys of the same tokens.
    pairs: bool,
    /// Chunks of a layer in order.
    sequential: bool,
}

impl Grain {
    fn of(pipeline: &Pipeline) -> Self {
        let needs = pipeline.needs();
        Self { pairs: needs.peer, sequential: needs.history }
    }

    /// Cuts the chunks of one layer into jobs; a step is a role and a chunk number.
    fn jobs(self, chunks: usize) -> Vec<Vec<(Role, usize)>> {
        let steps = (0..chunks).flat_map(|chunk| Role::ALL.map(|role| (role, chunk)));
        match (self.sequential, self.pairs) {
            (true, _) => vec![steps.collect()],
            (false, true) => (0..chunks).map(|chunk| Role::ALL.map(|role| (role, chunk)).to_vec()).collect(),
            (false, false) => steps.map(|step| vec![step]).collect(),
        }
    }
}

/// Decoded tensors that later steps of a job may look at; `None` after a failure.
struct Known {
    /// Decoded keys of the current tokens.
    peer: Option<Vec<u8>>,
    /// Decoded earlier tokens, by role.
    history: [Option<Vec<u8>>; 2],
}

impl Known {
    fn new() -> Self {
        Self { peer: None, history: [Some(Vec::new()), Some(Vec::new())] }
    }

    /// Adds what the pipeline needs to a context that knows its place, token ids and rotation.
    ///
    /// `shape` and `dtype` are those of the tensor that is coded, `key` those of the keys of the same tokens.
    fn add_to<'a>(
        &'a self,
        cx: Context<'a>,
        needs: Needs,
        (shape, dtype): (Shape, DType),
        key: Option<(Shape, DType)>,
    ) -> Result<Context<'a>> {
        let lost = |what| Error::corrupt(format!("{what} could not be decoded, and a plugin needs them"));
        let mut cx = cx;
        if needs.peer && cx.role == Role::Value {
            let peer = self.peer.as_deref().ok_or_else(|| lost("the keys of these tokens"))?;
            let (shape, dtype) = key.ok_or_else(|| lost("the keys of these tokens"))?;
            cx.peer = Some(Chunk::new(shape, dtype, peer)?);
        }
        if needs.history {
            let history = self.history[cx.role as usize].as_deref().ok_or_else(|| lost("earlier tokens"))?;
            let seq = history.len() / (shape.row() * dtype.size()).max(1);
            cx.history = Some(Chunk::new(shape.with_seq(seq), dtype, history)?);
        }
        Ok(cx)
    }

    /// Takes in a step's result.
    fn keep(&mut self, needs: Needs, role: Role, decoded: Option<&[u8]>) {
        if needs.peer && role == Role::Key {
            self.peer = decoded.map(<[u8]>::to_vec);
        }
        if needs.history {
            let history = &mut self.history[role as usize];
            match (history.as_mut(), decoded) {
                (Some(history), Some(decoded)) => history.extend_from_slice(decoded),
                _ => *history = None,
            }
        }
    }
}

/// Runs the code of plugins; a panic in it becomes an error of the chunk.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::new(ErrorKind::PluginPanicked, format!("a plugin panicked: {}", text.unwrap_or("no message"))))
    })
}

/// Runs jobs in batches: in parallel within a batch, handing over results in order while the next batch is worked on.
fn in_batches<J: Sync, T: Send>(
    jobs: &[J],
    bytes: impl Fn(&J) -> usize,
    work: impl Fn(&J) -> T + Sync,
    mut deliver: impl FnMut(&J, T) -> Result<()> + Send,
) -> Result<()> {
    let mut start = 0;
    let mut finished: Vec<(&J, T)> = Vec::new();
    while start < jobs.len() {
        let mut end = start;
        let mut total = 0;
        let mut largest = 0;
        while end < jobs.len() && end - start < BATCH_JOBS {
            let next = bytes(&jobs[end]);
            let fits = total + next <= BATCH_BYTES || end - start < 2 && largest.max(next) <= ALONE_BYTES;
            if end > start && !fits {
                break;
            }
            largest = largest.max(next);
            total += next;
            end += 1;
        }
        let batch = &jobs[start..end];
        let mut pass = |finished: Vec<(_, T)>| finished.into_iter().try_for_each(|(job, result)| deliver(job, result));
        let compute = || batch.par_iter().map(|job| (job, work(job))).collect();
        if largest <= OVERLAP_BYTES {
            let (passed, computed) = rayon::join(|| pass(std::mem::take(&mut finished)), compute);
            passed?;
            finished = computed;
        } else {
            pass(std::mem::take(&mut finished))?;
            finished = compute();
        }
        start = end;
    }
    finished.into_iter().try_for_each(|(job, result)| deliver(job, result))
}
