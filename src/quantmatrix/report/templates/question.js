/* The question: hardware, model and memory; the answer is ranked as `quantmatrix recommend` ranks it. */
const QUESTION = ["my-hardware", "my-model", "my-memory", "my-prefer"];
const OPTIONS = DATA.answers.options.map((line) =>
  Object.fromEntries(DATA.answers.option.map((name, n) => [name, line[n]])));
const ANSWER_HEAD = ["", "Checkpoint", "Kernel", "Proof", "Error", "Step, of BF16's", "Weights", "Memory"];
const MOST = 8; // answers shown at first

/* Position in `fits` for a device with this memory in MiB; 0 is no limit, nor are unknown weights. */
function findFit(option, memory) {
  if (!memory || option.weights_mib === null) return 0;
  const peak = option.peak_mib ?? 0;
  const loaded = peak >= option.weights_mib ? option.weights_mib : option.largest_mib;
  const room = memory - Math.max(0, peak - loaded);
  const two = option.movable && option.largest_mib < option.weights_mib;
  if (option.weights_mib <= room) return 0;
  if (two && option.largest_mib <= room) return 1;
  return option.layerwise_mib <= room ? 2 : 3;
}

/* What is preferred as a number, smaller is better. */
function weigh(option, prefer) {
  const found = {
    quality: option.psnr_db === null ? null : -option.psnr_db, speed: option.step, memory: option.weights_mib,
  }[prefer];
  return found ?? Infinity;
}

function rankKey(option, fit, prefer) {
  const exact = weigh(option, prefer);
  const step = exact === Infinity ? exact : Math.floor(exact / DATA.ranking.buckets[prefer]);
  return [fit, option.proof, step, Number(option.made), exact];
}

/* [fit, option], the best first, every checkpoint once. */
function rank(hardware, model, memory, prefer) {
  const keyed = OPTIONS.filter((one) => one.hardware === hardware && one.model === model)
    .map((one) => [rankKey(one, findFit(one, memory), prefer), one]);
  keyed.sort(([a], [b]) => {
    const n = a.findIndex((value, place) => value !== b[place]);
    return n < 0 ? 0 : a[n] < b[n] ? -1 : 1;
  });
  const best = new Map();
  for (const [[fit], one] of keyed) if (!best.has(one.checkpoint)) best.set(one.checkpoint, [fit, one]);
  return [...best.values()];
}

function readQuestion() {
  const [hardware, model, memory, prefer] = QUESTION.map((id) => find(id).value);
  const row = DATA.hardware.find(([id]) => id === hardware);
  return { hardware, model, prefer, memory: 1024 * (Number(memory) || (row ? row[3] : 0)) };
}

function answer() {
  const asked = readQuestion();
  const ready = Boolean(asked.hardware && asked.model);
  const ranked = ready ? rank(asked.hardware, asked.model, asked.memory, asked.prefer) : [];
  const usable = ranked.filter(([fit]) => fit < 3);
  find("answer").hidden = !usable.length;
  find("answer-status").textContent = ready ? tellAnswer(asked, ranked, usable)
    : "Choose your hardware and your model; memory is the card's unless you give less.";
  find("answer-rows").replaceChildren(...ranked.slice(0, MOST).map(drawAnswer));
  find("best").replaceChildren(...(usable.length ? describeBest(...usable[0]) : []));
}

function answerAgain() {
  answer();
  keepAddress();
}

function tellAnswer(asked, ranked, usable) {
  const room = asked.memory ? ` with ${asked.memory / 1024} GiB` : "";
  const place = `${asked.model} on ${asked.hardware}${room}`;
  if (usable.length) {
    const more = ranked.length > MOST ? `, the best ${MOST} below` : "";
    return `${place}: ${usable.length} of ${ranked.length} checkpoints fit${more}. Best: ${usable[0][1].checkpoint}.`;
  }
  if (ranked.length) {
    const least = Math.min(...ranked.map(([, one]) => one.layerwise_mib));
    return `${place}: nothing fits; the smallest needs ${(least / 1024).toFixed(1)} GiB with --dit-layerwise-offload.`;
  }
  const [, , , rule, message] = DATA.answers.refused
    .find(([, model, hardware]) => model === asked.model && hardware === asked.hardware) ?? [];
  return `${place}: nothing runs${rule ? ` (${rule})` : ""}. ${message ?? "The tables have no checkpoint of it."}`;
}

const gibibytes = (mib) => (mib === null ? "" : `${(mib / 1024).toFixed(1)} GiB`);

function tellError(one) {
  if (one.relative_l2 === null) return "not measured";
  return `${one.psnr_db === null ? "" : `${one.psnr_db.toFixed(1)} dB, `}${one.relative_l2.toFixed(3)}`;
}

function tellProof(one) {
  return one.cell && one.proof !== 2 ? `${one.state} · ${one.scope}` : DATA.ranking.proofs[one.proof];
}

function drawAnswer([fit, one], n) {
  const cell = one.cell && DATA.cells.find((candidate) => nameOf(candidate) === one.cell);
  const name = cell
    ? make("button", { type: "button", class: "link", "aria-haspopup": "dialog" }, one.checkpoint) : one.checkpoint;
  if (cell) name.addEventListener("click", () => openCell(cell));
  const where = (text) => (text ? [make("small", {}, text)] : []);
  const step = one.step === null ? "not measured" : one.step.toFixed(2);
  const peak = one.peak_mib === null ? "" : `peak ${gibibytes(one.peak_mib)} (${one.peak_on})`;
  return make("tr", {},
    make("td", {}, String(n + 1)),
    make("th", { scope: "row" }, name, make("small", {}, one.family)),
    make("td", {}, one.kernel), make("td", {}, tellProof(one)),
    make("td", {}, tellError(one), ...where(one.error_on)),
    make("td", {}, step, ...where(one.step_on)),
    make("td", {}, gibibytes(one.weights_mib), ...where(peak)),
    make("td", {}, DATA.ranking.fits[fit]));
}

/* Commands of an option; the offload that makes it fit is added where it is not there. */
function listCommands(fit, one) {
  const offload = DATA.ranking.offloads[fit];
  const commands = [...one.commands];
  const last = commands.length - 1;
  if (offload && !commands[last].split(" ").includes(offload.trim())) commands[last] += offload;
  return commands;
}

function describeBest(fit, one) {
  const title = one.made ? "Make it from the base model, and run it" : "Run it";
  return [make("h3", {}, `${title}: ${one.checkpoint}`), ...listCommands(fit, one).flatMap(commandBox)];
}
