//! Eviction policies: which tokens stay in the cache.

use std::fmt::Debug;

use serde_json::Value;

use crate::{Capabilities, Error, Result};

/// Extent of the cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Layer of the model.
    pub layer: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub dim: usize,
}

/// What attention did while one or more tokens were appended.
///
/// # Shapes
/// `live` is `(rows, tokens)` and `probabilities` is `(queries, q_heads, tokens)`, row-major. There is one row while all KV heads hold the
/// same tokens, else one per KV head. Query head `h` reads KV head `h / (q_heads / kv_heads)`, and so the tokens of [`Self::row`] of that.
#[derive(Clone, Copy, Debug)]
pub struct AttentionStep<'a> {
    /// Position of the first query.
    pub first_query: u64,
    /// Number of queries.
    pub queries: usize,
    /// Live tokens of each head.
    pub tokens: usize,
    /// Positions of the live tokens, ascending in each row.
    pub live: &'a [u32],
    /// Softmax probabilities; zero where masked.
    pub probabilities: &'a [f32],
}

impl<'a> AttentionStep<'a> {
    /// Positions of the tokens that a KV head holds; empty if there is no such row.
    pub fn row(&self, kv_head: usize) -> &'a [u32] {
        row(self.live, self.tokens, kv_head)
    }

    /// Checks that the lengths fit each other and the geometry.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) if they do not.
    pub fn check(&self, geometry: &CacheGeometry) -> Result<()> {
        check_live(self.live, self.tokens, geometry)?;
        let expected = self.queries.checked_mul(geometry.q_heads).and_then(|rows| rows.checked_mul(self.tokens));
        if expected == Some(self.probabilities.len()) {
            return Ok(());
        }
        let Self { queries, tokens, probabilities, .. } = self;
        Err(Error::shape(format!(
            "expected probabilities of ({queries}, {}, {tokens}), got {} numbers",
            geometry.q_heads,
            probabilities.len()
        )))
    }
}

/// The cache at the moment of a decision.
///
/// # Shapes
/// `live` is `(rows, tokens)` as in [`AttentionStep`].
#[derive(Clone, Copy, Debug)]
pub struct CacheView<'a> {
    /// Tokens seen so far, evicted ones included.
    pub seen: u64,
    /// Live tokens of each head.
    pub tokens: usize,
    /// Positions of the live tokens, ascending in each row.
    pub live: &'a [u32],
}

impl<'a> CacheView<'a> {
    /// Positions of the tokens that a KV head holds; empty if there is no such row.
    pub fn row(&self, kv_head: usize) -> &'a [u32] {
        row(self.live, self.tokens, kv_head)
    }

    /// Checks that the lengths fit each other and the geometry.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) if they do not.
    pub fn check(&self, geometry: &CacheGeometry) -> Result<()> {
        check_live(self.live, self.tokens, geometry)
    }
}

fn row(live: &[u32], tokens: usize, kv_head: usize) -> &[u32] {
    let row = if live.len() == tokens { 0 } else { kv_head };
    row.checked_mul(tokens).and_then(|start| live.get(start..)?.get(..tokens)).unwrap_or_default()
}

fn check_live(live: &[u32], tokens: usize, geometry: &CacheGeometry) -> Result<()> {
    let kv_heads = geometry.kv_heads;
    if live.len() == tokens || Some(live.len()) == tokens.checked_mul(kv_heads) {
        return Ok(());
    }
    Err(Error::shape(format!("expected positions of (1 or {kv_heads}, {tokens}), got {}", live.len())))
}

/// Which of the live tokens stay, as indices into the [rows](CacheView::row) of the cache, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeepSet {
    /// All of them.
    All,
    /// The same indices for every KV head.
    Shared(Vec<u32>),
    /// One list per KV head, all of one length: a layer is stored in chunks of `(seq, heads, dim)`, so every head holds as many tokens.
    PerHead(Vec<Vec<u32>>),
}

impl KeepSet {
    /// Number of the tokens that stay in each head, of `tokens` that it holds.
    pub fn kept(&self, tokens: usize) -> usize {
        self.of(0).map_or(tokens, <[u32]>::len)
    }

