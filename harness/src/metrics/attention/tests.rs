use gearbox_core::{ErrorKind, Shape};
use half::{bf16, f16};

use super::*;

/// A tensor `(seq, heads, dim)`.
#[derive(Clone)]
struct Tensor {
    shape: Shape,
    numbers: Vec<f32>,
}

impl Tensor {
    fn new(shape: Shape, number: impl FnMut() -> f32) -> Self {
        Self { shape, numbers: std::iter::repeat_with(number).take(shape.elements()).collect() }
    }

    fn row(&self, token: usize, head: usize) -> &[f32] {
        let Shape { heads, dim, .. } = self.shape;
        &self.numbers[(token * heads + head) * dim..][..dim]
    }

    fn bytes(&self, dtype: DType) -> Vec<u8> {
        let bytes = |number: &f32| match dtype {
            DType::F16 => f16::from_f32(*number).to_le_bytes().to_vec(),
            DType::Bf16 => bf16::from_f32(*number).to_le_bytes().to_vec(),
            _ => number.to_le_bytes().to_vec(),
        };
        self.numbers.iter().flat_map(bytes).collect()
    }
}

/// A layer with everything that goes into a replay.
struct Case {
    spans: Vec<Span>,
    /// Keys and their decoded form, values and theirs.
    tensors: [Tensor; 4],
    /// Queries of some of the spans.
    queries: Vec<(u64, Tensor)>,
    dtype: DType,
    facts: Option<AttentionFacts>,
}

impl Case {
    fn replay(&self, options: AttentionOptions) -> Result<LayerAttention> {
        let bytes = self.tensors.each_ref().map(|tensor| tensor.bytes(self.dtype));
        let chunks: Vec<Chunk<'_>> = self
            .tensors
            .iter()
            .zip(&bytes)
            .map(|(tensor, bytes)| Chunk::new(tensor.shape, self.dtype, bytes).unwrap())
            .collect();
        // Originals come span by span, decoded tensors in two parts.
        let mut at = 0;
        let mut parts = [const { Vec::new() }; 4];
        for span in &self.spans {
            parts[0].push(chunks[0].tokens(at..at + span.seq));
            parts[2].push(chunks[2].tokens(at..at + span.seq));
            at += span.seq;
        }
        for tensor in [1, 3] {
            let seq = chunks[tensor].shape().seq;
            parts[tensor] = vec![chunks[tensor].tokens(0..seq / 3), chunks[tensor].tokens(seq / 3..seq)];
        }
        let bytes = self.query_bytes();
        let queries = self.query_parts(&bytes);
        Attention::new(options)?.layer(&LayerInput {
            spans: &self.spans,
            key: Sides { original: &parts[0], decoded: &parts[1] },
            value: Sides { original: &parts[2], decoded: &parts[3] },
            queries: &queries,
            facts: self.facts,
        })
    }

    fn query_bytes(&self) -> Vec<Vec<u8>> {
        self.queries.iter().map(|(_, tensor)| tensor.bytes(self.dtype)).collect()
    }

