//! The report as Markdown, for papers, tickets and terminals.

use std::fmt::Write as _;

use super::results::{Line, Results};
use super::{bytes, decimal, rate, ratio};
use crate::gate::Metric;
use crate::sweep::{Sweep, result};

/// The whole report; `plots` are the pictures beside it.
pub(super) fn text(results: &Results, plots: &[String]) -> String {
    let mut text = String::from("# Gearbox report\n\n");
    let _ = writeln!(text, "{}.\n", results.summary());
    let dumps = results.dumps.iter().map(|dump| {
        let number = |number| decimal(Some(number), 3);
        let findings: Vec<_> = dump.findings.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        vec![
            dump.path.clone(),
            dump.runs.to_string(),
            dump.entries.to_string(),
            bytes(dump.original_bytes),
            number(dump.entropy.floor),
            number(dump.entropy.ceiling),
            if findings.is_empty() { "nothing".into() } else { findings.join(", ") },
            dump.digest.clone(),
        ]
    });
    let headings = [
        "dump",
        ">runs",
        ">entries",
        ">keys and values",
        ">order-0 floor, bits per value",
        ">ratio at the floor",
        "left out or remarked upon",
        "digest",
    ];
    text.push_str(&table(&headings, dumps));
    for (idx, dump) in results.dumps.iter().enumerate() {
        let _ = writeln!(text, "\n## {}\n", escaped(&dump.path));
        let mut lines: Vec<_> = results.lines().filter(|line| line.dump == idx).collect();
        lines.sort_by_key(|line| (!line.row.is_ok(), line.row.stored_bytes));
        text.push_str(&rows(&lines));
        for plot in plots.iter().filter(|plot| plot.ends_with(&format!("-{}.svg", idx + 1))) {
            let _ = writeln!(text, "\n![{plot}]({plot})");
        }
    }
    for model in &results.models {
        let _ = writeln!(text, "\n## {}\n", escaped(&model.file));
        let metrics = model.results.metrics();
        let headings: Vec<_> = ["cache".to_owned()]
            .into_iter()
            .chain(metrics.iter().map(|metric| format!(">{metric}")))
            .chain(["end".to_owned()])
            .collect();
        let headings: Vec<_> = headings.iter().map(String::as_str).collect();
        let lines = model.results.rows.iter().map(|row| {
            let numbers = metrics.iter().map(|metric| decimal(row.measured.get(metric).copied().flatten(), 4));
            [row.name.clone()].into_iter().chain(numbers).chain([row.end()]).collect()
        });
        text.push_str(&table(&headings, lines));
        for problem in &model.results.problems {
            let _ = writeln!(text, "\nFAILED: {}", escaped(problem));
        }
    }
    for source in &results.sweeps {
        let (file, Sweep { receipt, .. }) = (&source.file, &source.results);
        let _ = writeln!(text, "\n## Gate, canaries and receipt of {}\n", escaped(file));
        let notes = source.results.notes();
        // Names of plugins and reasons come from elsewhere, and must not end the block.
        let _ = writeln!(text, "```text\n{}\n```\n", notes.trim_end().replace("```", "'''"));
        let commit = receipt.commit.as_deref().unwrap_or("unknown");
        let features = receipt.cpu_features.join(", ");
        let (version, threads) = (&receipt.version, receipt.threads);
        let _ = writeln!(
            text,
            "Version {version}, commit {}, processor {}, {threads} threads.",
            escaped(commit),
            escaped(&features)
        );
    }
    text.push_str(NOTES);
    text
}

const NOTES: &str = "
## How to read it

*ratio* is bytes of the original keys and values ÷ bytes of the whole stored file, headers, index and checksums included; *keys* and *values*
count the chunks of that role. *bits* are stored bits per value, *gap* is how far they are from the order-0 floor of the dump. *worst head* is
the lowest cosine of any head. *KL p99* (nats) and *output error* (relative) are of attention replayed with the queries of the dump. Speeds
are 10^6 bytes of original tensors per second, one thread each, measured once per row, without a spread. A `*` marks the rows that no other
row of the dump beats in stored bytes, worst-head error and both times at once. `-` was not measured.
";

fn rows(lines: &[Line<'_>]) -> String {
    let lossy = lines.iter().any(|line| line.row.changed_values > 0);
    let attends = lossy && lines.iter().any(|line| line.row.measured(Metric::KlP99).is_some());
    let mut headings = vec!["pipeline", "chunking", "result", "front", ">ratio", ">bits", ">stored"];
    if lossy {
        headings.push(">worst head");
    }
    if attends {
        headings.extend([">KL p99", ">output error"]);
    }
    headings.extend([">encode MB/s", ">decode MB/s", ">keys", ">values", ">gap"]);
    let cells = |line: &Line<'_>| {
        let row = line.row;
        let mut cells = vec![row.name.clone(), row.chunking.clone()];
        if let Some(reason) = row.outcome.reason() {
            cells.push(format!("{}: {reason}", result(row)));
            cells.resize(headings.len(), "-".into());
            return cells;
        }
        let number = |metric, decimals| decimal(row.measured(metric), decimals);
        cells.extend([result(row).to_owned(), if line.front { "*" } else { "" }.into()]);
        let stored = row.stored_bytes;
        cells.extend([ratio(row.original_bytes, stored), decimal(row.bits_per_value, 2), stored.to_string()]);
        if lossy {
            cells.push(number(Metric::WorstHeadCosine, 5));
        }
        if attends {
            cells.extend([number(Metric::KlP99, 4), number(Metric::OutputError, 4)]);
        }
        cells.extend([row.encode_ns, row.decode_ns].map(|ns| rate(row.original_bytes, ns)));
        cells.extend([row.key, row.value].map(|role| ratio(role.original_bytes, role.stored_bytes)));
        cells.push(decimal(row.gap, 2));
        cells
    };
    table(&headings, lines.iter().map(cells))
}

/// A table; a heading that starts with `>` is of a number column.
fn table(headings: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &mut dyn Iterator<Item = String>| format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    let mut text = line(&mut headings.iter().map(|heading| heading.trim_start_matches('>').to_owned()));
    text.push_str(&line(
        &mut headings.iter().map(|heading| if heading.starts_with('>') { "--:" } else { "---" }.into()),
    ));
    for row in rows {
        text.push_str(&line(&mut row.iter().map(|cell| escaped(cell))));
    }
    text
}

/// Text that Markdown takes as it is: no cell, emphasis, link, code or tag begins or ends in it.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '|' | '`' | '[' | ']' | '\\' | '*' | '~' => safe.extend(['\\', character]),
            _ if character.is_control() => safe.push(' '),
            _ => safe.push(character),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_in_their_cell() {
        let cells = vec!["a|b\n| c".to_owned(), "<script>`x`</script>".to_owned()];
        let text = table(&["name", ">number"], std::iter::once(cells));
        let last = text.lines().last().unwrap();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert_eq!(last, r"| a\|b \| c | &lt;script&gt;\`x\`&lt;/script&gt; |");
        assert_eq!(text.lines().nth(1), Some("| --- | --: |"));
    }
}
