// Elements, formats, and what the parts of the page share.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const count = rows.name.length;
// Long texts are stored once, and rows hold their numbers.
for (const key of ["reason", "violations", "labels", "pipeline"]) rows[key] = rows[key].map((number) => data.texts[number]);
const byId = (id) => document.getElementById(id);

/** An element; a child that is a string becomes text, never markup. */
function h(tag, attributes = {}, ...children) {
  const element = tag === "svg" || tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.replace("svg:", ""))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

const NONE = "–";
const known = (number) => typeof number === "number" && Number.isFinite(number);
const fixed = (decimals) => (number) => (known(number) ? number.toFixed(decimals).replace("-", "−") : NONE);
const whole = (number) => (known(number) ? Math.round(number).toLocaleString("en").replaceAll(",", "\u202f") : NONE);
const ratio = fixed(3);

/** A positive number with three digits that count. */
function short(number) {
  if (!known(number)) return NONE;
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size < 1e-3 || size >= 1e6) {
    const power = Math.floor(Math.log10(size));
    const digits = fixed(1)(number / 10 ** power).replace(/\.0$/, "");
    return `${digits === "1" ? "" : `${digits}·`}10${superscript(power)}`;
  }
  return String(Number(number.toPrecision(3))).replace("-", "−");
}

function superscript(power) {
  return String(power).replace(/./g, (digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)]);
}

function bytes(number) {
  if (!known(number)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) [number, unit] = [number / 1024, unit + 1];
  return `${unit === 0 ? number : number < 10 ? number.toFixed(2) : number < 100 ? number.toFixed(1) : number.toFixed(0)} ${units[unit]}`;
}

const plural = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;
const isOk = (row) => rows.result[row] !== "failed" && rows.result[row] !== "unsupported";
const dumpOf = (row) => data.dumps[rows.dump[row]];
const dumpName = (dump) => dump.path.split(/[\\/]/).filter(Boolean).pop() ?? dump.path;

/** How a result looks: a colour and a shape, so that neither alone carries it. */
const LOOKS = {
  exact: { colour: "exact", shape: "circle" },
  "exact here": { colour: "exact", shape: "circle" },
  passes: { colour: "passes", shape: "triangle" },
  "below the gate": { colour: "below", shape: "cross" },
  failed: { colour: "bad", shape: "square" },
  unsupported: { colour: "faint", shape: "dash" },
};

/** The mark of a result as a small picture. */
function mark(result) {
  const { colour, shape } = LOOKS[result];
  const stroke = { fill: "none", stroke: `var(--${colour})`, "stroke-width": 1.8 };
  const shapes = {
    circle: ["svg:circle", { cx: 6, cy: 6, r: 4, fill: `var(--${colour})` }],
    triangle: ["svg:path", { d: "M6 1.5 10.8 10H1.2Z", fill: `var(--${colour})` }],
    cross: ["svg:path", { d: "M2 2 10 10M10 2 2 10", ...stroke }],
    square: ["svg:path", { d: "M2 2H10V10H2Z", ...stroke }],
    dash: ["svg:path", { d: "M2 6H10", ...stroke }],
  };
  return h("svg", { class: "mark", viewBox: "0 0 12 12", "aria-hidden": "true" }, h(...shapes[shape]));
}

/** What is shown: `view` holds the rows that pass the filters in the order of the table. */
const state = { dump: -1, words: [], limits: [], hidden: new Set(), front: false, sort: null, view: [], selected: -1 };
/** What is told when something changes: `view` the rows that are shown, `selected` the row below, `theme` the colours, `pointed` a row under the pointer. */
const listeners = { view: [], selected: [], theme: [], pointed: [] };
const on = (what, listener) => listeners[what].push(listener);
const tell = (what, ...values) => listeners[what].forEach((listener) => listener(...values));

function select(row) {
  state.selected = row;
  tell("selected", row);
  try {
    history.replaceState(null, "", `#r${rows.number[row]}`);
  } catch {
    // Some browsers allow no address in a file; the page works without.
  }
}

const tip = byId("tip");

function showTip(row, x, y) {
  const line = (name, value, unit) => known(value[0]) && h("tr", {}, h("td", {}, name), h("td", {}, `${value[1](value[0])} ${unit}`));
  const lines = [
    line("ratio", [rows.ratio[row], ratio], ""),
    line("stored", [rows.stored[row], whole], "bytes"),
    line("stored", [rows.bits[row], fixed(2)], "bits per value"),
    line("worst head, cosine", [rows.cosine[row], fixed(5)], ""),
    line("worst head, NMSE", [rows.nmse[row], short], ""),
    line("KL p99", [rows.kl[row], short], "nats"),
    line("output error", [rows.output[row], short], ""),
    line("encode", [rows.encode[row], whole], "MB/s"),
    line("decode", [rows.decode[row], whole], "MB/s"),
  ];
  const result = `${rows.result[row]}${rows.front[row] ? ", on the front" : ""}`;
  tip.replaceChildren(
    h("b", {}, rows.name[row]),
    h("div", { class: "muted" }, rows.chunking[row], data.dumps.length > 1 && ` · ${dumpName(dumpOf(row))}`),
    h("table", {}, lines),
    h("div", { class: "result" }, mark(rows.result[row]), result),
    rows.violations[row] ? h("div", { class: "muted" }, rows.violations[row]) : "",
  );
  placeTip(x, y);
}

function placeTip(x, y) {
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - width - 12 : x + 16;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - height - 8))}px`;
}

const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", hideTip, { passive: true });