    fn query_parts<'a>(&self, bytes: &'a [Vec<u8>]) -> Vec<Queries<'a>> {
        let parts = self.queries.iter().zip(bytes);
        let chunk = |tensor: &Tensor, bytes| Chunk::new(tensor.shape, self.dtype, bytes).unwrap();
        parts.map(|((first, tensor), bytes)| Queries { first: *first, chunk: chunk(tensor, bytes) }).collect()
    }

    /// Attention as textbooks write it, in F64, of one query head.
    fn textbook(&self, head: usize, top: usize) -> AttentionError {
        let [key, decoded_key, value, decoded_value] = &self.tensors;
        let kv_head = head / (self.queries[0].1.shape.heads / key.shape.heads);
        let facts = self.facts.unwrap_or_else(|| AttentionFacts::usual(key.shape.dim));
        let positions: Vec<u64> =
            self.spans.iter().flat_map(|span| (0..span.seq as u64).map(|token| span.start + token)).collect();
        let (mut kls, mut logit_errors, mut agreements) = (Vec::new(), Vec::new(), Vec::new());
        let (mut error, mut norm, mut undefined) = (0.0, 0.0, 0);
        for (first, queries) in &self.queries {
            for token in 0..queries.shape.seq {
                let position = first + token as u64;
                let sees = |at: u64| at <= position && facts.window.is_none_or(|window| position - at < window);
                let live: Vec<usize> = (0..positions.len()).filter(|i| sees(positions[*i])).collect();
                if live.is_empty() {
                    undefined += 1;
                    continue;
                }
                let query = queries.row(token, head);
                let attend = |keys: &Tensor, values: &Tensor| {
                    let dot = |i: &usize| {
                        let pairs = query.iter().zip(keys.row(*i, kv_head));
                        let logit = pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * facts.scale;
                        facts.softcap.map_or(logit, |softcap| softcap * (logit / softcap).tanh())
                    };
                    let logits: Vec<f64> = live.iter().map(dot).collect();
                    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
                    let logs: Vec<f64> = logits.iter().map(|logit| logit - max - total.ln()).collect();
                    let mut output = vec![0.0; values.shape.dim];
                    for (i, log) in live.iter().zip(&logs) {
                        for (output, v) in output.iter_mut().zip(values.row(*i, kv_head)) {
                            *output += log.exp() * f64::from(*v);
                        }
                    }
                    let mut order: Vec<usize> = (0..live.len()).collect();
                    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
                    order.truncate(top);
                    (logits, logs, output, order)
                };
                let (logits, logs, output, order) = attend(key, value);
                let (logits_2, logs_2, output_2, order_2) = attend(decoded_key, decoded_value);
                logit_errors.extend(logits.iter().zip(&logits_2).map(|(a, b)| (a - b).abs()));
                kls.push(logs.iter().zip(&logs_2).map(|(a, b)| a.exp() * (a - b)).sum::<f64>());
                error += output.iter().zip(&output_2).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                norm += output.iter().map(|a| a * a).sum::<f64>();
                let common = order.iter().filter(|token| order_2.contains(token)).count();
                agreements.push(common as f64 / order.len() as f64);
            }
        }
        kls.sort_by(f64::total_cmp);
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len() as f64;
        AttentionError {
            queries: kls.len() as u64,
            undefined,
            broken: 0,
            logit_rmse: mean(&logit_errors.iter().map(|error| error * error).collect::<Vec<_>>()).sqrt(),
            logit_max: logit_errors.iter().copied().fold(0.0, f64::max),
            kl_mean: mean(&kls),
            kl_p99: kls[(kls.len() * 99).div_ceil(100) - 1],
            kl_max: kls[kls.len() - 1],
            output_error: (error / norm).sqrt(),
            top_agreement: mean(&agreements),
        }
    }

    #[track_caller]
    fn check(&self) {
        let options = AttentionOptions::default();
        let found = self.replay(options.clone()).unwrap();
        // A capped logit and its change are rounded to F32. What that makes of a logit goes into every probability, and with the changes,
        // which are at most twice the cap, into the divergence.
        let cap = self.facts.and_then(|facts| facts.softcap).unwrap_or(0.0);
        let capped = 4.0 * cap * (1.0 + cap) * f64::from(f32::EPSILON);
        assert_eq!(found.heads.len(), self.queries[0].1.shape.heads);
        for (head, sums) in found.heads.iter().enumerate() {
            let (got, expected) = (sums.error(), self.textbook(head, options.top));
            assert_eq!((got.queries, got.undefined), (expected.queries, expected.undefined));
            // Inputs are multiples of 1/8 and the scale is a power of two, so logits and their changes are exact. What is left is the
            // rounding of the textbook, which takes logarithms below 1000 from each other.
            let close = |a: f64, b: f64, tolerance: f64| assert!((a - b).abs() <= tolerance, "{got:?} {expected:?}");
            let exact = 1e-12 + capped;
            close(got.logit_rmse, expected.logit_rmse, exact);
            close(got.logit_max, expected.logit_max, capped);
            close(got.kl_mean, expected.kl_mean, exact);
            close(got.kl_max, expected.kl_max, exact);
            close(got.kl_p99, expected.kl_p99, exact + expected.kl_p99 / 128.0);
            assert!(got.kl_p99 >= expected.kl_p99 - exact && got.kl_p99 <= got.kl_max);
            assert_eq!(got.top_agreement, expected.top_agreement);
            // Weights and sums of up to a section are F32: one rounding per token, and some terms cancel.
            let rounding = (SECTION.min(self.tensors[0].shape.seq) + 2) as f64 * f64::from(f32::EPSILON);
            close(got.output_error, expected.output_error, (rounding + capped) * expected.output_error.max(1.0));
        }
    }
}

