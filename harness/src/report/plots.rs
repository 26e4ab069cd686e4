//! The plots of a report as SVG files: the front, the ledgers of its rows, and the errors of one row by layer and head.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use gearbox_core::Role;
use gearbox_core::ledger::Section;

use super::axis::{Axis, BAND, short};
use super::results::{Line, Results};
use super::svg::Svg;
use super::{bytes, rate, ratio};
use crate::gate::Metric;
use crate::sweep::{Row, result};

/// All plots with their file names, numbered by dump; a plot that would be empty is left out.
pub(super) fn all(results: &Results) -> Vec<(String, String)> {
    let mut plots = Vec::new();
    for (idx, dump) in results.dumps.iter().enumerate() {
        let lines: Vec<_> = results.lines().filter(|line| line.dump == idx && line.row.is_ok()).collect();
        let drawn = [
            ("front", front(&lines, &dump.path)),
            ("ledger", ledger(&lines, &dump.path)),
            ("heads", results.best(idx).and_then(|line| heads(line.row))),
        ];
        let name = |(kind, plot): (&str, Option<String>)| Some((format!("{kind}-{}.svg", idx + 1), plot?));
        plots.extend(drawn.into_iter().filter_map(name));
    }
    plots
}

/// What goes up: the error of the worst head, or the speed where nothing was lost.
struct Height {
    label: &'static str,
    of: fn(&Row) -> Option<f64>,
    is_better_high: bool,
}

fn height(lines: &[Line<'_>]) -> Height {
    let error = |row: &Row| row.measured(Metric::WorstHeadNmse).filter(|error| error.is_finite());
    if lines.iter().any(|line| error(line.row).is_some_and(|error| error > 0.0)) {
        return Height { label: "← better, NMSE of the worst head", of: error, is_better_high: false };
    }
    let speed = |row: &Row| (row.decode_ns > 0).then(|| row.original_bytes as f64 * 1e3 / row.decode_ns as f64);
    Height { label: "decoding in MB/s, single measurement, better →", of: speed, is_better_high: true }
}

/// A row with its place.
struct Mark<'a> {
    line: &'a Line<'a>,
    bits: f64,
    up: f64,
    x: f64,
    y: f64,
}

