// What surrounds the rows: summary, gate, models, receipts, colours. Starts the page.

/** A plain table; a heading that starts with `>` is of a number column. */
function plain(table, headings, lines) {
  const kind = (idx) => (headings[idx].startsWith(">") ? "number" : undefined);
  table.append(h("thead", {}, h("tr", {}, headings.map((heading, idx) => h("th", { scope: "col", class: kind(idx) }, heading.replace(/^>/, ""))))),
    h("tbody", {}, lines.map((line) => h("tr", {}, line.map((cell, idx) => h("td", { class: kind(idx) }, cell))))));
  return table;
}

const wide = (table) => h("div", { class: "wide" }, table);
const captioned = (caption) => h("table", { class: "plain" }, h("caption", {}, caption));

/** The row with the most of a number among those that pass a test. */
function most(key, test) {
  let best = -1;
  for (let row = 0; row < count; row += 1) {
    if (known(rows[key][row]) && test(row) && (best < 0 || rows[key][row] > rows[key][best])) best = row;
  }
  return best;
}

const isExact = (row) => rows.result[row] === "exact" || rows.result[row] === "exact here";
const holds = (row) => isExact(row) && !rows.violations[row] || rows.result[row] === "passes";

function summary() {
  const names = data.dumps.map(dumpName);
  const title = names.length === 0 ? "No results" : names.length <= 3 ? names.join(", ") : `${names.slice(0, 2).join(", ")} and ${names.length - 2} more dumps`;
  byId("title").textContent = title;
  document.title = `${title} · Gearbox report`;
  const judged = rows.result.filter((_, row) => isOk(row)).length;
  const passing = rows.result.filter((_, row) => holds(row)).length;
  const ended = (result) => rows.result.filter((other) => other === result).length;
  const runs = data.dumps.reduce((sum, dump) => sum + dump.runs, 0);
  const original = data.dumps.reduce((sum, dump) => sum + dump.original_bytes, 0);
  const others = [["failed", "failed"], ["unsupported", "not legal here"]].filter(([result]) => ended(result) > 0).map(([result, words]) => `${whole(ended(result))} ${words}`);
  const bold = (text) => h("b", {}, text);
  byId("lead").append(bold(plural(count, "row")), ` over ${plural(data.dumps.length, "dump")} of ${plural(runs, "run")} in all and ${bytes(original)} of keys and values. `,
    judged > 0 ? bold(`${whole(passing)} of ${whole(judged)}`) : "", judged > 0 ? ` that ran to the end hold the gate${others.length > 0 ? `; ${others.join(", ")}` : ""}.` : `${others.join(", ")}.`);
  const alerts = data.inputs.flatMap((input) => input.canaries.filter((canary) => canary.problem).map((canary) => `Canary ${canary.name} of ${canary.dump} failed, so the numbers of ${input.file} cannot be trusted: ${canary.problem}`));
  const unfit = data.total_rows - data.unread_rows - count;
  if (unfit > 0) alerts.push(`${whole(unfit)} of ${plural(data.total_rows, "row")} are left out to keep this page below 6 MB; rows.csv holds them all.`);
  if (data.unread_rows > 0) alerts.push(`${whole(data.unread_rows)} of ${plural(data.total_rows, "row")} were not read from their store, those with the lowest ratios; gearbox results export has them.`);
  byId("alerts").append(...alerts.map((text) => h("p", { class: "warning" }, text)));
  figures();
  const number = (value) => fixed(3)(value);
  plain(byId("dumps"), ["dump", ">runs", ">entries", ">keys and values", ">order-0 floor, bits per value", ">ratio at the floor", "left out or remarked upon", "digest"],
    data.dumps.map((dump) => [dump.path, whole(dump.runs), whole(dump.entries), bytes(dump.original_bytes), number(dump.floor), number(dump.ceiling), dump.findings.map(([reason, times]) => `${times} ${reason}`).join(", ") || "nothing", h("code", {}, dump.digest)]));
}

