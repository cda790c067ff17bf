"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = { proven: "✓", refused: "⊘", failing: "✗", unjudged: "≈", stale: "↻", unproven: "?", planned: "…" };
const FILTERS = ["family", "model", "hardware", "state", "scope", "text"];
const STEP_NAMES = ["PSNR dB", "cosine", "relative L2"];
const CHUNK = 240; // cells drawn at a time
const [ROW, HARDWARE, BACKEND, STATE, SCOPE, CLAIM, RULE, REASON, OFFER, RECORD, OTHERS] = Array(11).keys();
const SVG = "http://www.w3.org/2000/svg";

const find = (id) => document.getElementById(id);
let found = []; // [row, its cells that pass the filters]
let drawn = 0;

/* An element; children are elements or text, never HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function stateOf(cell) {
  return DATA.states[cell[STATE]];
}

/* `proven · stand-in`: the state, and what was run to know it. */
function labelOf(cell) {
  return labelled(cell[STATE], cell[SCOPE]);
}

function labelled(state, scope) {
  return scope < 0 ? DATA.states[state] : `${DATA.states[state]} · ${DATA.scopes[scope]}`;
}

/* The class of a scope's strength: colour alone never tells it. */
function strengthOf(cell) {
  return cell[SCOPE] < 0 ? "" : ` scope-${DATA.scopes[cell[SCOPE]].replace(" ", "-")}`;
}

function nameOf(cell) {
  const backends = BACKENDS_OF.get(cell[ROW]);
  const suffix = backends.size > 1 && cell[BACKEND] ? `+${cell[BACKEND]}` : "";
  return `${DATA.rows[cell[ROW]][0]}@${DATA.hardware[cell[HARDWARE]][0]}${suffix}`;
}

const BACKENDS_OF = new Map();
const SEARCHED = DATA.rows.map(([id, , , checkpoint]) =>
  [id, ...DATA.checkpoints[checkpoint]].join(" ").toLowerCase());
for (const cell of DATA.cells) {
  if (!BACKENDS_OF.has(cell[ROW])) BACKENDS_OF.set(cell[ROW], new Set());
  BACKENDS_OF.get(cell[ROW]).add(cell[BACKEND]);
}

/* Filters: one pass over the cells, then the first rows are drawn. */
function readFilters() {
  const text = find("text").value.trim().toLowerCase();
  const index = (id, names) => names.indexOf(find(id).value);
  return {
    text,
    family: index("family", DATA.families),
    model: index("model", DATA.models),
    hardware: index("hardware", DATA.hardware.map(([id]) => id)),
    state: index("state", DATA.states),
    scope: index("scope", DATA.scopes),
  };
}

function applyFilters() {
  const wanted = readFilters();
  const rows = new Map();
  const passes = DATA.rows.map(([, family, model], number) =>
    (wanted.family < 0 || family === wanted.family) &&
    (wanted.model < 0 || model === wanted.model) &&
    SEARCHED[number].includes(wanted.text));
  let cells = 0;
  for (const cell of DATA.cells) {
    if (!passes[cell[ROW]]) continue;
    if (wanted.hardware >= 0 && cell[HARDWARE] !== wanted.hardware) continue;
    if (wanted.state >= 0 && cell[STATE] !== wanted.state) continue;
    if (wanted.scope >= 0 && cell[SCOPE] !== wanted.scope) continue;
    if (!rows.has(cell[ROW])) rows.set(cell[ROW], []);
    rows.get(cell[ROW]).push(cell);
    cells += 1;
  }
  found = [...rows];
  drawn = 0;
  find("body").replaceChildren();
  drawHead(wanted.hardware);
  drawMore();
  find("status").textContent =
    `${cells} of ${DATA.cells.length} cells in ${found.length} of ${DATA.rows.length} rows`;
  keepFilters();
}

function columns(only) {
  return DATA.hardware.map((_, number) => number).filter((n) => only < 0 || n === only);
}

function drawHead(only) {
  const heads = columns(only).map((number) => {
    const [id, name, arch] = DATA.hardware[number];
    return make("th", { scope: "col" }, id, make("small", {}, `${name} ${arch}`));
  });
  find("head").replaceChildren(make("th", { scope: "col" }, "Row"), ...heads);
}

function drawMore() {
  const only = readFilters().hardware;
  const rows = [];
  for (let cells = 0; drawn < found.length && cells < CHUNK; drawn += 1) {
    rows.push(drawRow(found[drawn], columns(only)));
    cells += found[drawn][1].length;
  }
  find("body").append(...rows);
  find("more").hidden = drawn >= found.length;
}

