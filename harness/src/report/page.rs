//! The report as one HTML page that needs nothing beside it.
//!
//! What the page shows is one JSON value in it: tables of rows by column, and details of as many rows as fit. Its script turns strings into text,
//! never into markup.

use std::collections::{BTreeMap, BTreeSet};

use gearbox_core::{Error, Result, Role};
use serde::Serialize;
use serde_json::{Value, json};

use super::results::{Line, Results};
use crate::gate::{Metric, Verdict};
use crate::sweep::{Canary, Outcome, Row, Sweep, result};

/// Most bytes of the page, with some room below the 6 MB that it promises.
const PAGE_BYTES: usize = 5_800_000;
/// Most bytes of the rows in it; details take what is left.
const ROW_BYTES: usize = 3_800_000;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPTS: [&str; 5] = [
    include_str!("page/base.js"),
    include_str!("page/table.js"),
    include_str!("page/scatter.js"),
    include_str!("page/details.js"),
    include_str!("page/page.js"),
];

/// Columns of rows, in the order of [`cells`].
const COLUMNS: [&str; 24] = [
    "input",
    "dump",
    "name",
    "chunking",
    "result",
    "reason",
    "violations",
    "labels",
    "front",
    "pipeline",
    "stored",
    "ratio",
    "key",
    "value",
    "bits",
    "gap",
    "snr",
    "cosine",
    "nmse",
    "kl",
    "output",
    "encode",
    "decode",
    "number",
];