/// Numbers of a fixed sequence (xorshift, seed 1): multiples of 1/8 from -2 to 2.
fn numbers() -> impl FnMut() -> f32 {
    let mut state = 1u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 20) % 33) as f32 / 8.0 - 2.0
    }
}

/// A random case; of the decoded numbers every fifth is another one.
fn case(spans: &[(u64, usize)], (q_heads, kv_heads): (usize, usize), dims: [usize; 2], dtype: DType) -> Case {
    let mut number = numbers();
    let spans: Vec<Span> = spans.iter().map(|(start, seq)| Span { start: *start, seq: *seq }).collect();
    let tokens = spans.iter().map(|span| span.seq).sum();
    let [key, value] = dims.map(|dim| Tensor::new(Shape::new(tokens, kv_heads, dim), &mut number));
    let [decoded_key, decoded_value] = [&key, &value].map(|tensor| {
        let mut decoded = tensor.clone();
        decoded.numbers.iter_mut().step_by(5).for_each(|x| *x = number());
        decoded
    });
    let queries = spans
        .iter()
        .map(|span| (span.start, Tensor::new(Shape::new(span.seq, q_heads, dims[0]), &mut number)))
        .collect();
    Case { spans, tensors: [key, decoded_key, value, decoded_value], queries, dtype, facts: None }
}

#[test]
fn one_token_attends_to_itself_alone() {
    let case = case(&[(0, 1)], (1, 1), [4, 3], DType::F32);
    case.check();
    let found = case.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((found.kl_max, found.top_agreement), (0.0, 1.0));
    assert!(found.logit_max > 0.0 && found.output_error > 0.0);
}

#[test]
fn groups_of_heads_gaps_and_several_entries_follow_the_textbook() {
    for dtype in DType::ALL {
        case(&[(0, 9), (9, 1), (10, 1), (40, 12)], (6, 2), [16, 5], dtype).check();
    }
    case(&[(3, 2), (7, 11)], (4, 4), [4, 16], DType::F16).check();
}

/// Facts of a layer.
fn facts(scale: f64, softcap: Option<f64>, window: Option<u64>) -> AttentionFacts {
    AttentionFacts { scale, softcap, window }
}

#[test]
fn scale_softcap_and_window_follow_the_textbook_with_groups_and_gaps() {
    for facts in [
        facts(0.125, None, None),
        facts(0.25, Some(3.0), None),
        facts(0.25, None, Some(1)),
        facts(0.5, Some(8.0), Some(11)),
        facts(0.25, None, Some(33)),
    ] {
        let case = case(&[(0, 9), (9, 1), (10, 1), (40, 43), (90, 2)], (6, 2), [16, 5], DType::F16);
        Case { facts: Some(facts), ..case }.check();
    }
}

#[test]
fn windows_begin_within_panels_blocks_and_sections() {
    for window in [7, SECTION as u64 + 20] {
        let case = case(&[(0, 2 * SECTION + 21)], (2, 1), [4, 17], DType::F16);
        Case { facts: Some(facts(0.5, None, Some(window))), ..case }.check();
    }
}

