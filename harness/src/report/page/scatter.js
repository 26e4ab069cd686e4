// The scatter plot: one mark per row on a canvas, the front of the two axes as a line.

const AXES = {
  bits: { label: "stored bits per value", log: true },
  stored: { label: "stored bytes", log: true, format: bytes },
  ratio: { label: "ratio, original ÷ stored bytes", log: true, high: true },
  nmse: { label: "NMSE of the worst head", log: true },
  angle: { label: "1 − cosine of the worst head", log: true },
  kl: { label: "KL p99 of attention, nats", log: true },
  output: { label: "relative error of the attention output", log: true },
  encode: { label: "encoding, MB/s, single measurement", log: true, high: true },
  decode: { label: "decoding, MB/s, single measurement", log: true, high: true },
};
rows.angle = rows.cosine.map((cosine) => (known(cosine) ? Math.max(0, 1 - cosine) : null));

/** What each axis shows. */
const shown = { x: "bits", y: "nmse" };
const canvas = document.querySelector("#scatter canvas");
const PAD = { left: 78, right: 18, top: 14, bottom: 44 };
/** Height of the band for zeros, which a logarithmic axis has no place for. */
const BAND = 46;
let marks = [];
let fronts = [];
let pointed = -1;
let frame = 0;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Place of a number on an axis between two pixels; zeros go into the band at the low end. */
function scale(numbers, from, to) {
  const positive = numbers.filter((number) => number > 0);
  const zeros = numbers.length > positive.length;
  const [least, most] = positive.length
    ? positive.reduce(([least, most], number) => [Math.min(least, number), Math.max(most, number)], [Infinity, -Infinity])
    : [1, 1];
  const slack = Math.max(0.03, (Math.log10(most) - Math.log10(least)) * 0.06);
  const [low, high] = [Math.log10(least) - slack, Math.log10(most) + slack];
  const sign = Math.sign(to - from);
  const start = zeros ? from + sign * BAND : from;
  const at = (number) => (number > 0 ? start + ((Math.log10(number) - low) / (high - low)) * (to - start) : from + (sign * BAND) / 2);
  return { at, zeros, start, ticks: positive.length ? ticks(low, high) : [] };
}

/** Round numbers between two powers of ten. */
function ticks(low, high) {
  const span = high - low;
  const steps = span > 5 ? [1] : span > 1.2 ? [1, 2, 5] : span > 0.5 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9];
  const found = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const step of steps) {
      const number = step * 10 ** power;
      if (Math.log10(number) >= low && Math.log10(number) <= high) found.push(number);
    }
  }
  return found;
}

/** The rows that no other row beats in both axes, along the first. */
function frontOf(places) {
  const better = (axis, a, b) => (AXES[axis].high ? a >= b : a <= b);
  const sorted = [...places].sort((a, b) => (AXES[shown.x].high ? b.xs - a.xs : a.xs - b.xs) || (AXES[shown.y].high ? b.ys - a.ys : a.ys - b.ys));
  const front = [];
  for (const place of sorted) {
    const held = front[front.length - 1];
    if (!held || !better(shown.y, held.ys, place.ys)) front.push(place);
  }
  return front;
}

/** Moves marks with the same zero apart, so that none hides another. */
function spread(places, axis, other) {
  const rank = new Map();
  for (const place of places) {
    if (place[`${axis}s`] !== 0) continue;
    const cell = Math.round(place[other] / 7);
    const held = rank.get(cell) ?? 0;
    rank.set(cell, held + 1);
    place[axis] += (held % 2 ? -1 : 1) * Math.min(Math.ceil(held / 2) * 6, BAND / 2 - 6);
  }
}

function layout() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const [xs, ys] = [rows[shown.x], rows[shown.y]];
  const usable = state.view.filter((row) => isOk(row) && known(xs[row]) && known(ys[row]));
  const x = scale(usable.map((row) => xs[row]), PAD.left, width - PAD.right);
  const y = scale(usable.map((row) => ys[row]), height - PAD.bottom, PAD.top);
  const speeds = usable.map((row) => rows.decode[row]).filter((speed) => speed > 0).map(Math.log);
  const [slow, fast] = speeds.reduce(([least, most], speed) => [Math.min(least, speed), Math.max(most, speed)], [Infinity, -Infinity]);
  const size = (speed) => (speed > 0 && fast > slow ? 3.2 + (5.3 * (Math.log(speed) - slow)) / (fast - slow) : 4.5);
  marks = usable.map((row) => ({ row, xs: xs[row], ys: ys[row], x: x.at(xs[row]), y: y.at(ys[row]), size: size(rows.decode[row]) }));
  spread(marks, "y", "x");
  fronts = data.dumps.map((_, dump) => frontOf(marks.filter((mark) => rows.dump[mark.row] === dump))).filter((front) => front.length > 0);
  marks.sort((a, b) => rows.front[a.row] - rows.front[b.row] || b.size - a.size);
  return { width, height, x, y, left: state.view.length - usable.length };
}

