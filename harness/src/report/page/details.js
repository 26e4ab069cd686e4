// One row in full: numbers, heat maps by layer and head, where its bytes go, how to run it again.

const LEFT = 34;

/** Colour of a share between 0 and 1 of the scale; negative ones are on the other side of zero. */
function heatColour(share, diverging) {
  const [low, high] = diverging ? ["--zero", share < 0 ? "--minus" : "--plus"] : ["--heat-low", "--heat-high"];
  return `color-mix(in oklab, var(${high}) ${(100 * Math.min(1, Math.abs(share))).toFixed(1)}%, var(${low}))`;
}

/** Shares of the colour scale for the numbers of a heat map. */
function heatScale(numbers, kind) {
  const finite = numbers.filter(known);
  if (kind === "diverging") {
    const most = finite.reduce((most, number) => Math.max(most, Math.abs(number)), 1e-9);
    return { share: (number) => number / most, ends: [-most, 0, most] };
  }
  const positive = kind === "log" ? finite.filter((number) => number > 0) : finite;
  if (positive.length === 0) return { share: () => 0, ends: [0] };
  const change = kind === "log" ? Math.log : (number) => number;
  const [lowest, most] = positive.reduce(([least, most], number) => [Math.min(least, number), Math.max(most, number)], [Infinity, -Infinity]);
  // Small differences must not look large: the scale covers at least a factor of ten, or a quarter of the greatest number.
  const least = Math.min(lowest, kind === "log" ? most / 10 : most * 0.75);
  const span = change(most) - change(least);
  // The lowest share is not the colour of nothing.
  const share = (number) => (kind === "log" && number <= 0 ? 0 : 0.08 + 0.92 * ((change(number) - change(least)) / span));
  return { share, ends: [least, most] };
}

/**
 * A heat map: layers down, the columns of each group across. `groups` are `{ title, columns, cells }`, cells by layer and column; a cell of
 * `null` was damaged beyond measure, an absent one does not exist.
 */
function heat(heading, { layers, groups, kind, format, unit, across, note, damaged }) {
  const numbers = groups.flatMap((group) => group.cells.flat());
  const { share, ends } = heatScale(numbers, kind);
  const wide = groups.reduce((sum, group) => sum + group.columns.length, 0);
  const width = Math.max(13, Math.min(52, Math.floor(400 / wide)));
  const height = layers.length <= 16 ? 22 : layers.length <= 40 ? 15 : 10;
  const places = [];
  const svg = h("svg", { tabindex: 0, role: "application", "aria-label": `${heading}; the arrow keys go from cell to cell` });
  const top = 18;
  const label = (text, x, y, attributes) => svg.append(h("svg:text", { x, y, ...attributes }, text));
  label("layer", 0, top - 6, { class: "axis" });
  const step = Math.ceil(13 / height);
  layers.forEach((layer, idx) => idx % step === 0 && label(String(layer), LEFT - 8, top + idx * height + height / 2 + 4, { "text-anchor": "end" }));
  let x = LEFT;
  for (const { title, columns, cells } of groups) {
    label(title, x, top - 6);
    columns.forEach((column, idx) => {
      if (width >= 18 || idx % 4 === 0) label(column, x + idx * width + width / 2, top + layers.length * height + 13, { class: "axis", "text-anchor": "middle" });
    });
    cells.forEach((line, at) => line.forEach((number, idx) => {
      if (number === undefined) return;
      const [left, y] = [x + idx * width, top + at * height];
      const part = known(number) ? share(number) : 1;
      const fill = known(number) ? heatColour(part, kind === "diverging") : "var(--bad)";
      const rect = h("svg:rect", { x: left, y, width: width - 1, height: height - 1, fill, "data-cell": places.length });
      svg.append(rect);
      if (width >= 36 && height >= 20) {
        const ink = Math.abs(part) > 0.52 ? "var(--heat-on-high)" : "var(--ink)";
        svg.append(h("svg:text", { class: "in", x: left + width / 2, y: y + height / 2 + 4, style: `fill:${ink}` }, known(number) ? format(number) : "×"));
      }
      places.push({ rect, at, column: left, text: `layer ${layers[at]}, ${across ? `${title}, ${across} ${columns[idx]}` : columns[idx]}`, number });
    }));
    x += columns.length * width + 18;
  }
  label(across ?? "", LEFT, top + layers.length * height + 27, { class: "axis" });
  const size = { width: x, height: top + layers.length * height + (across ? 32 : 20) };
  for (const [name, value] of Object.entries(size)) svg.setAttribute(name, value);
  svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  heatPointer(svg, places, (number) => (known(number) ? `${format(number)} ${unit}` : damaged));
  const ramp = ends.map((end, idx) => [idx > 0 && ends.length === 2 && h("i", { style: `background:linear-gradient(90deg in oklab, ${heatColour(0.08)}, ${heatColour(1)})` }), format(end)]);
  const scale = kind === "diverging"
    ? [format(ends[0]), h("i", { style: "background:linear-gradient(90deg in oklab, var(--minus), var(--zero), var(--plus))" }), `+${format(ends[2])}`]
    : ramp;
  return h("div", { class: "panel map" }, h("h3", {}, heading), h("div", { class: "heat" }, svg),
    h("div", { class: "ramp" }, scale.flat().map((part) => typeof part === "string" ? h("span", {}, part) : part), h("span", {}, kind === "log" ? `${unit}, logarithmic` : unit)), note && h("p", { class: "note" }, note));
}