/// The page.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if a value is no JSON, which takes a defect of this program.
pub(super) fn text(results: &Results) -> Result<String> {
    let mut texts = Texts::default();
    let all: Vec<_> = results.lines().enumerate().collect();
    // What matters most comes first where not all of it fits.
    let mut wanted: Vec<usize> = (0..all.len()).collect();
    wanted.sort_by_key(|idx| {
        let line = &all[*idx].1;
        (!line.front, !line.holds(), !line.row.is_ok(), line.row.stored_bytes, *idx)
    });
    let mut held = BTreeMap::new();
    let mut size = 0;
    for idx in &wanted {
        let cells = cells(*idx, &all[*idx].1, &mut texts);
        size += cells.iter().map(|cell| cell.to_string().len() + 1).sum::<usize>() + std::mem::take(&mut texts.added);
        if size > ROW_BYTES {
            break;
        }
        held.insert(*idx, cells);
    }
    let mut columns: BTreeMap<&str, Vec<Value>> = COLUMNS.iter().map(|name| (*name, Vec::new())).collect();
    for cells in held.values() {
        for (name, cell) in COLUMNS.iter().zip(cells) {
            columns.entry(name).or_default().push(cell.clone());
        }
    }
    let mut data = json!({
        "total_rows": all.len() + results.left_out,
        "unread_rows": results.left_out,
        "inputs": results.sweeps.iter().map(|source| input(&source.file, &source.results)).collect::<Vec<_>>(),
        "dumps": results.dumps.iter().map(|dump| json!({
            "path": dump.path,
            "digest": dump.digest,
            "runs": dump.runs,
            "entries": dump.entries,
            "original_bytes": dump.original_bytes,
            "floor": dump.entropy.floor,
            "ceiling": dump.entropy.ceiling,
            "findings": dump.findings.iter().collect::<Vec<_>>(),
            "floors": dump.floors.iter().map(|floor| (floor.layer, floor.role, digits(floor.floor, 5))).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "rows": columns,
        "texts": texts.all,
        "models": results.models.iter().map(|source| json!({
            "file": source.file,
            "columns": source.results.metrics().iter().map(ToString::to_string).collect::<Vec<_>>(),
            "rows": source.results.rows.iter().map(|row| json!({
                "name": row.name,
                "numbers": source.results.metrics().iter().map(|metric| row.measured.get(metric).copied().flatten()).collect::<Vec<_>>(),
                "end": row.end(),
            })).collect::<Vec<_>>(),
            "problems": source.results.problems,
        })).collect::<Vec<_>>(),
    });
    let fixed = PAGE.len() + STYLE.len() + SCRIPTS.iter().map(|script| script.len()).sum::<usize>();
    let mut room = PAGE_BYTES.saturating_sub(fixed + inline(&data)?.len());
    let mut all_details = BTreeMap::new();
    for idx in wanted.iter().filter(|idx| held.contains_key(idx)) {
        let Some(details) = details(all[*idx].1.row) else { continue };
        let place = held.range(..idx).count();
        let details = serde_json::to_value(details).map_err(|error| Error::invalid_input(error.to_string()))?;
        let bytes = inline(&details)?.len() + 12;
        if bytes > room {
            break;
        }
        room -= bytes;
        all_details.insert(place, details);
    }
    data["details"] = json!(all_details);
    Ok(assemble(&inline(&data)?))
}

/// Puts the parts into the page, each where it belongs.
fn assemble(data: &str) -> String {
    let mut page = String::with_capacity(PAGE_BYTES / 8 + data.len());
    let mut rest = PAGE;
    let script = SCRIPTS.concat();
    for (place, part) in [("/*STYLE*/", STYLE), ("/*DATA*/", data), ("/*SCRIPT*/", &script)] {
        let (before, after) = rest.split_once(place).unwrap_or_else(|| unreachable!("the page has a place `{place}`"));
        page.push_str(before);
        page.push_str(part);
        rest = after;
    }
    page.push_str(rest);
    page
}

/// JSON in which no tag can begin.
fn inline(value: &Value) -> Result<String> {
    let text = serde_json::to_string(value).map_err(|error| Error::invalid_input(error.to_string()))?;
    Ok(text.replace('<', "\\u003c"))
}

/// Long texts that many rows share, each once.
#[derive(Default)]
struct Texts {
    all: Vec<String>,
    numbers: BTreeMap<String, usize>,
    /// Bytes that were added since someone looked.
    added: usize,
}

impl Texts {
    fn number(&mut self, text: String) -> usize {
        let next = self.all.len();
        let number = *self.numbers.entry(text.clone()).or_insert(next);
        if number == next {
            self.added += text.len() + text.matches(['"', '<', '\\']).count() * 5 + 3;
            self.all.push(text);
        }
        number
    }
}

/// The cells of a row; numbers with the digits that anyone looks at, files have them all.
fn cells(idx: usize, line: &Line<'_>, texts: &mut Texts) -> [Value; COLUMNS.len()] {
    let row = line.row;
    let ratio = |original: u64, stored: u64| digits(original as f64 / stored as f64, 6);
    let speed = |ns: u64| digits(row.original_bytes as f64 * 1e3 / ns as f64, 5);
    let number = |metric, count| row.measured(metric).and_then(|number| digits(number, count));
    let outcome = if matches!(row.outcome, Outcome::Failed { .. }) { "failed" } else { result(row) };
    let reason = match &row.outcome {
        Outcome::Failed { state, reason } => format!("{state}: {reason}"),
        outcome => outcome.reason().unwrap_or_default().to_owned(),
    };
    let violations =
        row.verdict.as_ref().filter(|verdict| !verdict.passed()).map(ToString::to_string).unwrap_or_default();
    let labels: Vec<_> = row.labels.iter().map(ToString::to_string).collect();
    let snr = row.error.as_ref().and_then(|error| digits(error.all.error.snr_db?, 4));
    [
        json!(line.sweep),
        json!(line.dump),
        json!(row.name),
        json!(row.chunking),
        json!(outcome),
        json!(texts.number(reason)),
        json!(texts.number(violations)),
        json!(texts.number(labels.join(", "))),
        json!(u8::from(line.front)),
        json!(texts.number(row.pipeline.to_string())),
        json!((row.stored_bytes > 0).then_some(row.stored_bytes)),
        json!(ratio(row.original_bytes, row.stored_bytes)),
        json!(ratio(row.key.original_bytes, row.key.stored_bytes)),
        json!(ratio(row.value.original_bytes, row.value.stored_bytes)),
        json!(row.bits_per_value.and_then(|bits| digits(bits, 5))),
        json!(row.gap.and_then(|gap| digits(gap, 5))),
        json!(snr),
        json!(number(Metric::WorstHeadCosine, 9)),
        json!(number(Metric::WorstHeadNmse, 4)),
        json!(number(Metric::KlP99, 4)),
        json!(number(Metric::OutputError, 4)),
        json!(speed(row.encode_ns)),
        json!(speed(row.decode_ns)),
        json!(idx + 1),
    ]
}

/// A number with so many digits that count; none if it is not finite.
fn digits(number: f64, count: usize) -> Option<f64> {
    let text = format!("{number:.*e}", count.saturating_sub(1));
    number.is_finite().then(|| text.parse().unwrap_or(number))
}

/// What the page says of a file: its receipt, what its gate and its canaries came to.
fn input(file: &str, sweep: &Sweep) -> Value {
    let judged: Vec<(&Row, &Verdict)> =
        sweep.rows.iter().filter_map(|row| Some((row, row.verdict.as_ref()?))).collect();
    let limits = sweep.gate.0.iter().map(|(metric, limit)| {
        let violates = |(_, verdict): &&(&Row, &Verdict)| {
            verdict.violations.iter().any(|violation| violation.metric == *metric)
        };
        let violating = judged.iter().filter(violates).count();
        let unmeasured = judged.iter().filter(violates).filter(|(row, _)| row.measured(*metric).is_none()).count();
        let (holding, outside) = (judged.len() - violating, violating - unmeasured);
        json!({ "metric": metric, "limit": limit.to_string(), "holding": holding, "violating": outside, "unmeasured": unmeasured })
    });
    let canaries = sweep.canaries.iter().map(|canary: &Canary| {
        json!({ "name": canary.name, "dump": canary.dump, "what": canary.what(), "end": canary.wanted(), "problem": canary.problem })
    });
    json!({
        "file": file,
        "receipt": sweep.receipt,
        "required": sweep.gate_required,
        "limits": limits.collect::<Vec<_>>(),
        "canaries": canaries.collect::<Vec<_>>(),
        "notes": sweep.remarks().lines().collect::<Vec<_>>(),
    })
}

/// Numbers by layer, keys and values apart; none where a layer has none.
#[derive(Default, Serialize)]
struct ByRole<T> {
    key: Vec<T>,
    value: Vec<T>,
}

impl<T> ByRole<T> {
    fn of(mut make: impl FnMut(Role) -> Vec<T>) -> Self {
        Self { key: make(Role::Key), value: make(Role::Value) }
    }
}

/// What the page shows of a row by layer and head.
#[derive(Serialize)]
struct Details {
    layers: Vec<u32>,
    runs: usize,
    /// NMSE by layer and KV head, the worst of all runs; none if damaged beyond measure.
    heads: ByRole<Vec<Option<f64>>>,
    /// Relative error of the attention output by layer and query head, the worst of all runs.
    attention: Vec<Vec<Option<f64>>>,
    queries: u64,
    original: ByRole<u64>,
    stored: ByRole<u64>,
    values: ByRole<u64>,
    /// Stored bytes by section and lane, the most first.
    ledger: Vec<(String, u64)>,
}

fn details(row: &Row) -> Option<Details> {
    let error = row.error.as_ref()?;
    let attention = row.attention.as_ref().filter(|attention| attention.all.queries > 0);
    let layers: BTreeSet<u32> = error.layers.iter().map(|layer| layer.layer).collect();
    let worst = |numbers: &mut dyn Iterator<Item = (usize, f64)>| {
        let mut line: Vec<Option<f64>> = Vec::new();
        for (head, number) in numbers {
            line.resize(line.len().max(head + 1), Some(0.0));
            line[head] = line[head].filter(|_| number.is_finite()).map(|held| held.max(number));
        }
        line.into_iter().map(|number| number.and_then(|number| digits(number, 3))).collect::<Vec<_>>()
    };
    let heads = ByRole::of(|role| {
        let line = |layer: &u32| {
            let heads = error.heads.iter().filter(|head| (head.layer, head.role) == (*layer, role));
            worst(&mut heads.map(|head| (head.head, head.error.nmse)))
        };
        layers.iter().map(line).collect()
    });
    let of_attention = |layer: &u32| {
        let heads = attention.iter().flat_map(|attention| &attention.heads).filter(|head| head.layer == *layer);
        worst(&mut heads.map(|head| (head.head, head.error.output_error)))
    };
    let by_layer = |numbers: &dyn Fn(u32, Role) -> u64| {
        ByRole::of(|role| layers.iter().map(|layer| numbers(*layer, role)).collect())
    };
    let mut ledger = BTreeMap::<String, u64>::new();
    for entry in &row.ledger {
        let section = entry.account.section;
        let name = entry.account.lane.as_ref().map_or_else(|| section.to_string(), |lane| format!("{section} {lane}"));
        *ledger.entry(name).or_default() += entry.bytes;
    }
    let mut ledger: Vec<_> = ledger.into_iter().collect();
    ledger.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    Some(Details {
        runs: error.heads.iter().map(|head| head.run.as_str()).collect::<BTreeSet<_>>().len(),
        heads,
        attention: if attention.is_some() { layers.iter().map(of_attention).collect() } else { Vec::new() },
        queries: attention.map_or(0, |attention| attention.all.queries),
        original: by_layer(&|layer, role| {
            let own = row.sequences.iter().filter(|cost| (cost.layer, cost.role) == (layer, role));
            own.map(|cost| cost.original_bytes).sum()
        }),
        stored: by_layer(&|layer, role| {
            let own = row
                .ledger
                .iter()
                .filter(|entry| (entry.account.layer, entry.account.role) == (Some(layer), Some(role)));
            own.map(|entry| entry.bytes).sum()
        }),
        values: by_layer(&|layer, role| {
            let own = error.layers.iter().filter(|held| (held.layer, held.role) == (layer, role));
            own.map(|held| held.error.elements).sum()
        }),
        layers: layers.into_iter().collect(),
        ledger,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tag_begins_in_the_data_and_its_words_are_no_places() {
        let value = json!({ "name": "</script><!-- /*SCRIPT*/ \u{2028}\" <script>" });
        let text = inline(&value).unwrap();
        assert!(!text.contains('<'), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        let page = assemble(&text);
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.contains("!-- /*SCRIPT*/"));
    }

    #[test]
    fn page_names_no_address_outside_of_itself() {
        let page = assemble("{}");
        // The name of a vocabulary is no address that anyone fetches.
        let page = page.replace("http://www.w3.org/2000/svg", "");
        for word in ["http:", "https:", "//cdn", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML"] {
            assert!(!page.contains(word), "{word}");
        }
    }

    #[test]
    fn numbers_keep_the_digits_that_count() {
        assert_eq!(digits(1.234_567, 3), Some(1.23));
        assert_eq!(digits(f64::INFINITY, 3), None);
        assert_eq!(digits(0.0, 3), Some(0.0));
    }
}