function shape(context, kind, x, y, size) {
  context.beginPath();
  if (kind === "triangle") {
    context.moveTo(x, y - size * 1.1);
    context.lineTo(x + size, y + size * 0.8);
    context.lineTo(x - size, y + size * 0.8);
    context.closePath();
  } else if (kind === "cross") {
    const arm = size * 0.75;
    context.moveTo(x - arm, y - arm);
    context.lineTo(x + arm, y + arm);
    context.moveTo(x + arm, y - arm);
    context.lineTo(x - arm, y + arm);
  } else {
    context.arc(x, y, size, 0, 2 * Math.PI);
  }
}

function paint() {
  frame = 0;
  const plot = layout();
  const { width, height, x, y } = plot;
  if (width === 0) return;
  const density = devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const context = canvas.getContext("2d");
  context.scale(density, density);
  const paper = colour("paper");
  const colours = Object.fromEntries(Object.entries(LOOKS).map(([result, look]) => [result, colour(look.colour)]));
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.lineWidth = 1;
  axes(context, plot);
  const dense = marks.length > 600;
  context.strokeStyle = colour("ink");
  context.globalAlpha = 0.45;
  for (const front of fronts) stairs(context, front);
  context.globalAlpha = 1;
  for (const { row, x, y, size } of marks) {
    const look = LOOKS[rows.result[row]];
    const onFront = rows.front[row];
    shape(context, look.shape, x, y, size);
    context.strokeStyle = colours[rows.result[row]];
    context.globalAlpha = dense && !onFront ? 0.45 : 1;
    context.lineWidth = look.shape === "cross" ? (onFront ? 2.4 : 1.3) : 1.4;
    if (look.shape !== "cross") {
      context.fillStyle = onFront ? colours[rows.result[row]] : paper;
      context.fill();
    }
    context.stroke();
  }
  context.globalAlpha = 1;
  labels(context, plot);
  for (const [row, ring] of [[state.selected, "ink"], [pointed, "accent"]]) {
    const place = marks.find((mark) => mark.row === row);
    if (!place) continue;
    context.strokeStyle = colour(ring);
    context.lineWidth = 2;
    context.beginPath();
    context.arc(place.x, place.y, place.size + 5, 0, 2 * Math.PI);
    context.stroke();
  }
  caption(plot);
}

function axes(context, { width, height, x, y }) {
  const [ink, rule, soft] = [colour("ink"), colour("rule"), colour("soft")];
  const [right, bottom] = [width - PAD.right, height - PAD.bottom];
  const format = (axis) => AXES[axis].format ?? short;
  context.fillStyle = soft;
  context.strokeStyle = rule;
  context.textAlign = "center";
  let free = -Infinity;
  for (const tick of x.ticks) {
    const [at, text] = [x.at(tick), format(shown.x)(tick)];
    context.beginPath();
    context.moveTo(at, PAD.top);
    context.lineTo(at, bottom);
    context.globalAlpha = 0.6;
    context.stroke();
    context.globalAlpha = 1;
    const half = context.measureText(text).width / 2;
    if (at - half < free + 8) continue;
    context.fillText(text, at, bottom + 16);
    free = at + half;
  }
  context.textAlign = "right";
  free = Infinity;
  for (const tick of y.ticks) {
    const at = y.at(tick);
    context.beginPath();
    context.moveTo(PAD.left, at);
    context.lineTo(right, at);
    context.globalAlpha = 0.6;
    context.stroke();
    context.globalAlpha = 1;
    if (at > free - 16) continue;
    context.fillText(format(shown.y)(tick), PAD.left - 8, at + 4);
    free = at;
  }
  if (y.zeros) {
    context.fillStyle = colour("wash");
    context.fillRect(PAD.left, y.start, right - PAD.left, bottom - y.start);
    context.fillStyle = soft;
    context.fillText("0", PAD.left - 8, bottom - BAND / 2 + 4);
    context.textAlign = "left";
    context.fillStyle = colour("faint");
    context.fillText("exact", PAD.left + 6, bottom - 6);
  }
  if (x.zeros) context.fillText("0", PAD.left + BAND / 2, bottom + 16);
  context.strokeStyle = ink;
  context.beginPath();
  context.moveTo(PAD.left, PAD.top);
  context.lineTo(PAD.left, bottom);
  context.lineTo(right, bottom);
  context.stroke();
  context.fillStyle = ink;
  context.textAlign = "right";
  context.fillText(title("x", "→", "←"), right, bottom + 36);
  context.save();
  context.translate(13, PAD.top);
  context.rotate(-Math.PI / 2);
  context.fillText(title("y", "→", "←"), 0, 0);
  context.restore();
}

/** The label of an axis with an arrow to its better side. */
function title(axis, high, low) {
  const { label, high: up } = AXES[shown[axis]];
  return up ? `${label}, better ${high}` : `${low} better, ${label}`;
}

function stairs(context, front) {
  context.lineWidth = 1.2;
  context.setLineDash([5, 3]);
  context.beginPath();
  front.forEach(({ x, y }, idx) => {
    if (idx === 0) return context.moveTo(x, y);
    // Between two rows of the front, what is reached is the worse of both.
    context.lineTo(x, front[idx - 1].y);
    context.lineTo(x, y);
  });
  context.stroke();
  context.setLineDash([]);
}

