/* True size: step and memory beside BF16, a line for each cell that was timed, with bars. */
const [SPEED_CELL, BF16_STEP, STEP, BF16_WEIGHTS, WEIGHTS, BF16_PEAK, PEAK] = Array(7).keys();
const SPEED_HEAD = [
  ["Model", (line) => DATA.rows[cellOf(line)[ROW]][2]],
  ["Checkpoint and kernel", (line) => nameOf(cellOf(line))],
  ["BF16 step", (line) => line[BF16_STEP]],
  ["Step", (line) => line[STEP]],
  ["Step, of BF16's", (line) => line[STEP] / line[BF16_STEP]],
  ["Weights, of BF16's", (line) => line[WEIGHTS] / line[BF16_WEIGHTS]],
  ["Peak, of BF16's", (line) => line[PEAK] / line[BF16_PEAK]],
];
let speedOrder = { column: 0, down: false };

function cellOf(line) {
  return DATA.cells[line[SPEED_CELL]];
}

function drawSpeed() {
  const place = Number(find("speed-hardware").value);
  const lines = DATA.speed.filter((line) => cellOf(line)[HARDWARE] === place);
  const value = SPEED_HEAD[speedOrder.column][1];
  const sign = speedOrder.down ? -1 : 1;
  lines.sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    return left < right ? -sign : left > right ? sign : a[SPEED_CELL] - b[SPEED_CELL];
  });
  find("speed-head").replaceChildren(...SPEED_HEAD.map(([title], column) => drawSpeedHead(title, column)));
  find("speed-rows").replaceChildren(...lines.map(drawSpeedLine));
}

function drawSpeedHead(title, column) {
  const active = speedOrder.column === column;
  const button = make("button", { type: "button", class: "sort" }, title,
    make("span", { "aria-hidden": "true" }, active ? (speedOrder.down ? " ▾" : " ▴") : ""));
  button.addEventListener("click", () => {
    speedOrder = { column, down: active && !speedOrder.down };
    drawSpeed();
    find("speed-head").children[column].querySelector("button").focus();
  });
  const order = active ? (speedOrder.down ? "descending" : "ascending") : "none";
  return make("th", { scope: "col", "aria-sort": order }, button);
}

function drawSpeedLine(line) {
  const cell = cellOf(line);
  const [, , model, checkpoint] = DATA.rows[cell[ROW]];
  const name = make("button", { type: "button", class: "link", "aria-haspopup": "dialog" },
    `${DATA.checkpoints[checkpoint][0]}${cell[BACKEND] ? `, ${cell[BACKEND]}` : ""}`);
  name.addEventListener("click", () => openCell(cell));
  const seconds = (value) => (value === null ? "–" : `${value.toPrecision(3)} s`);
  return make("tr", {}, make("td", {}, DATA.models[model][1]), make("th", { scope: "row" }, name),
    make("td", {}, seconds(line[BF16_STEP])), make("td", {}, seconds(line[STEP])),
    drawShare(line[STEP], line[BF16_STEP]), drawShare(line[WEIGHTS], line[BF16_WEIGHTS]),
    drawShare(line[PEAK], line[BF16_PEAK]));
}

/* A ratio as a bar, up to twice of BF16's, with its number. */
function drawShare(part, whole) {
  if (!part || !whole) return make("td", {}, "–");
  const share = part / whole;
  const width = Math.min(share, 2) * 40;
  const bar = draw("svg", { class: "bar-share", viewBox: "0 0 84 12", width: 84, height: 12, "aria-hidden": "true" },
    draw("rect", { class: share > 1 ? "more" : "value", x: 0, y: 1, width, height: 10 }),
    draw("line", { class: "axis", x1: 40, x2: 40, y1: 0, y2: 12 }));
  return make("td", {}, bar, ` ${share.toFixed(2)}`);
}

function startSpeed() {
  const places = [...new Set(DATA.speed.map((line) => cellOf(line)[HARDWARE]))];
  find("speed").hidden = !places.length;
  if (!places.length) return;
  fill("speed-hardware", places.map((number) => [String(number), DATA.hardware[number][1]]));
  find("speed-hardware").value = String(places.find((n) => DATA.hardware[n][0] !== "cpu") ?? places[0]);
  find("speed-hardware").addEventListener("input", drawSpeed);
  drawSpeed();
}
