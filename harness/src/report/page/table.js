// Filters and the table. Only the rows in sight are in the document.

const COLUMNS = [
  { key: "dump", head: "dump", text: (row) => dumpName(dumpOf(row)), only: () => data.dumps.length > 1, most: 22 },
  { key: "name", head: "pipeline", text: (row) => rows.name[row], most: 40, first: true },
  { key: "chunking", head: "chunking", text: (row) => rows.chunking[row], most: 22 },
  { key: "result", head: "result", text: (row) => rows.result[row], most: 14 },
  { key: "front", head: "front", text: (row) => (rows.front[row] ? "●" : ""), most: 5 },
  { key: "ratio", head: "ratio", unit: "whole file", format: ratio, high: true },
  { key: "bits", head: "bits", unit: "per value", format: fixed(2) },
  { key: "stored", head: "stored", unit: "bytes", format: whole },
  { key: "cosine", head: "worst head", unit: "cosine", format: fixed(5), high: true, lossy: true },
  { key: "nmse", head: "worst head", unit: "NMSE", format: short, lossy: true },
  { key: "kl", head: "KL p99", unit: "nats", format: short, lossy: true },
  { key: "output", head: "output error", unit: "relative", format: short, lossy: true },
  { key: "encode", head: "encode", unit: "MB/s", format: whole, high: true },
  { key: "decode", head: "decode", unit: "MB/s", format: whole, high: true },
  { key: "key", head: "keys", unit: "ratio", format: ratio, high: true },
  { key: "value", head: "values", unit: "ratio", format: ratio, high: true },
  { key: "gap", head: "gap", unit: "bits to floor", format: fixed(2) },
  { key: "snr", head: "SNR", unit: "dB", format: fixed(1), high: true },
];

const anyLossy = rows.nmse.some((number, row) => known(number) && number > 0 || rows.result[row] === "below the gate");
const columns = COLUMNS.filter((column) => {
  if (column.only && !column.only()) return false;
  if (column.lossy && !anyLossy) return false;
  return column.text || rows[column.key].some(known);
});
if (innerWidth < 640) {
  // On a phone, numbers come before the words beside them.
  for (const key of ["result", "front", "chunking"]) {
    const at = columns.findIndex((column) => column.key === key);
    columns.push(...columns.splice(at, 1));
  }
}
const ROW = 27;
const table = byId("table");
const scroll = byId("scroll");
const body = table.tBodies[0];
let drawn = [0, 0];
let focus = 0;

/** What words of the filter are looked for in. */
const haystack = [];
function textOf(row) {
  haystack[row] ??= [rows.name[row], rows.chunking[row], rows.result[row], dumpOf(row).path, rows.reason[row], rows.pipeline[row]].join("\n").toLowerCase();
  return haystack[row];
}

/** `ratio>3` and the like; what is none is a word. */
function parseFilter(text) {
  state.words = [];
  state.limits = [];
  for (const part of text.toLowerCase().split(/\s+/).filter(Boolean)) {
    const found = /^([a-z]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/.exec(part);
    if (found && COLUMNS.some((column) => column.format && column.key === found[1])) {
      const [, key, sign, number] = found;
      const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };
      state.limits.push((row) => known(rows[key][row]) && compare[sign](rows[key][row], Number(number)));
    } else {
      state.words.push(part);
    }
  }
}

function isShown(row) {
  return (state.dump < 0 || rows.dump[row] === state.dump)
    && !state.hidden.has(rows.result[row])
    && (!state.front || rows.front[row])
    && state.words.every((word) => textOf(row).includes(word))
    && state.limits.every((holds) => holds(row));
}

/** The rank of each row under the sort in force; rows without the number come last in both directions. */
function order() {
  const all = Array.from({ length: count }, (_, row) => row);
  const { key, down } = state.sort;
  const column = COLUMNS.find((column) => column.key === key);
  const sign = down ? -1 : 1;
  if (column.format || key === "front") {
    const numbers = rows[key];
    return all.sort((a, b) => {
      const [left, right] = [numbers[a], numbers[b]];
      if (!known(left) || !known(right)) return (known(right) ? 1 : 0) - (known(left) ? 1 : 0) || a - b;
      return sign * (left - right) || a - b;
    });
  }
  const texts = all.map(column.text);
  return all.sort((a, b) => (texts[a] < texts[b] ? -sign : texts[a] > texts[b] ? sign : a - b));
}

let ordered = [];

