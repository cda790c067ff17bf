/* Other programs: a column each, of runs and of what is documented. */
const [CHECKPOINT, PROGRAM, PLACE, VERDICT, OTHER_SCOPE, SAID, OTHER_NUMBER, RUN, STATEMENTS] = Array(9).keys();
const PROGRAM_TEXT = DATA.programs.map(([id, name]) => `${id} ${name}`.toLowerCase());
const VERDICT_SIGNS = {
  works: ["✓", "proven"], "wrong numbers": ["≠", "failing"], "not quantized": ["=", "failing"],
  refuses: ["⊘", "refused"], crashes: ["✗", "failing"], "not installed": ["–", "planned"],
  stale: ["↻", "stale"], documented: ["?", "unproven"],
}; // sign, and the class whose colour it has

function kindOf(one) {
  return DATA.checkpoints[one[CHECKPOINT]];
}

/* Whether a cell speaks of a hardware; what is documented holds wherever the program runs. */
function runsOn(one, place) {
  return one[PLACE] < 0 ? DATA.programs[one[PROGRAM]][2].includes(place) : one[PLACE] === place;
}

/* The id of a runtime's cell; without a hardware where nothing was run. */
function nameOther(one) {
  const where = one[PLACE] < 0 ? "" : `@${DATA.hardware[one[PLACE]][0]}`;
  return `${kindOf(one)[0]}${where}~${DATA.programs[one[PROGRAM]][0]}`;
}

/* `refuses · stand-in (documented to work)`, or `documented: works`. */
function labelOther(one) {
  if (one[RUN] < 0) return one[SAID];
  const scope = one[OTHER_SCOPE] < 0 ? "" : ` · ${DATA.scopes[one[OTHER_SCOPE]]}`;
  return `${DATA.verdicts[one[VERDICT]][0]}${scope}${one[SAID] ? ` (${one[SAID]})` : ""}`;
}

/* Cells of a program in a row: its runs, or what is documented where there is none. */
function pickOthers(all, program) {
  const cells = all.filter((one) => one[PROGRAM] === program);
  const runs = cells.filter((one) => one[RUN] >= 0);
  return (runs.length ? runs : cells).sort(compareOthers);
}

function compareOthers(a, b) {
  return a[VERDICT] - b[VERDICT] || b[OTHER_SCOPE] - a[OTHER_SCOPE] || a[PLACE] - b[PLACE];
}

function drawOther(one) {
  const verdict = DATA.verdicts[one[VERDICT]][0];
  const [sign, look] = VERDICT_SIGNS[verdict];
  const text = one[RUN] < 0 ? one[SAID] : verdict;
  const about = one[RUN] < 0 ? "" : [DATA.hardware[one[PLACE]][0], DATA.scopes[one[OTHER_SCOPE]], one[SAID]]
    .filter(Boolean).join(" · ");
  const number = one[OTHER_NUMBER] ? `, ${one[OTHER_NUMBER]}` : "";
  const button = make("button", { type: "button", class: `other state ${look}`, "aria-haspopup": "dialog" },
    `${sign} ${text}`, ...(one[OTHER_NUMBER] ? [make("b", {}, ` ${one[OTHER_NUMBER]}`)] : []),
    ...(about ? [make("small", {}, about)] : []),
    make("span", { class: "spoken" }, `${nameOther(one)}: ${labelOther(one)}${number}`));
  button.addEventListener("click", () => openOther(one));
  return button;
}

function openOther(one) {
  const run = one[RUN] < 0 ? null : detail().runs[one[RUN]];
  const [, name] = DATA.programs[one[PROGRAM]];
  const [, meaning] = DATA.verdicts[one[VERDICT]];
  const statements = one[STATEMENTS].map((n) => detail().statements[n]);
  showDialog(nameOther(one), labelOther(one), [
    pairs([["program", name], ["meaning", meaning]]),
    ...(run ? describeRun(run, one) : [make("p", {}, "Nobody has run it.")]),
    ...statements.flatMap(describeStatement),
    make("h3", {}, run ? "To run it again" : "To run it where the program is installed"),
    ...commandBox(run ? run.again
      : `quantmatrix run-column --runtime ${DATA.programs[one[PROGRAM]][0]} --hardware auto --checkpoint ${kindOf(one)[0]}`),
  ]);
}

function describeRun(run, one) {
  const scope = one[OTHER_SCOPE] < 0 ? "" : `${DATA.scopes[one[OTHER_SCOPE]]}: ${DATA.weights[one[OTHER_SCOPE]]}`;
  return [
    pairs([["message", run.reason], ["version", run.version], ["scope", scope], ["made", run.made], ["commit", run.commit]]),
    make("h3", {}, "Loaded by"), ...commandBox(run.command),
    ...(run.tried.length ? [make("h3", {}, "Also tried"), ...run.tried.map((text) => make("p", {}, text))] : []),
    folded("Latents at the worst step, compared with its own run of the base model", run.worst),
    ...bars("Transformer in memory, by number format", run.weights, mebibytes),
    ...(run.log ? [make("h3", {}, "Log"), make("pre", { tabindex: "0" }, run.log)] : []),
    make("p", {}, make("a", { href: run.file }, "The record as JSON")),
  ];
}

function describeStatement([says, quote, source, version, date]) {
  return [make("h3", {}, `Documented: ${says}`),
    pairs([["words", quote], ["source", source], ["version", version], ["read on", date]])];
}