/** Names of rows of the front, where they fit. */
function labels(context, { width, height }) {
  const taken = marks.length <= 400 ? marks.map(({ x, y, size }) => [x - size, y - size, x + size, y + size]) : [];
  const clear = ([left, top, right, bottom]) => left >= PAD.left && right <= width - 4 && top >= 4 && bottom <= height - PAD.bottom
    && taken.every((box) => right < box[0] || left > box[2] || bottom < box[1] || top > box[3]);
  context.fillStyle = colour("ink");
  // A halo keeps names readable over lines.
  context.strokeStyle = colour("paper");
  context.lineWidth = 4;
  context.lineJoin = "round";
  context.textAlign = "left";
  let written = 0;
  for (const { row, x, y, size } of fronts.flat()) {
    if (written >= 24) return;
    const name = rows.name[row];
    const text = name.length > 30 ? `${name.slice(0, 29)}…` : name;
    const wide = context.measureText(text).width;
    const spots = [[x + size + 4, y - 5], [x + size + 5, y + 4], [x - size - 5 - wide, y + 4], [x - wide / 2, y - size - 6], [x - wide / 2, y + size + 14]];
    // Among many marks, the side away from them.
    for (const [left, base] of marks.length > 400 ? [spots[2]] : spots) {
      const box = [left - 2, base - 11, left + wide + 2, base + 3];
      if (!clear(box)) continue;
      context.strokeText(text, left, base);
      context.fillText(text, left, base);
      taken.push(box);
      written += 1;
      break;
    }
  }
}

function caption({ left }) {
  const [x, y] = [AXES[shown.x].label, AXES[shown.y].label];
  const counts = `${plural(marks.length, "row")} in the plot`;
  const missing = left > 0 ? `; ${whole(left)} of the shown rows ${left === 1 ? "is" : "are"} not, which did not run to the end or have no such number` : "";
  byId("scatter-caption").textContent = marks.length === 0
    ? "No row with both numbers passes the filters."
    : `${counts}${missing}. Larger marks decode faster. Filled marks are on the front of stored bytes, worst-head error and both times; the line is the front of the two axes shown${data.dumps.length > 1 ? ", of each dump" : ""}. Axes are logarithmic.`;
  canvas.setAttribute("aria-label", `${y} against ${x}, ${counts}. The left and right arrow keys go from row to row, Enter selects.`);
}

function repaint() {
  frame ||= requestAnimationFrame(paint);
}

function nearest(x, y) {
  let [best, held] = [26 ** 2, undefined];
  for (const place of marks) {
    const distance = (place.x - x) ** 2 + (place.y - y) ** 2;
    if (distance <= best) [best, held] = [distance, place];
  }
  return held;
}

function point(place, x, y) {
  const row = place ? place.row : -1;
  if (row === pointed && row < 0) return;
  pointed = row;
  if (place) showTip(row, x, y);
  else hideTip();
  repaint();
}

function startScatter() {
  if (!anyLossy) shown.y = "decode";
  for (const axis of ["x", "y"]) {
    const box = byId(`${axis}-axis`);
    for (const [key, { label }] of Object.entries(AXES)) {
      if (rows[key].some(known)) box.append(h("option", { value: key, selected: shown[axis] === key }, label));
    }
    box.addEventListener("change", () => { shown[axis] = box.value; repaint(); });
  }
  const present = [...new Set(rows.result)].filter((result) => result !== "failed" && result !== "unsupported");
  byId("legend").append(...Object.keys(LOOKS).filter((result) => present.includes(result)).map((result) => h("span", {}, mark(result), result)));
  canvas.addEventListener("pointermove", (event) => point(nearest(event.offsetX, event.offsetY), event.clientX, event.clientY));
  canvas.addEventListener("pointerleave", () => point());
  canvas.addEventListener("click", (event) => {
    const place = nearest(event.offsetX, event.offsetY);
    if (place) select(place.row);
  });
  canvas.addEventListener("blur", () => point());
  canvas.addEventListener("keydown", (event) => {
    const along = [...marks].sort((a, b) => a.x - b.x || a.y - b.y);
    if (along.length === 0) return;
    const at = along.findIndex((mark) => mark.row === (pointed >= 0 ? pointed : state.selected));
    const steps = { ArrowRight: at + 1, ArrowLeft: at < 0 ? 0 : at - 1, Home: 0, End: along.length - 1 };
    if (event.key in steps) {
      const place = along[Math.max(0, Math.min(steps[event.key], along.length - 1))];
      const box = canvas.getBoundingClientRect();
      point(place, box.left + place.x, box.top + place.y);
    } else if (event.key === "Enter" && pointed >= 0) select(pointed);
    else return;
    event.preventDefault();
  });
  on("view", repaint);
  on("selected", repaint);
  on("theme", repaint);
  on("pointed", (row) => { pointed = row; repaint(); });
  new ResizeObserver(repaint).observe(canvas);
}