function drawNearEnd() {
  const box = find("matrix");
  const left = box.scrollHeight - box.scrollTop - box.clientHeight;
  if (left < 2 * box.clientHeight && drawn < found.length) drawMore();
}

function drawRow([number, cells], shown) {
  const [id, family, model, checkpoint] = DATA.rows[number];
  const about = `${DATA.families[family]} · ${DATA.models[model]} · ${DATA.checkpoints[checkpoint][1]}`;
  const row = make("tr", {}, make("th", { scope: "row" }, id, make("small", {}, about)));
  for (const hardware of shown) {
    row.append(make("td", {}, ...cells.filter((c) => c[HARDWARE] === hardware).map(drawCell)));
  }
  return row;
}

function drawCell(cell) {
  const state = stateOf(cell);
  const label = `${nameOf(cell)}: ${labelOf(cell)}`;
  const text = `${SYMBOLS[state]} ${labelOf(cell)}${cell[BACKEND] ? ` · ${cell[BACKEND]}` : ""}`;
  const button = make("button", {
    type: "button", class: `state ${state}${strengthOf(cell)}`, "aria-haspopup": "dialog", "aria-label": label,
  }, text);
  button.addEventListener("click", () => openCell(cell));
  return button;
}

/* The address keeps filters and the open cell, so both can be sent to somebody. */
function keepFilters(cell) {
  const params = new URLSearchParams();
  for (const id of FILTERS) if (find(id).value) params.set(id, find(id).value);
  if (cell) params.set("cell", nameOf(cell));
  const text = params.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  for (const id of FILTERS) find(id).value = params.get(id) ?? "";
  applyFilters();
  const name = params.get("cell");
  const cell = name && DATA.cells.find((candidate) => nameOf(candidate) === name);
  if (cell) openCell(cell);
}

/* Evidence of one cell. */
function openCell(cell) {
  const record = cell[RECORD] === null ? null : DATA.records[cell[RECORD]];
  find("cell-title").textContent = `${nameOf(cell)}: ${labelOf(cell)}`;
  find("cell-body").replaceChildren(
    ...describeClaim(cell, record),
    ...(record ? describeRecord(record, cell) : [make("p", {}, "There is no evidence yet.")]),
    ...describeBenchmark(DATA.benchmarks[DATA.cells.indexOf(cell)]),
  );
  if (!find("cell").open) find("cell").showModal();
  find("cell").scrollTop = 0;
  keepFilters(cell);
}

function describeClaim(cell, record) {
  const rule = cell[RULE] ? ` (${cell[RULE]})` : "";
  const scope = cell[SCOPE] < 0 ? "" : `${DATA.scopes[cell[SCOPE]]}: ${DATA.weights[cell[SCOPE]]}`;
  const parts = [pairs([["claim", cell[CLAIM] + rule], ["scope", scope], ["why", cell[REASON]]])];
  for (const [other, state, file] of cell[OTHERS]) {
    parts.push(make("p", {}, "Also ", make("a", { href: file }, labelled(state, other))));
  }
  if (record && record.command) {
    parts.push(make("h3", {}, "Command that ran"), ...commandBox(record.command));
  }
  const [title, ...commands] = DATA.shared[cell[OFFER]];
  if (record && commands.length === 1 && commands[0] === record.command) return parts;
  parts.push(make("h3", {}, title), ...commands.flatMap(commandBox));
  return parts;
}

function commandBox(command) {
  const text = make("pre", { tabindex: "0" }, command);
  const button = make("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
    }
  });
  return [text, button];
}

function describeRecord(record, cell) {
  const curvesFirst = [...record.checks].sort((a, b) => Boolean(b.steps) - Boolean(a.steps));
  const parts = curvesFirst.flatMap((check) => describeCheck(check, DATA.weights[cell[SCOPE]]));
  if (record.refusal) parts.push(make("h3", {}, "Refusal"), make("p", {}, record.refusal));
  for (const [name, facts] of Object.entries(DATA.shared[record.plan])) {
    parts.push(make("h3", {}, `Plan: ${name}`), pairs(facts));
  }
  for (const warning of record.warnings) parts.push(make("p", {}, `Warning: ${warning}`));
  parts.push(...describeBars(record));
  parts.push(make("h3", {}, "Machine and versions"));
  parts.push(pairs([...DATA.shared[record.machine], ...DATA.shared[record.versions]]));
  parts.push(pairs([["made", record.made], ["commit", record.commit]]));
  parts.push(make("p", {}, make("a", { href: record.file }, "The record as JSON")));
  return parts;
}

