"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = { proven: "✓", refused: "⊘", failing: "✗", unjudged: "≈", stale: "↻", unproven: "?", planned: "…" };
const FILTERS = ["family", "model", "hardware", "state", "scope", "text"];
const STEP_NAMES = ["PSNR dB", "cosine", "relative L2"];
const CHUNK = 240; // cells drawn at a time
const [ROW, HARDWARE, BACKEND, STATE, SCOPE, CLAIM, RULE, REASON, OFFER, RECORD, OTHERS, NUMBER] = Array(12).keys();
const SVG = "http://www.w3.org/2000/svg";

const find = (id) => document.getElementById(id);
let found = []; // [checkpoint, its cells that pass the filters, the best first]
let shown = []; // hardware that has a column
let drawn = 0;
let sorting = { column: -1, down: false }; // a hardware, or -1: the order of the tables

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

const BACKENDS_OF = new Map();
for (const cell of DATA.cells) {
  if (!BACKENDS_OF.has(cell[ROW])) BACKENDS_OF.set(cell[ROW], new Set());
  BACKENDS_OF.get(cell[ROW]).add(cell[BACKEND]);
}

function nameOf(cell) {
  const backends = BACKENDS_OF.get(cell[ROW]);
  const suffix = backends.size > 1 && cell[BACKEND] ? `+${cell[BACKEND]}` : "";
  return `${DATA.rows[cell[ROW]][0]}@${DATA.hardware[cell[HARDWARE]][0]}${suffix}`;
}

function checkpointOf(cell) {
  return DATA.rows[cell[ROW]][3];
}

/* What a word of the search may be a part of: of a row, of a hardware, or of the cell itself. */
const ROW_TEXT = DATA.rows.map(([id, family, model, checkpoint]) =>
  [id, DATA.families[family], ...DATA.models[model], ...DATA.checkpoints[checkpoint]].join(" ").toLowerCase());
const PLACE_TEXT = DATA.hardware.map(([id, name, arch]) => [id, name, arch].join(" ").toLowerCase());

/* Per row and per hardware, which words are in its text: cells then only look up. */
function prepareSearch(text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const look = (texts) => texts.map((one) => words.map((word) => one.includes(word)));
  const [rows, places] = [look(ROW_TEXT), look(PLACE_TEXT)];
  return (cell) => words.every((word, n) => rows[cell[ROW]][n] || places[cell[HARDWARE]][n] ||
    cell[BACKEND].includes(word) || labelOf(cell).includes(word));
}

function readFilters() {
  const index = (id, names) => names.indexOf(find(id).value);
  return [
    [(cell) => DATA.rows[cell[ROW]][1], index("family", DATA.families)],
    [(cell) => DATA.rows[cell[ROW]][2], index("model", DATA.models.map(([id]) => id))],
    [(cell) => cell[HARDWARE], index("hardware", DATA.hardware.map(([id]) => id))],
    [(cell) => cell[STATE], index("state", DATA.states)],
    [(cell) => cell[SCOPE], index("scope", DATA.scopes)],
  ].filter(([, wanted]) => wanted >= 0);
}

/* Filters: one pass over the cells, then the first rows are drawn. */
function applyFilters() {
  const wanted = readFilters();
  const matches = prepareSearch(find("text").value);
  const rows = new Map();
  const places = new Set();
  let cells = 0;
  for (const cell of DATA.cells) {
    if (!wanted.every(([value, number]) => value(cell) === number) || !matches(cell)) continue;
    const checkpoint = checkpointOf(cell);
    if (!rows.has(checkpoint)) rows.set(checkpoint, []);
    rows.get(checkpoint).push(cell);
    places.add(cell[HARDWARE]);
    cells += 1;
  }
  for (const list of rows.values()) list.sort(compareCells);
  found = [...rows];
  shown = [...DATA.hardware.keys()].filter((number) => places.has(number));
  find("empty").hidden = cells > 0;
  find("matrix").hidden = cells === 0;
  find("status").textContent = `${cells} of ${DATA.cells.length} cells of ` +
    `${found.length} of ${DATA.checkpoints.length} checkpoints`;
  drawAgain();
  keepAddress();
}

/* The better state first, then the stronger scope. */
function compareCells(a, b) {
  return a[STATE] - b[STATE] || b[SCOPE] - a[SCOPE];
}