function heatPointer(svg, places, text) {
  let at = -1;
  const show = (idx, x, y) => {
    places[at]?.rect.classList.remove("at");
    at = idx;
    const place = places[at];
    if (!place) return hideTip();
    place.rect.classList.add("at");
    tip.replaceChildren(h("b", {}, text(place.number)), place.text);
    placeTip(x, y);
  };
  svg.addEventListener("pointermove", (event) => show(Number(event.target.dataset?.cell ?? -1), event.clientX, event.clientY));
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const here = places[at] ?? places[0];
    const same = (place) => ["ArrowLeft", "ArrowRight"].includes(event.key) ? place.at === here.at : place.column === here.column;
    const line = places.filter(same).sort((a, b) => a.at - b.at || a.column - b.column);
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = at < 0 ? here : line[Math.max(0, Math.min(line.indexOf(here) + step, line.length - 1))];
    const box = next.rect.getBoundingClientRect();
    show(places.indexOf(next), box.right, box.bottom);
  });
}

const numbered = (cells) => Array.from({ length: Math.max(0, ...cells.map((line) => line.length)) }, (_, idx) => String(idx));

function heats(row, held) {
  const { layers } = held;
  const worst = held.runs > 1 ? ` The worst of ${held.runs} runs.` : "";
  const panels = [];
  const damaged = "damaged: not finite";
  if (held.heads.key.length > 0) {
    const groups = [["keys", held.heads.key], ["values", held.heads.value]].map(([title, cells]) => ({ title, columns: numbered(cells), cells }));
    const exact = groups.every((group) => group.cells.flat().every((number) => number === 0));
    panels.push(heat("Error by layer and KV head", { layers, groups, kind: "log", format: short, unit: "NMSE", across: "head", damaged,
      note: exact ? "Every element of every head came back exactly." : `Squared error ÷ squared original over all tokens and channels.${worst}` }));
  }
  if (held.attention.length > 0) {
    const groups = [{ title: "query heads", columns: numbered(held.attention), cells: held.attention }];
    panels.push(heat("Error of attention by layer and query head", { layers, groups, kind: "log", format: short, unit: "relative error of the output", across: "head", damaged,
      note: `Replayed with ${whole(held.queries)} queries of the dump.${worst}` }));
  }
  const roles = ["key", "value"].filter((role) => held.stored[role].some((number) => number > 0));
  const byRole = (number) => layers.map((_, at) => roles.map((role) => number(role, at)));
  const divide = (a, b, factor = 1) => (a > 0 && b > 0 ? (factor * a) / b : undefined);
  if (roles.length > 0) {
    const groups = [{ title: "", columns: roles.map((role) => `${role}s`), cells: byRole((role, at) => divide(held.original[role][at], held.stored[role][at])) }];
    panels.push(heat("Ratio by layer", { layers, groups, kind: "linear", format: fixed(2), unit: "original ÷ stored",
      note: "All KV heads of a layer share its chunks, so their stored bytes cannot be told apart. What belongs to the whole file is not in here." }));
    const floors = dumpOf(row).floors;
    if (floors.length > 0) {
      const floor = (role, layer) => floors.find(([at, of]) => at === layer && of === role)?.[2];
      const gap = byRole((role, at) => {
        const bits = divide(held.stored[role][at], held.values[role][at], 8);
        const least = floor(role, layers[at]);
        return bits === undefined || !known(least) ? undefined : bits - least;
      });
      panels.push(heat("Gap to the entropy floor by layer", { layers, groups: [{ title: "", columns: groups[0].columns, cells: gap }], kind: "diverging", format: fixed(2), unit: "bits per value",
        note: "Stored bits per value − order-0 floor of that layer and role: below zero where the pipeline found structure beyond order 0, or lost something." }));
    } else {
      panels.push(h("div", { class: "panel" }, h("h3", {}, "Gap to the entropy floor by layer"), h("p", { class: "note" }, "Not in the results: floors by layer were not stored by the version that wrote them.")));
    }
  }
  return panels;
}