#[test]
fn usual_facts_and_windows_that_hide_nothing_change_no_bit() {
    let mut case = case(&[(0, 70), (80, 3)], (4, 2), [16, 16], DType::F16);
    let expected = case.replay(AttentionOptions::default()).unwrap();
    for facts in [facts(0.25, None, None), facts(0.25, None, Some(83)), facts(0.25, None, Some(u64::MAX))] {
        case.facts = Some(facts);
        assert_eq!(case.replay(AttentionOptions::default()).unwrap(), expected);
    }
    case.facts = Some(facts(0.25, None, Some(82)));
    assert_ne!(case.replay(AttentionOptions::default()).unwrap(), expected);
}

#[test]
fn blocks_and_sections_are_joined() {
    case(&[(0, 2 * SECTION + 21)], (2, 1), [4, 17], DType::F16).check();
}

#[test]
fn queries_without_tokens_or_of_some_entries_follow_the_textbook() {
    let mut case = case(&[(5, 20), (30, 7)], (2, 1), [4, 4], DType::F32);
    case.queries.remove(0);
    case.check();
    // Positions 1 to 7: the first four see nothing, and the others only a part of the first span.
    case.queries[0].0 = 1;
    case.check();
    assert_eq!(case.replay(AttentionOptions::default()).unwrap().heads[1].error().undefined, 4);
}

#[test]
fn large_changes_do_not_overflow() {
    let mut case = case(&[(0, 40)], (2, 2), [16, 4], DType::F32);
    for factor in [16.0, -64.0, 1024.0] {
        case.tensors[1].numbers = case.tensors[0].numbers.iter().map(|x| x * factor).collect();
        let found = case.replay(AttentionOptions::default()).unwrap();
        for (head, sums) in found.heads.iter().enumerate() {
            let (got, expected) = (sums.error(), case.textbook(head, 8));
            // Both take sums of exponentials relative to the largest, of logits up to 16 000.
            assert!((got.kl_max / expected.kl_max - 1.0).abs() < 1e-12, "{got:?} {expected:?}");
            assert!((got.output_error / expected.output_error - 1.0).abs() < 42.0 * f64::from(f32::EPSILON));
            assert_eq!(got.top_agreement, expected.top_agreement);
        }
    }
}

#[test]
fn equal_inputs_give_exactly_zero() {
    for dtype in DType::ALL {
        let mut case = case(&[(0, 70), (80, 3)], (4, 2), [16, 16], dtype);
        case.tensors[1] = case.tensors[0].clone();
        case.tensors[3] = case.tensors[2].clone();
        for sums in case.replay(AttentionOptions::default()).unwrap().heads {
            let error = sums.error();
            let zeros =
                [error.logit_rmse, error.logit_max, error.kl_mean, error.kl_p99, error.kl_max, error.output_error];
            assert_eq!((error.queries, zeros, error.top_agreement), (73, [0.0; 6], 1.0));
        }
    }
}

#[test]
fn one_changed_side_follows_the_textbook() {
    for same in [0, 2] {
        let mut case = case(&[(0, 37)], (2, 1), [16, 16], DType::F16);
        case.tensors[same + 1] = case.tensors[same].clone();
        case.check();
    }
}

/// Two tokens of one channel, with queries at both.
fn two_tokens(keys: [f32; 2], decoded: [f32; 2], values: [f32; 2], decoded_values: [f32; 2]) -> Case {
    let tensor = |numbers: [f32; 2]| Tensor { shape: Shape::new(2, 1, 1), numbers: numbers.to_vec() };
    Case {
        spans: vec![Span { start: 0, seq: 2 }],
        tensors: [keys, decoded, values, decoded_values].map(tensor),
        queries: vec![(0, tensor([1.0, 1.0]))],
        dtype: DType::F32,
        facts: None,
    }
}