    /// The list of a KV head; none if all tokens stay.
    pub fn of(&self, kv_head: usize) -> Option<&[u32]> {
        match self {
            Self::All => None,
            Self::Shared(list) => Some(list),
            Self::PerHead(lists) => Some(lists.get(kv_head).map_or(&[], Vec::as_slice)),
        }
    }

    /// Checks what a policy decided: a host does so before it believes it.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) if a list does not ascend or names a token behind the last, if there
    /// is not one per KV head, or if their lengths differ.
    pub fn check(&self, tokens: usize, kv_heads: usize) -> Result<()> {
        let lists = match self {
            Self::All => return Ok(()),
            Self::Shared(list) => std::slice::from_ref(list),
            Self::PerHead(lists) if lists.len() == kv_heads => lists,
            Self::PerHead(lists) => {
                return Err(Error::shape(format!("expected lists for {kv_heads} KV heads, got {}", lists.len())));
            }
        };
        for list in lists {
            if let Some([one, next]) = list.array_windows().find(|[one, next]| one >= next) {
                return Err(Error::shape(format!("expected ascending indices of tokens, got {one} and then {next}")));
            }
            if let Some(last) = list.last().filter(|last| **last as usize >= tokens) {
                return Err(Error::shape(format!("expected indices below the {tokens} live tokens, got {last}")));
            }
            if list.len() != lists[0].len() {
                let (one, other) = (lists[0].len(), list.len());
                return Err(Error::shape(format!("expected lists of one length, got {one} and {other} tokens")));
            }
        }
        Ok(())
    }

    /// Positions of the tokens that stay, `(rows, kept)`, for a set that passed [`Self::check`].
    pub fn positions(&self, cache: &CacheView<'_>, kv_heads: usize) -> Vec<u32> {
        let rows = if matches!(self, Self::PerHead(_)) || cache.live.len() != cache.tokens { kv_heads } else { 1 };
        let mut live = Vec::with_capacity(rows * self.kept(cache.tokens));
        for head in 0..rows {
            let row = cache.row(head);
            match self.of(head) {
                None => live.extend_from_slice(row),
                Some(list) => live.extend(list.iter().filter_map(|idx| row.get(*idx as usize))),
            }
        }
        live
    }
}

/// Which tokens of one layer are live, as every host has to know: tokens are appended, and those that a policy does not keep go.
///
/// # Examples
/// ```
/// use gearbox_core::{KeepSet, LiveTokens};
///
/// let mut cache = LiveTokens::default();
/// cache.append(4);
/// cache.keep(&KeepSet::PerHead(vec![vec![0, 3], vec![1, 3]]), 2);
/// cache.append(1);
/// assert_eq!((cache.view().row(0), cache.view().row(1)), (&[0, 3, 4][..], &[1, 3, 4][..]));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveTokens {
    seen: u64,
    tokens: usize,
    /// `(rows, tokens)`.
    live: Vec<u32>,
}

impl LiveTokens {
    /// Appends tokens to each head. Positions are those of a sequence of less than 2^32 tokens.
    pub fn append(&mut self, tokens: usize) {
        let fresh = self.seen as u32..(self.seen + tokens as u64) as u32;
        self.live = if self.tokens == 0 {
            // Heads that hold nothing hold the same.
            fresh.collect()
        } else {
            let rows = self.live.chunks_exact(self.tokens);
            rows.flat_map(|row| row.iter().copied().chain(fresh.clone())).collect()
        };
        self.seen += tokens as u64;
        self.tokens += tokens;
    }

    /// What a policy sees of it.
    pub fn view(&self) -> CacheView<'_> {
        CacheView { seen: self.seen, tokens: self.tokens, live: &self.live }
    }

    /// Keeps what a set names that passed [`KeepSet::check`].
    pub fn keep(&mut self, keep: &KeepSet, kv_heads: usize) {
        self.live = keep.positions(&self.view(), kv_heads);
        self.tokens = keep.kept(self.tokens);
    }
}

/// What a policy promises of every plan that it makes; the conformance kit attacks it, and hosts reserve memory by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Most tokens that each head holds after a plan is applied; none if there is no such number.
    pub most: Option<u64>,
    /// So many first tokens of the sequence stay, as far as they are live.
    pub sinks: u64,
    /// So many last tokens of the sequence stay.
    pub recent: u64,
}