/** A few numbers in large type, each with the row it belongs to. */
function figures() {
  const best = [
    ["highest ratio, exact", "ratio", ratio, most("ratio", isExact)],
    ["highest ratio, within the gate", "ratio", ratio, anyLossy ? most("ratio", holds) : -1],
    ["fastest decoding of an exact row, MB/s", "decode", whole, most("decode", isExact)],
    ["fastest decoding of a lossy row within the gate, MB/s", "decode", whole, anyLossy ? most("decode", (row) => rows.result[row] === "passes") : -1],
  ];
  for (const [name, key, format, row] of best) {
    if (row < 0) continue;
    const button = h("button", { type: "button" }, rows.name[row]);
    button.addEventListener("click", () => { select(row); byId("row-title").focus(); byId("row").scrollIntoView(); });
    const place = data.dumps.length > 1 ? ` on ${dumpName(dumpOf(row))}` : "";
    byId("figures").append(h("div", {}, h("dt", {}, name), h("dd", {}, format(rows[key][row])), h("dd", { class: "small" }, button, `, ${rows.chunking[row]}${place}`)));
  }
}

function gate() {
  const box = byId("gate").querySelector("div");
  for (const input of data.inputs) {
    const several = data.inputs.length > 1;
    const limits = input.limits.map(({ metric, limit, holding, violating, unmeasured }) => [h("code", {}, metric), limit, whole(holding), whole(violating), whole(unmeasured)]);
    const caption = `${several ? `${input.file}: ` : ""}limits of the gate${input.required ? "" : " (the default; none were asked for)"}`;
    box.append(wide(plain(captioned(caption), ["metric", "limit", ">rows within", ">outside", ">not measured"], limits)));
    const canaries = input.canaries.map((canary) => [canary.name, canary.dump, canary.what, h("span", { class: `pill ${canary.problem ? "bad" : ""}` }, canary.problem ?? canary.end)]);
    box.append(h("br"), canaries.length > 0
      ? wide(plain(captioned("Canaries: what must be exact, and a broken head that the gate must catch"), ["canary", "dump", "what was done", "end"], canaries))
      : h("p", { class: "warning" }, `${input.file} holds no canaries: nothing shows that the measuring itself worked.`));
    for (const note of input.notes) box.append(h("p", { class: "note" }, note));
  }
}

function models() {
  if (data.models.length === 0) return;
  byId("models").hidden = false;
  document.querySelector('nav a[href="#models"]').hidden = false;
  for (const { file, columns, rows, problems } of data.models) {
    byId("models").querySelector("div").append(wide(plain(captioned(file), ["cache", ...columns.map((column) => `>${column}`), "end"],
      rows.map(({ name, numbers, end }) => [name, ...numbers.map(short), end]))), problems.map((problem) => h("p", { class: "warning" }, problem)), h("br"));
  }
  byId("models").querySelector("div").append(h("p", { class: "note" }, "A real model read through the compressed cache. Ratios count resident bytes over the whole request; the other numbers compare with the dense cache on the same text."));
}

function receipts() {
  const box = byId("receipts").querySelector("div");
  for (const { file, receipt } of data.inputs) {
    const plugins = receipt.plugins.map(({ id, format_version: version, library }) => [h("code", {}, id), String(version), library ? h("code", {}, typeof library === "string" ? library : JSON.stringify(library)) : "built in"]);
    box.append(wide(plain(captioned(file), ["version", "commit", "processor", ">threads"],
      [[receipt.version, h("code", {}, receipt.commit ?? "unknown"), receipt.cpu_features.join(", ") || "unknown", whole(receipt.threads)]])),
      h("details", {}, h("summary", {}, plural(plugins.length, "plugin")), wide(plain(h("table", { class: "plain" }), ["plugin", "format version", "library"], plugins))));
  }
}

function colours() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wanted = () => document.querySelector('input[name="theme"]:checked').value;
  const apply = () => {
    const theme = wanted() === "auto" ? (dark.matches ? "dark" : "light") : wanted();
    document.documentElement.dataset.theme = theme;
    tell("theme");
  };
  dark.addEventListener("change", apply);
  for (const input of document.querySelectorAll('input[name="theme"]')) input.addEventListener("change", apply);
  apply();
}

/** The row that an address names, else the smallest within the gate, else the first. */
function first() {
  const named = /^#r(\d+)$/.exec(location.hash);
  const row = named ? rows.number.indexOf(Number(named[1])) : -1;
  if (row >= 0) return row;
  const best = most("ratio", (row) => holds(row) && data.details[row]);
  return best >= 0 ? best : count > 0 ? 0 : -1;
}

colours();
summary();
startFilters();
startTable();
startScatter();
on("selected", showDetails);
state.selected = first();
sortBy(anyLossy || data.dumps.length === 1 ? "ratio" : "dump", anyLossy || data.dumps.length === 1);
showDetails();
gate();
models();
receipts();
// Milliseconds from opening the page to this line.
document.documentElement.dataset.ready = performance.now().toFixed(0);