function describeCheck(check, weights) {
  const limits = new Map(DATA.shared[check.limits]);
  const parts = [make("h3", {}, `Check ${check.name}: ${check.verdict}`)];
  if (check.message) parts.push(make("p", {}, check.message));
  if (check.pictures) {
    parts.push(...check.pictures.map((index, n) => drawPicture(DATA.shared[index], n, check, weights)));
    if (!check.pictures.length) {
      parts.push(make("p", {}, "Its pictures are in the record: there are too many for one page."));
    }
  }
  if (check.steps) {
    parts.push(curve(check.steps.map(([psnr]) => psnr), limits.get("psnr_db.at_least"), "PSNR dB"));
    parts.push(curve(check.steps.map((s) => s[2]), limits.get("relative_l2.at_most"), "relative L2"));
    parts.push(stepTable(check.steps));
  }
  parts.push(folded("Metrics", check.metrics), folded("Limits", [...limits]));
  return parts;
}

/* BF16, quantized or difference; its caption is also its name. */
function drawPicture(source, n, check, weights) {
  const kind = ["BF16", "quantized", `difference, amplified ${check.gain}x (black = identical)`][n];
  const name = `${kind}: ${check.shown}; ${weights}`;
  return make("figure", {},
    make("img", { src: source, alt: name }), make("figcaption", {}, name));
}

function folded(title, facts) {
  if (!facts.length) return "";
  return make("details", { open: "" }, make("summary", {}, title), pairs(facts));
}

function pairs(facts) {
  const list = make("dl");
  for (const [name, value] of facts) {
    if (value !== "") list.append(make("dt", {}, name), make("dd", {}, String(value)));
  }
  return list;
}

function stepTable(steps) {
  const head = make("tr", {}, ...["step", ...STEP_NAMES].map((n) => make("th", { scope: "col" }, n)));
  const rows = steps.map((step, n) => make("tr", {}, make("th", { scope: "row" }, String(n + 1)),
    ...step.map((value) => make("td", {}, value === null ? "–" : String(value)))));
  return make("details", {}, make("summary", {}, "Numbers per step"),
    make("table", {}, make("caption", {}, "Distance from BF16 after each step"),
      make("thead", {}, head), make("tbody", {}, ...rows)));
}

/* Values over steps as a line, with the limit as a dashed one; null values are left out. */
function curve(values, limit, title) {
  const points = values.map((value, step) => [step, value]).filter(([, value]) => value !== null);
  const numbers = points.map(([, value]) => value).concat(limit === undefined ? [] : [limit]);
  const low = Math.min(...numbers), high = Math.max(...numbers), span = high - low || 1;
  const x = (step) => 56 + (step * 290) / Math.max(values.length - 1, 1);
  const y = (value) => 130 - ((value - low) * 110) / span;
  const label = points.map(([step, value]) => `step ${step + 1}: ${value}`).join(", ");
  const bound = limit === undefined ? "" : `; limit ${limit}`;
  const picture = draw("svg", {
    viewBox: "0 0 360 160", width: 360, height: 160, role: "img",
    "aria-label": `${title} per step: ${label}${bound}`,
  });
  picture.append(draw("line", { class: "axis", x1: 50, y1: 136, x2: 352, y2: 136 }));
  if (limit !== undefined) {
    picture.append(draw("line", { class: "limit", x1: 50, y1: y(limit), x2: 352, y2: y(limit) }));
  }
  const line = points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ");
  picture.append(draw("polyline", { class: "curve", points: line }));
  for (const [step, value] of points) {
    picture.append(draw("circle", { class: "dot", cx: x(step), cy: y(value), r: 3 },
      draw("title", {}, `step ${step + 1}: ${value}`)));
  }
  for (const value of new Set([low, high])) {
    picture.append(draw("text", { x: 4, y: y(value) + 4 }, value.toPrecision(4)));
  }
  picture.append(draw("text", { x: 56, y: 152 }, `step 1 to ${values.length}`));
  return make("figure", {}, picture, make("figcaption", {}, `${title} per step${bound}`));
}

/* Seconds and bytes, wherever a record has them, as bars. */
function describeBars(record) {
  const metrics = record.checks.flatMap((check) => check.metrics);
  const numbers = metrics.filter(([, value]) => typeof value === "number");
  const plan = Object.entries(DATA.shared[record.plan])
    .flatMap(([part, facts]) => facts.map(([name, value]) => [`${part} ${name}`, value]));
  const seconds = [...Object.entries(record.timings), ...numbers.filter(([n]) => /(^|[._])seconds$/.test(n))];
  const bytes = [...plan, ...numbers].filter(([name]) => /(^|[._ ])bytes$/.test(name));
  return [
    ...bars("Latency", seconds, (value) => `${value.toPrecision(3)} s`),
    ...bars("Memory", bytes, mebibytes),
  ];
}