/// Which tokens stay. The settings live here, the state of one layer in a session.
///
/// [`Capabilities::streaming`] says that a decision does not depend on whether tokens came in one step or in several.
pub trait EvictionPolicy: Send + Sync + Debug {
    /// What it needs to know.
    fn capabilities(&self) -> Capabilities;

    /// The settings with every default filled in; stored in containers.
    fn config(&self) -> Value;

    /// What it promises of a plan made when so many tokens were seen; nothing by default.
    fn retention(&self, _geometry: &CacheGeometry, _seen: u64) -> Retention {
        Retention::default()
    }

    /// Starts deciding for one layer of one request.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the budget cannot be met with this geometry.
    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>>;
}

/// One layer of one request. It sees attention step by step, so that the same code serves offline replay and a live decoder.
pub trait EvictionSession: Send {
    /// Takes in the attention of one step.
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()>;

    /// Decides which tokens stay.
    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: CacheGeometry = CacheGeometry { layer: 0, layers: 1, q_heads: 4, kv_heads: 2, dim: 8 };

    #[test]
    fn rows_are_one_or_one_per_head() {
        let view = |tokens, live| CacheView { seen: 9, tokens, live };
        let shared = view(3, &[0, 4, 8]);
        assert_eq!((shared.row(0), shared.row(1)), (&[0, 4, 8][..], &[0, 4, 8][..]));
        let apart = view(2, &[0, 4, 1, 8]);
        assert_eq!((apart.row(0), apart.row(1), apart.row(2)), (&[0, 4][..], &[1, 8][..], &[][..]));
        assert!(view(0, &[]).row(1).is_empty());
        assert!(shared.check(&GEOMETRY).is_ok() && apart.check(&GEOMETRY).is_ok());
        let error = view(3, &[0, 4]).check(&GEOMETRY).unwrap_err();
        assert_eq!(error.to_string(), "expected positions of (1 or 2, 3), got 2");
    }

    #[test]
    fn steps_state_their_lengths() {
        let step =
            |probabilities| AttentionStep { first_query: 0, queries: 1, tokens: 2, live: &[0, 1], probabilities };
        assert!(step(&[0.5; 8]).check(&GEOMETRY).is_ok());
        let error = step(&[0.5; 4]).check(&GEOMETRY).unwrap_err();
        assert_eq!(error.to_string(), "expected probabilities of (1, 4, 2), got 4 numbers");
    }

    #[test]
    fn wrong_keep_sets_are_named() {
        let says = |keep: KeepSet| keep.check(4, 2).unwrap_err().to_string();
        assert_eq!(says(KeepSet::Shared(vec![1, 1])), "expected ascending indices of tokens, got 1 and then 1");
        assert_eq!(says(KeepSet::Shared(vec![1, 4])), "expected indices below the 4 live tokens, got 4");
        assert_eq!(says(KeepSet::PerHead(vec![vec![0]])), "expected lists for 2 KV heads, got 1");
        let uneven = KeepSet::PerHead(vec![vec![0], vec![0, 1]]);
        assert_eq!(says(uneven), "expected lists of one length, got 1 and 2 tokens");
        for keep in [KeepSet::All, KeepSet::Shared(vec![]), KeepSet::PerHead(vec![vec![0, 3], vec![1, 2]])] {
            keep.check(4, 2).unwrap();
        }
    }

    #[test]
    fn positions_follow_the_rows() {
        let shared = CacheView { seen: 9, tokens: 3, live: &[0, 4, 8] };
        let heads = KeepSet::PerHead(vec![vec![0, 1], vec![1, 2]]);
        assert_eq!(KeepSet::Shared(vec![0, 2]).positions(&shared, 2), [0, 8]);
        assert_eq!(heads.positions(&shared, 2), [0, 4, 4, 8]);
        let apart = CacheView { seen: 9, tokens: 3, live: &[0, 4, 8, 1, 2, 3] };
        assert_eq!(heads.positions(&apart, 2), [0, 4, 2, 3]);
        assert_eq!(KeepSet::Shared(vec![2]).positions(&apart, 2), [8, 3]);
        assert_eq!(KeepSet::All.positions(&apart, 2), apart.live);
        assert_eq!((KeepSet::All.kept(3), heads.kept(3)), (3, 2));
    }
}
