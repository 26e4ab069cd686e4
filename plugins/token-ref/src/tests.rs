//! What the lanes hold, and what rows cost.

use half::f16;

use super::*;

const DIM: usize = 16;
const SHAPE: Shape = Shape::new(0, 2, DIM);

fn halves(values: impl IntoIterator<Item = f64>) -> Vec<u8> {
    values.into_iter().flat_map(|value| f16::from_f64(value).to_le_bytes()).collect()
}

/// The row of a token as a first layer gives it, before rotation: numbers around 1, other ones for each token.
fn row(token: u32) -> Vec<f64> {
    let number = |i: usize| ((token as usize * 97 + i * 41 + 7) % 211) as f64 / 64.0 - 1.5;
    (0..SHAPE.row()).map(number).collect()
}

fn values(tokens: &[u32]) -> Vec<u8> {
    halves(tokens.iter().flat_map(|token| row(*token)))
}

fn rope(theta: f64) -> Rope {
    Rope { pairing: RopePairing::HalfSplit, theta, rotary_dim: DIM, scaling: RopeScaling::None }
}

/// The same rows rotated as a model does, in F32.
fn rotated(tokens: &[u32], first: u64, theta: f64) -> Vec<f64> {
    let mut keys = Vec::new();
    for (position, token) in (first..).zip(tokens) {
        for head in row(*token).chunks(DIM) {
            let angle =
                |i: usize| position as f32 * (1.0 / (theta as f32).powf((2 * (i % (DIM / 2))) as f32 / DIM as f32));
            let turned = |i: usize| {
                let other = if i < DIM / 2 { -head[i + DIM / 2] } else { head[i - DIM / 2] };
                head[i] as f32 * angle(i).cos() + other as f32 * angle(i).sin()
            };
            keys.extend((0..DIM).map(|i| f64::from(turned(i))));
        }
    }
    keys
}

fn transform(settings: Value) -> TokenRef {
    TokenRef::new(serde_json::from_value(settings).unwrap()).unwrap()
}

struct Coded {
    latents: Latents,
    lanes: Vec<(String, usize)>,
}

impl Coded {
    /// Codes tokens `before..` of a tensor, the rest being history, and checks that they come back.
    fn of(transform: &TokenRef, dtype: DType, bytes: &[u8], ids: &[u32], before: usize, cx: Context<'_>) -> Self {
        let whole = Chunk::new(SHAPE.with_seq(ids.len()), dtype, bytes).unwrap();
        let cx = Context {
            first_token: cx.first_token + before as u64,
            tokens: Some(&ids[before..]),
            history: Some(whole.tokens(0..before)),
            history_tokens: Some(&ids[..before]),
            ..cx
        };
        let chunk = whole.tokens(before..ids.len());
        let mut latents = Latents::new();
        transform.forward(chunk, &cx, &mut latents).unwrap();
        let mut back = vec![0x55; chunk.bytes().len()];
        transform.inverse(&latents, &cx, ChunkMut::new(chunk.shape(), dtype, &mut back).unwrap()).unwrap();
        assert_eq!(back, chunk.bytes());
        let lanes = latents.lanes().iter().map(|lane| (lane.spec.name.to_string(), lane.spec.shape.seq)).collect();
        Self { latents, lanes }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        &self.latents.lane(name).unwrap().bytes
    }
}

fn lanes<const N: usize>(lanes: [(&str, usize); N]) -> Vec<(String, usize)> {
    lanes.map(|(name, rows)| (name.to_owned(), rows)).into()
}

const VALUES: Context<'static> = Context::new(0, Role::Value, 0);
const KEYS: Context<'static> = Context::new(0, Role::Key, 0);

#[test]
fn rows_of_repeated_tokens_are_left_out() {
    let transform = transform(json!({}));
    let ids = [5, 6, 5, 5, 7, 6];
    let coded = Coded::of(&transform, DType::F16, &values(&ids), &ids, 0, VALUES);
    assert_eq!(coded.lanes, lanes([("modes", 6), ("rows", 3)]));
    assert_eq!(coded.bytes("modes"), [0, 0, 1, 1, 0, 1]);
    assert_eq!(coded.bytes("rows"), values(&[5, 6, 7]));
    // From the history on, everything is known.
    let coded = Coded::of(&transform, DType::F16, &values(&ids), &ids, 5, VALUES);
    assert_eq!(coded.lanes, []);
}

