//! The ledger of a cache: which bytes are resident, now, at most and on average.

use std::ops::AddAssign;

use serde::Serialize;

/// Resident bytes of one layer, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerBytes {
    /// Encoded lanes.
    pub payload: u64,
    /// Headers of chunks and lanes, as long as in a container.
    pub headers: u64,
    /// Recent tokens that are not encoded.
    pub tail: u64,
    /// Positions of the live tokens, once tokens were evicted.
    pub positions: u64,
    /// Memory that is held beyond these: unused capacity, and what structs take more than headers.
    pub slack: u64,
}

impl LayerBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.payload + self.headers + self.tail + self.positions + self.slack
    }
}

impl AddAssign for LayerBytes {
    fn add_assign(&mut self, other: Self) {
        self.payload += other.payload;
        self.headers += other.headers;
        self.tail += other.tail;
        self.positions += other.positions;
        self.slack += other.slack;
    }
}

/// Resident bytes over time. A step is a block of the prompt, or one token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Usage {
    /// After the last step.
    pub now: u64,
    /// At most, tokens included that were appended and not yet encoded.
    pub peak: u64,
    /// Mean over the ends of all steps.
    pub average: f64,
    /// What all tokens seen would take in the storage type, after the last step.
    pub dense: u64,
    /// Mean of `dense` over the ends of all steps.
    pub dense_average: f64,
}

impl Usage {
    /// Dense bytes ÷ resident bytes after the last step.
    pub fn ratio(&self) -> f64 {
        self.dense as f64 / self.now as f64
    }

    /// Dense bytes ÷ resident bytes, both averaged over the steps.
    pub fn average_ratio(&self) -> f64 {
        self.dense_average / self.average
    }

    pub(super) fn reached(&mut self, bytes: u64) {
        self.peak = self.peak.max(bytes);
    }

    /// Takes in the end of a step, which is number `step`, from 1 on.
    pub(super) fn ended(&mut self, bytes: u64, dense: u64, step: u64) {
        (self.now, self.dense) = (bytes, dense);
        self.average += (bytes as f64 - self.average) / step as f64;
        self.dense_average += (dense as f64 - self.dense_average) / step as f64;
    }
}

/// What coding the chunks of one layer came to since the request began, keys and values together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Coded {
    /// Chunks that were encoded; one that lost tokens and was encoded again counts twice.
    pub chunks: u64,
    /// Those among them of which no lane became smaller, so that they are stored as they are.
    pub raw_chunks: u64,
    /// Bytes that went in.
    pub raw_bytes: u64,
    /// Bytes that came out, with headers as long as in a container.
    pub stored_bytes: u64,
    /// Time of encoding in nanoseconds.
    pub encode_ns: u64,
    /// Bytes that decoding gave back: attention reads every chunk in every step.
    pub decoded_bytes: u64,
    /// Time of decoding in nanoseconds.
    pub decode_ns: u64,
}

impl AddAssign for Coded {
    fn add_assign(&mut self, other: Self) {
        self.chunks += other.chunks;
        self.raw_chunks += other.raw_chunks;
        self.raw_bytes += other.raw_bytes;
        self.stored_bytes += other.stored_bytes;
        self.encode_ns += other.encode_ns;
        self.decoded_bytes += other.decoded_bytes;
        self.decode_ns += other.decode_ns;
    }
}

/// What one layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerLedger {
    /// Layer of the model.
    pub layer: u32,
    /// Tokens seen.
    pub seen: u64,
    /// Tokens left, per head.
    pub live: u64,
    /// Encoded chunks of keys and values together.
    pub chunks: u64,
    /// Resident bytes by what they are for, after the last step.
    pub bytes: LayerBytes,
    /// Resident bytes over time.
    pub usage: Usage,
    /// What coding came to.
    pub coded: Coded,
}

/// What a cache holds: every resident byte once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CacheLedger {
    /// By layer.
    pub layers: Vec<LayerLedger>,
    /// Trained models of the pipeline.
    pub artifacts: u64,
    /// Token ids, if a plugin looks at them.
    pub token_ids: u64,
    /// Resident bytes of all layers, artifacts and token ids over time.
    pub usage: Usage,
    /// Buffers that all layers share, and that attention reads: the decoded keys and values of one layer.
    pub scratch: u64,
}

/// Where the time of the steps went, in nanoseconds of wall time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// Handing attention probabilities to policies.
    pub score_ns: u64,
    /// Decisions of policies.
    pub plan_ns: u64,
    /// Moving the tokens that stay.
    pub move_ns: u64,
    /// Encoding chunks.
    pub encode_ns: u64,
    /// Decoding chunks.
    pub decode_ns: u64,
    /// Attention, with appending and with widening stored elements to F32.
    pub attention_ns: u64,
    /// Everything else: projections, feed-forward, norms, head.
    pub rest_ns: u64,
    /// Steps.
    pub steps: u64,
}

impl Timings {
    /// All phases together.
    pub fn total_ns(&self) -> u64 {
        self.cache_ns() + self.rest_ns
    }

    /// The phases that a cache spends: all but the rest.
    pub(crate) fn cache_ns(&self) -> u64 {
        self.score_ns + self.plan_ns + self.move_ns + self.encode_ns + self.decode_ns + self.attention_ns
    }
}