function bars(title, facts, show) {
  if (!facts.length) return [];
  const most = Math.max(...facts.map(([, value]) => value)) || 1;
  const label = facts.map(([name, value]) => `${name} ${show(value)}`).join(", ");
  const height = facts.length * 18 + 6;
  const picture = draw("svg", {
    viewBox: `0 0 560 ${height}`, width: 560, height, role: "img", "aria-label": `${title}: ${label}`,
  });
  facts.forEach(([name, value], n) => {
    const width = Math.max((value * 250) / most, 1);
    picture.append(draw("text", { x: 0, y: n * 18 + 14 }, name),
      draw("rect", { class: "value", x: 215, y: n * 18 + 4, width, height: 12 }),
      draw("text", { x: 221 + width, y: n * 18 + 14 }, show(value)));
  });
  return [make("h3", {}, title), picture];
}

/* Quantized beside BF16: bars of steps, loads and memory, and every comparison as a table. */
const TIMING_HEAD = ["", "BF16 ms", "quantized ms", "ratio", "95 % interval", "smallest detectable change", "verdict"];

function describeBenchmark(bench) {
  if (!bench) return [];
  const both = ([name, bf16, quantized]) => [[`${name}, BF16`, bf16], [`${name}, quantized`, quantized]];
  const whole = bench.timings.filter(([name]) => / (step|load)$/.test(name)); // layers: in the table
  const of = (kind) => whole.filter(([name]) => name.endsWith(kind)).flatMap(both);
  const show = (value) => `${value.toPrecision(3)} ms`;
  const size = bench.size === "tiny" ? "a tiny stand-in" : "full size";
  const label = `${size} on ${bench.device}; ${bench.clock}; made ${bench.made}${bench.old ? `; ${bench.old}` : ""}`;
  return [
    make("h3", {}, "Against BF16"), make("p", {}, label),
    ...bars("Latency of a step against BF16", of("step"), show),
    ...bars("Loading beside BF16", of("load"), show),
    ...bars("Memory beside BF16", bench.memory.flatMap(both), mebibytes),
    make("p", {}, `Step memory is what a step holds on top of the weights, counted by ${bench.counted}.`),
    timingTable(bench.timings),
    ...commandBox(bench.command),
    make("p", {}, make("a", { href: bench.file }, "The benchmark as JSON")),
  ];
}

function timingTable(timings) {
  const rows = timings.map(([name, bf16, quantized, ratio, low, high, detectable, verdict]) => {
    const cells = [bf16, quantized, ratio.toFixed(3), `${low.toFixed(3)} to ${high.toFixed(3)}`,
      `${(100 * detectable).toFixed(1)} %`, verdict];
    return make("tr", {}, make("th", { scope: "row" }, name),
      ...cells.map((value) => make("td", {}, String(value))));
  });
  const head = make("tr", {}, ...TIMING_HEAD.map((n) => make("th", { scope: "col" }, n)));
  return make("details", { open: "" }, make("summary", {}, "Numbers beside BF16"),
    make("table", {}, make("caption", {}, "Below 1 the quantized form is faster than BF16"),
      make("thead", {}, head), make("tbody", {}, ...rows)));
}

function mebibytes(value) {
  return `${(value / 2 ** 20).toFixed(1)} MiB`;
}

function fill(id, names) {
  find(id).append(...names.map((name) => make("option", { value: name }, name)));
}

/* Cells per state and scope, the strongest scope first. */
function countLabels() {
  const scopes = [...DATA.scopes.keys()].reverse().concat(-1);
  return DATA.states.flatMap((state, n) => scopes.flatMap((scope) => {
    const count = DATA.cells.filter((c) => c[STATE] === n && c[SCOPE] === scope).length;
    return count || (scope < 0 && !DATA.cells.some((c) => c[STATE] === n))
      ? [make("li", { class: state }, `${SYMBOLS[state]} ${count} ${labelled(n, scope)}`)] : [];
  }));
}

function start() {
  fill("family", DATA.families);
  fill("model", DATA.models);
  fill("hardware", DATA.hardware.map(([id]) => id));
  fill("state", DATA.states);
  fill("scope", DATA.scopes);
  find("counts").append(...countLabels());
  find("filters").addEventListener("input", applyFilters);
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("filters").addEventListener("reset", () => setTimeout(applyFilters));
  find("more").addEventListener("click", drawMore);
  find("cell").addEventListener("close", () => keepFilters());
  addEventListener("hashchange", readAddress);
  find("matrix").addEventListener("scroll", drawNearEnd, { passive: true });
  readAddress();
}

start();
