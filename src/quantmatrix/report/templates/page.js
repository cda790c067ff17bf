"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = { proven: "✓", refused: "⊘", failing: "✗", unjudged: "≈", stale: "↻", unproven: "?", planned: "…" };
const FILTERS = ["family", "model", "hardware", "program", "state", "scope", "text"];
const STEP_NAMES = ["PSNR dB", "cosine", "relative L2"];
const CHUNK = 240; // cells drawn at a time
const [ROW, HARDWARE, BACKEND, STATE, SCOPE, CLAIM, RULE, REASON, OFFER, RECORD, OTHERS, NUMBER] = Array(12).keys();
const BY_NAME = "name"; // key of the first column: the order of the tables
const SVG = "http://www.w3.org/2000/svg";

const find = (id) => document.getElementById(id);
let found = []; // [checkpoint, its cells that pass the filters, those of other programs], the best first
let shown = []; // columns: see `listColumns`
let drawn = 0;
let sorting = { column: BY_NAME, down: false };

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

/* What a word of the search may be a part of: of a checkpoint, of a row, of a hardware, or of the cell itself. */
const CHECKPOINT_TEXT = DATA.checkpoints.map(([id, reference, base, family, model]) =>
  [id, reference, base, DATA.families[family], ...DATA.models[model]].join(" ").toLowerCase());
const ROW_TEXT = DATA.rows.map(([id, , , checkpoint]) => `${id.toLowerCase()} ${CHECKPOINT_TEXT[checkpoint]}`);
const PLACE_TEXT = DATA.hardware.map(([id, name, arch]) => [id, name, arch].join(" ").toLowerCase());

/* Per checkpoint, row and hardware, which words are in its text: cells then only look up. */
function prepareSearch(text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const look = (texts) => texts.map((one) => words.map((word) => one.includes(word)));
  const [checkpoints, rows, places] = [look(CHECKPOINT_TEXT), look(ROW_TEXT), look(PLACE_TEXT)];
  const programs = look(PROGRAM_TEXT);
  const own = (cell) => words.every((word, n) => rows[cell[ROW]][n] || places[cell[HARDWARE]][n] ||
    cell[BACKEND].includes(word) || labelOf(cell).includes(word));
  const other = (one) => words.every((word, n) => checkpoints[one[CHECKPOINT]][n] || programs[one[PROGRAM]][n] ||
    (one[PLACE] >= 0 && places[one[PLACE]][n]) || labelOther(one).includes(word));
  return [own, other];
}

/* Tests of the filters that are set, for our cells and for those of other programs. */
function readFilters() {
  const chosen = (id, names) => (find(id).value ? names.indexOf(find(id).value) : null);
  const tests = [
    [chosen("family", DATA.families), (n) => [(c) => DATA.rows[c[ROW]][1] === n, (o) => kindOf(o)[3] === n]],
    [chosen("model", DATA.models.map(([id]) => id)), (n) => [(c) => DATA.rows[c[ROW]][2] === n, (o) => kindOf(o)[4] === n]],
    [chosen("hardware", DATA.hardware.map(([id]) => id)), (n) => [(c) => c[HARDWARE] === n, (o) => runsOn(o, n)]],
    [chosen("program", DATA.programs.map(([id]) => id)), (n) => [() => n < 0, (o) => o[PROGRAM] === n]], // -1: ours
    [chosen("state", DATA.states), (n) => [(c) => c[STATE] === n, (o) => DATA.verdicts[o[VERDICT]][0] === find("state").value]],
    [chosen("scope", DATA.scopes), (n) => [(c) => c[SCOPE] === n, (o) => o[OTHER_SCOPE] === n]],
  ].filter(([value]) => value !== null).map(([value, make]) => make(value));
  return [0, 1].map((kind) => (cell) => tests.every((pair) => pair[kind](cell)));
}

