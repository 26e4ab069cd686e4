//! The engine: a dump through a pipeline into a container, and back.
//!
//! Work is cut into jobs (one chunk of one layer and role; more where a plugin looks at the decoded keys or earlier tokens) that run in
//! parallel. Results are handed over in stored order, so the same input gives the same bytes for any number of threads. A bounded number
//! of bytes is in flight, whatever the size of the dump; only a plugin that looks at earlier tokens makes it hold a layer.

mod decode;
mod encode;

use std::panic::{AssertUnwindSafe, catch_unwind};

use gearbox_core::container::RunInfo;
use gearbox_core::{Chunk, ChunkCoder, Context, DType, Error, ErrorKind, Needs, Pipeline, Result, Role, Shape};
use rayon::prelude::*;

pub use decode::{Decoded, decode, decode_into};
pub use encode::{Encoded, check, encode, encode_arrays, offered, train};

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
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

/// The parts of the context that the coders of one layer need or want, by role.
#[derive(Clone, Copy)]
struct Uses([Needs; 2]);

impl Uses {
    /// A layer that no route holds uses nothing; its chunks fail on their own.
    fn of(pipeline: &Pipeline, layer: u32) -> Self {
        Self(Role::ALL.map(|role| pipeline.coder(layer, role).map_or(Needs::NONE, ChunkCoder::context)))
    }

    /// Cuts the chunks of the layer into jobs; a step is a role and a chunk number.
    fn jobs(self, chunks: usize, roles: &[Role]) -> Vec<Vec<(Role, usize)>> {
        let of_chunk = |chunk| roles.iter().map(move |role| (*role, chunk));
        let steps = (0..chunks).flat_map(of_chunk);
        let sequential = self.0.iter().any(|uses| uses.history);
        match (sequential, self.of_role(Role::Value).peer) {
            (true, _) => vec![steps.collect()],
            (false, true) => (0..chunks).map(|chunk| of_chunk(chunk).collect()).collect(),
            (false, false) => steps.map(|step| vec![step]).collect(),
        }
    }

    fn of_role(self, role: Role) -> Needs {
        self.0[role as usize]
    }
}

/// What the steps of a job know of each other; `None` after a failure.
struct Known {
    uses: Uses,
    /// Token ids of the current step, if they are used and stored.
    tokens: Option<Vec<u32>>,
    /// Decoded keys of the current tokens.
    peer: Option<Vec<u8>>,
    /// By role.
    history: [History; 2],
}

/// Decoded earlier tokens.
struct History {
    bytes: Option<Vec<u8>>,
    /// Their ids, if all are known.
    tokens: Option<Vec<u32>>,
}

impl Known {
    fn new(uses: Uses) -> Self {
        let history =
            Role::ALL.map(|role| History { bytes: Some(Vec::new()), tokens: uses.of_role(role).tokens.then(Vec::new) });
        Self { uses, tokens: None, peer: None, history }
    }

    /// Begins a step. The token ids come from the run record, which the decoder reads too.
    fn begin(&mut self, run: &RunInfo, role: Role, first_token: u64, seq: usize) {
        self.tokens = if self.uses.of_role(role).tokens { run.tokens(first_token, seq) } else { None };
    }

    /// Adds what the coder uses to the context of the current step, which knows its place and rotation.
    ///
    /// `shape` and `dtype` are those of the tensor that is coded, `key` those of the keys of the same tokens.
    fn context<'a>(
        &'a self,
        cx: Context<'a>,
        (shape, dtype): (Shape, DType),
        key: Option<(Shape, DType)>,
    ) -> Result<Context<'a>> {
        let lost = |what| Error::corrupt(format!("{what} could not be decoded, and a plugin looks at them"));
        let uses = self.uses.of_role(cx.role);
        let mut cx = Context { tokens: self.tokens.as_deref(), ..cx };
        if uses.peer && cx.role == Role::Value {
            let peer = self.peer.as_deref().ok_or_else(|| lost("the keys of these tokens"))?;
            let (shape, dtype) = key.ok_or_else(|| lost("the keys of these tokens"))?;
            cx.peer = Some(Chunk::new(shape, dtype, peer)?);
        }
        if uses.history {
            let History { bytes, tokens } = &self.history[cx.role as usize];
            let bytes = bytes.as_deref().ok_or_else(|| lost("earlier tokens"))?;
            let seq = bytes.len() / (shape.row() * dtype.size()).max(1);
            cx.history = Some(Chunk::new(shape.with_seq(seq), dtype, bytes)?);
            cx.history_tokens = tokens.as_deref();
        }
        Ok(cx)
    }

    /// Takes in the result of the current step.
    fn keep(&mut self, role: Role, decoded: Option<&[u8]>) {
        if role == Role::Key && self.uses.of_role(Role::Value).peer {
            self.peer = decoded.map(<[u8]>::to_vec);
        }
        if self.uses.of_role(role).history {
            let history = &mut self.history[role as usize];
            append(&mut history.bytes, decoded);
            append(&mut history.tokens, self.tokens.as_deref());
        }
    }
}

/// Appends what is there; without it nothing is known any more.
fn append<T: Copy>(all: &mut Option<Vec<T>>, more: Option<&[T]>) {
    match (all.as_mut(), more) {
        (Some(all), Some(more)) => all.extend_from_slice(more),
        _ => *all = None,
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