function ledger(row, held) {
  const total = rows.stored[row];
  const most = Math.max(1, ...held.ledger.map(([, bytes]) => bytes));
  const share = (number) => `${((100 * number) / total).toFixed(number / total < 0.001 && number > 0 ? 3 : 1)} %`;
  const bars = held.ledger.map(([name, number]) => [h("span", {}, name), h("span", { class: "track" }, h("i", { style: `width:${(100 * number) / most}%` })), h("span", { class: "number" }, whole(number)), h("span", { class: "number muted" }, share(number))]);
  const sum = ["total", h("span", { class: "total" }), whole(total), "100 %"].map((cell, idx) => (idx === 1 ? cell : h("span", { class: `total${idx > 1 ? " number" : ""}` }, cell)));
  const panels = [h("div", { class: "panel" }, h("h3", {}, "Where the bytes go"), h("div", { class: "bytes" }, bars, sum),
    h("p", { class: "note" }, "Bytes of the ledger: every stored byte is in exactly one line, and the lines sum to the file."))];
  const { key, value } = held.stored;
  const sums = held.layers.map((_, at) => (key[at] ?? 0) + (value[at] ?? 0));
  if (sums.some((sum) => sum > 0)) {
    const top = Math.max(...sums);
    const lines = held.layers.map((layer, at) => [h("span", {}, `layer ${layer}`),
      h("span", { class: "track", title: `keys ${whole(key[at])}, values ${whole(value[at])} bytes` }, [key, value].map((role) => h("i", { style: `width:${(100 * (role[at] ?? 0)) / top}%` }))),
      h("span", { class: "number" }, whole(sums[at])), h("span", { class: "number muted" }, share(sums[at]))]);
    panels.push(h("div", { class: "panel" }, h("h3", {}, "Stored bytes by layer: ", h("i", { class: "key" }), " keys ", h("i", { class: "key two" }), " values"), h("div", { class: "bytes" }, lines)));
  }
  return panels;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function showDetails() {
  const row = state.selected;
  const box = byId("details");
  byId("row-title").textContent = row < 0 ? "Row" : rows.name[row];
  if (row < 0) return box.replaceChildren(h("p", { class: "note" }, "No row to show."));
  const result = rows.result[row];
  const kind = result === "failed" ? "bad" : result === "below the gate" || result === "unsupported" ? "no" : "";
  const fact = (name, value) => value !== NONE && h("span", {}, `${name} `, h("b", {}, value));
  const dump = dumpOf(row);
  const parts = [h("p", { class: "headline" },
    h("span", { class: `result pill ${kind}` }, mark(result), `${result}${rows.front[row] ? ", on the front" : ""}`),
    h("span", {}, rows.chunking[row]), h("span", {}, `${dumpName(dump)}, ${plural(dump.runs, "run")}`),
    fact("ratio", ratio(rows.ratio[row])), fact("bits per value", fixed(2)(rows.bits[row])), fact("stored", bytes(rows.stored[row] || null)),
    fact("encode", known(rows.encode[row]) ? `${whole(rows.encode[row])} MB/s` : NONE), fact("decode", known(rows.decode[row]) ? `${whole(rows.decode[row])} MB/s` : NONE))];
  if (rows.reason[row]) parts.push(h("p", { class: "warning" }, rows.reason[row]));
  if (rows.violations[row]) parts.push(h("p", { class: "warning" }, `Outside the gate: ${rows.violations[row]}.`));
  const held = data.details[row];
  if (held) parts.push(h("div", { class: "panels" }, heats(row, held), ledger(row, held)));
  else if (isOk(row)) parts.push(h("p", { class: "note" }, "Heat maps and ledger of this row are not in this page, which keeps below 6 MB; they are in the results that it was made from."));
  const pipeline = rows.pipeline[row];
  const labels = rows.labels[row] ? `It promises: ${rows.labels[row]}. ` : "";
  parts.push(h("details", {}, h("summary", {}, "Pipeline and command"),
    h("p", { class: "note" }, `${labels}Row ${rows.number[row]} of rows.csv; results of ${data.inputs[rows.input[row]].file}.`),
    h("pre", { tabindex: 0 }, JSON.stringify(JSON.parse(pipeline), null, 2)),
    h("pre", { class: "wrap", tabindex: 0 }, `gearbox sweep --dump ${quoted(dump.path)} --pipeline ${quoted(pipeline)}`)));
  box.replaceChildren(...parts);
}