fn front(lines: &[Line<'_>], dump: &str) -> Option<String> {
    let (left, right, top, bottom) = (78.0, 742.0, 40.0, 420.0);
    let height = height(lines);
    let places = || lines.iter().filter_map(|line| Some((line, line.row.bits_per_value?, (height.of)(line.row)?)));
    let x = Axis::new(places().map(|(_, bits, _)| bits), left, right);
    let y = Axis::new(places().map(|(_, _, up)| up), bottom, top);
    let mut marks: Vec<_> =
        places().map(|(line, bits, up)| Mark { line, bits, up, x: x.at(bits), y: y.at(up) }).collect();
    if marks.is_empty() {
        return None;
    }
    let mut svg = Svg::new(760.0, 490.0, &format!("Stored bits per value and {} of {dump}", height.label));
    svg.text(left, 20.0, "", &format!("{dump}: {} rows", marks.len()));
    axes(&mut svg, &x, &y, (left, right, top, bottom));
    svg.text(right, bottom + 36.0, "end", "← better, stored bits per value");
    svg.text_up(16.0, top, height.label);
    let staircase = staircase(&mut marks, height.is_better_high);
    svg.path(&path(&staircase.iter().map(|idx| &marks[*idx]).collect::<Vec<_>>()), "class=\"line\"", "");
    for mark in &marks {
        let (shape, class) = shape(mark);
        svg.path(
            &shape,
            &format!("class=\"mark {class}{}\"", if mark.line.front { " front" } else { "" }),
            &words(mark),
        );
    }
    labels(&mut svg, &marks, &staircase, (left, right, top, bottom));
    legend(&mut svg, &marks, left, bottom + 36.0);
    svg.text(
        left,
        bottom + 56.0,
        "soft",
        "Filled: on the front of bytes, error and both times. Line: front of the two axes, which are logarithmic.",
    );
    Some(svg.finish())
}

fn axes(svg: &mut Svg, x: &Axis, y: &Axis, (left, right, top, bottom): (f64, f64, f64, f64)) {
    if y.zeros {
        svg.rect(left, y.start(), right - left, bottom - y.start(), "class=\"band\"", "");
        svg.text(left - 8.0, bottom - BAND / 2.0 + 4.0, "end soft", "0");
        svg.text(left + 6.0, bottom - 6.0, "soft", "exact");
    }
    let mut free = f64::NEG_INFINITY;
    for tick in x.ticks() {
        let at = x.at(tick);
        svg.path(&format!("M{at:.1} {top}V{bottom}"), "class=\"grid\"", "");
        if at > free {
            svg.text(at, bottom + 16.0, "mid soft", &short(tick));
            free = at + 30.0;
        }
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        svg.path(&format!("M{left} {at:.1}H{right}"), "class=\"grid\"", "");
        svg.text(left - 8.0, at + 4.0, "end soft", &short(tick));
    }
    svg.path(&format!("M{left} {top}V{bottom}H{right}"), "class=\"axis\"", "");
}

/// Sorts marks from left to right, and returns those that no other one beats in both axes.
fn staircase(marks: &mut [Mark<'_>], is_better_high: bool) -> Vec<usize> {
    let up = |mark: &Mark<'_>| if is_better_high { -mark.up } else { mark.up };
    marks.sort_by(|a, b| a.bits.total_cmp(&b.bits).then(up(a).total_cmp(&up(b))));
    let mut least = f64::INFINITY;
    let better = |(idx, mark): (usize, &Mark<'_>)| {
        (up(mark) < least).then(|| {
            least = up(mark);
            idx
        })
    };
    marks.iter().enumerate().filter_map(better).collect()
}

/// Between two rows of a front, what is reached is the worse of both.
fn path(front: &[&Mark<'_>]) -> String {
    let mut path = String::new();
    for (idx, mark) in front.iter().enumerate() {
        let _ = if idx == 0 {
            write!(path, "M{:.1} {:.1}", mark.x, mark.y)
        } else {
            write!(path, "H{:.1}V{:.1}", mark.x, mark.y)
        };
    }
    path
}

/// The mark of a row: colour and shape say the same, so that neither is needed.
fn shape(mark: &Mark<'_>) -> (String, &'static str) {
    let (x, y) = (mark.x, mark.y);
    match result(mark.line.row) {
        "passes" => (format!("M{x:.1} {:.1}l5.5 9.5h-11z", y - 6.0), "passes"),
        "below the gate" => (format!("M{:.1} {:.1}l8 8m0 -8l-8 8", x - 4.0, y - 4.0), "below"),
        _ => (format!("M{:.1} {y:.1}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", x - 4.5), "exact"),
    }
}

fn words(mark: &Mark<'_>) -> String {
    let row = mark.line.row;
    format!(
        "{} {}: {} bytes, ratio {}, worst-head NMSE {}, encode {} MB/s, decode {} MB/s, {}",
        row.name,
        row.chunking,
        row.stored_bytes,
        ratio(row.original_bytes, row.stored_bytes),
        row.measured(Metric::WorstHeadNmse).map_or("-".into(), short),
        rate(row.original_bytes, row.encode_ns),
        rate(row.original_bytes, row.decode_ns),
        result(row)
    )
}

/// Names of rows of the front, where they fit.
fn labels(svg: &mut Svg, marks: &[Mark<'_>], front: &[usize], (left, right, top, bottom): (f64, f64, f64, f64)) {
    let mut taken: Vec<_> = marks.iter().map(|mark| (mark.x - 5.0, mark.y - 5.0, mark.x + 5.0, mark.y + 5.0)).collect();
    for mark in front.iter().map(|idx| &marks[*idx]) {
        let text = cut(&mark.line.row.name, 30);
        // A generous guess: the reader's font is not known here.
        let wide = 6.4 * text.chars().count() as f64;
        let (x, y) = (mark.x, mark.y);
        let spots = [(x + 8.0, y - 5.0), (x + 9.0, y + 4.0), (x - 9.0 - wide, y + 4.0), (x - wide / 2.0, y + 19.0)];
        let fits = |(x, base): &(f64, f64)| {
            let (to, above, below) = (x + wide, base - 11.0, base + 3.0);
            let inside = *x > left && to < right && above > top - 14.0 && below < bottom;
            let clear = |&(from, high, until, low): &(f64, f64, f64, f64)| {
                to < from || *x > until || below < high || above > low
            };
            inside && taken.iter().all(clear)
        };
        if let Some((x, base)) = spots.into_iter().find(fits) {
            svg.text(x, base, "halo", &text);
            taken.push((x, base - 11.0, x + wide, base + 3.0));
        }
    }
}

fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

fn legend(svg: &mut Svg, marks: &[Mark<'_>], mut x: f64, y: f64) {
    for name in ["exact", "exact here", "passes", "below the gate"] {
        let Some(mark) = marks.iter().find(|mark| result(mark.line.row) == name) else { continue };
        let sample = Mark { x: x + 6.0, y: y - 4.0, ..*mark };
        let (path, class) = shape(&sample);
        svg.path(&path, &format!("class=\"mark {class} front\""), "");
        svg.text(x + 17.0, y, "soft", name);
        x += 34.0 + 6.4 * name.len() as f64;
    }
}

/// Most bars of a plot of ledgers.
const BARS: usize = 24;

/// Fills of parts of ledgers, which follow each other, so that neighbours differ in lightness too.
const FILLS: [&str; 7] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8e96"];

fn ledger(lines: &[Line<'_>], dump: &str) -> Option<String> {
    let mut shown: Vec<_> = lines.iter().filter(|line| line.front && !line.row.ledger.is_empty()).collect();
    shown.sort_by_key(|line| line.row.stored_bytes);
    let of_front = shown.len();
    shown.truncate(BARS);
    let most = shown.iter().map(|line| line.row.stored_bytes).max()? as f64;
    let mut totals = BTreeMap::<String, u64>::new();
    for line in &shown {
        for (part, bytes) in parts(line.row) {
            *totals.entry(part).or_default() += bytes;
        }
    }
    let mut names: Vec<_> = totals.into_iter().collect();
    names.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let names: Vec<String> = names.into_iter().map(|(name, _)| name).take(FILLS.len() - 1).collect();
    let (left, wide, step) = (230.0, 420.0, 22.0);
    let bottom = 62.0 + step * shown.len() as f64;
    let mut svg = Svg::new(760.0, bottom + 30.0, &format!("Where the bytes go, {dump}"));
    let of =
        if of_front > shown.len() { format!(", the {} smallest of {of_front}", shown.len()) } else { String::new() };
    svg.text(12.0, 20.0, "", &format!("{dump}: stored bytes of the rows on the front{of}"));
    let mut x = 12.0;
    for (name, fill) in names.iter().map(String::as_str).chain(["all else"]).zip(FILLS) {
        svg.rect(x, 32.0, 10.0, 10.0, &format!("fill=\"{fill}\""), "");
        svg.text(x + 14.0, 41.0, "soft", name);
        x += 32.0 + 6.4 * name.chars().count() as f64;
    }
    for (idx, line) in shown.iter().enumerate() {
        let y = 56.0 + step * idx as f64;
        let parts = parts(line.row);
        svg.text(left - 8.0, y + 12.0, "end", &cut(&line.row.name, 34));
        let known: u64 = names.iter().filter_map(|name| parts.get(name)).sum();
        let widths = names.iter().map(|name| parts.get(name).copied().unwrap_or_default());
        let widths: Vec<_> = widths.chain([line.row.stored_bytes.saturating_sub(known)]).collect();
        let mut x = left;
        for ((bytes, fill), name) in widths
            .iter()
            .zip(FILLS.iter().take(names.len()).chain([&FILLS[6]]))
            .zip(names.iter().map(String::as_str).chain(["all else"]))
        {
            let width = wide * *bytes as f64 / most;
            if *bytes > 0 {
                svg.rect(x, y, width, step - 7.0, &format!("fill=\"{fill}\""), &format!("{name}: {bytes} bytes"));
            }
            x += width;
        }
        svg.text(x + 6.0, y + 12.0, "soft", &bytes(line.row.stored_bytes));
    }
    svg.text(left, bottom + 16.0, "soft", "Every stored byte is counted once; the parts of a bar sum to its file.");
    Some(svg.finish())
}

/// Stored bytes by lane, and of all headers together.
fn parts(row: &Row) -> BTreeMap<String, u64> {
    let mut parts = BTreeMap::new();
    for entry in &row.ledger {
        let name = match (&entry.account.section, &entry.account.lane) {
            (Section::Payload, Some(lane)) => lane.clone(),
            (Section::Payload, None) => "payload".to_owned(),
            (Section::Artifact, _) => "trained models".to_owned(),
            _ => "headers, index".to_owned(),
        };
        *parts.entry(name).or_default() += entry.bytes;
    }
    parts
}

/// The errors of a row by layer and KV head; none of a row that lost nothing.
fn heads(row: &Row) -> Option<String> {
    let report = row.error.as_ref()?;
    let mut cells = BTreeMap::<_, f64>::new();
    for head in &report.heads {
        let error = if head.error.nmse.is_nan() { f64::INFINITY } else { head.error.nmse };
        let worst = cells.entry((head.role, head.layer, head.head)).or_default();
        *worst = worst.max(error);
    }
    let finite = || cells.values().copied().filter(|error| error.is_finite() && *error > 0.0);
    let most = finite().fold(0.0, f64::max);
    if most == 0.0 {
        return None;
    }
    // Small differences must not look large.
    let least = finite().fold(f64::INFINITY, f64::min).min(most / 10.0);
    let layers: Vec<u32> = cells.keys().map(|(_, layer, _)| *layer).collect::<BTreeSet<_>>().into_iter().collect();
    let count = cells.keys().map(|(_, _, head)| head + 1).max()?;
    let size = (640.0 / (2 * count) as f64).clamp(6.0, 54.0);
    let tall = if layers.len() > 20 { 12.0 } else { 20.0 };
    let (left, top) = (56.0, 64.0);
    let between = 24.0;
    let bottom = top + tall * layers.len() as f64;
    let width = (left + 2.0 * size * count as f64 + between + 12.0).max(560.0);
    let mut svg = Svg::new(width, bottom + 62.0, &format!("Error by layer and head of {}", row.name));
    svg.text(12.0, 20.0, "", &format!("{} {}", row.name, row.chunking));
    svg.text(12.0, 38.0, "soft", "squared error ÷ squared original (NMSE) by layer and KV head, worst of all runs");
    for (group, role) in Role::ALL.into_iter().enumerate() {
        let start = left + group as f64 * (size * count as f64 + between);
        svg.text(start, top - 6.0, "soft", &format!("{role}s"));
        for (at, layer) in layers.iter().enumerate() {
            let y = top + at as f64 * tall;
            if group == 0 && (tall > 12.0 || at % 2 == 0) {
                svg.text(left - 8.0, y + tall / 2.0 + 4.0, "end soft", &layer.to_string());
            }
            for head in 0..count {
                let Some(error) = cells.get(&(role, *layer, head)) else { continue };
                let share = ((error.max(least).ln() - least.ln()) / (most.ln() - least.ln())).min(1.0);
                let fill = if error.is_finite() {
                    shade(if *error > 0.0 { 0.08 + 0.92 * share } else { 0.0 })
                } else {
                    "#a8326e".into()
                };
                let x = start + head as f64 * size;
                let number = if error.is_finite() { short(*error) } else { "not finite".into() };
                let title = format!("layer {layer}, {role}s, head {head}: {number}");
                svg.rect(x, y, size - 1.0, tall - 1.0, &format!("fill=\"{fill}\""), &title);
            }
        }
        for head in (0..count).step_by(if size < 16.0 { 4 } else { 1 }) {
            svg.text(start + (head as f64 + 0.5) * size, bottom + 14.0, "mid soft", &head.to_string());
        }
    }
    svg.text(12.0, top - 6.0, "soft", "layer");
    svg.text(left, bottom + 30.0, "soft", "head");
    for idx in 0..48 {
        let part = f64::from(idx) / 47.0;
        svg.rect(
            left + 3.0 * f64::from(idx),
            bottom + 38.0,
            3.2,
            9.0,
            &format!("fill=\"{}\"", shade(0.08 + 0.92 * part)),
            "",
        );
    }
    svg.text(left + 152.0, bottom + 47.0, "soft", &format!("{} to {}, logarithmic", short(least), short(most)));
    Some(svg.finish())
}

/// A colour between pale and dark blue, even in lightness.
fn shade(share: f64) -> String {
    let mix = |low: f64, high: f64| (low + (high - low) * share).round();
    format!("rgb({} {} {})", mix(242.0, 10.0), mix(239.0, 61.0), mix(232.0, 102.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_between_characters() {
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöüß", 3), "äö…");
    }
}