#[test]
fn turned_keys_differ_by_rounding_only() {
    let ids: Vec<u32> = (0..40).map(|i| i * i % 7).collect();
    let known = rope(10_000.0);
    for (transform, rope) in [
        (transform(json!({})), Some(&known)),
        (transform(json!({"rope": {}})), None),
        (transform(json!({"rope": {"theta": 3.0}})), Some(&known)), // what the dump says goes first
    ] {
        let cx = Context { rope, first_token: 1000, ..KEYS };
        let keys = halves(rotated(&ids, 1000, 10_000.0));
        let coded = Coded::of(&transform, DType::F16, &keys, &ids, 10, cx);
        // All squares modulo 7 were met in the first rows, which are history.
        assert_eq!(coded.lanes, lanes([("difference-0", 30)]));
        let steps = coded.bytes("difference-0");
        let total: u32 = steps.iter().map(|step| u32::from(*step)).sum();
        assert!(total <= 2 * steps.len() as u32, "{total} for {}", steps.len());

        let singles: Vec<u8> =
            rotated(&ids, 1000, 10_000.0).into_iter().flat_map(|value| (value as f32).to_le_bytes()).collect();
        let coded = Coded::of(&transform, DType::F32, &singles, &ids, 10, cx);
        let far = coded.bytes("difference-0").iter().filter(|step| **step > 20).count();
        assert!(far * 20 < steps.len(), "{far} of {}: angles are those of F32", steps.len());
    }
}

#[test]
fn keys_of_unknown_rotation_are_literal_rows() {
    let ids: Vec<u32> = (0..40).map(|i| i % 7).collect();
    let keys = halves(rotated(&ids, 0, 2.0));
    let coded = Coded::of(&transform(json!({})), DType::F16, &keys, &ids, 0, KEYS);
    assert_eq!(coded.lanes, lanes([("rows", 40)]));
    // Facts that cannot be true of these heads are none.
    let narrow = Rope { rotary_dim: 2 * DIM, ..rope(2.0) };
    let coded = Coded::of(&transform(json!({})), DType::F16, &keys, &ids, 0, Context { rope: Some(&narrow), ..KEYS });
    assert_eq!(coded.lanes, lanes([("rows", 40)]));
}

#[test]
fn chunk_without_token_ids_is_one_lane_of_rows() {
    let bytes = values(&[1, 1, 1]);
    let chunk = Chunk::new(SHAPE.with_seq(3), DType::F16, &bytes).unwrap();
    // Ids of another number of tokens are none, and a history of other heads is none.
    for tokens in [None, Some(&[1u32, 1][..])] {
        let cx = Context { tokens, ..VALUES };
        let mut latents = Latents::new();
        transform(json!({})).forward(chunk, &cx, &mut latents).unwrap();
        let [lane] = latents.lanes() else { panic!("{latents:?}") };
        assert_eq!((&*lane.spec.name, lane.spec.shape, &lane.bytes), ("rows", chunk.shape(), &bytes));
    }
    let history = Chunk::new(Shape::new(1, 1, DIM), DType::F16, &bytes[..2 * DIM]).unwrap();
    let cx = Context { tokens: Some(&[1, 2, 3]), history: Some(history), history_tokens: Some(&[1]), ..VALUES };
    let mut latents = Latents::new();
    transform(json!({})).forward(chunk, &cx, &mut latents).unwrap();
    assert_eq!(latents.lanes().len(), 1);
}