#[test]
fn outputs_worked_out_by_hand() {
    // Outputs 3 and (3 + 5) / 2 = 4 become 3 and (3 + 11) / 2 = 7: a difference of 3, against a norm of 5.
    let found = two_tokens([0.0; 2], [0.0; 2], [3.0, 5.0], [3.0, 11.0]).replay(AttentionOptions::default()).unwrap();
    let error = found.heads[0].error();
    assert_eq!((error.output_error, error.kl_max, error.logit_max), (0.6, 0.0, 0.0));
}

#[test]
fn changes_below_the_rounding_of_probabilities_keep_their_digits() {
    // Probabilities of 1/2 and a change δ of one logit: KL = ln cosh(δ/2) = δ²/8 (1 - δ²/24 ...), and the output changes by δ/4.
    let found = two_tokens([0.0; 2], [0.0, 1e-6], [0.0, 1.0], [0.0, 1.0]).replay(AttentionOptions::default()).unwrap();
    let (error, delta) = (found.heads[0].error(), f64::from(1e-6f32));
    assert!((error.kl_max / (delta * delta / 8.0) - 1.0).abs() < 1e-12, "{error:?}");
    assert!((error.output_error / (delta / 2.0) - 1.0).abs() < 1e-6, "{error:?}");
}

#[test]
fn changes_under_a_softcap_keep_their_digits() {
    // A logit of 3 under a cap of 1 is nearly flat: δ becomes δ (1 - tanh² 3) = 0.00986 δ, and KL = p (1 - p) δ² / 2.
    let mut case = two_tokens([0.0, 3.0], [0.0, 3.0 + 2f32.powi(-20)], [0.0, 1.0], [0.0, 1.0]);
    case.facts = Some(facts(1.0, Some(1.0), None));
    let error = case.replay(AttentionOptions::default()).unwrap().heads[0].error();
    let (logit, delta) = (3f64.tanh(), 2f64.powi(-20) / 3f64.cosh().powi(2));
    let p = 1.0 / (1.0 + logit.exp());
    // Logit and change are rounded to F32, and a second-order term of the change is left out.
    assert!((error.logit_max / delta - 1.0).abs() < 4e-6, "{error:?}");
    assert!((error.kl_max / (p * (1.0 - p) * delta * delta / 2.0) - 1.0).abs() < 8e-6, "{error:?}");

    case.tensors[1] = case.tensors[0].clone();
    let error = case.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.logit_max, error.kl_max, error.output_error), (0.0, 0.0, 0.0));
}

#[test]
fn what_is_not_finite_outside_the_window_is_not_seen() {
    let lost = [f32::NAN, 1.0];
    let mut case = two_tokens(lost, [f32::INFINITY, 1.0], [f32::NEG_INFINITY, 2.0], [f32::NAN, 1.0]);
    case.facts = Some(facts(1.0, None, Some(1)));
    let error = case.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.queries, error.undefined, error.broken), (1, 1, 0));
    assert_eq!((error.kl_max, error.output_error), (0.0, 0.5));
    // A cap does not make an infinite product a finite logit.
    let mut case = two_tokens([0.0, 1.0], [0.0, f32::INFINITY], [1.0, 2.0], [1.0, 2.0]);
    case.facts = Some(facts(1.0, Some(5.0), None));
    let error = case.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.broken, error.kl_max), (1, f64::INFINITY));
}