function sortBy(key, down) {
  state.sort = { key, down };
  ordered = order();
  for (const th of table.tHead.rows[0].cells) {
    if (th.dataset.key === key) th.setAttribute("aria-sort", down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  }
  filter();
}

function filter() {
  state.view = ordered.filter(isShown);
  focus = Math.max(0, state.view.indexOf(state.selected));
  scroll.scrollTop = 0;
  byId("found").textContent = state.view.length === count ? plural(count, "row") : `${whole(state.view.length)} of ${plural(count, "row")}`;
  tell("view");
}

function header() {
  const cells = columns.map((column) => {
    const button = h("button", { type: "button" }, column.head, column.unit && h("small", {}, column.unit));
    button.addEventListener("click", () => {
      const held = state.sort.key === column.key;
      sortBy(column.key, held ? !state.sort.down : Boolean(column.high) || column.key === "front");
    });
    const kind = [column.format && "number", column.first && "first"].filter(Boolean).join(" ");
    const th = h("th", { scope: "col", class: kind, "data-key": column.key }, button);
    const longest = (texts) => texts.reduce((most, text) => Math.max(most, text.length), 0);
    const texts = column.text ?? ((row) => column.format(rows[column.key][row]));
    // Of numbers, whose lengths hardly differ, a sample will do.
    const step = column.text ? 1 : Math.ceil(count / 500);
    const wanted = longest(Array.from({ length: Math.ceil(count / step) }, (_, idx) => texts(idx * step)));
    const width = Math.max(Math.min(wanted, column.most ?? 14), column.head.length + 2, (column.unit ?? "").length * 0.82);
    th.style.width = `${(width * 6.6 + 15 + (column.key === "result" ? 16 : 0)).toFixed(0)}px`;
    return th;
  });
  table.tHead.append(h("tr", { "aria-rowindex": 1 }, cells));
  table.style.width = `${cells.reduce((sum, cell) => sum + Number.parseFloat(cell.style.width), 0)}px`;
}

function line(at) {
  const row = state.view[at];
  const result = rows.result[row];
  const cells = [];
  for (const column of columns) {
    const kind = [column.format && "number", column.first && "first"].filter(Boolean).join(" ");
    if (column.key === "result") {
      cells.push(h("td", {}, h("span", { class: "result", title: rows.violations[row] || rows.reason[row] || undefined }, mark(result), result)));
    } else if (column.text) {
      const text = column.text(row);
      cells.push(h("td", { class: kind, title: text.length > (column.most ?? 99) ? text : undefined }, text));
    } else if (isOk(row)) {
      cells.push(h("td", { class: kind }, column.format(rows[column.key][row])));
    } else if (column.key === "ratio") {
      const span = columns.filter((column) => column.format).length;
      cells.push(h("td", { class: "reason", colspan: span, title: rows.reason[row] }, rows.reason[row]));
    }
  }
  const tr = h("tr", { "aria-rowindex": at + 2, "data-at": at, tabindex: at === focus ? 0 : -1, "aria-selected": String(row === state.selected), class: isOk(row) ? undefined : "out" }, cells);
  return tr;
}

function draw(force) {
  const total = state.view.length;
  const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 8);
  const last = Math.min(total, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + 8);
  if (!force && drawn[0] === first && drawn[1] === last) return;
  drawn = [first, last];
  const held = body.contains(document.activeElement);
  const gap = (lines) => h("tr", { class: "gap", "aria-hidden": "true" }, h("td", { colspan: columns.length, style: `height:${lines * ROW}px` }));
  const lines = Array.from({ length: last - first }, (_, idx) => line(first + idx));
  if (total === 0) lines.push(h("tr", {}, h("td", { class: "empty", colspan: columns.length }, count === 0 ? "The results hold no rows." : "No row passes the filters.")));
  body.replaceChildren(...(first > 0 ? [gap(first)] : []), ...lines, ...(last < total ? [gap(total - last)] : []));
  // Something in the table can always be reached with the tab key.
  const at = body.querySelector(`[data-at="${focus}"]`) ?? body.querySelector("[data-at]");
  if (at) at.tabIndex = 0;
  if (held && at) at.focus({ preventScroll: true });
  table.setAttribute("aria-rowcount", total + 1);
}

function moveTo(at) {
  focus = Math.max(0, Math.min(at, state.view.length - 1));
  const head = table.tHead.offsetHeight;
  const top = focus * ROW;
  if (top < scroll.scrollTop) scroll.scrollTop = top;
  if (top + ROW + head > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + ROW + head - scroll.clientHeight;
  draw(true);
  body.querySelector(`[data-at="${focus}"]`)?.focus({ preventScroll: true });
}

function startTable() {
  header();
  let waiting = false;
  scroll.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(false); });
  }, { passive: true });
  const rowOf = (event) => {
    const tr = event.target.closest("tr[data-at]");
    return tr ? state.view[Number(tr.dataset.at)] : undefined;
  };
  body.addEventListener("click", (event) => {
    const row = rowOf(event);
    if (row === undefined) return;
    focus = state.view.indexOf(row);
    select(row);
  });
  body.addEventListener("pointerover", (event) => tell("pointed", rowOf(event) ?? -1));
  body.addEventListener("pointerleave", () => tell("pointed", -1));
  body.addEventListener("focusin", (event) => tell("pointed", rowOf(event) ?? -1));
  body.addEventListener("focusout", () => tell("pointed", -1));
  body.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(scroll.clientHeight / ROW) - 2);
    const steps = { ArrowDown: focus + 1, ArrowUp: focus - 1, PageDown: focus + page, PageUp: focus - page, Home: 0, End: Infinity };
    if (event.key in steps) moveTo(steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") {
      select(state.view[focus]);
      if (event.key === "Enter") byId("row-title").focus();
    } else return;
    event.preventDefault();
  });
  on("view", () => draw(true));
  on("selected", () => draw(true));
  addEventListener("resize", () => draw(true));
}

function startFilters() {
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("text").addEventListener("input", (event) => { parseFilter(event.target.value); filter(); });
  byId("only-front").addEventListener("change", (event) => { state.front = event.target.checked; filter(); });
  if (data.dumps.length > 1) {
    byId("which").hidden = false;
    const options = data.dumps.map((dump, idx) => h("option", { value: idx }, dumpName(dump)));
    byId("dump").append(h("option", { value: -1 }, "all"), ...options);
    byId("dump").addEventListener("change", (event) => { state.dump = Number(event.target.value); filter(); });
  }
  for (const result of Object.keys(LOOKS)) {
    const found = rows.result.filter((other) => other === result).length;
    if (found === 0) continue;
    const input = h("input", { type: "checkbox", checked: true });
    input.addEventListener("change", () => { state.hidden[input.checked ? "delete" : "add"](result); filter(); });
    byId("results").append(h("label", { class: "chip" }, input, h("span", {}, mark(result), `${result} ${whole(found)}`)));
  }
}
