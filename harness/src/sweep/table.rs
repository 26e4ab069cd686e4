//! What a sweep prints for people.

use std::fmt::Write as _;

use super::{Label, Outcome, Refuted, Resumed, Row, Sweep};
use crate::entropy::Entropy;
use crate::gate::Metric;
use crate::report::{self, Columns};

impl Sweep {
    /// Dumps, rows, canaries and verdict as text with a Markdown table, the smallest file first.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for dump in &self.dumps {
            let _ = writeln!(
                text,
                "{}: {} runs, {} entries, {} of keys and values, digest {}",
                dump.path,
                dump.runs,
                dump.entries,
                report::bytes(dump.original_bytes),
                dump.digest
            );
            if !dump.findings.is_empty() {
                let findings: Vec<_> =
                    dump.findings.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
                let _ = writeln!(text, "findings: {}", findings.join(", "));
            }
            let Entropy { floor, ceiling, channel_floor, channel_ceiling, .. } = dump.entropy;
            let number = |number| report::decimal(Some(number), 3);
            let _ = writeln!(
                text,
                "order-0 floor: {} bits per value, a ratio of {}; {} and {} with exponents per channel",
                number(floor),
                number(ceiling),
                number(channel_floor),
                number(channel_ceiling)
            );
        }
        let _ = writeln!(text, "\n{}", self.table());
        let notes = [
            self.reasons(),
            self.refutations(),
            self.sameness(),
            self.undefined(),
            self.canary_lines(),
            self.verdict(),
            self.resumption(),
        ];
        for note in notes {
            text.push_str(&note);
        }
        text.truncate(text.trim_end().len());
        text
    }

    fn table(&self) -> Columns {
        let lossy = self.rows.iter().any(|row| row.changed_values > 0);
        let attends = lossy && self.rows.iter().any(|row| row.measured(Metric::KlMean).is_some());
        let many = self.dumps.len() > 1;
        let mut headings = if many { vec!["dump"] } else { Vec::new() };
        headings.extend(["pipeline", "chunking", ">ratio", ">key", ">value", ">bits", ">gap", ">stored"]);
        if lossy {
            headings.extend([">SNR dB", ">worst head"]);
        }
        if attends {
            headings.extend([">KL p99", ">output error"]);
        }
        headings.extend([">enc MB/s", ">dec MB/s", "front", "result"]);
        let mut table = Columns::new(&headings);
        let mut rows: Vec<_> = self.rows.iter().filter(|row| !matches!(row.outcome, Outcome::Unsupported(_))).collect();
        rows.sort_by_key(|row| (row.dump.clone(), !row.is_ok(), row.stored_bytes));
        for row in rows {
            let mut cells = if many { vec![row.dump.clone()] } else { Vec::new() };
            cells.extend([row.name.clone(), row.chunking.clone()]);
            if row.is_ok() {
                cells.extend([
                    report::ratio(row.original_bytes, row.stored_bytes),
                    report::ratio(row.key.original_bytes, row.key.stored_bytes),
                    report::ratio(row.value.original_bytes, row.value.stored_bytes),
                    report::decimal(row.bits_per_value, 2),
                    report::decimal(row.gap, 2),
                    row.stored_bytes.to_string(),
                ]);
                if lossy {
                    let snr = row.error.as_ref().and_then(|error| error.all.error.snr_db);
                    cells.extend([report::decimal(snr, 1), decimal(row, Metric::WorstHeadCosine, 5)]);
                }
                if attends {
                    cells.extend([decimal(row, Metric::KlP99, 4), decimal(row, Metric::OutputError, 4)]);
                }
                cells.extend([
                    report::rate(row.original_bytes, row.encode_ns),
                    report::rate(row.original_bytes, row.decode_ns),
                    if row.pareto { "*" } else { "" }.to_owned(),
                ]);
            } else {
                cells.resize(headings.len() - 1, "-".to_owned());
            }
            cells.push(result(row).to_owned());
            table.row(cells);
        }
        table
    }

    /// Why rows are missing, each reason once.
    fn reasons(&self) -> String {
        let mut failed = String::new();
        let mut unsupported: Vec<(&str, Vec<String>)> = Vec::new();
        for row in &self.rows {
            let name = format!("{} {}", row.name, row.chunking);
            match &row.outcome {
                Outcome::Ok => {}
                Outcome::Failed { state, reason } => {
                    let _ = writeln!(failed, "{name} FAILED ({state}): {reason}");
                }
                Outcome::Unsupported(reason) => match unsupported.iter_mut().find(|(held, _)| held == reason) {
                    Some((_, names)) => names.push(name),
                    None => unsupported.push((reason, vec![name])),
                },
            }
        }
        if !unsupported.is_empty() {
            let count: usize = unsupported.iter().map(|(_, names)| names.len()).sum();
            let _ = writeln!(failed, "not legal, {count} in all:");
        }
        for (reason, names) in unsupported {
            let _ = writeln!(failed, "  {}: {reason}", names.join(", "));
        }
        failed
    }

    /// What the kit found in loaded plugins, and which labels that costs.
    fn refutations(&self) -> String {
        let mut text = String::new();
        for Refuted { plugin, property, found, labels } in &self.refuted {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let cost =
                if labels.is_empty() { String::new() } else { format!(", label {} withheld", labels.join(" or ")) };
            let (id, settings) = (&plugin.id, plugin.settings_value());
            let _ = writeln!(text, "the conformance kit refutes `{id}` {settings}{cost}: {property}: {found}");
        }
        text
    }

    fn sameness(&self) -> String {
        let lines = self.same.iter().map(|same| format!("{} does the same as {}: left out\n", same.name, same.same_as));
        lines.collect()
    }

    /// What the replay of attention left out.
    fn undefined(&self) -> String {
        let mut text = String::new();
        for dump in &self.dumps {
            let rows = self.rows.iter().filter(|row| row.dump == dump.path && row.changed_values > 0);
            let reports = rows.filter_map(|row| Some(&row.attention.as_ref()?.all));
            if let Some(all) = reports.max_by_key(|all| all.undefined).filter(|all| all.undefined > 0) {
                let (left_out, total) = (all.undefined, all.undefined + all.queries);
                let _ = writeln!(
                    text,
                    "attention in {}: {left_out} of {total} queries left out, whose logits or outputs in the dump are not finite",
                    dump.path
                );
            }
        }
        text
    }

    fn canary_lines(&self) -> String {
        let mut text = String::new();
        for canary in &self.canaries {
            let what = canary.flipped.as_ref().map_or("store, every bit compared".to_owned(), |head| {
                format!(
                    "signs of {} head {} turned in layer {}, chunk {}, run `{}`: cosine {}, of the worst head {}",
                    head.role,
                    head.head,
                    head.layer,
                    head.chunk,
                    head.run,
                    report::decimal(Some(canary.error.cosine), 5),
                    report::decimal(canary.worst_head_cosine, 5)
                )
            });
            let end = match (&canary.problem, canary.flipped.is_some()) {
                (Some(problem), _) => format!("FAILED: {problem}"),
                (None, true) => "caught by the gate, as it must".to_owned(),
                (None, false) => "no error at all, as it must".to_owned(),
            };
            let place = if self.dumps.len() > 1 { format!(" of {}", canary.dump) } else { String::new() };
            let _ = writeln!(text, "canary {}{place} ({what}): {end}", canary.name);
        }
        text
    }

    /// Where rows came from and where they are.
    fn resumption(&self) -> String {
        let Some(Resumed { store, computed, read, shard }) = &self.resumed else { return String::new() };
        let share = shard.as_ref().map_or_else(String::new, |shard| {
            format!("; share {shard}, so `gearbox results merge` and `gearbox gate` have the last word")
        });
        format!("results in `{store}`: {computed} units computed, {read} read{share}\n")
    }

    /// What the gate and the search come to.
    fn verdict(&self) -> String {
        let limits: Vec<_> = self.gate.0.iter().map(|(metric, limit)| format!("{metric} {limit}")).collect();
        let judged = || self.rows.iter().filter_map(|row| Some((row, row.verdict.as_ref()?)));
        let passing = judged().filter(|(_, verdict)| verdict.passed()).count();
        let mut text = format!("gate ({}): {passing} of {} rows pass\n", limits.join(", "), judged().count());
        for found in &self.found {
            let _ = writeln!(text, "search: {} of {} settings run", found.evaluated, found.products);
            for (idx, verdict) in found.best.iter().zip(&found.violations) {
                let row = &self.rows[*idx];
                if let Some(reason) = row.outcome.reason() {
                    let _ = writeln!(text, "  no setting ran on {}: {reason}", row.dump);
                    continue;
                }
                let (kind, end) =
                    if found.passed { ("cheapest", String::new()) } else { ("nearest miss", format!("; {verdict}")) };
                let _ = writeln!(
                    text,
                    "  {kind} for {}: {} {}, {} bytes, ratio {}{end}",
                    row.dump,
                    row.name,
                    row.chunking,
                    row.stored_bytes,
                    report::ratio(row.original_bytes, row.stored_bytes)
                );
            }
        }
        if passing == 0 && self.found.is_empty() {
            let near = judged().min_by(|(_, a), (_, b)| a.excess().total_cmp(&b.excess()));
            if let Some((row, verdict)) = near {
                let _ = writeln!(text, "nearest miss: {} {} on {}: {verdict}", row.name, row.chunking, row.dump);
            }
        }
        text
    }
}

fn decimal(row: &Row, metric: Metric, decimals: usize) -> String {
    report::decimal(row.measured(metric), decimals)
}

fn result(row: &Row) -> &'static str {
    match (&row.outcome, &row.verdict) {
        (Outcome::Failed { .. }, _) => "FAILED",
        (Outcome::Unsupported(_), _) => "unsupported",
        (Outcome::Ok, Some(verdict)) if !verdict.passed() => "below the gate",
        (Outcome::Ok, _) if row.changed_values > 0 => "passes",
        // Exact on this dump, whatever another one would give.
        (Outcome::Ok, _) if !row.labels.contains(&Label::Lossless) => "exact here",
        (Outcome::Ok, _) => "exact",
    }
}