#[test]
fn most_attended_tokens_are_those_of_the_first_positions_among_equals() {
    let mut tokens = Vec::new();
    let rows = [1.0, 3.0, 2.0, 3.0, 3.0, 0.0, 2.0, 5.0, 3.0, f32::NEG_INFINITY, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    for (count, expected) in [(1, vec![10]), (4, vec![10, 7, 1, 3]), (6, vec![10, 7, 1, 3, 4, 8])] {
        largest(&rows, f32::NEG_INFINITY, count, &mut tokens);
        assert_eq!(tokens, expected);
    }
    largest(&rows, f32::NEG_INFINITY, 20, &mut tokens);
    assert_eq!(tokens.len(), 15);
}

#[test]
fn threads_change_nothing() {
    let mut case = case(&[(0, 300)], (6, 2), [16, 16], DType::F16);
    case.facts = Some(facts(0.25, Some(4.0), Some(100)));
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.replay(AttentionOptions::default()).unwrap())
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn chosen_queries_are_evenly_spaced_and_end_with_the_last() {
    let case = case(&[(0, 7), (20, 3)], (1, 1), [4, 4], DType::F32);
    let bytes = case.query_bytes();
    let queries = case.query_parts(&bytes);
    let sides = Sides { original: &[], decoded: &[] };
    let input = LayerInput { spans: &case.spans, key: sides, value: sides, queries: &queries, facts: None };
    let rule = Rule::of(None, 4).unwrap();
    for (count, expected) in [
        (1, vec![(1, 2, 10)]),
        (3, vec![(0, 2, 3), (0, 5, 6), (1, 2, 10)]),
        (5, vec![(0, 1, 2), (0, 3, 4), (0, 5, 6), (1, 0, 8), (1, 2, 10)]),
    ] {
        let options = AttentionOptions { queries: Some(count), ..AttentionOptions::default() };
        let chosen = Attention::new(options).unwrap().select(&input, &rule).unwrap();
        assert_eq!(chosen.iter().map(|query| (query.part, query.token, query.sees.end)).collect::<Vec<_>>(), expected);
    }
    let all = Attention::new(AttentionOptions { queries: Some(99), top: 1 }).unwrap().select(&input, &rule).unwrap();
    assert_eq!(all.len(), 10);
}

#[test]
fn what_is_not_finite_is_counted_where_it_is_seen() {
    // The second key is lost to both sides: the query that sees it is undefined.
    let nan = two_tokens([0.0, f32::NAN], [0.0, f32::NAN], [1.0, 2.0], [1.5, 2.0]);
    let error = nan.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.queries, error.undefined, error.broken, error.output_error), (1, 1, 0, 0.5));
    // So it is if the value is.
    let nan = two_tokens([0.0; 2], [0.0; 2], [1.0, f32::INFINITY], [1.5, f32::INFINITY]);
    let error = nan.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.queries, error.undefined, error.broken, error.output_error), (1, 1, 0, 0.5));
    // A decoder that makes a key infinite breaks the second query, but not the first.
    let broken = two_tokens([0.0, 1.0], [0.0, f32::INFINITY], [1.0, 2.0], [1.0, 2.0]);
    let error = broken.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.queries, error.undefined, error.broken), (2, 0, 1));
    let bad = [error.logit_rmse, error.logit_max, error.kl_mean, error.kl_p99, error.kl_max, error.output_error];
    assert_eq!((bad, error.top_agreement), ([f64::INFINITY; 6], 0.5));
    // A broken value leaves the probabilities as they are.
    let broken = two_tokens([0.0, 1.0], [0.0, 1.0], [1.0, 2.0], [1.0, f32::NAN]);
    let error = broken.replay(AttentionOptions::default()).unwrap().heads[0].error();
    assert_eq!((error.broken, error.kl_max, error.output_error, error.top_agreement), (1, 0.0, f64::INFINITY, 1.0));
}

