/* Evidence of one cell; the block that it comes from is read when the first cell is opened. */
let details = null;
function detail() {
  details ??= JSON.parse(find("details").textContent);
  return details;
}

function openCell(cell) {
  const record = cell[RECORD] === null ? null : detail().records[cell[RECORD]];
  showDialog(nameOf(cell), labelOf(cell), [
    ...describeClaim(cell, record),
    ...(record ? describeRecord(record, cell) : [make("p", {}, "There is no evidence yet.")]),
    ...describeBenchmark(detail().benchmarks[DATA.cells.indexOf(cell)]),
    ...describeHistory(detail().history[DATA.cells.indexOf(cell)]),
  ]);
}

function showDialog(name, label, parts) {
  find("cell-title").textContent = `${name}: ${label}`;
  find("cell-body").replaceChildren(...parts);
  if (!find("cell").open) find("cell").showModal();
  find("cell").scrollTop = 0;
  keepAddress(name);
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
  const [title, ...commands] = detail().shared[cell[OFFER]];
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
  for (const [name, facts] of Object.entries(detail().shared[record.plan])) {
    parts.push(make("h3", {}, `Plan: ${name}`), pairs(facts));
  }
  for (const warning of record.warnings) parts.push(make("p", {}, `Warning: ${warning}`));
  parts.push(...describeBars(record));
  parts.push(make("h3", {}, "Machine and versions"));
  parts.push(pairs([...detail().shared[record.machine], ...detail().shared[record.versions]]));
  parts.push(pairs([["made", record.made], ["commit", record.commit]]));
  parts.push(make("p", {}, make("a", { href: record.file }, "The record as JSON")));
  return parts;
}

function describeCheck(check, weights) {
  const limits = new Map(detail().shared[check.limits]);
  const parts = [make("h3", {}, `Check ${check.name}: ${check.verdict}`)];
  if (check.message) parts.push(make("p", {}, check.message));
  if (check.pictures) {
    parts.push(...check.pictures.map((index, n) => drawPicture(detail().shared[index], n, check, weights)));
    if (!check.pictures.length) {
      parts.push(make("p", {}, "Its pictures are in the record; there are too many to show here."));
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
  const plan = Object.entries(detail().shared[record.plan])
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

/* Quantized compared with BF16: bars of steps, loads and memory, and every comparison as a table. */
const TIMING_HEAD = ["timing", "BF16 ms", "quantized ms", "ratio", "95 % interval", "smallest detectable change", "verdict"];

function describeBenchmark(bench) {
  if (!bench) return [];
  const both = ([name, bf16, quantized]) => [[`${name}, BF16`, bf16], [`${name}, quantized`, quantized]];
  const whole = bench.timings.filter(([name]) => / (step|load)$/.test(name)); // layers: in the table
  const of = (kind) => whole.filter(([name]) => name.endsWith(kind)).flatMap(both);
  const show = (value) => `${value.toPrecision(3)} ms`;
  const size = bench.size === "tiny" ? "a tiny stand-in" : "full size";
  const label = `${size} on ${bench.device}; ${bench.clock}; made ${bench.made}${bench.old ? `; ${bench.old}` : ""}`;
  return [
    make("h3", {}, "Compared with BF16"), make("p", {}, label),
    ...bars("Latency of a step compared with BF16", of("step"), show),
    ...bars("Loading compared with BF16", of("load"), show),
    ...bars("Memory compared with BF16", bench.memory.flatMap(both), mebibytes),
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
  return make("details", { open: "" }, make("summary", {}, "Timings compared with BF16"),
    make("table", {}, make("caption", {}, "Below 1 the quantized form is faster than BF16"),
      make("thead", {}, head), make("tbody", {}, ...rows)));
}

/* What the cell's records said, the latest first; a line for each change. */
const HISTORY_HEAD = ["run on", "commit", "scope", "change", "verdict", "PSNR dB", "step, of BF16's"];
const CHANGES = { first: "first run", better: "▲ better", worse: "▼ worse" };

function describeHistory(versions) {
  if (!versions) return [];
  const [since, ...lines] = versions;
  const show = (value) => (value === null ? "–" : value.toPrecision(4));
  const rows = lines.map(([day, commit, scope, trend, verdict, error, step]) => make("tr", {},
    make("th", { scope: "row" }, day),
    ...[commit, DATA.scopes[scope], CHANGES[trend], verdict, show(error), show(step)].map((text) => make("td", {}, text))));
  const head = make("tr", {}, ...HISTORY_HEAD.map((name) => make("th", { scope: "col" }, name)));
  return [make("h3", {}, "History"), make("p", {}, since),
    make("table", {}, make("caption", {}, "Runs that changed the verdict, the error or the speed, latest first"),
      make("thead", {}, head), make("tbody", {}, ...rows))];
}

function mebibytes(value) {
  return `${(value / 2 ** 20).toFixed(1)} MiB`;
}