/* Filters: one pass over the cells, then the first rows are drawn. */
function applyFilters() {
  const [own, other] = readFilters();
  const [matches, matchesOther] = prepareSearch(find("text").value);
  const rows = new Map();
  const rowOf = (checkpoint) => {
    if (!rows.has(checkpoint)) rows.set(checkpoint, [checkpoint, [], []]);
    return rows.get(checkpoint);
  };
  const cells = DATA.cells.filter((cell) => own(cell) && matches(cell));
  const others = DATA.others.filter((one) => other(one) && matchesOther(one));
  for (const cell of cells) rowOf(checkpointOf(cell))[1].push(cell);
  for (const one of others) rowOf(one[CHECKPOINT])[2].push(one);
  for (const [, list] of rows.values()) list.sort(compareCells);
  found = [...rows.values()];
  shown = listColumns(new Set(cells.map((cell) => cell[HARDWARE])), new Set(others.map((one) => one[PROGRAM])));
  find("empty").hidden = found.length > 0;
  find("matrix").hidden = found.length === 0;
  find("status").textContent = `${cells.length} of ${DATA.cells.length} cells of ` +
    `${found.length} of ${DATA.checkpoints.length} checkpoints` +
    (DATA.others.length ? `; other programs: ${others.length} of ${DATA.others.length}` : "");
  drawAgain();
  keepAddress();
}

/* The better state first, then the stronger scope. */
function compareCells(a, b) {
  return a[STATE] - b[STATE] || b[SCOPE] - a[SCOPE];
}

/* A column: key, title, what it is, its cells in a row, their order, and how they are drawn. */
function listColumns(places, programs) {
  const own = [...DATA.hardware.keys()].filter((number) => places.has(number)).map((number) => ({
    key: String(number), title: DATA.hardware[number][0], about: DATA.hardware[number].slice(1, 3).join(" "),
    pick: ([, cells]) => cells.filter((cell) => cell[HARDWARE] === number), compare: compareCells, draw: drawCells,
  }));
  const others = [...DATA.programs.keys()].filter((number) => programs.has(number)).map((number) => ({
    key: `program-${number}`, title: DATA.programs[number][0], about: DATA.programs[number][1], other: true,
    pick: ([, , all]) => pickOthers(all, number), compare: compareOthers, draw: (all) => all.map(drawOther),
  }));
  return [...own, ...others];
}

/* Checkpoints in the order of their model, or of their best cell in one column. */
function sortRows() {
  const order = ([a], [b]) => DATA.checkpoints[a][4] - DATA.checkpoints[b][4] || a - b;
  const sign = sorting.down ? -1 : 1;
  const column = shown.find(({ key }) => key === sorting.column);
  if (!column) {
    found.sort((a, b) => sign * order(a, b));
    return;
  }
  const best = new Map(found.map((row) => [row, column.pick(row)[0]]));
  found.sort((a, b) => {
    const [left, right] = [best.get(a), best.get(b)];
    if (!left || !right) return Boolean(right) - Boolean(left) || order(a, b); // what is not there comes last
    return sign * column.compare(left, right) || order(a, b);
  });
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
  const heads = shown.map(({ key, title, about }) => head(key, title, [make("small", {}, about)]));
  find("head").replaceChildren(head(BY_NAME, "Model and checkpoint", []), ...heads);
  const others = shown.filter((column) => column.other).length;
  const group = (count, title) => (count ? [make("th", { scope: "colgroup", colspan: count }, title)] : []);
  find("groups").hidden = !others;
  find("groups").replaceChildren(...(others ? [make("td", {}), ...group(shown.length - others, "quantmatrix"),
    ...group(others, "Other programs")] : []));
}

function drawMore() {
  const rows = [];
  for (let cells = 0; drawn < found.length && cells < CHUNK; drawn += 1) {
    rows.push(drawRow(found[drawn]));
    cells += found[drawn][1].length + found[drawn][2].length;
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

function drawRow(row) {
  const [id, reference, , family, model] = DATA.checkpoints[row[0]];
  const about = `${DATA.families[family]} · ${reference}`;
  return make("tr", {}, make("th", { scope: "row" },
    make("small", {}, DATA.models[model][1]), id, make("small", {}, about)),
  ...shown.map(({ pick, draw }) => make("td", {}, ...draw(pick(row)))));
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
function keepAddress(name) {
  const params = new URLSearchParams();
  for (const id of [...QUESTION, ...FILTERS]) {
    if (find(id).value && find(id).value !== find(id).dataset.default) params.set(id, find(id).value);
  }
  if (name) params.set("cell", name);
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
  const other = name && !cell && DATA.others.find((candidate) => nameOther(candidate) === name);
  if (other) openOther(other);
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