#[test]
fn errors_name_expected_and_got() {
    let options = AttentionOptions::default;
    let message = |case: &Case| {
        let error = case.replay(options()).unwrap_err();
        (error.kind(), error.to_string())
    };
    let good = || case(&[(0, 3), (5, 2)], (4, 2), [4, 4], DType::F32);

    let mut case = good();
    case.queries.clear();
    assert_eq!(message(&case), (ErrorKind::InvalidInput, "expected queries, got none".to_owned()));

    let mut case = good();
    case.spans[1].start = 2;
    let expected = "expected ascending positions, got 2 after 3 were taken";
    assert_eq!(message(&case), (ErrorKind::InvalidInput, expected.to_owned()));

    let mut case = good();
    case.tensors[3] = Tensor::new(Shape::new(4, 2, 4), || 0.0);
    assert_eq!(message(&case), (ErrorKind::ShapeMismatch, "value: decoded: expected 5 tokens, got 4".to_owned()));

    let mut case = good();
    case.tensors[1] = Tensor::new(Shape::new(5, 2, 3), || 0.0);
    let expected = "key: decoded: expected f32 of (2, 4), got f32 of (1, 2, 3)";
    assert_eq!(message(&case), (ErrorKind::ShapeMismatch, expected.to_owned()));

    let mut case = good();
    case.queries[0].1 = Tensor::new(Shape::new(3, 3, 4), || 0.0);
    let expected = "expected query heads to be a multiple of 2, got 3";
    assert_eq!(message(&case), (ErrorKind::ShapeMismatch, expected.to_owned()));

    let mut case = good();
    case.facts = Some(facts(-1.0, None, None));
    let expected = "attention: expected a positive `scale` in the range of f32, got -1";
    assert_eq!(message(&case), (ErrorKind::InvalidInput, expected.to_owned()));

    let error = Attention::new(AttentionOptions { queries: Some(0), top: 8 }).unwrap_err();
    assert_eq!(error.to_string(), "`/queries`: expected at least 1, got 0");
}

#[test]
fn quantiles_are_rounded_up_by_less_than_a_hundredth() {
    let mut sums = AttentionSums::default();
    assert_eq!((sums.error().kl_p99, sums.error().top_agreement), (0.0, 1.0));
    for kl in 1..=200 {
        sums.add(&Seen { kl: f64::from(kl), ..Seen::default() });
    }
    let p99 = sums.error().kl_p99;
    assert!((198.0..=199.98).contains(&p99), "{p99}");
    let mut zeros = AttentionSums::default();
    (0..199).for_each(|_| zeros.add(&Seen::default()));
    zeros.add(&Seen { kl: 7.0, ..Seen::default() });
    assert_eq!((zeros.error().kl_p99, zeros.error().kl_max), (0.0, 7.0));
}

#[test]
fn reports_name_the_worst_head_and_do_not_depend_on_how_they_were_collected() {
    let layer = |kls: [f64; 2]| {
        let heads = kls.map(|kl| {
            let mut sums = AttentionSums::default();
            sums.add(&Seen {
                live: 1,
                kl,
                output_squares: kl * kl,
                output_norm: 1.0,
                agreement: 1.0,
                ..Seen::default()
            });
            sums
        });
        LayerAttention { heads: heads.to_vec() }
    };
    let layers = [("a", 0, layer([1.0, 2.0])), ("a", 1, layer([4.0, 0.0])), ("b", 0, layer([4.0, f64::INFINITY]))];
    let mut tally = AttentionTally::default();
    assert!(tally.is_empty());
    let mut halves = [AttentionTally::default(), AttentionTally::default()];
    for (idx, (run, layer, found)) in layers.iter().enumerate() {
        tally.add(run, *layer, found);
        halves[idx / 2].add(run, *layer, found);
        let report = tally.report();
        let worst = report.worst_kl.unwrap();
        let expected = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1)][idx];
        assert_eq!((worst.run.as_str(), worst.layer, worst.head), expected);
        assert_eq!(report.worst_output.unwrap().head, worst.head);
        assert_eq!(report.worst_layer.unwrap().layer, worst.layer);
    }
    let [mut first, second] = halves;
    first.merge(second);
    assert_eq!(first.report(), tally.report());
    let report = tally.report();
    assert_eq!((report.all.queries, report.layers.len(), report.heads.len()), (6, 2, 6));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["all"]["kl_max"], serde_json::Value::Null);
    assert_eq!(json["heads"][1]["kl_max"], 2.0);
    assert_eq!(json["worst_kl"]["run"], "b");
}