/* Checkpoints in the order of their model, or of their best cell in one column. */
function sortRows() {
  const model = ([, cells]) => DATA.rows[cells[0][ROW]][2];
  const best = ([, cells]) => cells.find((cell) => cell[HARDWARE] === sorting.column);
  const order = (a, b) => model(a) - model(b) || a[0] - b[0];
  const column = (a, b) => {
    const [left, right] = [best(a), best(b)];
    if (!left || !right) return Boolean(right) - Boolean(left); // what is not there comes last
    return (sorting.down ? -1 : 1) * compareCells(left, right) || order(a, b);
  };
  const byName = (a, b) => (sorting.down ? -order(a, b) : order(a, b));
  found.sort(sorting.column < 0 ? byName : column);
}

function sortBy(column) {
  sorting = { column, down: sorting.column === column && !sorting.down };
  drawAgain();
  const [button] = find("head").querySelectorAll(`button[data-column="${column}"]`);
  if (button) button.focus();
}

function drawAgain() {
  sortRows();
  drawn = 0;
  find("body").replaceChildren();
  drawHead();
  drawMore();
}

function drawHead() {
  const head = (column, title, more) => {
    const active = sorting.column === column;
    const order = active ? (sorting.down ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button", class: "sort", "data-column": column },
      title, make("span", { "aria-hidden": "true" }, active ? (sorting.down ? " ▾" : " ▴") : ""));
    button.addEventListener("click", () => sortBy(column));
    return make("th", { scope: "col", "aria-sort": order }, button, ...more);
  };
  const heads = shown.map((number) => {
    const [id, name, arch] = DATA.hardware[number];
    return head(number, id, [make("small", {}, `${name} ${arch}`)]);
  });
  find("head").replaceChildren(head(-1, "Model and checkpoint", []), ...heads);
}

function drawMore() {
  const rows = [];
  for (let cells = 0; drawn < found.length && cells < CHUNK; drawn += 1) {
    rows.push(drawRow(found[drawn]));
    cells += found[drawn][1].length;
  }
  find("body").append(...rows);
  find("more").hidden = drawn >= found.length;
}

function drawAll() {
  while (drawn < found.length) drawMore();
}

function drawNearEnd() {
  const box = find("matrix");
  const left = box.scrollHeight - box.scrollTop - box.clientHeight;
  if (left < 2 * box.clientHeight && drawn < found.length) drawMore();
}

function drawRow([checkpoint, cells]) {
  const [, family, model] = DATA.rows[cells[0][ROW]];
  const [id, reference] = DATA.checkpoints[checkpoint];
  const about = `${DATA.families[family]} · ${reference}`;
  const row = make("tr", {}, make("th", { scope: "row" },
    make("small", {}, DATA.models[model][1]), id, make("small", {}, about)));
  for (const hardware of shown) {
    row.append(make("td", {}, ...drawCells(cells.filter((cell) => cell[HARDWARE] === hardware))));
  }
  return row;
}

/* The best cell, and the others folded below it: drawn when they are asked for. */
function drawCells([best, ...others]) {
  if (!best) return [];
  if (!others.length) return [drawCell(best)];
  const folded = make("details", {}, make("summary", {}, `${others.length} more`));
  folded.addEventListener("toggle", () => folded.append(...others.map(drawCell)), { once: true });
  return [drawCell(best), folded];
}

function drawCell(cell) {
  const state = stateOf(cell);
  const scope = cell[SCOPE] < 0 ? state : DATA.scopes[cell[SCOPE]];
  const number = cell[NUMBER] ? `, ${cell[NUMBER]}` : "";
  const said = cell[BACKEND] || (state === "proven" || state === scope ? "" : state);
  const button = make("button", {
    type: "button", class: `state ${state}${strengthOf(cell)}`, "aria-haspopup": "dialog",
  }, `${SYMBOLS[state]} ${scope}`, ...(cell[NUMBER] ? [make("b", {}, ` ${cell[NUMBER]}`)] : []),
  ...(said ? [make("small", {}, said)] : []),
  make("span", { class: "spoken" }, `${nameOf(cell)}: ${labelOf(cell)}${number}`));
  button.addEventListener("click", () => openCell(cell));
  return button;
}

/* The address keeps question, filters and the open cell, so all of it can be sent to somebody. */
function keepAddress(cell) {
  const params = new URLSearchParams();
  for (const id of [...QUESTION, ...FILTERS]) {
    if (find(id).value && find(id).value !== find(id).dataset.default) params.set(id, find(id).value);
  }
  if (cell) params.set("cell", nameOf(cell));
  const text = params.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  for (const id of [...QUESTION, ...FILTERS]) {
    find(id).value = params.get(id) ?? find(id).dataset.default ?? "";
  }
  applyFilters();
  answer();
  const name = params.get("cell");
  const cell = name && DATA.cells.find((candidate) => nameOf(candidate) === name);
  if (cell) openCell(cell);
}

function fill(id, names) {
  find(id).append(...names.map(([value, text]) => make("option", { value }, text ?? value)));
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