#[test]
fn difference_that_saves_less_than_its_headers_is_a_literal_row() {
    // One row of one token, each element a few steps from the earlier one: 32 elements save less than 64 bytes.
    let mut bytes = values(&[5, 5]);
    for byte in bytes[64..].iter_mut().step_by(2) {
        *byte ^= 0x1F;
    }
    let coded = Coded::of(&transform(json!({})), DType::F16, &bytes, &[5, 5], 1, VALUES);
    assert_eq!(coded.lanes, lanes([("rows", 1)]));
    let coded = Coded::of(&transform(json!({})), DType::F16, &bytes.repeat(3), &[5; 6], 0, VALUES);
    assert_eq!(coded.lanes, lanes([("modes", 6), ("rows", 1), ("difference-0", 5)]));
}

#[test]
fn row_costs_at_most_its_mode() {
    // Rows that have less and less to do with each other.
    for spread in [0, 1, 30, 300, 1000, 3000, 30_000] {
        let ids: Vec<u32> = (0..60).map(|i| i % 4).collect();
        let mut bytes = values(&ids);
        let mut state = 1u32;
        for word in bytes.chunks_exact_mut(2) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let steps = ((u64::from(state) * spread) >> 32) as u16;
            word.copy_from_slice(&u16::from_le_bytes([word[0], word[1]]).wrapping_add(steps).to_le_bytes());
        }
        let coded = Coded::of(&transform(json!({})), DType::F16, &bytes, &ids, 0, VALUES);
        let modes = usize::from(coded.latents.lane("modes").is_ok()) * ids.len();
        let lanes: usize = coded.latents.lanes().iter().map(|lane| lane.bytes.len()).sum();
        assert!(lanes <= bytes.len() + modes, "spread {spread}: {lanes} for {}", bytes.len());
    }
}

#[test]
fn context_of_another_chunk_is_corrupt() {
    let transform = transform(json!({}));
    let ids = [5, 6, 5];
    let coded = Coded::of(&transform, DType::F16, &values(&ids), &ids, 0, VALUES);
    let mut out = values(&ids);
    let out = ChunkMut::new(SHAPE.with_seq(3), DType::F16, &mut out).unwrap();
    let error = transform.inverse(&coded.latents, &VALUES, out).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Corrupt, "row 2: expected a literal row, since its token is new here, got mode 1")
    );
}

/// Rows turned to their positions by the transform's own rotation, so that they are the same on every machine.
fn turned<F: Format>(tokens: &[u32], first: u64, rope: &Rope) -> Vec<u8> {
    let mut rotation = Rotation::default();
    assert!(rotation.set(rope, DIM));
    let mut keys = Vec::new();
    for (position, token) in (first..).zip(tokens) {
        let mut elements: Vec<u32> = row(*token).into_iter().map(number::nearest::<F>).collect();
        rotation.turn::<F>(&mut elements, DIM, 0.0, position as f32);
        keys.extend(elements.iter().flat_map(|element| element.to_le_bytes().into_iter().take(F::BYTES)));
    }
    keys
}

#[test]
fn lanes_never_change() {
    // Containers are read by later versions and on other machines: a prediction must stay the same to the last bit.
    let ids: Vec<u32> = (0..90).map(|i| i * i % 23).collect();
    let llama = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
    let plain = rope(500_000.0);
    let scaled = Rope { scaling: llama, ..rope(10_000.0) };
    let partial = Rope { pairing: RopePairing::Adjacent, rotary_dim: 10, ..rope(500_000.0) };
    let cases = [
        (&plain, DType::F16, turned::<F16>(&ids, 70_000, &plain)),
        (&scaled, DType::Bf16, turned::<Bf16>(&ids, 70_000, &scaled)),
        (&partial, DType::F32, turned::<F32>(&ids, 70_000, &partial)),
    ];
    let hashes = cases.map(|(rope, dtype, bytes)| {
        let cx = Context { rope: Some(rope), first_token: 70_000, ..KEYS };
        let coded = Coded::of(&transform(json!({})), dtype, &bytes, &ids, 5, cx);
        assert_eq!(coded.lanes[0].0, "modes");
        let bytes = coded.latents.lanes().iter().flat_map(|lane| &lane.bytes);
        bytes.fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3))
    });
    assert_eq!(hashes, [0x6461_8CA9_8D2B_4A59, 0xDF3B_6441_2AEB_97D7, 0xE8C0_5A4B_ACEB_719C], "{hashes:#x?}");
}
